"""Attention that hands a state on from unit to unit (rla, dia): exact at the start, alive, and right in every run."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file
from snapshot import differences, snapshot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from trained import evaluate, images, seeded, trained

import dcafy
from dcafy.attention import SE
from dcafy.emit.ends import wires_of
from dcafy.errors import InputError, NoAttentionError

KINDS = ("rla", "dia")
X, Y = images(2, 16), images(2, 16, seed=2)


class Unit(nn.Module):
    """Adds in place, as torchvision's do."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.short = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += x if self.short is None else self.short(x)
        return torch.relu_(y)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.Sequential(Unit(16, 16), Unit(16, 16))
        self.second = nn.Sequential(Unit(16, 24, 2), Unit(24, 24), Unit(24, 24))
        self.fc = nn.Linear(24, 5)

    def features(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


class Fork(nn.Module):
    """Two ways of the same width, and units in front of them and behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.front = nn.Conv2d(3, 16, 3, padding=1), Unit(16, 16)
        self.left, self.right = nn.Sequential(Unit(16, 16), Unit(16, 16)), nn.Sequential(Unit(16, 16), Unit(16, 16))
        self.behind = Unit(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(self.stem(x))
        return self.behind(self.left(x) + self.right(x)).mean((2, 3))


class Twins(nn.Module):
    """One part for two images: what it makes of the first is nothing to the second."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), Unit(16, 16), Unit(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3)) - self.body(x.flip(3) * 0.5).mean((2, 3))


def inserted(model: nn.Module, kind: str, **options: Any) -> nn.Module:
    with seeded(3):
        return dcafy.insert(model, kind, reduction=4, example_inputs=X, **options)


def new(model: nn.Module, kind: str) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if kind in name.split(".")}


def moved(model: nn.Module, kind: str) -> nn.Module:
    """With what was put in away from where it starts, its norms' statistics, too."""
    with seeded(4), torch.no_grad():
        for value in new(model, kind).values():
            value.add_(torch.randn_like(value), alpha=0.1)
        for name, buffer in model.named_buffers():
            if kind in name.split(".") and "running" in name:
                buffer.add_(torch.rand_like(buffer), alpha=0.3)
    return model


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model() -> Network:
    return trained(Network, images(8, 16))


@pytest.fixture(scope="module")
def result(model: Network, kind: str) -> Any:
    return moved(inserted(model, kind), kind).eval()


# What it computes --------------------------------------------------------------------------------------


