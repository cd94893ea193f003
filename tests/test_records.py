"""Records are read by their annotations: what was written comes back, and anything else is named with its place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcafy.records import (
    LATER,
    WRITTEN,
    Format,
    OtherVersion,
    ReadBy,
    Unknown,
    Wrong,
    matching,
    one_of,
    parsed,
    read,
    within,
    written,
)


@dataclass(frozen=True)
class Leaf:
    name: str
    size: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Tree:
    leaves: tuple[Leaf, ...]
    kind: Literal["one", "two"] = "one"
    share: float = 0.5
    whole: bool = True
    settings: dict[str, bool] = field(default_factory=dict)
    parts: Mapping[str, Leaf] = field(default_factory=dict)
    anything: Any = None


@dataclass(frozen=True)
class Grown:
    needed: tuple[int, ...] = field(default=(), metadata=WRITTEN)
    later: str | None = field(default=None, metadata=LATER)


def test_what_came_later_is_written_where_it_says_something_and_what_has_to_be_there_is_asked_for() -> None:
    assert written(Grown((1,))) == {"needed": [1]}
    assert written(Grown((1,), "x")) == {"needed": [1], "later": "x"}
    assert read(Grown, {"needed": []}) == Grown()
    with pytest.raises(Wrong, match="an object with 'needed'"):
        read(Grown, {"later": "x"})


LEAVES = st.builds(Leaf, st.text(), st.none() | st.lists(st.integers()).map(tuple))
TREES = st.builds(
    Tree,
    st.lists(LEAVES, max_size=3).map(tuple),
    st.sampled_from(["one", "two"]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.dictionaries(st.text(), st.booleans(), max_size=3),
    st.dictionaries(st.text(), LEAVES, max_size=3),
    st.none() | st.integers() | st.lists(st.text(), max_size=2),
)


@given(TREES)
def test_what_was_written_comes_back(tree: Tree) -> None:
    assert read(Tree, parsed(json.dumps(written(tree))), whole=True) == tree


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (3, "it should be an object, not 3"),
        ({}, "it should be an object with 'leaves'"),
        ({"leaves": {}}, "leaves should be a list"),
        ({"leaves": [{"name": 1}]}, r"leaves\[0\]\.name should be text, not 1"),
        ({"leaves": [{"name": "a", "size": [1, True]}]}, r"leaves\[0\]\.size\[1\] should be a whole number, not True"),
        ({"leaves": [], "kind": "three"}, "kind should be one of one, two, not 'three'"),
        ({"leaves": [], "kind": ["one"]}, "kind should be one of one, two"),
        ({"leaves": [], "share": True}, "share should be a number, not True"),
        ({"leaves": [], "share": None}, "share should be a number, not None"),
        ({"leaves": [], "whole": 1}, "whole should be true or false, not 1"),
        ({"leaves": [], "settings": {"a": 1}}, r"settings\.a should be true or false"),
        ({"leaves": [], "parts": {"x": {"name": None}}}, r"parts\.x\.name should be text"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(data: Any, says: str) -> None:
    with pytest.raises(Wrong, match=says):
        read(Tree, data)


def test_an_entry_that_means_nothing() -> None:
    with pytest.raises(Unknown, match=r"unknown entry leaves\[0\]\.nane\. Did you mean 'name'\?") as caught:
        read(Tree, {"leaves": [{"nane": "a"}]})
    assert caught.value.path == "leaves[0].nane"


def test_defaults_may_be_left_out_unless_all_is_asked_for() -> None:
    assert read(Tree, {"leaves": []}) == Tree(())
    with pytest.raises(Wrong, match="an object with 'kind'"):
        read(Tree, {"leaves": []}, whole=True)


@dataclass(frozen=True)
class Checked:
    number: Annotated[int, within(1, 9)] = 1
    digest: Annotated[str, matching("[0-9a-f]{4}", "four digits")] = "0000"
    name: Annotated[str, one_of({"a": 1, "b": 2})] = "a"
    twice: Annotated[int, ReadBy(lambda value, where: 2 * value)] = 0


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"number": 0}, "number should be a whole number from 1 to 9, not 0"),
        ({"number": 10}, "number should be a whole number from 1 to 9, not 10"),
        ({"number": "3"}, "number should be a whole number"),
        ({"digest": "00001"}, "digest should be four digits"),
        ({"digest": "0000\n"}, "digest should be four digits"),
        ({"name": "c"}, "name should be one of a, b, not 'c'"),
    ],
)
def test_checks_stand_with_the_annotation(data: dict[str, Any], says: str) -> None:
    with pytest.raises(Wrong, match=says):
        read(Checked, data)
    assert read(Checked, {"number": 9, "digest": "abcd", "name": "b", "twice": 4}) == Checked(9, "abcd", "b", 8)


def test_an_annotation_that_json_has_nothing_for() -> None:
    with pytest.raises(TypeError, match="no way to read"):
        read(set, [])


@pytest.mark.parametrize("text", ["{", '{"a": 1, "a": 2}', "NaN", '[Infinity, "x"]', "[" * 100_000])
def test_text_that_readers_of_json_disagree_about(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parsed(text)


def test_strange_names_do_not_reach_a_terminal() -> None:
    with pytest.raises(Unknown) as caught:
        read(Leaf, {"name": "a", "\x1b[31mred": 1})
    assert "\x1b" not in str(caught.value)
    with pytest.raises(Wrong) as wrong:
        read(Leaf, {"name": ["\x1b[31mred" * 99]})
    assert "\x1b" not in str(wrong.value)
    assert len(str(wrong.value)) < 200


STEPS = {1: lambda data: {**data, "b": data["a"]}, 2: lambda data: {"c": 0, **data}}


def test_older_documents_are_brought_up_step_by_step() -> None:
    current = Format("version", 2, STEPS)
    assert current.stamped({"c": 3}) == {"version": 2, "c": 3}
    assert current.opened({"version": 1, "a": 7}) == {"a": 7, "b": 7, "c": 0}
    assert current.opened({"version": 2, "b": 7}) == {"b": 7, "c": 0}
    assert current.opened({"version": 2, "c": 5}) == {"c": 5}


@pytest.mark.parametrize("version", [None, 0, 3, True, "2", 1.0, [1]])
def test_a_version_that_is_not_read_here(version: Any) -> None:
    with pytest.raises(OtherVersion) as caught:
        Format("version", 2, STEPS).opened({"version": version})
    assert caught.value.version == version
    with pytest.raises(OtherVersion):
        Format("version", 2).opened({"version": 1})
