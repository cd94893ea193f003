"""Networks as users write them, by kinds: what they do around attention costs no block, no link and no bit."""

from __future__ import annotations

import collections
import copy
import functools
import math
import pickle
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trained import seeded, trained_like

import dcafy

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
OTHER = ((1, 3, 48, 32), (3, 3, 37, 45))


class SE(nn.Module):
    def __init__(self, channels: int = 16, gate: nn.Module | None = None, act: nn.Module | None = None) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Linear(channels, channels // 2), nn.Linear(channels // 2, channels)
        self.gate, self.act = gate or nn.Sigmoid(), act or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.act(self.reduce(x.mean((2, 3))))))[:, :, None, None]


Body = Callable[["Unit", Tensor], Any]


class Unit(nn.Module):
    """A convolution and what ``body`` makes of it; attention is a part of this very forward."""

    def __init__(self, body: Body, prepare: Callable[[nn.Module], Any] = lambda _: None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, 1, 1)
        self.excite = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16), nn.Sigmoid())
        self.body = body
        prepare(self)

    def attend(self, x: Tensor) -> Tensor:
        return x * self.excite(x.mean((2, 3)))[:, :, None, None]

    def forward(self, x: Tensor) -> Any:
        return self.body(self, self.conv(x))


class Net(nn.Module):
    def __init__(self, *units: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.units = nn.ModuleList(units)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for unit in self.units:
            x = unit(x)
        return self.head(x)


def network(body: Body, prepare: Callable[[nn.Module], Any] = lambda _: None) -> nn.Module:
    return trained_like(Net(Unit(body, prepare), Unit(body, prepare)), IMAGES)


def connected(model: nn.Module, names: tuple[str, ...] = ("units.0", "units.1"), others: Any = OTHER) -> Any:
    """The model converted, after the questions that every case asks: blocks, links, bits in both modes, liveness."""
    plan = dcafy.inspect(model, example_inputs=IMAGES)
    assert tuple(block.name for block in plan.blocks) == names, plan
    assert len(plan.links) == len(names) - 1, plan
    made: Any = dcafy.convert(model, example_inputs=IMAGES)
    for training in (False, True):
        ours, theirs = copy.deepcopy(made).train(training), copy.deepcopy(model).train(training)
        for shape in ((2, 3, 32, 32), *others):
            with seeded(1):
                images = torch.rand(shape)
            with seeded(2):
                expected = theirs(images)
            with seeded(2):
                got = ours(images)
            assert same(got, expected), (shape, training)
        assert all(torch.equal(ours.get_buffer(name), value) for name, value in theirs.named_buffers())
        with torch.no_grad(), seeded(2):
            for connection in dcafy.connections(ours).values():
                connection.beta.fill_(0.7)
            moved = ours(images)
        assert not same(moved, expected), f"not connected with training={training}"
    return made.eval()


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    rows = (one.values(), other.values()) if isinstance(one, dict) else (one, other)
    return len(one) == len(other) and all(map(same, *rows))


# 1. What was tried and given up ------------------------------------------------------------------


class Picky(nn.Module):
    """Fails after it has computed something, and normalises it meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor, mask: float | None = None) -> Tensor:
        x = self.norm(x)
        if mask is None:
            raise ValueError("a mask is needed")
        return x * mask


def asks_twice(unit: Any, x: Tensor) -> Tensor:
    try:
        return unit.attend(unit.picky(x))
    except ValueError:
        return unit.attend(unit.picky(x, 0.5))


def calls_with_too_much(unit: Any, x: Tensor) -> Tensor:
    for layer in (unit.act, unit.conv):
        try:
            x = layer(x, lengths=None)
        except TypeError:  # noqa: PERF203
            x = layer(x)
    return unit.attend(x)


def views_what_it_cannot(unit: Any, x: Tensor) -> Tensor:
    try:
        y = torch.relu(x).view(3, 5, 7)
    except RuntimeError:
        y = x
    return unit.attend(y)


@pytest.mark.parametrize(
    ("body", "prepare"),
    [
        (asks_twice, lambda unit: unit.add_module("picky", Picky())),
        (calls_with_too_much, lambda unit: unit.add_module("act", nn.ReLU())),
        (views_what_it_cannot, lambda unit: None),
    ],
)
def test_a_call_whose_error_is_caught_has_done_what_it_did(body: Body, prepare: Any) -> None:
    """No node of what failed is left, and all of what was computed before: batch norm has counted it."""
    connected(network(body, prepare))


class Head(nn.Module):
    """Decides by content, so that it is called as it is; and changes what it is given."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.conv = way, nn.Conv2d(16, 16, 1)

    def forward(self, given: Any) -> Tensor:
        if self.way == "list":
            given[0] = self.conv(given[0])
            y = given[0]
        elif self.way == "dict":
            given["y"] = self.conv(given.pop("x"))
            y = given["y"]
        else:
            given["maps"][0] = self.conv(given["maps"][0])
            y = given["maps"][0]
        return y * 2 if y.max() > 1e9 else y


GIVEN: dict[str, Callable[[Tensor], Any]] = {
    "list": lambda x: [x],
    "dict": lambda x: {"x": x},
    "inner": lambda x: {"maps": [x]},
}


@pytest.mark.parametrize("way", GIVEN)
def test_a_module_that_needs_values_and_writes_into_what_it_is_given(way: str) -> None:
    """It was tried without data, and then given data: each time what it would be given by its caller."""
    made = GIVEN[way]
    connected(network(lambda unit, x: unit.head(made(unit.attend(x))), lambda unit: unit.add_module("head", Head(way))))


READ: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "list": lambda unit, x: unit.head(given := [x]) + given[0],
    "dict": lambda unit, x: unit.head(given := {"x": x}) + given["y"],
    "inner": lambda unit, x: unit.head(given := {"maps": [x]}) + given["maps"][0],
}