def normed(state: dict[str, Tensor], path: str, x: Tensor) -> Tensor:
    mean, var, w, b = (
        state[f"{path}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * w + b


def cell(state: dict[str, Tensor], path: str, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's modified LSTM, gate by gate."""
    gates = []
    for number, read in enumerate((x, h)):
        w1, b1, w2, b2 = (
            state.get(f"{path}.{layer}.{number}.{key}") for layer in ("reduce", "expand") for key in ("weight", "bias")
        )
        if w1 is not None:
            hidden = read @ w1.T + (0 if b1 is None else b1)
            gates.append(hidden.clamp_min(0) @ w2.T + (0 if b2 is None else b2))
    i, f, g, o = sum(gates).split(c.shape[1], 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.sigmoid(), c


PATHS = ("first.0", "first.1", "second.0", "second.1", "second.2")


def restated(state: dict[str, Tensor], kind: str, x: Tensor) -> Tensor:
    """Network with rla or dia, from the numbers alone."""
    x = F.conv2d(x, state["stem.weight"], state["stem.bias"], padding=1)
    h, hc = torch.zeros(x.shape[0], 32, *x.shape[2:], dtype=x.dtype), None
    for path in PATHS:
        stride = 2 if path == "second.0" else 1
        y = F.conv2d(x, state[f"{path}.conv1.weight"], stride=stride, padding=1)
        if f"{path}.rla.enter.conv.weight" in state:  # what a convolution of x and h side by side adds up to
            both = torch.cat((state[f"{path}.conv1.weight"], state[f"{path}.rla.enter.conv.weight"]), 1)
            y = F.conv2d(torch.cat((x, h), 1), both, stride=stride, padding=1)
        y = normed(state, f"{path}.bn2", F.conv2d(normed(state, f"{path}.bn1", y).clamp_min(0),
                                                  state[f"{path}.conv2.weight"], padding=1))  # fmt: skip
        if kind == "rla":
            h = F.avg_pool2d(h, 2) if stride == 2 else h
            z = h + F.conv2d(y, state[f"{path}.rla.out.weight"])
            h = F.conv2d(normed(state, f"{path}.rla.norm", z).tanh(), state[f"{path}.rla.recurrent.weight"], padding=1)
        else:
            G = y.mean((2, 3))
            hc = (torch.zeros_like(G), torch.zeros_like(G)) if path.endswith(".0") else hc
            assert hc is not None
            hc = cell(state, f"{path}.dia.cell", G, *hc)
            y = y * 4 * hc[0][:, :, None, None]
        short = x if stride == 1 else F.conv2d(x, state[f"{path}.short.weight"], state[f"{path}.short.bias"], stride=2)
        x = (y + short).clamp_min(0)
    logits = x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    if kind == "rla":
        last = normed(state, "fc.rla.norm", h).clamp_min(0).mean((2, 3))
        logits = logits + last @ state["fc.rla.fc.weight"].T
    return logits


def test_the_equations(result: Any, kind: str) -> None:
    twin = copy.deepcopy(result).double()
    for x in (X.double(), images(3, 20, seed=5).double()):
        assert (evaluate(twin, x) - restated(twin.state_dict(), kind, x)).abs().max() < 1e-9


@pytest.mark.parametrize(("kind", "reduction", "own"), [("rla", 16, 311_616), ("dia", 20, 2_801_020)])
def test_the_papers_counts(kind: str, reduction: int, own: int) -> None:
    """rla: 24.67 M in units of 2^20, as printed; its paper has 2,048 more, for the map of zeros of the first unit."""
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    before = sum(p.numel() for p in model.parameters())
    result = dcafy.insert(model, kind, reduction=reduction, example_inputs=torch.empty(1, 3, 224, 224, device="meta"))
    assert sum(p.numel() for p in result.parameters()) - before == own
    if kind == "rla":
        assert f"{(before + own) / 2**20:.2f}" == f"{(before + own + 2048) / 2**20:.2f}" == "24.67"


# Exact and alive ---------------------------------------------------------------------------------------


def test_exact_at_the_start(model: Network, kind: str) -> None:
    source = copy.deepcopy(model).train()
    source.first[0].bn1.eval()
    before, random = snapshot(source), torch.random.get_rng_state()
    result = inserted(source, kind)
    assert differences(before, snapshot(source)) == []
    assert torch.equal(random, torch.random.get_rng_state())
    assert isinstance(result, Network)
    state = result.state_dict()
    assert all(torch.equal(state[key], value) for key, value in source.state_dict().items())
    assert all(kind in key.split(".") for key in state.keys() - source.state_dict().keys())
    assert not result.first[0].bn1.training
    assert result.first[1].get_submodule(kind).training
    original = copy.deepcopy(source)
    for x in (X, images(1, 16), images(3, 20), images(1, 4)):
        with torch.no_grad():
            assert torch.equal(original.train()(x), result.train()(x))
            assert torch.equal(original.eval()(x), result.eval()(x))
    buffers = dict(result.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in original.named_buffers())
    shared = dict(inserted(source, kind, copy=False).named_parameters())
    assert all(shared[name] is parameter for name, parameter in source.named_parameters())
    with torch.no_grad():
        assert not torch.allclose(inserted(model, kind, init="paper").eval()(X), model(X), atol=1e-3)


def test_alive_under_freeze_base(model: Network, kind: str) -> None:
    result = dcafy.freeze_base(inserted(model, kind)).train()
    own = new(result, kind)
    assert {name for name, p in result.named_parameters() if p.requires_grad} == own.keys()
    groups = dcafy.parameter_groups(result, lr=0.05)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in own.values()}
    optimizer, reached = torch.optim.SGD(groups, lr=0.05), set[str]()
    for step in range(3):
        loss = F.cross_entropy(result(images(4, 16, seed=step)), torch.tensor([0, 1, 2, 3]))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in own.values())
        reached |= {name for name, p in own.items() if p.grad.any()}
        optimizer.step()
    assert reached == own.keys()
    assert not torch.equal(evaluate(result.eval(), X), evaluate(model, X))


def test_what_starts_at_zero_moves_the_output(model: Network, kind: str) -> None:
    result = inserted(model, kind).eval()
    zero = {name: p for name, p in new(result, kind).items() if not p.any() and "norm" not in name}
    assert len(zero) == {"rla": 5, "dia": 8}[kind]
    expected = evaluate(model, X)
    for name, parameter in zero.items():
        with torch.no_grad(), seeded(1):
            parameter.add_(torch.randn_like(parameter))
            assert not torch.equal(result(X), expected), name
            parameter.zero_()
    assert torch.equal(evaluate(result, X), expected)


# Runs --------------------------------------------------------------------------------------------------


def test_parts_and_units_by_themselves(result: Any) -> None:
    expected = evaluate(result, X)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(result.fc(result.features(X).mean((2, 3))), expected)
        z = torch.randn(2, 24, 8, 8, generator=torch.Generator().manual_seed(0))
        alone = result.second[1](z)  # hears nothing
        assert torch.equal(result(X), expected)
        assert torch.equal(result.second[1](z), alone)
        result.second[2](z)
        assert torch.equal(result.fc(result.features(X).mean((2, 3))), expected)
        result.first[0](torch.randn(3, 16, 16, 16))
        assert torch.equal(result.second[0](torch.ones(2, 16, 16, 16)), result.second[0](torch.ones(2, 16, 16, 16)))
        first, second = dcafy.run(result), dcafy.run(result)
        with first:
            a = result.first(result.stem(X))
        with second:
            b = result.first(result.stem(Y))
        with first:
            assert torch.equal(result.fc(result.second(a).mean((2, 3))), expected)
        with second:
            assert torch.equal(result.fc(result.second(b).mean((2, 3))), result(Y))


def test_a_run_that_failed_leaves_nothing(result: Any) -> None:
    expected = evaluate(result, X)
    handle = result.second[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        result(Y)
    handle.remove()
    assert torch.equal(evaluate(result, X), expected)
    leaves = [value for module in result.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    assert leaves == []


def test_a_run_inside_a_run(result: Any) -> None:
    """A teacher that is asked half-way, a copy, whose units are ends of the same wire."""
    expected, teacher = evaluate(result, X), copy.deepcopy(result)
    asked = []
    handle = result.second[0].register_forward_hook(lambda *_: asked.append(evaluate(teacher, Y)))
    assert torch.equal(evaluate(result, X), expected)
    handle.remove()
    assert torch.equal(asked[0], evaluate(teacher, Y))


def gradients(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> list[Tensor]:
    model = copy.deepcopy(model).train()
    run(model).square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_checkpoints_and_two_forwards_before_one_backward(result: Any) -> None:
    def checkpointed(model: Any, x: Tensor) -> Tensor:
        x = model.stem(x)
        for unit in (*model.first, *model.second):
            x = checkpoint(unit, x, use_reentrant=False)
        return model.fc(x.mean((2, 3)))

    plain = gradients(result, lambda model: torch.cat((model(X), model(Y))))
    again = gradients(result, lambda model: torch.cat((checkpointed(model, X), checkpointed(model, Y))))
    assert len(plain) == len(again) == len(list(result.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_threads(result: Any) -> None:
    given = [images(2, 16, seed=seed) for seed in range(4)]
    expected, wrong = [evaluate(result, x) for x in given], []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(5) if not torch.equal(evaluate(result, given[i]), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_ways_that_fork_and_parts_that_are_called_twice(kind: str) -> None:
    fork = trained(Fork, images(8, 16))
    result = moved(inserted(fork, kind), kind).eval()
    seen = []
    handle = result.right.register_forward_hook(lambda module, given, output: seen.append(output.clone()))
    expected = evaluate(result, X)
    with torch.no_grad():
        result.left[0].conv1.weight.mul_(2)
        assert not torch.equal(result(X), expected)
    handle.remove()
    assert torch.equal(*seen)  # which hears the unit in front of both ways
    assert torch.equal(evaluate(inserted(fork, kind).eval(), X), evaluate(fork, X))
    twins = trained(Twins, images(8, 16))
    result = moved(inserted(twins, kind), kind).eval()
    made = []
    with torch.no_grad():
        for x in (X, X.flip(3) * 0.5):
            with dcafy.run(result):
                made.append(result.body(x).mean((2, 3)))
        assert torch.equal(result(X), made[0] - made[1])  # the second pass heard nothing of the first


# Copies, graphs, compilers -----------------------------------------------------------------------------


def test_copies_and_pickles(result: Any, kind: str) -> None:
    expected = evaluate(result, X)
    for twin in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert torch.equal(evaluate(twin, X), expected)
        own = list(dict.fromkeys(new(twin, kind)))
        assert own == list(new(result, kind))  # what units share is shared
    half = copy.deepcopy(result).bfloat16()
    assert evaluate(half, X.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert evaluate(result, X).dtype == torch.bfloat16
    laid_out = copy.deepcopy(result).to(memory_format=torch.channels_last)
    assert torch.allclose(evaluate(laid_out, X.to(memory_format=torch.channels_last)), expected, atol=1e-4)


def test_traced_and_exported(result: Any) -> None:
    expected = evaluate(result, X)
    assert torch.equal(evaluate(torch.fx.symbolic_trace(result), X), expected)
    auto = torch.export.Dim.AUTO
    program = torch.export.export(result, (X,), dynamic_shapes=({0: auto, 2: auto, 3: auto},)).module()
    for x in (X, images(3, 24)):
        assert torch.equal(evaluate(program, x), evaluate(result, x))


@pytest.mark.filterwarnings("ignore:The TorchScript type system")
def test_flat_and_scripted(result: Any) -> None:
    """One plain graph, whose other sizes are right, too; a part of such a network is refused with the reason."""
    plain = dcafy.flat(result)
    assert not any(type(module).__module__.startswith("dcafy") for module in plain.modules())
    assert plain.state_dict().keys() == result.state_dict().keys()
    scripted, auto = torch.jit.script(plain), torch.export.Dim.AUTO
    program = torch.export.export(plain, (X,), dynamic_shapes=({0: auto, 2: auto, 3: auto},)).module()
    for x in (X, images(1, 20, seed=3)):
        assert torch.equal(evaluate(plain, x), evaluate(result, x))
        assert torch.equal(evaluate(program, x), evaluate(result, x))  # sizes that a forward asks for stay open
        assert torch.allclose(evaluate(scripted, x), evaluate(result, x), atol=1e-5)
    for one in (plain, result):
        one.zero_grad()
        one(X).square().sum().backward()
    ours, theirs = (dict(one.named_parameters()) for one in (plain, result))
    assert all(torch.allclose(theirs[name].grad, p.grad, rtol=1e-4, atol=1e-5) for name, p in ours.items())
    result.zero_grad()
    with pytest.raises(InputError, match="hand a state on by themselves"):
        dcafy.flat(result.second)


@pytest.mark.slow
def test_compiled(result: Any) -> None:
    twin = copy.deepcopy(result).train()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    compiled(X).square().sum().backward()
    expected = gradients(result, lambda model: model(X))
    assert all(torch.allclose(p.grad, g, atol=1e-5) for p, g in zip(twin.parameters(), expected, strict=True))
    assert torch.allclose(evaluate(compiled.eval(), Y), evaluate(twin.eval(), Y), atol=1e-6)


# What is told of it ------------------------------------------------------------------------------------


def test_usage_is_what_changing_the_state_does(result: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros, the other image's and the average state, in the place of what a module hears and of what all do."""
    data = [(images(2, 16, seed=seed), torch.tensor([0, 1])) for seed in range(3)]
    found = dcafy.usage(result, data)
    assert (found.connections, found.loss_change, found.images) == ((), 0.0, 6)
    assert found.states is not None
    heard = {path: module.relay for path, module in result.named_modules() if path.split(".")[-1] == kind}
    heard = {path: relay for path, relay in heard.items() if relay.hears}
    assert [(row.name, row.hears) for row in found.states.units] == [(p, *relay.hears) for p, relay in heard.items()]
    relays, seen = type(next(iter(heard.values()))), dict[Any, list[Tensor]]()
    own = relays.heard

    def losses() -> Tensor:
        with torch.no_grad():
            return torch.cat([F.cross_entropy(result(x), y, reduction="none") for x, y in data]).double()

    def noting(relay: Any, like: Tensor, ear: int = 0) -> Tensor:
        state = own(relay, like, ear)
        seen.setdefault((relay, ear), []).append(state)
        return state

    monkeypatch.setattr(relays, "heard", noting)
    before = losses()
    means = {key: torch.cat(states).mean(0, keepdim=True) for key, states in seen.items()}
    changes: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "cut": lambda key, state: torch.zeros_like(state),
        "shuffled": lambda key, state: state.flip(0),
        "mean": lambda key, state: means[key].expand_as(state),
    }
    for name, chosen in {**{path: {relay} for path, relay in heard.items()}, "": set(heard.values())}.items():
        row = next((row for row in found.states.units if row.name == name), found.states)
        for which, change in changes.items():

            def changed(relay: Any, like: Tensor, ear: int = 0, own: Any = own, change: Any = change) -> Tensor:
                state = own(relay, like, ear)
                return change((relay, ear), state) if relay in chosen else state  # noqa: B023

            monkeypatch.setattr(relays, "heard", changed)
            difference = losses() - before
            effect = getattr(row, which)
            assert effect.loss == pytest.approx(difference.mean().item(), abs=1e-5), (name, which)
            assert effect.loss_error == pytest.approx(difference.std().item() / 6**0.5, rel=1e-3, abs=1e-5)
            assert effect.loss or kind == "dia", (name, which)
    assert "the state that is handed on" in str(found)
    monkeypatch.undo()
    assert dcafy.usage(nn.DataParallel(result), data).states == found.states


def test_what_is_told_of_it(result: Any, kind: str) -> None:
    found = dcafy.summary(result)
    ((one,), own) = found.handed_on, new(result, kind)
    assert (one.kind, one.parameters) == (kind, sum(p.numel() for p in own.values()))
    assert f"{one.parameters:,} parameters: it hands a state on" in str(found)
    assert "arXiv" in str(found)
    assert one.hears[f"second.2.{kind}"] == ("second.1",)
    assert "topology" not in str(found)  # there is no block that one could connect
    for asked in (dcafy.connections, dcafy.revert, lambda model: dcafy.drop(model, ["second.1"])):
        with pytest.raises(InputError, match="hand a state on by themselves"):
            asked(result)


# Beside others -----------------------------------------------------------------------------------------


def test_behind_and_before_other_attention_and_connected(model: Network, kind: str) -> None:
    with_se = inserted(model, "se")
    below = moved(inserted(with_se, kind), kind).eval()
    connected = dcafy.convert(below, example_inputs=X)
    assert len(dcafy.connections(connected)) == 4
    assert len(wires_of(connected)) == 2
    back = dcafy.revert(connected)
    for twin in (connected, back, dcafy.flat(connected), pickle.loads(pickle.dumps(connected))):
        assert torch.equal(evaluate(twin, X), evaluate(below, X))
    with torch.no_grad():
        for connection in dcafy.connections(connected).values():
            connection.beta.fill_(0.7)
    with torch.no_grad():
        for layer in (module for module in connected.modules() if isinstance(module, SE)):
            layer.expand.weight.normal_()
    assert not torch.equal(evaluate(connected, X), evaluate(below, X))
    assert torch.equal(evaluate(dcafy.flat(connected), X), evaluate(connected, X))
    assert torch.equal(evaluate(inserted(inserted(model, kind), "eca").eval(), X), evaluate(model, X))
    both = inserted(inserted(model, "rla"), "dia").eval()
    assert torch.equal(evaluate(both, X), evaluate(model, X))
    assert len(wires_of(both)) == 2


class Inline(Unit):
    """Has attention in its very forward: what is put in and what connects go into one module."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.fc = nn.Linear(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y = y * torch.sigmoid(self.fc(y.mean((2, 3))))[:, :, None, None]
        return F.relu(y + x)


class OfInline(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.units = nn.Conv2d(3, 16, 3, padding=1), nn.Sequential(*(Inline(16, 16) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.units(self.stem(x)).mean((2, 3))


@pytest.mark.parametrize("name", ["eca", *KINDS])
def test_revert_leaves_in_what_was_put_into_the_host_of_a_block(name: str) -> None:
    below = moved(inserted(trained(OfInline, images(8, 16)), name), name).eval()
    connected = dcafy.convert(below, example_inputs=X)
    assert {"units.1", "units.2"} <= dcafy.connections(connected).keys()
    for twin in (connected, pickle.loads(pickle.dumps(connected)), dcafy.revert(connected)):
        assert torch.equal(evaluate(twin, X), evaluate(below, X))
    assert dcafy.revert(connected).state_dict().keys() == below.state_dict().keys()


def test_convert_gives_what_is_connected_by_nature(model: Network, kind: str) -> None:
    result = dcafy.convert(model, attention=kind, attention_reduction=4, example_inputs=X)
    assert torch.equal(evaluate(result.eval(), X), evaluate(model, X))
    assert new(result, kind)
    with pytest.raises(NoAttentionError, match="from unit to unit"):
        dcafy.convert(result, example_inputs=X)
    if kind == "rla":  # a cell by itself attends its unit all the same
        with pytest.raises(InputError, match="nobody to hand a state on to"):
            inserted(Twins(), kind, where="body.1")
    only = inserted(model, kind, where="second.*").eval()
    assert {name.split(".")[0] for name in new(only, kind)} <= {"second", "fc"}
    assert torch.equal(evaluate(only, X), evaluate(model, X))


def test_a_folder(model: Network, result: Any, kind: str, tmp_path: Path) -> None:
    dcafy.save(result, tmp_path)
    loaded = dcafy.load(tmp_path, model=inserted(model, kind))
    assert torch.equal(evaluate(loaded, X), evaluate(result, X))
    dcafy.save(result, tmp_path, base=False)
    held = load_file(tmp_path / "connections.safetensors").keys()
    assert set() < held <= result.state_dict().keys() - model.state_dict().keys()
    assert torch.equal(evaluate(dcafy.load(tmp_path, model), X), evaluate(result, X))


@pytest.mark.slow
def test_a_folder_and_the_commands(kind: str, tmp_path: Path, dcafy_command: Callable[..., Any]) -> None:
    """What a zoo builds is read without any code, and what the commands say of it."""
    folder, size, small = tmp_path / "model", ("--input-size", "3x64x64"), ("--set", "width_mult=0.2")
    given = "torchvision:mobilenet_v2", *small, *size
    code, out, _ = dcafy_command("convert", *given, "--attention", kind, "-o", folder)
    assert code == 0
    assert f"0 connections with 0 parameters, {kind} with " in out
    loaded = dcafy.load(folder)
    assert new(loaded, kind)
    moved(loaded, kind).eval()
    dcafy.save(loaded, tmp_path / "again")
    again, x = dcafy.load(tmp_path / "again"), images(1, 64)
    assert torch.equal(evaluate(again, x), evaluate(loaded, x))
    assert list(new(again, kind)) == list(new(loaded, kind))
    code, out, _ = dcafy_command("inspect", folder)
    assert code == 0
    assert f"{kind} in " in out
