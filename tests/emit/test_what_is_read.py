"""What a forward reads besides its own plain attributes is compared at every call, or the module is left alone."""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import functools
import os
import pickle
import random
import time
import types
import warnings
from collections.abc import Callable, Iterator
from random import uniform
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dcafy

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

SCALE = 1.0
FLAGS = {"scale": 1.0, "nested": {"on": True}}
COUNTS = [0]
CALLS = 0
SEEN: list[Any] = []
CHANCE = random.Random(0)


@dataclasses.dataclass
class Config:
    scale: float = 1.0
    others: list[dict[str, float]] = dataclasses.field(default_factory=lambda: [{"scale": 1.0}])

    def twice(self) -> float:
        return 2 * self.scale


class Slotted:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


class Shared:
    scale = 1.0


SHARED = Shared()


class Gated(nn.Module):
    """Attention that is scaled by what ``read`` finds."""

    by_class = 1.0
    table = (1.0, 2.0)
    of_all = Config()

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop, self.norm = nn.Linear(8, 8), nn.Dropout(0.0), nn.GroupNorm(2, 8, eps=1.0)
        self.layers = nn.ModuleList([nn.Dropout(0.5)])
        self.space, self.config, self.slotted = argparse.Namespace(scale=1.0), Config(), Slotted()
        self.few, self.row, self.constants = {1}, collections.deque([1.0]), Shared
        self.tree: Any = {"a": [{"scale": 1.0}], "b": (1, [2, 3])}
        self.array, self.number = np.ones(1), np.float32(1.0)
        self.scaled = functools.partial(torch.mul, other=1.0)
        self.own = self.norm.own = 1.0  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc(x.mean((2, 3))).sigmoid()[:, :, None, None]
        return x * gate


def scale_of_package() -> float:
    return SCALE


def reading(function: Callable[[Any, Tensor], Any]) -> type[Gated]:
    """``Gated`` with a forward that has ``function`` in it, as its own method."""

    def forward(self: Any, x: Tensor) -> Tensor:
        gate = self.fc(x.mean((2, 3))).sigmoid()[:, :, None, None]
        return x * gate * self.read(x)

    return type("Gated", (Gated,), {"read": function, "forward": forward, "__module__": __name__})


def network(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), kind(), nn.Conv2d(8, 8, 3), kind()).eval()


def units(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, Gated))


def beside(name: str, value: Any) -> Callable[[nn.Module, pytest.MonkeyPatch], None]:
    return lambda model, patch: patch.setitem(globals(), name, value)