@pytest.mark.parametrize("way", READ)
def test_what_a_module_that_needs_values_wrote_is_read(way: str) -> None:
    """The user's forward runs, and is right; no graph has what it reads there, and none is written."""

    class Reads(Net):
        def forward(self, x: Tensor) -> Any:
            for unit in self.units:
                x = unit(x if unit is not self.units[0] else self.stem(x))
            return READ[way](self, x)

    model = Reads(*(Unit(lambda unit, x: unit.attend(x)) for _ in range(2)))
    model.head = Head(way)  # type: ignore[assignment]
    made = connected(trained_like(model, IMAGES))
    with pytest.raises(dcafy.DcafyError, match="reads what head wrote into a list or dictionary"):
        dcafy.flat(made)


def test_what_is_kept_in_python_is_put_back() -> None:
    """Lists, dicts, sets, deques and objects of a forward that is given up hold what they held."""
    from dcafy.trace.effects import Kept

    module = nn.Linear(2, 2)
    plain: Any = module
    plain.rows, plain.table, plain.names = [1, [2]], collections.defaultdict(list, a=[3]), {"x"}
    plain.last, plain.note = collections.deque([4], maxlen=2), types.SimpleNamespace(value=5)
    plain.ordered = collections.OrderedDict(b=1)
    before = repr({name: value for name, value in vars(module).items() if not name.startswith("_")})
    kept = Kept([module])
    plain.rows[1].append(0)
    plain.rows.clear()
    plain.table["b"].append(1)
    plain.names.add("y")
    plain.last.extend((5, 6))
    plain.note.value, plain.note.more = 0, 1
    plain.ordered["c"] = 2
    plain.new = 1
    del plain.last
    kept.put_back()
    assert repr({name: value for name, value in vars(module).items() if not name.startswith("_")}) == before
    assert list(plain.ordered) == ["b"]


# 2. Plain tensors and placement ------------------------------------------------------------------

PLAIN: dict[str, tuple[Any, Callable[[Any, Tensor], Tensor]]] = {
    "element": (torch.tensor([8.0, 16.0]), lambda unit, x: x * unit.kept[0] + unit.kept[1]),
    "full": (torch.tensor([8.0, 16.0]), lambda unit, x: x + torch.full((1,), unit.kept[0], dtype=x.dtype)),
    "new_full": (torch.tensor([8.0]), lambda unit, x: x + x.new_full((1,), unit.kept[0])),
    "list": ([torch.tensor(2.0), torch.tensor(1.0)], lambda unit, x: x * unit.kept[0] + unit.kept[1]),
    "dict of lists": ({"k": [torch.tensor(2.0)]}, lambda unit, x: x * unit.kept["k"][0]),
    "tuple": ((torch.tensor(2.0), 1), lambda unit, x: x * unit.kept[0]),
    "iterated": (torch.tensor([1.0, 2.0]), lambda unit, x: sum(x * kept for kept in unit.kept)),
    "expanded": (torch.rand(1, 2, 1, 1), lambda unit, x: x + unit.kept.expand(x.shape[0], -1, *x.shape[2:]).sum()),
    "placed": (torch.tensor(2), lambda unit, x: x * unit.kept.to(device=x.device, dtype=x.dtype)),
    "as_tensor": (None, lambda unit, x: x * torch.as_tensor(x.abs().mean() < 9, dtype=x.dtype, device=x.device)),
    "device": (None, lambda unit, x: x + torch.ones(1, device=next(unit.parameters()).device)),
}


@pytest.mark.parametrize("what", PLAIN)
def test_plain_tensors_stay_the_modules_own(what: str) -> None:
    """They are read when the graph runs: what they are changed to later is what is computed with."""
    kept, use = PLAIN[what]
    model = network(lambda unit, x: unit.attend(use(unit, x)), lambda unit: setattr(unit, "kept", copy.deepcopy(kept)))
    made = connected(model)
    if isinstance(kept, Tensor):
        for one in (model, made):
            for unit in one.units:  # type: ignore[union-attr]
                unit.kept = kept + 1
        assert torch.equal(made(IMAGES), model(IMAGES))


# 3. Numbers of sizes -----------------------------------------------------------------------------

