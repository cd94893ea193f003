"""Tables fit: no line is wider than there is room, no number and no word is broken, names stay told apart."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.text import Text

from dcafy.amounts import fixed, percent, points
from dcafy.tables import Column, Sheet, aside, plain, shown, unfolded

NAMES = [f"backbone.body.layer{stage}.{block}.se_module" for stage in range(1, 4) for block in range(2)]
HEADINGS = ("β", "varies", "T moves", "if cut", "if shuffled", "if mean", "top1 if cut")
NUMBERS = ("+0.1234", "12.34%", "0.12 σ", "+0.1234 ± 0.0012", "-0.0021 ± 0.0003", "+0.0002 ± 0.0001", "-1.50 ± 0.25")

WIDE = Sheet(
    (Column("receiving block", "name"), Column("hears", "row"), *(Column(title, "number") for title in HEADINGS)),
    (
        *((name, before, *NUMBERS) for before, name in itertools.pairwise(["-", *NAMES])),
        None,
        ("all of them", "", "", "", "", *NUMBERS[3:]),
    ),
    "connections",
    {**{name: number for number, name in enumerate(NAMES, start=1)}, "all of them": "all"},
)


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140, 200])
def test_no_line_is_wider_than_there_is_room_and_nothing_is_broken(width):
    text = plain([WIDE], width)
    assert max(map(cell_len, text.splitlines())) <= width
    for number in NUMBERS[3:]:
        assert text.count(number) == len(NAMES) + 1
    words = set(text.split())
    assert {word for title in (*HEADINGS, "receiving", "block", "hears") for word in title.split()} <= words


def test_where_there_is_room_names_are_whole_and_where_there_is_less_numbers_stand_for_them():
    assert all(name in unfolded([WIDE]).split() for name in NAMES)
    narrow = plain([WIDE], 60)
    assert NAMES[0] not in narrow
    rows = [line.split() for line in narrow.splitlines() if re.match(r" *\d ", line)]
    assert {row[0] for row in rows} == set("123456")
    # Under what all of them begin with stands what tells them apart.
    assert {"in", "backbone.body", "….se_module"} <= set(narrow.split())
    assert len(re.findall("^all ", narrow, re.MULTILINE)) >= 2  # in each part
    shown_names = {row[1] for row in rows if row[1].startswith("layer")}
    assert len(shown_names) == len(NAMES)


def test_numbers_are_those_of_the_rows():
    table = plain([Sheet(WIDE.columns[:2], WIDE.rows[:6], numbers=WIDE.numbers)], 45)
    rows = [line.split() for line in table.splitlines() if re.match(r" *\d ", line)]
    assert [(row[0], row[-1]) for row in rows] == [("1", "-"), *((str(n), str(n - 1)) for n in range(2, 7))]


@pytest.mark.parametrize("width", range(24, 60))
def test_names_that_are_shortened_stay_told_apart(width):
    names = [
        f"{start}.{n}.attention" for start in ("a_very_long_beginning", "another_long_beginning") for n in range(3)
    ]
    rows = tuple((name, name[-12:], "1234567890") for name in names)
    sheet = Sheet((Column("name", "name"), Column("hears", "row"), Column("x", "number")), rows)
    for part in plain([sheet], width).strip().split("\n\n"):  # a narrow table is several
        lines = [line for line in part.splitlines() if line.startswith("a")]
        assert len({line.split()[0] for line in lines}) == len(names)


def test_what_has_no_beginning_in_common_keeps_its_names():
    rows = (("alpha.branch.one", "1"), ("beta.branch.two", "2"))
    text = plain([Sheet((Column("name", "name"), Column("what", "number")), rows)], 20)
    assert text.split()[:2] == ["name", "what"]
    assert {line[:5] for line in text.splitlines()} >= {"alpha", "beta."}


def test_columns_in_which_nothing_stands_are_left_out():
    sheet = Sheet((Column("name", "name"), Column("size"), Column("more", "row")), (("a", "-", ()), ("b", "-", ())))
    for told in (plain([sheet], 80), sheet.html()):
        assert "name" in told
        assert "size" not in told
        assert "more" not in told
    assert "size" in plain([Sheet(sheet.columns, (("a", "-", ()), ("b", "7x7", ())))], 80)


def test_sentences_are_written_over_lines_and_not_broken():
    reason = "its extraction updates statistics (BatchNorm), which must not happen twice"
    sheet = Sheet((Column("name", "name"), Column("reason", "text")), (("stage4.bn_gate", reason), ("b", "short")))
    text = plain([sheet], 60)
    assert len(text.splitlines()) > 4
    assert set(reason.split()) <= set(text.split())
    assert reason in plain([sheet], 120)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(max_size=90), min_size=1, max_size=5, unique=True),
    st.integers(30, 130),
    st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=7),
)
def test_names_of_any_kind_fit_and_cannot_steer_the_terminal(names, width, numbers):
    columns = (Column("name", "name"), Column("hears", "row"), *(Column("x", "number") for _ in numbers))
    rows = tuple((name, names[0], *numbers) for name in names)
    sheet = Sheet(columns, rows, numbers={name: n for n, name in enumerate(names, start=1)})
    for line in plain([sheet], width).splitlines():
        assert cell_len(line) <= width
        assert line.isprintable()
    assert "<script" not in Sheet(columns, (("<script>", "</table><script>", *numbers),)).html()


def test_a_long_table_is_cut_in_a_notebook_and_says_so():
    sheet = Sheet((Column("class", "name"),), tuple((f"c{n}",) for n in range(1000)))
    assert "900 more" in sheet.html()
    assert len(sheet.html()) < 20_000


def test_a_terminal_is_filled_a_pipe_is_not_and_columns_count(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(cell_len, shown([WIDE]).splitlines())) <= 60
    assert max(map(cell_len, shown([WIDE], terminal=True).splitlines())) <= 60
    monkeypatch.delenv("COLUMNS")
    assert all(name in shown([WIDE]).split() for name in NAMES)
    assert shown([Text("[bold]x[/]"), "[bold]y[/]"], terminal=True).split() == ["[bold]x[/]", "[bold]y[/]"]
    assert shown([]) == shown([], terminal=True).strip() == ""


def test_rows_that_come_one_by_one_stand_in_columns_on_a_terminal_and_on_one_line_in_a_pipe(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    told = "a cat 98.8%, a dog 1.1%, a very long sort of cat 0.1%"
    assert aside("a\x1b[1m.png", told, 12, terminal=False) == f"a\\x1b[1m.png: {told}"
    lines = aside("photographs/2024/one.png", told, 24, terminal=True).splitlines()
    assert lines[0].startswith("photograph…4/one.png  a cat")
    assert all(len(line) <= 40 for line in lines)
    assert all(line.startswith(" " * 22) for line in lines[1:])
    assert " ".join(lines).split()[1:] == told.split()


def test_amounts():
    assert [fixed(x, sign=True) for x in (-0.00001, 0.00001, 0.0, -0.5)] == ["+0.0000", "+0.0000", "+0.0000", "-0.5000"]
    assert (fixed(float("nan")), fixed(-float("inf"))) == ("nan", "-inf")
    assert (percent(0.98765), percent(-1e-9), points(-0.0123), points(1e-9)) == ("98.8%", "0.0%", "-1.23", "+0.00")
