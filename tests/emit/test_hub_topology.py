"""Topology ``hub``: a block hears the state of one LSTM cell that has read every G before it in its stage."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from trained import evaluate, images, seeded, trained

import dcafy
from dcafy.attention import CBAM, SE
from dcafy.conversion import appraise
from dcafy.emit.cell import LightCell
from dcafy.emit.ends import wires_of

X, Y = images(2, 16), images(2, 16, seed=2)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, attention: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, 1 + (inputs != outputs), 1)
        self.norm = nn.BatchNorm2d(outputs)
        self.attention = attention(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.attention(self.norm(self.conv(x))))


def with_se(channels: int) -> nn.Module:
    return SE(channels, 2, init="paper")


class Network(nn.Module):
    """Two blocks of 12 channels, then four of 16."""

    def __init__(self, attention: Callable[[int], nn.Module] = with_se) -> None:
        super().__init__()
        widths = (3, 12, 12, 16, 16, 16, 16)
        self.blocks = nn.Sequential(*(Block(a, b, attention) for a, b in itertools.pairwise(widths)))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


def moved(connected: Any) -> Any:
    with seeded(3), torch.no_grad():
        for connection in dcafy.connections(connected).values():
            connection.alpha.uniform_(0.5, 1.5)
            connection.beta.uniform_(0.5, 1.5)
    return connected


def converted(model: nn.Module, **options: Any) -> Any:
    with seeded(1):
        return dcafy.convert(model, topology="hub", reduction=2, example_inputs=X, **options)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained(Network, images(8, 16))


@pytest.fixture(scope="module")
def connected(model: nn.Module) -> Any:
    return moved(converted(model)).eval()


def test_exact_and_what_it_is_made_of(model: nn.Module) -> None:
    fresh = converted(model)
    assert list(dcafy.connections(fresh)) == [
        f"blocks.{i}.attention<-blocks.{i - 1}.attention" for i in (1, 3, 4, 5)
    ]  # none from stage to stage
    for x in (X, images(3, 20), images(1, 4)):
        assert torch.equal(evaluate(fresh, x), evaluate(model, x))
    cells = {id(module): module for module in fresh.modules() if isinstance(module, LightCell)}
    assert sorted((cell.channels, cell.hidden, len(cell.reduce)) for cell in cells.values()) == [(12, 6, 1), (16, 8, 2)]
    assert all("dca" in key.split(".") for key in fresh.state_dict().keys() - model.state_dict().keys())
    costs = {cost.topology: cost for cost in appraise(model, example_inputs=X).costs}
    assert costs["hub"].connections == 4
    own = [p for name, p in converted(model, min_hidden=8).named_parameters() if "dca" in name.split(".")]
    assert costs["hub"].parameters < sum(p.numel() for p in own)  # at the default reduction it is smaller


NORM = ("running_mean", "running_var", "weight", "bias")


def test_the_equations(connected: Any) -> None:
    """In float64, from the numbers alone: the cell reads each G over its root mean square."""
    state, x = {key: value.double() for key, value in connected.state_dict().items()}, X.double()
    before = torch.empty(0)
    for i, block in enumerate(connected.blocks):
        at = f"blocks.{i}"
        x = torch.nn.functional.conv2d(x, state[f"{at}.conv.weight"], state[f"{at}.conv.bias"], block.conv.stride, 1)
        mean, var, w, b = (state[f"{at}.norm.{key}"][:, None, None] for key in NORM)
        x = (x - mean) / (var + 1e-5).sqrt() * w + b
        G = x.mean((2, 3))
        if i in (0, 2):
            h = c = torch.zeros_like(G)
            heard = G
        else:
            part = f"{at}.attention.dca.parts.0"
            own = {1: 1, 3: 3, 4: 3, 5: 3}[i]  # where the state dict of a shared cell has its numbers, too
            cell = f"blocks.{own}.attention.dca.parts.0.cell"
            read = before / (before.square().mean(1, keepdim=True) + 1e-8).sqrt()
            z = torch.relu(read @ state[f"{cell}.reduce.0.weight"].T + state[f"{cell}.reduce.0.bias"])
            z = z @ state[f"{cell}.expand.0.weight"].T + state[f"{cell}.expand.0.bias"]
            if f"{cell}.reduce.1.weight" in state:
                again = torch.relu(h @ state[f"{cell}.reduce.1.weight"].T)
                z = z + again @ state[f"{cell}.expand.1.weight"].T
            i_, f, g, o = z.split(G.shape[1], 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i_) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.sigmoid(c)
            heard = state[f"{part}.alpha"] * G + state[f"{part}.beta"] * h
        before = G
        se = f"{at}.attention"
        w1, b1, w2, b2 = (state[f"{se}.{layer}.{key}"] for layer in ("reduce", "expand") for key in ("weight", "bias"))
        t = torch.sigmoid(torch.relu(heard @ w1.flatten(1).T + b1) @ w2.flatten(1).T + b2)
        x = torch.relu(x * t[:, :, None, None])
    expected = x.mean((2, 3)) @ state["head.weight"].T + state["head.bias"]
    assert (evaluate(copy.deepcopy(connected).double(), X.double()) - expected).abs().max() < 1e-9


def test_alive_under_freeze_base(model: nn.Module) -> None:
    fresh = dcafy.freeze_base(converted(model)).train()
    own = {name: p for name, p in fresh.named_parameters() if p.requires_grad}
    optimizer, reached = torch.optim.SGD(own.values(), lr=0.5), set[str]()
    for step in range(3):
        optimizer.zero_grad()
        fresh(images(4, 16, seed=step)).square().sum().backward()
        reached |= {name for name, p in own.items() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert reached == own.keys()


def test_runs_parts_copies_and_graphs(connected: Any) -> None:
    expected = evaluate(connected, X)
    for twin in (copy.deepcopy(connected), pickle.loads(pickle.dumps(connected)), dcafy.flat(connected)):
        assert torch.equal(evaluate(twin, X), expected)
    assert torch.equal(evaluate(torch.export.export(connected, (X,)).module(), X), expected)
    with torch.no_grad():
        connected.blocks[3](torch.randn(2, 16, 8, 8))  # by itself it hears nothing
        for _ in range(2):
            assert torch.equal(connected.head(connected.blocks(X).mean((2, 3))), expected)
        first, second = dcafy.run(connected), dcafy.run(connected)
        with first:
            a = connected.blocks[:4](X)
        with second:
            b = connected.blocks[:4](Y)
        with first:
            assert torch.equal(connected.head(connected.blocks[4:](a).mean((2, 3))), expected)
        with second:
            assert torch.equal(connected.head(connected.blocks[4:](b).mean((2, 3))), connected(Y))


def test_checkpoints_and_two_forwards_before_one_backward(connected: Any) -> None:
    def checkpointed(model: Any, x: Tensor) -> Tensor:
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return model.head(x.mean((2, 3)))

    def gradients(run: Callable[[Any], Tensor]) -> list[Tensor]:
        twin = copy.deepcopy(connected)
        run(twin).square().sum().backward()
        return [p.grad for p in twin.parameters()]

    plain = gradients(lambda model: torch.cat((model(X), model(Y))))
    again = gradients(lambda model: torch.cat((checkpointed(model, X), checkpointed(model, Y))))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(plain, again, strict=True))


def test_taken_out_and_kept(model: nn.Module, connected: Any, tmp_path: Any) -> None:
    assert len(wires_of(connected)) == 2
    back = dcafy.revert(connected)
    assert torch.equal(evaluate(back, X), evaluate(model, X))
    assert wires_of(back) == ()
    dcafy.save(connected, tmp_path)
    assert torch.equal(evaluate(dcafy.load(tmp_path, model=model), X), evaluate(connected, X))
    for name in dcafy.connections(connected):
        less = dcafy.drop(connected, name)
        silent = copy.deepcopy(connected)
        host = silent.get_submodule(name.partition("<-")[0])
        host.dca.forward = functools.partial(deaf, host.dca.parts[0])
        assert torch.equal(evaluate(less, X), evaluate(silent, X)), name


def deaf(part: Any, G: Tensor, *messages: Tensor | None) -> Tensor:
    """What a connection gives that is told nothing."""
    return part.alpha * G


def test_spatial_attention_and_several_outputs() -> None:
    model = trained(lambda: Network(lambda channels: CBAM(channels, 2, init="paper")), images(8, 16))
    fresh = converted(model)
    assert torch.equal(evaluate(fresh, X), evaluate(model, X))
    assert {c.dimension for c in dcafy.connections(fresh).values()} == {"channel", "spatial"}
    for name, connection in dcafy.connections(fresh).items():
        with torch.no_grad():
            connection.beta.fill_(0.5)
            assert not torch.equal(fresh(X), model(X)), name
            connection.beta.zero_()
    moved(fresh)
    for x in (X, images(1, 24)):
        assert torch.allclose(evaluate(dcafy.flat(fresh), x), evaluate(fresh, x), atol=1e-6)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision mobilenet": lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
    "timm seresnet": lambda: timm.create_model("legacy_seresnet18", num_classes=5),
    "timm skresnet": lambda: timm.create_model("skresnet18", num_classes=5),
    "timm cbam": lambda: timm.create_model("resnet26d", num_classes=5, block_args={"attn_layer": "cbam"}),
}


@pytest.mark.zoo
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_libraries(name: str) -> None:
    x = images(2, 96)
    model = trained(NETWORKS[name], images(4, 96))
    fresh = dcafy.convert(model, topology="hub", example_inputs=x)
    for given in (x, images(1, 128)):
        assert torch.equal(evaluate(fresh, given), evaluate(model, given))
    result = moved(fresh)
    assert not torch.equal(evaluate(result, x), evaluate(model, x))
    assert torch.allclose(evaluate(dcafy.flat(result), x), evaluate(result, x), atol=1e-5)
    own = {key: p for key, p in result.named_parameters() if "dca" in key.split(".")}
    result.train()(x).square().sum().backward()
    assert [key for key, p in own.items() if p.grad is None or not p.grad.any()] == []