SIZES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "int": lambda x, h, w: torch.cat([x[:, :, int(h / 2) :], x[:, :, : int(h / 2)]], 2),
    "int of float": lambda x, h, w: F.interpolate(x, size=(int(h * 0.5), int(w * 0.5))),
    "float": lambda x, h, w: 20 * x / float(h),
    "floor and ceil": lambda x, h, w: F.interpolate(x, size=(math.floor(h * 0.7), math.ceil(w / 2))),
    "trunc and round": lambda x, h, w: F.interpolate(x, size=(math.trunc(h * 0.7), round(w / 3))),
    "chain": lambda x, h, w: F.pad(x, (0, int(math.ceil(w / 8.0)) * 8 - w, 0, int(round(float(h) * 1.5)) - h)),  # noqa: RUF046
    "max and min": lambda x, h, w: x / max(h, w, 4) * min(x.shape[2:]),
    "divmod": lambda x, h, w: x * divmod(h, 7)[1] + divmod(w, 3)[0],
    "prod": lambda x, h, w: x.view(len(x), 16, math.prod(x.shape[2:])).view(x.shape),
    "map": lambda x, h, w: F.adaptive_avg_pool2d(x, tuple(map(int, (h / 2, w / 2)))),
    "list": lambda x, h, w: F.interpolate(x, [int(n / 2) for n in x.shape[2:]]),
    "slice": lambda x, h, w: x[(slice(None), slice(None), slice(0, int(h / 2)))],
    "batch": lambda x, h, w: x.view(int(x.size(0)), int(x.size(1)), -1).view(x.size()),
}


@pytest.mark.parametrize("what", SIZES)
def test_numbers_of_sizes_stay_symbolic(what: str) -> None:
    resized = SIZES[what]
    connected(network(lambda unit, x: unit.attend(resized(x, x.shape[2], x.shape[3]))))


def test_names_of_numbers_are_what_they_were_afterwards() -> None:
    connected(network(lambda unit, x: unit.attend(20 * x / int(x.shape[2]))))
    assert "int" not in globals()
    assert max is __builtins__["max"] if isinstance(__builtins__, dict) else __builtins__.max  # type: ignore[attr-defined]
    assert max.__module__ == "builtins"


def test_a_loop_over_a_size_is_refused_in_words() -> None:
    model = network(lambda unit, x: unit.attend(torch.stack([x[:, :, i] for i in range(x.shape[2])], 2)))
    with pytest.raises(dcafy.NoAttentionError, match="bakes the image size") as error:
        dcafy.convert(model, example_inputs=IMAGES)
    assert "dcafy.insert" not in str(error.value), "it has attention"


# 4. Names ----------------------------------------------------------------------------------------

NAMES = (
    *("meta", "graph", "code", "recompile", "print_readable", "_graph", "_code", "add_submodule", "shape_env"),
    *("_written", "_said", "self", "wire"),
)


@pytest.mark.parametrize("name", [*NAMES, "dca"])
def test_any_identifier_at_the_root(name: str, tmp_path: Path) -> None:
    class Named(Net):
        def forward(self, x: Tensor) -> Tensor:
            return getattr(self, name)(super().forward(x))

    model = Named(SE(), SE())
    model.add_module(name, nn.Conv2d(4, 4, 1))
    model = trained_like(model, IMAGES)
    made = connected(model)
    dcafy.save(made, tmp_path / "folder")
    loaded = dcafy.load(tmp_path / "folder", model).eval()
    assert torch.equal(loaded(IMAGES), made(IMAGES))
    reverted = dcafy.revert(made)
    assert list(reverted.state_dict()) == list(model.state_dict())
    assert torch.equal(pickle.loads(pickle.dumps(dcafy.connections(made)["units.1"])).alpha, torch.ones(1))


@pytest.mark.parametrize("name", NAMES)
def test_any_identifier_beside_attention(name: str) -> None:
    model = network(
        lambda unit, x: unit.attend(getattr(unit, name)(x)), lambda unit: unit.add_module(name, nn.Conv2d(16, 16, 1))
    )
    connected(model)


