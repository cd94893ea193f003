"""Models that take and give more than tensors: named tuples, and values in them, on the way in and out."""

from __future__ import annotations

import collections
import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import networks
import pytest
import torch
from networks import with_attention
from torch import Tensor, nn
from trained import moved, trained_like

import dcafy
from dcafy.graph.nodes import leaves, mapped, tensors_in
from dcafy.trace.inputs import as_data, as_inputs, from_data, probe

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(2, 3, 64, 64, generator=GENERATOR)


class Pair(NamedTuple):
    """A picture and how bright it is."""

    image: Tensor
    brightness: Tensor


class Scores(NamedTuple):
    """What a network gives: scores, and what it looked at."""

    scores: Tensor
    seen: Tensor


PAIR = Pair(IMAGES, torch.rand(2, 1, generator=GENERATOR))


class TakesPair(nn.Module):
    """A network whose input is a named tuple, by name, by index and unpacked."""

    def __init__(self) -> None:
        super().__init__()
        self.network = with_attention(networks.SELinear)

    def forward(self, pair: Pair) -> Tensor:
        image, brightness = pair
        return self.network(image) * brightness + pair.brightness * pair[1]


class TakesBoth(TakesPair):
    """A network whose arguments have the names of the tuple's fields."""

    def forward(self, image: Tensor, brightness: Tensor) -> Tensor:  # type: ignore[override]
        return self.network(image) * brightness


class HandsOn(TakesPair):
    """A network that gives named tuples to its parts: what a part hands on is its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TakesPair()
        self.marks = Marks()

    def forward(self, pair: Pair) -> Tensor:
        return self.inner(Pair(self.marks(pair).image, brightness=pair.brightness))


class Marks(nn.Module):
    """Makes the picture darker, and hands the brightness on."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, pair: Pair) -> Pair:
        return Pair(pair.image * self.gain, pair.brightness)


class GivesScores(nn.Module):
    """A network whose output is a named tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.network = with_attention(networks.SELinear)

    def forward(self, x: Tensor) -> Scores:
        return Scores(self.network(x), x.mean((2, 3)))


class DecidesByContent(TakesPair):
    """A root that cannot be recorded: its parts are, with inputs seen in a run on the named tuple."""

    def forward(self, pair: Pair) -> Tensor:
        bright = pair.image * 2 if bool(pair.brightness.sum() > 1e6) else pair.image
        return self.network(bright)


def ready(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = build()
    for network in [m for m in model.modules() if isinstance(m, networks.Classifier)]:
        trained_like(network, IMAGES)
    return model.eval()


@pytest.mark.parametrize("build", [TakesPair, TakesBoth, HandsOn, DecidesByContent])
def test_a_named_tuple_as_input(build: Callable[[], nn.Module]) -> None:
    model = ready(build)
    given = PAIR if build is TakesBoth else (PAIR,)
    plan = dcafy.inspect(model, example_inputs=PAIR)
    assert len(plan.links) == 3
    assert dcafy.inspect(model, example_inputs=given) == plan
    connected = dcafy.convert(model, example_inputs=PAIR)
    inputs = (*PAIR,) if build is TakesBoth else (PAIR,)
    with torch.no_grad():
        assert torch.equal(connected(*inputs), model(*inputs))


def test_a_named_tuple_as_output(tmp_path: Path) -> None:
    model = ready(GivesScores)
    connected = dcafy.convert(model, example_inputs=IMAGES)
    dcafy.save(connected, tmp_path / "model")
    for network in (connected, dcafy.load(tmp_path / "model", model)):
        with torch.no_grad():
            given, expected = network(IMAGES), model(IMAGES)
        assert type(given) is Scores
        assert all(map(torch.equal, given, expected))


@pytest.mark.parametrize("build", [TakesPair, TakesBoth, HandsOn, DecidesByContent])
def test_a_folder_says_what_a_named_tuple_was(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """By its fields: its class is the user's code, which no folder may name."""
    model = ready(build)
    connected = moved(dcafy.convert(model, example_inputs=PAIR))
    dcafy.save(connected, tmp_path / "model")
    loaded = dcafy.load(tmp_path / "model", model).eval()
    given = tuple(PAIR) if build is TakesBoth else (PAIR,)
    with torch.no_grad():
        assert torch.equal(loaded(*given), connected(*given))
        assert not torch.equal(loaded(*given), model(*given))