def inside(change: Callable[[Any], object]) -> Callable[[nn.Module, pytest.MonkeyPatch], None]:
    def all_of(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
        for unit in units(model):
            change(unit)

    return all_of


def enclosing() -> tuple[Callable[[Any, Tensor], Any], Callable[[], None], dict[str, float]]:
    """A function with a name and a dictionary around it, what gives the name another value, and the dictionary."""
    scale, table = 1.0, {"scale": 1.0}

    def grow() -> None:
        nonlocal scale
        scale += 1

    return lambda self, x: scale * table["scale"], grow, table


READ_ENCLOSED, GROW_ENCLOSED, TABLE = enclosing()
DEFAULTS = {"scale": 1.0}


def with_default(self: Any, x: Tensor, table: dict[str, float] = DEFAULTS) -> float:
    return table["scale"]


def with_named_default(self: Any, x: Tensor, *, table: dict[str, float] = DEFAULTS) -> float:
    return table["scale"]


Case = tuple[Callable[[Any, Tensor], Any], Callable[[nn.Module, pytest.MonkeyPatch], None]]

COMPARED: dict[str, Case] = {
    "namespace": (lambda self, x: self.space.scale, inside(lambda u: setattr(u.space, "scale", 3.0))),
    "new namespace": (
        lambda self, x: self.space.scale,
        inside(lambda u: setattr(u, "space", types.SimpleNamespace(scale=3.0))),
    ),
    "dataclass": (lambda self, x: self.config.scale, inside(lambda u: setattr(u.config, "scale", 3.0))),
    "method of a config": (lambda self, x: self.config.twice(), inside(lambda u: setattr(u.config, "scale", 3.0))),
    "list of dicts in a dataclass": (
        lambda self, x: self.config.others[0]["scale"],
        inside(lambda u: u.config.others[0].update(scale=3.0)),
    ),
    "slots": (lambda self, x: self.slotted.scale, inside(lambda u: setattr(u.slotted, "scale", 3.0))),
    "dict in a list in a dict": (
        lambda self, x: self.tree["a"][0]["scale"],
        inside(lambda u: u.tree["a"][0].update(scale=3.0)),
    ),
    "list in a tuple in a dict": (lambda self, x: self.tree["b"][1][0], inside(lambda u: u.tree["b"][1].insert(0, 7))),
    "set": (lambda self, x: len(self.few), inside(lambda u: u.few.add(3))),
    "deque": (lambda self, x: self.row[0], inside(lambda u: u.row.appendleft(3.0))),
    "a class for a config": (lambda self, x: self.constants.scale, lambda m, p: p.setattr(Shared, "scale", 3.0)),
    "a class's config": (lambda self, x: self.of_all.scale, lambda m, p: p.setattr(Gated.of_all, "scale", 3.0)),
    "numpy array": (lambda self, x: float(self.array[0]), inside(lambda u: u.array.__setitem__(0, 3.0))),
    "numpy number": (lambda self, x: float(self.number), inside(lambda u: setattr(u, "number", np.float32(3.0)))),
    "partial": (
        lambda self, x: self.scaled(torch.ones_like(x)),
        inside(lambda u: setattr(u, "scaled", functools.partial(torch.mul, other=3.0))),
    ),
    "a part's p": (lambda self, x: 1.0 + self.drop.p, inside(lambda u: setattr(u.drop, "p", 0.5))),
    "a part's p, which it has as well": (
        lambda self, x: self.own + self.norm.own,
        inside(lambda u: setattr(u.norm, "own", 3.0)),
    ),
    "a part's p, in a list": (
        lambda self, x: sum(layer.p for layer in self.layers),
        inside(lambda u: setattr(u.layers[0], "p", 0.25)),
    ),
    "a part's eps": (
        lambda self, x: F.group_norm(x, 2, self.norm.weight, self.norm.bias, self.norm.eps),
        inside(lambda u: setattr(u.norm, "eps", 3.0)),
    ),
    "a part's bias": (
        lambda self, x: 1.0 if self.norm.bias is None else 2.0,
        inside(lambda u: setattr(u.norm, "bias", None)),
    ),
    "getattr": (lambda self, x: getattr(self, "own"), inside(lambda u: setattr(u, "own", 3.0))),  # noqa: B009
    "getattr with a default": (lambda self, x: getattr(self, "later", 1.0), inside(lambda u: setattr(u, "later", 3.0))),
    "getattr of a config": (
        lambda self, x: getattr(self.space, "later", 1.0),
        inside(lambda u: setattr(u.space, "later", 3.0)),
    ),
    "hasattr": (lambda self, x: 3.0 if hasattr(self, "later") else 1.0, inside(lambda u: setattr(u, "later", 3.0))),
    "__dict__": (lambda self, x: self.__dict__["own"], inside(lambda u: setattr(u, "own", 3.0))),
    "vars": (lambda self, x: vars(self)["own"], inside(lambda u: setattr(u, "own", 3.0))),
    "class attribute": (lambda self, x: self.by_class, lambda m, patch: patch.setattr(Gated, "by_class", 3.0)),
    "a class's tuple": (lambda self, x: self.table[0], lambda m, patch: patch.setattr(Gated, "table", (3.0,))),
    "attribute of a named class": (lambda self, x: Gated.by_class, lambda m, p: p.setattr(Gated, "by_class", 3.0)),
    "global": (lambda self, x: SCALE, beside("SCALE", 3.0)),
    "global that a function reads": (lambda self, x: scale_of_package(), beside("SCALE", 3.0)),
    "global dict": (lambda self, x: FLAGS["scale"], beside("FLAGS", {"scale": 3.0})),
    "dict in a global dict": (
        lambda self, x: 1.0 if FLAGS["nested"]["on"] else 3.0,  # type: ignore[index]
        lambda m, patch: patch.setitem(FLAGS["nested"], "on", False),  # type: ignore[arg-type]
    ),
    "global object": (
        lambda self, x: SHARED.scale,
        lambda m, patch: patch.setattr(SHARED, "scale", 3.0, raising=False),
    ),
    "enclosed name": (READ_ENCLOSED, lambda m, patch: GROW_ENCLOSED()),
    "enclosed dict": (READ_ENCLOSED, lambda m, patch: patch.setitem(TABLE, "scale", 3.0)),
    "default": (with_default, lambda m, patch: patch.setitem(DEFAULTS, "scale", 3.0)),
    "named default": (with_named_default, lambda m, patch: patch.setitem(DEFAULTS, "scale", 3.0)),
    "dtype": (lambda self, x: 3.0 if x.dtype == torch.float64 else 1.0, lambda m, patch: m.double() and None),
    "default dtype": (
        lambda self, x: 3.0 if torch.get_default_dtype() == torch.float64 else 1.0,
        lambda m, patch: patch.setattr(torch, "get_default_dtype", lambda: torch.float64),
    ),
    "autocast": (
        lambda self, x: 3.0 if torch.is_autocast_enabled("cpu") else 1.0,
        lambda m, patch: patch.setattr(torch, "is_autocast_enabled", lambda *of: True),
    ),
}


@pytest.mark.parametrize("name", COMPARED)
def test_what_is_compared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, change = COMPARED[name]
    model = network(reading(read))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        connected = dcafy.convert(model, example_inputs=IMAGES).eval()
        assert len(dcafy.connections(connected)) == 1
        assert heard(connected) == heard(copy.deepcopy(connected)) == 1
    for one in (model, connected):
        change(one, monkeypatch)
    images = IMAGES.to(next(model.parameters()).dtype)
    with pytest.warns(UserWarning, match="own forward runs"):
        assert torch.equal(connected(images), model(images))


def heard(model: nn.Module) -> int:
    """How many connections speak in one call."""
    spoken = []
    hooks = [c.register_forward_hook(lambda *_: spoken.append(1)) for c in dcafy.connections(model).values()]
    model(IMAGES)
    for hook in hooks:
        hook.remove()
    return len(spoken)


def counted(self: Any, x: Tensor) -> float:
    COUNTS[0] += 1
    return 1.0


def counted_by_name(self: Any, x: Tensor) -> float:
    global CALLS
    CALLS += 1
    return 1.0


def kept_apart(self: Any, x: Tensor) -> float:
    SEEN.append(tuple(x.shape))
    return 1.0


def counting() -> Callable[[Any, Tensor], float]:
    calls = 0

    def read(self: Any, x: Tensor) -> float:
        nonlocal calls
        calls += 1
        return 1.0

    return read


def kept_in_default(self: Any, x: Tensor, seen: list[Any] = []) -> float:  # noqa: B006
    seen.append(tuple(x.shape))
    return 1.0


class Drawing(Gated):
    """Has a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.chance, self.numpys = random.Random(0), np.random.default_rng(0)


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "random": (lambda self, x: random.uniform(0.8, 1.2), "random.uniform"),
    "random in training": (lambda self, x: random.random() if self.training else 1.0, "random.random"),
    "from random": (lambda self, x: uniform(0.8, 1.2), "random.uniform"),
    "numpy's": (lambda self, x: float(np.random.rand()) if self.training else 1.0, "numpy.random.rand"),
    "a generator beside": (lambda self, x: CHANCE.random(), "changes the global CHANCE"),
    "environment": (lambda self, x: float(os.environ.get("SCALE", "1")), "os.environ"),
    "getenv": (lambda self, x: float(os.getenv("SCALE", "1")), "os.getenv"),
    "clock": (lambda self, x: 1.0 + time.time() % 1, "time.time"),
    "a counter in a list": (counted, "changes the global COUNTS"),
    "a counter": (counted_by_name, "changes the global CALLS"),
    "a list beside": (kept_apart, "changes the global SEEN"),
    "an enclosed counter": (counting(), "changes the enclosed calls"),
    "a list as a default": (kept_in_default, "changes the default seen"),
    "gradients": (lambda self, x: 2.0 if torch.is_grad_enabled() else 1.0, "torch.is_grad_enabled"),
    "inference": (lambda self, x: 2.0 if torch.is_inference_mode_enabled() else 1.0, "is_inference_mode_enabled"),
    "requires_grad": (lambda self, x: 2.0 if x.requires_grad else 1.0, "requires_grad of a tensor"),
    "requires_grad of a weight": (lambda self, x: 2.0 if self.fc.weight.requires_grad else 1.0, "requires_grad"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    read, reason = REFUSED[name]
    plan = dcafy.inspect(network(reading(read)), example_inputs=IMAGES)
    assert not plan.links
    assert sum(reason in item.reason for item in plan.skipped) == 2, plan.skipped


@pytest.mark.parametrize(
    "read", [lambda self, x: self.chance.random(), lambda self, x: float(self.numpys.random())], ids=["random", "numpy"]
)
def test_a_generator_of_its_own(read: Any) -> None:
    kind = reading(read)
    plan = dcafy.inspect(network(type("Drawing", (kind, Drawing), {})), example_inputs=IMAGES)
    assert not plan.links
    assert all("its forward changes self." in item.reason for item in plan.skipped)


def counts_and_shows(self: Any, x: Tensor) -> float:
    self.seen, self.count = x * 2, self.count + 1
    return 1.0


def shows(self: Any, x: Tensor) -> float:
    self.seen = x * 2
    return 1.0


class Counting(Gated):
    count = 0


def test_a_counter_beside_a_stored_map_is_what_is_named() -> None:
    """A stored map alone is connected."""
    both, alone = (type("Counting", (reading(read), Counting), {}) for read in (counts_and_shows, shows))
    plan = dcafy.inspect(network(both), example_inputs=IMAGES)
    assert [item.reason for item in plan.skipped[:2]] == ["kept whole: its forward changes self.count"] * 2
    assert len(dcafy.inspect(network(alone), example_inputs=IMAGES).links) == 1


def test_above_the_blocks_all_of_it_is_the_users_own() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network(Gated)

        def forward(self, x: Tensor) -> Any:
            COUNTS[0] += 1
            return self.body(x * random.uniform(0.8, 1.2)) * float(os.environ.get("SCALE", "1"))

    model = Net().eval()
    connected = dcafy.convert(model, example_inputs=IMAGES).eval()
    random.seed(0)
    expected = [model(IMAGES), model(IMAGES)]
    random.seed(0)
    assert all(torch.equal(connected(IMAGES), one) for one in expected)
    assert not torch.equal(*expected)


class Reading(Gated):
    """Reads of everything that is compared, in code that a pickle can name."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc(x.mean((2, 3))).sigmoid()[:, :, None, None]
        scale = self.space.scale * self.config.others[0]["scale"] * SCALE * FLAGS["scale"] * self.by_class  # type: ignore[operator]
        return x * gate * (scale * getattr(self, "later", 1.0) * SHARED.scale + self.drop.p)


def test_copies_pickles_and_compiled_ones_stay_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    connected = dcafy.convert(network(Reading), example_inputs=IMAGES).eval()
    with torch.no_grad():
        next(iter(dcafy.connections(connected).values())).beta.fill_(1.0)
    expected = connected(IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = pickle.loads(pickle.dumps(connected))
        assert torch.equal(copy.deepcopy(connected)(IMAGES), expected)
        assert torch.equal(again(IMAGES), expected)
    torch._dynamo.reset()
    compiled = torch.compile(connected, backend="eager", fullgraph=True)
    assert torch.equal(compiled(IMAGES), expected)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    with pytest.warns(UserWarning, match="The global SCALE"):
        assert not torch.equal(again(IMAGES), expected)


SCALES = {"scale": 1.0}


def scaled_by(table: dict[str, float]) -> Callable[[Callable[[Any, Tensor], Tensor]], Callable[[Any, Tensor], Tensor]]:
    def decorated(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
        def scaled(self: Any, x: Tensor) -> Tensor:
            return forward(self, x) * table["scale"]

        return scaled

    return decorated


class Decorated(Gated):
    forward = scaled_by(SCALES)(Gated.forward)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")  # what warns
@pytest.mark.parametrize("way", ["as it is", "copied", "pickled", "compiled"])
def test_what_a_decorator_encloses(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(Decorated)
    connected = dcafy.convert(model, example_inputs=IMAGES).eval()
    with torch.no_grad():
        next(iter(dcafy.connections(connected).values())).beta.fill_(1.0)
    ways: dict[str, Callable[[nn.Module], Any]] = {
        "copied": copy.deepcopy,
        "pickled": lambda one: pickle.loads(pickle.dumps(one)),
        "compiled": lambda one: torch.compile(one, backend="eager"),
    }
    torch._dynamo.reset()
    again = ways[way](connected) if way in ways else connected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(again(IMAGES), connected(IMAGES))
        assert not torch.equal(again(IMAGES), model(IMAGES))
    monkeypatch.setitem(SCALES, "scale", 3.0)
    with pytest.warns(UserWarning, match="The enclosed table, by which Decorated goes"):
        assert torch.equal(again(IMAGES), model(IMAGES))


class Twice(Gated):
    """One decorator twice: two functions of one name, each with a table of its own."""

    tables = ({"scale": 0.5}, {"scale": 1.5})
    forward = scaled_by(tables[0])(scaled_by(tables[1])(Gated.forward))


class Value(nn.Module):
    def value(self, table: dict[str, float] = SCALES) -> float:
        return table["scale"]


class ByPart(Gated):
    """What encloses something is found through a part only."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Value()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.part.value()


@pytest.mark.parametrize(
    ("kind", "table"), [(Twice, Twice.tables[0]), (Twice, Twice.tables[1]), (ByPart, SCALES)], ids=["1", "2", "part"]
)
def test_what_is_enclosed_is_found_again_after_a_pickle(
    kind: type[Gated], table: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(kind)
    connected = dcafy.convert(model, example_inputs=IMAGES).eval()
    with torch.no_grad():
        next(iter(dcafy.connections(connected).values())).beta.fill_(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = pickle.loads(pickle.dumps(connected))
        assert torch.equal(again(IMAGES), connected(IMAGES))
        assert not torch.equal(again(IMAGES), model(IMAGES))
    monkeypatch.setitem(table, "scale", 7.0)
    with pytest.warns(UserWarning, match="own forward runs"):
        assert torch.equal(again(IMAGES), model(IMAGES))


def raising(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A function over a name that is gone when it is called."""
    try:
        raise ValueError
    except ValueError:

        def guarded(self: Any, x: Tensor) -> Tensor:
            if self.fc.in_features < 0:
                raise error  # noqa: F821
            return forward(self, x)

    return guarded


class Emptied(Gated):
    forward = raising(Gated.forward)


FUNCTIONS = [torch.relu, lambda x: x]


class Lambdas(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return FUNCTIONS[1](super().forward(x))


@pytest.mark.parametrize("kind", [Emptied, Lambdas])
def test_what_cannot_be_noted_is_no_obstacle(kind: type[Gated]) -> None:
    model = network(kind)
    connected = dcafy.convert(model, example_inputs=IMAGES).eval()
    assert heard(connected) == heard(pickle.loads(pickle.dumps(connected))) == 1


def test_what_is_enclosed_no_more_after_a_pickle_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class that is there now is another one than was pickled."""
    model = network(Decorated)
    data = pickle.dumps(dcafy.convert(model, example_inputs=IMAGES).eval())
    monkeypatch.setattr(Decorated, "forward", Gated.forward)
    with pytest.warns(UserWarning, match="The enclosed table"):
        assert torch.equal(pickle.loads(data)(IMAGES), model(IMAGES))


def test_the_warning_names_the_place() -> None:
    model = network(reading(lambda self, x: self.space.scale))
    connected = dcafy.convert(model, example_inputs=IMAGES).eval()
    for unit in units(connected):
        unit.space.scale = 3.0
    with pytest.warns(UserWarning, match=r"Gated\.space\.scale is no longer what it was"):
        connected(IMAGES)


class Residual(nn.Module):
    """A block without attention, which goes by autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(self.conv(x))
        return x + (2 * inner if torch.is_autocast_enabled("cpu") else inner)


def test_where_attention_was_put_in() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Residual(), Residual()).eval()
    connected = dcafy.convert(model, attention="se", example_inputs=IMAGES).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(UserWarning, match="autocast"):
        assert torch.equal(connected(IMAGES), model(IMAGES))