@pytest.mark.parametrize("name", ["meta", "graph", "_graph", "dca", "recompile"])
def test_a_plain_attribute_keeps_its_value(name: str) -> None:
    class Scaled(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * getattr(self, name)["scale"]

    model: Any = Scaled(SE(), SE())
    model.__dict__[name] = {"scale": 2.0}
    assert getattr(connected(trained_like(model, IMAGES)), name) == {"scale": 2.0}


# 5. Sizes that a layer is built for --------------------------------------------------------------


class Fixed(nn.Module):
    """FcaNet: weights of one size, to which other maps are pooled."""

    def __init__(self, size: int, larger_only: bool) -> None:
        super().__init__()
        self.size, self.larger_only = size, larger_only
        self.conv = nn.Conv2d(16, 16, 1)
        self.register_buffer("weight", torch.rand(16, size, size))
        self.excite = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = y = self.conv(x)
        n, c, h, w = x.shape
        if (h > self.size) if self.larger_only else (h != self.size or w != self.size):
            y = F.adaptive_avg_pool2d(x, (self.size, self.size))
        return x * self.excite((y * self.weight).mean((2, 3))).view(n, c, 1, 1)


@pytest.mark.parametrize("larger_only", [False, True])
@pytest.mark.parametrize("size", [16, 8])
def test_a_size_fixed_by_design(size: int, larger_only: bool) -> None:
    """At the size it was built for it is connected; where it would go another way, it says so."""
    model = trained_like(Net(Fixed(size, larger_only), Fixed(size, larger_only)), IMAGES)
    made = connected(model, others=((3, 3, 32, 32),))
    if size == 16:
        with pytest.raises(dcafy.DcafyError, match="goes by the size of its input"):
            made(torch.rand(2, 3, 64, 64))


# 6. Shared modules -------------------------------------------------------------------------------


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


@pytest.mark.parametrize(
    "shared",
    [
        {"gate": nn.Sigmoid()},
        {"act": nn.SiLU()},
        {"act": nn.PReLU()},
        {"act": Swish()},
        {"act": nn.Sequential(nn.ReLU(), nn.Dropout(0.0))},
        {"gate": nn.Hardsigmoid(), "act": Swish()},
    ],
    ids=lambda shared: " and ".join(f"{name} {type(module).__name__}" for name, module in shared.items()),
)
def test_a_place_is_that_of_the_caller(shared: dict[str, nn.Module]) -> None:
    """One activation for all blocks is registered in the first of them."""
    model = trained_like(Net(*(SE(**shared) for _ in range(3))), IMAGES)
    connected(model, ("units.0", "units.1", "units.2"))


# 7. Optional arguments ---------------------------------------------------------------------------


class WithLabels(Net):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = super().forward(x)
        return y if labels is None else {"loss": F.cross_entropy(y.mean((2, 3)), labels), "y": y}


@pytest.mark.parametrize(
    "given", [IMAGES, (IMAGES, torch.tensor([1, 2])), (IMAGES, None)], ids=["without", "with", "None"]
)
def test_labels_come_and_go(given: Any) -> None:
    model = trained_like(WithLabels(SE(), SE()), IMAGES)
    made: Any = dcafy.convert(model, example_inputs=given)
    labels = torch.tensor([1, 2])
    for training in (False, True):
        for args, kwargs in (((), {}), ((labels,), {}), ((), {"labels": labels}), ((None,), {})):
            expected = model.train(training)(IMAGES, *args, **kwargs)
            assert same(made.train(training)(IMAGES, *args, **kwargs), expected)


def test_a_block_that_is_called_in_another_way_says_so() -> None:
    class Masked(Unit):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            x = self.conv(x)
            return self.attend(x if mask is None else x * mask)

    class Masking(Net):
        mask: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for unit in self.units:
                x = unit(x) if self.mask is None else unit(x, self.mask)
            return self.head(x)

    model = trained_like(Masking(Masked(lambda *_: None), Masked(lambda *_: None)), IMAGES)
    made: Any = connected(model)
    made.mask = model.mask = torch.rand(16, 16)
    with pytest.warns(UserWarning, match="other arguments"):
        assert torch.equal(made(IMAGES), model.eval()(IMAGES))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(IMAGES)  # once is enough


# 8. By mode --------------------------------------------------------------------------------------

MODES: dict[str, Body] = {
    "alike": lambda unit, x: unit.attend(x) if unit.training else unit.attend(x),  # noqa: RUF034
    "dropout": lambda unit, x: unit.attend(F.dropout(x, 0.3) if unit.training else x),
    "noise": lambda unit, x: unit.attend(x + torch.randn_like(x) if unit.training else x),
    "behind": lambda unit, x: unit.attend(x) * 2 if unit.training else unit.attend(x),
    "another layer": lambda unit, x: unit.attend(x) + (unit.conv(x) if unit.training else 0),
    "dropped descriptor": lambda unit, x: (
        x * unit.excite(F.dropout(x.mean((2, 3)), 0.1) if unit.training else x.mean((2, 3)))[:, :, None, None]
    ),
    "a layer's": lambda unit, x: unit.attend(x * 2 if unit.conv.training else x),
    "a layer's, passed on": lambda unit, x: unit.attend(F.dropout(x, 0.3, unit.excite.training)),
    "a method of a part": lambda unit, x: unit.attend(noisy(unit.excite, x)),
}


def noisy(part: nn.Module, x: Tensor) -> Tensor:
    return x + torch.randn_like(x) if part.training else x


@pytest.mark.parametrize("how", MODES)
def test_a_block_that_goes_by_its_mode_is_connected_in_both(how: str) -> None:
    made = connected(network(MODES[how]))
    again = pickle.loads(pickle.dumps(made.units[1].conv))  # its neighbours stay what they were
    assert torch.equal(again.weight, made.units[1].conv.weight)
    for twin in (copy.deepcopy(made), copy.copy(made)):
        for training in (False, True):
            with seeded(3):
                expected = made.train(training)(IMAGES)
            with seeded(3):
                assert torch.equal(twin.train(training)(IMAGES), expected)


def test_a_block_that_goes_by_the_mode_of_a_part_is_right_where_that_is_another() -> None:
    """Norms that are frozen are in eval in training: the user's own forward runs, which is said."""
    made = connected(network(MODES["a layer's"])).train()
    plain = dcafy.revert(copy.deepcopy(made))
    for model in (made, plain):
        model.units[1].conv.eval()
    with torch.no_grad():
        for connection in dcafy.connections(made).values():
            connection.beta.fill_(0.7)
    with pytest.warns(UserWarning, match=r"Unit\.conv is in another mode than what it is a part of"):
        assert torch.equal(made(IMAGES), plain(IMAGES))
    with pytest.raises(dcafy.DcafyError, match=r"units\.0: its forward takes another path in training"):
        dcafy.flat(made)


def test_attention_that_is_another_in_training_is_left_alone_with_a_reason() -> None:
    def either(unit: Unit, x: Tensor) -> Tensor:
        return x if unit.training else unit.attend(x)

    plan = dcafy.inspect(network(either), example_inputs=IMAGES)
    assert not plan.blocks
    assert any("another path in training" in item.reason for item in plan.skipped)


def test_a_root_with_other_outputs_in_training() -> None:
    class Deep(Net):
        def forward(self, x: Tensor) -> Any:
            a = self.units[0](self.stem(x))
            b = self.units[1](a)
            return {"out": self.head(b), "aux": self.head(a)} if self.training else self.head(b)

    connected(trained_like(Deep(SE(), SE()), IMAGES))


# 9. What a forward leaves for others to look at --------------------------------------------------


def kept_map(unit: Any, x: Tensor) -> Tensor:
    unit.seen = unit.excite(x.mean((2, 3)))
    return x * unit.seen[:, :, None, None]


def kept_copy(unit: Any, x: Tensor) -> Tensor:
    pooled = x.mean((2, 3))
    scale = unit.excite(pooled)
    unit.seen, unit.pooled = scale.detach().clone(), pooled
    return x * scale[:, :, None, None]


def kept_in_eval(unit: Any, x: Tensor) -> Tensor:
    scale = unit.excite(x.mean((2, 3)))
    if not unit.training:
        unit.seen = scale.detach()
    return x * scale[:, :, None, None]


def averaged(unit: Any, x: Tensor) -> Tensor:
    scale = unit.excite(x.mean((2, 3)))
    if unit.seen is not None:
        scale = (scale + unit.seen.mean(0)) / 2
    unit.seen = scale.detach()
    return x * scale[:, :, None, None]


def averaged_elsewhere(unit: Any, x: Tensor) -> Tensor:
    scale = with_last(unit, unit.excite(x.mean((2, 3))))
    unit.seen = scale.detach()
    return x * scale[:, :, None, None]


def averaged_in_training(unit: Any, x: Tensor) -> Tensor:
    scale = unit.excite(x.mean((2, 3)))
    if unit.training and unit.seen is not None:
        scale = (scale + unit.seen.mean(0)) / 2
    unit.seen = scale.detach()
    return x * scale[:, :, None, None]


def with_last(unit: Any, scale: Tensor) -> Tensor:
    return scale if getattr(unit, "seen", None) is None else (scale + unit.seen.mean(0)) / 2


def counted(unit: Any, x: Tensor) -> Tensor:
    unit.seen = unit.excite(x.mean((2, 3)))
    unit.height = x.shape[2]
    return x * unit.seen[:, :, None, None]


def unseen(unit: Any) -> None:
    unit.seen = None


@pytest.mark.parametrize("body", [kept_map, kept_copy, kept_in_eval])
def test_a_tensor_that_a_block_keeps_is_the_connected_one(body: Body) -> None:
    model = network(body, unseen)
    made = connected(model)
    names = [name for name in ("seen", "pooled") if name in made.units[1].__dict__]
    for images in (IMAGES, IMAGES[:1]):
        with torch.no_grad():
            made(images), model(images)
        for ours, theirs in zip(made.units, model.units, strict=True):  # type: ignore[call-overload]
            assert all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in names)
    with torch.no_grad():
        for connection in dcafy.connections(made).values():
            connection.beta.fill_(0.7)
        made(IMAGES), model(IMAGES)
    assert torch.equal(made.units[0].seen, model.units[0].seen)  # type: ignore[index, union-attr]
    assert not torch.equal(made.units[1].seen, model.units[1].seen)  # type: ignore[index, union-attr]
    restored = pickle.loads(pickle.dumps(dcafy.revert(made)))
    assert type(restored.units[1]) is Unit