class Features(list[Tensor]):
    """Maps with their strides, whose constructor takes both."""

    def __init__(self, maps: list[Tensor], strides: list[int]) -> None:
        super().__init__(maps)
        self.strides = strides


class GivesFeatures(nn.Module):
    """A backbone that returns a list of a class of its own, inside a network that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.first, self.second = networks.SELinear(16), networks.SELinear(16)

    def forward(self, x: Tensor) -> Features:
        x = self.first(self.stem(x))
        return Features([x, self.second(x)], [1, 1])


class ReadsFeatures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = GivesFeatures()

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x)
        return features[1] * features.strides[0] + features[0]


def test_a_list_of_a_class_of_its_own() -> None:
    model = trained_like(ReadsFeatures(), IMAGES)
    connected = dcafy.convert(model, example_inputs=IMAGES).eval()
    assert list(dcafy.connections(connected)) == ["backbone.second"]
    with torch.no_grad():
        assert torch.equal(connected(IMAGES), model(IMAGES))


def test_a_named_tuple_comes_back_from_data() -> None:
    (again,) = from_data(as_data((PAIR,)))
    assert again._fields == PAIR._fields
    assert [value.shape for value in again] == [value.shape for value in PAIR]
    assert again.brightness is again[1]
    assert copy.deepcopy(again)._fields == again._replace(image=PAIR.image)._fields == PAIR._fields
    assert list(again._asdict()) == list(PAIR._fields)
    assert again._replace(image=PAIR.image).image is PAIR.image
    changed = mapped(again, lambda value: value.ndim)
    assert type(changed) is type(again)
    assert (changed.image, changed.brightness) == tuple(changed) == (4, 2)


@pytest.mark.parametrize("name", ["__class__", "_fields", "a b", "a=1); import os; (b", "é", ""])
def test_names_of_fields_that_no_named_tuple_has(name: str) -> None:
    with pytest.raises(ValueError, match="describes no input"):
        from_data({"tuple": [{"named": {name: {"value": 1}}}]})


def test_what_a_named_tuple_stands_for() -> None:
    one, both = as_inputs(PAIR, TakesPair()), as_inputs(PAIR, TakesBoth())
    assert type(one) is tuple
    assert one[0] is PAIR
    assert type(both) is tuple
    assert both[0] is PAIR.image
    assert both[1] is PAIR.brightness


# One mapping over all of them ---------------------------------------------------------------------


class Record(dict[str, Any]):
    """A dictionary with a constructor and an attribute of its own."""

    def __init__(self, owner: str, **items: Any) -> None:
        super().__init__(items)
        self.owner = owner


class Listed(list[Any]):
    """A list of a class of its own."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A dataclass that derives one field from another, and does not take it."""

    width: int
    twice: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "twice", 2 * self.width)


NESTED = {
    "tuple": (1, (2, ())),
    "named tuple": Scores(1, 2),  # type: ignore[arg-type]
    "list": [1, [2]],
    "list of a class": Listed([1, 2]),
    "dict": {"a": 1, "b": {"c": 2}},
    "ordered": collections.OrderedDict(b=1, a=2),
    "record": Record("me", a=1, b=[2]),
    "dataclass": Measured(1),
    "slice": slice(1, 2, 2),
}


@pytest.mark.parametrize("kind", NESTED)
def test_every_container_is_made_again(kind: str) -> None:
    value = NESTED[kind]
    seen = list(leaves(value))
    assert seen[:2] == [1, 2]
    again = mapped(value, lambda leaf: leaf)
    assert again == value
    assert type(again) is type(value)
    assert vars(again) == vars(value) if hasattr(value, "__dict__") else True
    grown = mapped(value, lambda leaf: leaf + 10 if isinstance(leaf, int) else leaf)
    assert list(leaves(grown)) == [leaf + 10 for leaf in seen]
    assert list(leaves(value)) == seen


def test_what_torch_gives_is_made_again() -> None:
    """Structseqs take their items at once, as tuples do."""
    values = torch.rand(1, 3, 4, 4).max(1)
    blank = probe(values)
    assert type(blank) is type(values)
    assert [tensor.device.type for tensor in tensors_in(blank)] == ["meta", "meta"]
    assert blank.values.shape == (2, 4, 4)
    assert mapped(values.values.shape, lambda size: size + 1) == torch.Size([2, 5, 5])
    assert type(mapped(values.values.shape, int)) is torch.Size
