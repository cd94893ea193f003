"""No name and no constant of a model, or of a file, is run as code."""

from __future__ import annotations

import collections
import enum
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

import dcafy
from dcafy.errors import InputError, TracingError

RAN: list[str] = []
"""What ran that should not."""

sys.modules["watched"] = sys.modules[__name__]
RUN = '__import__("watched").RAN.append("name")'
HOSTILE = f'a") if not [{RUN}] else getattr(self, "a'


@pytest.fixture(autouse=True)
def nothing_runs() -> Any:
    RAN.clear()
    yield
    assert not RAN


class Gated(nn.Module):
    """Attention whose layer has a name, and which hands a constant and some options on."""

    def __init__(self, name: str = "fc", rate: Any = 0.0, **options: Any) -> None:
        super().__init__()
        self.name, self.rate, self.options = name, rate, options
        self.inner = nn.ModuleDict({name: nn.Conv2d(8, 8, 1)})

    def forward(self, x: Tensor) -> Tensor:
        gate = self.inner[self.name](F.adaptive_avg_pool2d(x, 1))
        return x * F.dropout(gate, self.rate, self.training, **self.options).sigmoid()


def network(*gates: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), gates[0], nn.Conv2d(8, 8, 3), gates[-1]).eval()


def from_file() -> nn.Module:
    """Of torch's own classes only, as a pickle of a stranger's can have it."""
    layers = {HOSTILE: nn.Conv2d(3, 8, 3), "s": SqueezeExcitation(8, 4), "d": nn.Conv2d(8, 8, 3)}
    model = nn.Sequential()
    model._modules = collections.OrderedDict(layers | {"t": SqueezeExcitation(8, 4)})
    return model


X = torch.rand(2, 3, 16, 16)

DOORS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "inspect": lambda model, _: dcafy.inspect(model, example_inputs=X),
    "convert": lambda model, _: dcafy.convert(model, example_inputs=X),
    "insert": lambda model, _: dcafy.insert(model, "se", example_inputs=X),
    "save": lambda model, folder: dcafy.save(model, folder),
    "load": lambda model, folder: dcafy.load(folder, model=model),
}


@pytest.mark.parametrize("door", DOORS)
def test_hostile_names_are_refused(door: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="module is named 'a"):
        DOORS[door](from_file(), tmp_path)


@pytest.mark.parametrize(
    "name", [HOSTILE, "<script>", "a b", "a\nb", "a.b", "", "a" * 300 + "()", "ﬁlter", "\u202ea", 3]
)
@pytest.mark.parametrize("kind", ["_modules", "_parameters", "_buffers", "__dict__"])
def test_names_with_anything_else_are_refused(name: Any, kind: str) -> None:
    model = network(Gated())
    held: Any = nn.Identity() if kind == "_modules" else torch.zeros(1)
    getattr(model[1], kind)[name] = held
    with pytest.raises(InputError) as caught:
        dcafy.convert(model, example_inputs=X)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["forward", "call_super_init", "__class__", "state_dict", "_buffers"])
@pytest.mark.parametrize("kind", ["_modules", "_parameters", "_buffers"])
def test_names_that_something_of_the_class_hides_are_refused(name: str, kind: str) -> None:
    """The user's code may reach it by its holder; in source it would be what the class has."""
    model = network(Gated())
    getattr(model[1], kind)[name] = nn.Identity() if kind == "_modules" else torch.zeros(1)
    with pytest.raises(InputError, match=f"is named '{name}', as something else that every Gated has"):
        dcafy.convert(model, example_inputs=X)


def test_a_property_that_gives_what_it_hides_is_taken() -> None:
    class Held(nn.Sequential):
        @property
        def gate(self) -> nn.Module:
            return self._modules["gate"]  # type: ignore[return-value]

    model = Held()
    model._modules["gate"] = network(Gated())
    assert len(dcafy.connections(dcafy.convert(model, example_inputs=X))) == 1


@pytest.mark.parametrize("name", ["block1-0", "mro", "0", "слой", "x_1", "global", "lambda", "None"])
def test_other_names_are_taken(name: str) -> None:
    model = network(Gated(name))
    connected = dcafy.convert(model, example_inputs=X)
    assert len(dcafy.connections(connected)) == 1
    assert torch.equal(connected(X), model(X))


def test_a_plain_graph_has_no_words_of_python_as_names() -> None:
    connected = dcafy.convert(network(Gated("global")), example_inputs=X)
    with pytest.raises(TracingError, match="'global'"):
        dcafy.flat(connected)


def test_names_are_held_again_where_source_is_written() -> None:
    connected = dcafy.convert(network(Gated()), example_inputs=X)
    connected._modules = collections.OrderedDict(
        (HOSTILE if name == "0" else name, module) for name, module in connected._modules.items()
    )
    with pytest.raises(InputError, match="reads 'a"):
        dcafy.flat(connected)


class Loud(float):
    def __repr__(self) -> str:
        return f"{RUN} or 0.5"


class Word(str):
    def __repr__(self) -> str:
        return RUN


class Kind(enum.Enum):
    PLAIN = 1


class Choosing(Gated):
    """The same, with an argument in its call that becomes a constant of the graph."""

    def forward(self, x: Tensor, mode: Any = None) -> Tensor:
        return chosen(super().forward(x), mode)


def chosen(x: Tensor, mode: Any) -> Tensor:
    if type(x) is not Tensor and not isinstance(x, nn.Parameter):  # not on what stands for a tensor: a node of its own
        raise TypeError(type(x))
    return x


class Outer(nn.Module):
    def __init__(self, mode: Any) -> None:
        super().__init__()
        self.gates = nn.ModuleList([Choosing(), Choosing()])
        self.stem, self.mode = nn.Conv2d(3, 8, 3), mode

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for gate in self.gates:
            x = gate(x, self.mode)
        return x


@pytest.mark.parametrize("rate", [np.float64(0.25), np.float32(0.25), np.int64(0), Loud(0.5), True, 0.25], ids=repr)
def test_numbers_of_any_class_are_numbers(rate: Any) -> None:
    model = network(Gated(rate=rate))
    connected = dcafy.convert(model, example_inputs=X)
    assert len(dcafy.connections(connected)) == 1
    assert torch.equal(connected(X), model(X))
    for twin in (model.train(), connected.train()):
        torch.manual_seed(0)
        rate = twin(X)
    torch.manual_seed(0)
    assert torch.equal(model(X), rate)


@pytest.mark.parametrize("mode", [Word("a"), "a\n b", 'a"', Kind.PLAIN, {"a": Word("b")}, (Loud(1.0),), slice(Loud(1))])
def test_constants_are_written_as_what_they_are(mode: Any) -> None:
    model = Outer(mode).eval()
    connected = dcafy.convert(model, example_inputs=X)
    assert torch.equal(connected(X), model(X))
    assert torch.equal(dcafy.flat(connected)(X), model(X))


@pytest.mark.parametrize("mode", ["# COUNTER: 3", {Word("a"): 1}, {"a": "# COUNTER: 3"}], ids=str)
def test_constants_that_source_would_say_otherwise_are_refused(mode: Any) -> None:
    """fx takes lines with its own mark out of the source that it writes."""
    with pytest.raises(InputError, match="constant"):
        dcafy.flat(dcafy.convert(Outer(mode).eval(), example_inputs=X))