def test_what_a_block_kept_is_read_by_its_caller() -> None:
    class Sums(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) + sum(unit.seen.mean() for unit in self.units)

    connected(trained_like(Sums(Unit(kept_copy, unseen), Unit(kept_copy, unseen)), IMAGES))


@pytest.mark.parametrize("body", [averaged, averaged_elsewhere, averaged_in_training, counted])
def test_a_block_that_goes_by_what_it_kept_is_left_alone_with_a_reason(body: Body) -> None:
    plan = dcafy.inspect(network(body, unseen), example_inputs=IMAGES)
    assert not plan.links
    reasons = {item.reason for item in plan.skipped}
    assert reasons <= {
        "kept whole: its forward stores what it computes in self.seen",
        "kept whole: its forward takes another path in training than in eval",
    }
    assert reasons


# 10. Forwards that are not the class's own --------------------------------------------------------


def by_keyword_default(unit: Any) -> None:
    old = unit.forward

    @functools.wraps(old)
    def forward(*args: Any, _old: Any = old, **kwargs: Any) -> Any:
        return _old(*args, **kwargs)

    unit.forward = forward


def by_keyword_only_default(unit: Any) -> None:
    def forward(x: Tensor, *, module: Any = unit) -> Any:
        return type(module).forward(module, x)

    unit.forward = forward


def by_list(unit: Any) -> None:
    held = [unit]
    unit.forward = lambda x: type(held[0]).forward(held[0], x)


def by_attribute(unit: Any) -> None:
    def forward(x: Tensor) -> Any:
        return forward.old(x)  # type: ignore[attr-defined]

    forward.old = unit.forward  # type: ignore[attr-defined]
    unit.forward = forward


def by_cache(unit: Any) -> None:
    unit.forward = functools.lru_cache(unit.forward)


def by_weight(unit: Any) -> None:
    weight = unit.excite[0].weight
    unit.forward = lambda x: x * torch.sigmoid(x.mean((2, 3)) @ weight.t() @ weight)[:, :, None, None]


REGISTRY: dict[str, nn.Module] = {}


def by_registry(unit: Any) -> None:
    REGISTRY["unit"] = unit
    unit.forward = lambda x: type(REGISTRY["unit"]).forward(REGISTRY["unit"], x)


@pytest.mark.parametrize(
    "replace",
    [by_keyword_default, by_keyword_only_default, by_list, by_attribute, by_cache, by_weight, by_registry],
)
def test_a_forward_that_keeps_hold_of_modules_is_refused(replace: Callable[[nn.Module], None]) -> None:
    """In a copy it would go on using those very ones; the error says what to write."""
    model = network(Unit.attend)
    replace(model.units[1])  # type: ignore[index]
    with pytest.raises(dcafy.InputError, match=r"types\.MethodType"):
        dcafy.convert(model, example_inputs=IMAGES)


def test_a_partial_of_the_class_is_copied_with_its_module() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.se = SE()
            self.forward = functools.partial(Holder.run, self)

        def run(self, x: Tensor) -> Tensor:
            return x + self.se(x)

    connected(trained_like(Net(Holder(), Holder()), IMAGES), ("units.0.se", "units.1.se"))


def test_reasons_are_in_dcafys_own_words() -> None:
    """What only recording meets (tensors without data, proxies) is not told as an error of the user's code."""

    def item(unit: Unit, x: Tensor) -> Tensor:
        return unit.attend(x * (1 + x.mean().item()))

    plan = dcafy.inspect(network(item), example_inputs=IMAGES)
    assert plan.skipped
    for skipped in plan.skipped:
        assert not {"meta", "Proxy", "Error"} & set(skipped.reason.replace(":", " ").split()), skipped
        assert "test_field.py, line" in skipped.reason


# 12. What copies leave out, what is altered later, where things are made -----------------------------


class Pooling(nn.Module):
    """Keeps of itself, in copies and pickles, what it was made with and nothing else (as einops' layers do)."""

    def __init__(self, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.axes = axes

    def __getstate__(self) -> dict[str, Any]:
        return {"axes": self.axes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.axes)


class Remade(Pooling):
    """Says by itself how it is made anew, from nothing else."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.axes,)


class Excited(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x * super().forward(x)[:, :, None, None]


@pytest.mark.parametrize("kind", [Pooling, Remade])
def test_what_a_class_leaves_out_of_copies_is_no_connection(kind: type[Pooling], tmp_path: Path) -> None:
    def unit() -> nn.Module:
        return Excited(kind((2, 3)), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16), nn.Sigmoid())

    model = trained_like(Net(unit(), unit(), unit()), IMAGES)
    made = connected(model, ("units.0", "units.1", "units.2"))
    with torch.no_grad():
        for connection in dcafy.connections(made).values():
            connection.beta.fill_(0.7)
        expected = made(IMAGES)
        assert not torch.equal(expected, model(IMAGES))
        twins = copy.deepcopy(made), pickle.loads(pickle.dumps(made)), dcafy.flat(made), copy.copy(made)
        for twin in twins:
            assert torch.equal(twin(IMAGES), expected)
    plain = dcafy.revert(copy.deepcopy(made))
    assert [type(module) for module in plain.modules()] == [type(module) for module in model.modules()]


class Strips(nn.Module):
    """Two strips, each with a map of its own: the block hands on its strips of what it made, pooled once more."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = nn.AdaptiveAvgPool2d((None, 1)), nn.AdaptiveAvgPool2d((1, None))
        self.mix, self.of_rows, self.of_columns = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1), nn.Conv2d(8, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        strips = torch.cat([self.rows(x), self.columns(x).transpose(2, 3)], 2)
        rows, columns = self.mix(strips).split([height, width], 2)
        return x * self.of_rows(rows).sigmoid() * self.of_columns(columns.transpose(2, 3)).sigmoid()


def adds_in_place(unit: Any, x: Tensor) -> Tensor:
    y = unit.strips(x)
    y += x
    return F.relu_(y)


def drops_and_adds_in_place(unit: Any, x: Tensor) -> Tensor:
    return F.dropout(unit.strips(x), 0.1, training=False).add_(x)


def adds_in_place_by_content(unit: Any, x: Tensor) -> Tensor:
    y = unit.strips(x)
    if x.mean() < 1e6:
        y += x
    return y


@pytest.mark.parametrize("body", [adds_in_place, drops_and_adds_in_place, adds_in_place_by_content])
def test_what_is_altered_behind_its_fusion_has_gradients(body: Body) -> None:
    """Autograd keeps what the strips were pooled of once more, and refuses what was altered since."""

    def prepare(unit: nn.Module) -> None:
        unit.strips = Strips()

    model = network(body, prepare)
    made = dcafy.convert(model, example_inputs=IMAGES)
    for net in (model, made):
        net(IMAGES).square().mean().backward()
    for name, parameter in model.named_parameters():
        gradient = made.get_parameter(name).grad
        assert (gradient is None) is (parameter.grad is None), name
        assert gradient is None or torch.allclose(gradient, parameter.grad, rtol=1e-4, atol=1e-7), name


class Pyramid(nn.Module):
    """Squeezes each group of channels in a module of its own, and weighs them against one another (EPSA)."""

    def __init__(self) -> None:
        super().__init__()
        self.squeezes = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Sigmoid())
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        groups = torch.stack(x.chunk(2, 1), 1)
        weights = torch.stack([squeeze(groups[:, i]) for i, squeeze in enumerate(self.squeezes)], 1)
        return (groups * weights.softmax(1)).flatten(1, 2)


def test_a_block_that_pools_in_several_modules_has_a_connection_in_each() -> None:
    made = connected(trained_like(Net(Pyramid(), Pyramid()), IMAGES))
    assert len(dcafy.connections(made)) == 2
    with torch.no_grad():
        before = made(IMAGES)
        for connection in dcafy.connections(made).values():
            connection.beta.fill_(1)
            assert not torch.equal(made(IMAGES), before)
            connection.beta.fill_(0)


class Recurrent(nn.Module):
    """Sequences of a recurrent layer, which has its channels behind the steps, or behind the samples."""

    def __init__(self, *, batch_first: bool, keep: bool) -> None:
        super().__init__()
        self.batch_first, self.keep = batch_first, keep
        self.steps = nn.GRU(16, 16, batch_first=batch_first)
        self.excite = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.mean(3)
        y, _ = self.steps(rows.transpose(1, 2) if self.batch_first else rows.permute(2, 0, 1))
        if self.keep:
            y = y * self.excite(y.mean(1, keepdim=True))
            return x + y.transpose(1, 2)[..., None]
        y = y.transpose(1, 2) if self.batch_first else y.permute(1, 2, 0)
        return x + (y * self.excite(y.mean(2))[..., None])[..., None]


@pytest.mark.parametrize(("batch_first", "keep"), [(True, False), (False, False), (True, True)])
def test_recurrent_layers_have_their_channels_last(batch_first: bool, keep: bool) -> None:
    units = [Recurrent(batch_first=batch_first, keep=keep) for _ in range(2)]
    plan = dcafy.inspect(Net(*units).eval(), example_inputs=IMAGES)
    assert [(block.dimension, block.channels) for block in plan.blocks] == [("channel", 16)] * 2
    assert len(plan.links) == 1


def writes_into_new(x: Tensor, parts: list[Tensor]) -> Tensor:
    made = x.new_empty(len(x), 32)
    made[:, :16], made[:, 16:] = parts
    return made


def writes_into_zeros(x: Tensor, parts: list[Tensor]) -> Tensor:
    made = torch.zeros(x.shape[0], 32)
    made[:, :16] = parts[0]
    made[:, 16:].copy_(parts[1])
    return made


def adds_into_zeros(x: Tensor, parts: list[Tensor]) -> Tensor:
    made = torch.zeros(x.shape[0], 2, 16)
    made[:, 0] += parts[0]
    made.select(1, 1).add_(parts[1])
    return made.flatten(1)


@pytest.mark.parametrize("join", [writes_into_new, writes_into_zeros, adds_into_zeros])
def test_what_is_written_into_a_tensor_is_heard_and_told(join: Callable[[Tensor, list[Tensor]], Tensor]) -> None:
    """G and T that are put together in place are those of the same network that concatenates them."""

    def prepare(unit: nn.Module) -> None:
        unit.expand = nn.Linear(32, 32)

    def body(unit: Any, x: Tensor, join: Any = join) -> Tensor:
        values = unit.expand(join(x, [x.mean((2, 3)), x.amax((2, 3))])).sigmoid().chunk(2, 1)
        gate = join(x, list(values)).unflatten(1, (2, 16)).mean(1)
        return x * gate[:, :, None, None]

    made = connected(network(body, prepare))
    twin = dcafy.convert(
        network(functools.partial(body, join=lambda _, parts: torch.cat(parts, 1)), prepare), example_inputs=IMAGES
    )
    state = made.state_dict()
    assert [value.shape for value in twin.state_dict().values()] == [value.shape for value in state.values()]
    twin.load_state_dict(state)
    with torch.no_grad():
        for net in (made, twin):
            for connection in dcafy.connections(net).values():
                connection.beta.fill_(0.7)
        assert torch.equal(made(IMAGES), twin(IMAGES))


def test_a_map_is_told_as_its_fusion_reads_it() -> None:
    def in_place(unit: Any, x: Tensor) -> Tensor:
        gate = unit.excite(x.mean((2, 3)))
        gate.mul_(2.0)
        y = x * gate[:, :, None, None]
        gate.zero_()
        return y

    def plain(unit: Any, x: Tensor) -> Tensor:
        return x * (unit.excite(x.mean((2, 3))) * 2.0)[:, :, None, None]

    outputs = []
    for body in (in_place, plain):
        with seeded(3):
            made = dcafy.convert(network(body), example_inputs=IMAGES)
        with torch.no_grad():
            for connection in dcafy.connections(made).values():
                connection.beta.fill_(0.7)
            outputs.append(made(IMAGES))
    assert torch.equal(*outputs)


def test_a_variable_of_old_is_a_tensor() -> None:
    def body(unit: Any, x: Tensor) -> Tensor:
        zeros = torch.autograd.Variable(torch.zeros(x.size(0), x.size(1)))
        assert isinstance(x, torch.autograd.Variable)
        return x * unit.excite(x.mean((2, 3)) + zeros)[:, :, None, None]

    connected(network(body))


def test_a_partial_forward_holds_the_block_itself() -> None:
    def prepare(unit: nn.Module) -> None:
        unit.forward = functools.partial(scaled, unit, scale=2.0)

    model = network(Unit.attend, prepare)
    made = connected(model)
    plain = dcafy.revert(copy.deepcopy(made))
    assert plain.units[1].forward.args == (plain.units[1],)
    assert torch.equal(plain(IMAGES), model(IMAGES))


def scaled(unit: Any, x: Tensor, scale: float = 1.0) -> Tensor:
    return unit.attend(unit.conv(x)) * scale


def counts(unit: Any, context: Tensor) -> Tensor:
    unit.seen += 1
    return context


def averages_in_training(unit: Any, context: Tensor) -> Tensor:
    if unit.training:
        unit.usual = 0.9 * unit.usual + 0.1 * context.detach().mean(0)
    return context - unit.usual


@pytest.mark.parametrize("keeps", [counts, averages_in_training])
def test_a_block_that_keeps_a_buffer_is_connected(keeps: Callable[[Any, Tensor], Tensor]) -> None:
    def prepare(unit: nn.Module) -> None:
        unit.register_buffer("seen", torch.zeros(()))
        unit.register_buffer("usual", torch.zeros(16))

    def body(unit: Any, x: Tensor) -> Tensor:
        return x * unit.excite(keeps(unit, x.mean((2, 3))))[:, :, None, None]

    made = connected(network(body, prepare), others=())
    before = made.units[0].seen.clone(), made.units[0].usual.clone()
    made.train()(IMAGES)
    assert not all(torch.equal(*pair) for pair in zip(before, (made.units[0].seen, made.units[0].usual), strict=True))


def test_why_training_cannot_be_followed_is_said() -> None:
    def body(unit: Any, x: Tensor) -> Tensor:
        context = x.mean((2, 3))
        if unit.training:
            with torch.no_grad():
                unit.usual.lerp_(context.mean(0), 0.1)
        return x * unit.excite(context - unit.usual)[:, :, None, None]

    model = network(body, lambda unit: unit.register_buffer("usual", torch.zeros(16)))
    with pytest.raises(dcafy.NoAttentionError, match=r"in training than in eval, and there .* under torch\.no_grad"):
        dcafy.convert(model, example_inputs=IMAGES)


def test_blocks_that_lie_beside_one_another_are_said_to() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = SE(3 * 4), SE(3 * 4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.pixel_unshuffle(x, 2)
            return self.left(x) + self.right(x)

    with pytest.raises(dcafy.NoAttentionError, match="beside one another") as caught:
        dcafy.convert(Beside().eval(), example_inputs=IMAGES)
    assert "What was skipped" not in str(caught.value)


def test_a_pooled_map_that_is_weighed_is_no_attention() -> None:
    """What was pooled and spread again has a weight that says how far it is from X (CAN): the weight is no X."""

    def body(unit: Any, x: Tensor) -> Tensor:
        y = unit.attend(x)
        around = F.interpolate(unit.of_context(F.adaptive_avg_pool2d(y, 1)), y.shape[2:])
        weight = unit.of_difference(y - around).sigmoid()
        return y + around * weight

    def prepare(unit: nn.Module) -> None:
        unit.of_context, unit.of_difference = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)

    connected(network(body, prepare))
