"""Inserted attention that is connected: where β starts, what is trained while the base is frozen, and at which rate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from trained import images, seeded, trained

import dcafy
from dcafy.attention.kinds import ATTENTIONS
from dcafy.training import TrainingConfig
from dcafy.training.freezing import frozen_base
from dcafy.training.optimization import groups_of, optimizer_for

STARTING = sorted(name for name, kind in ATTENTIONS.items() if not kind.obstacle and not kind.along)


class Unit(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.units = nn.Sequential(Unit(16, 16), Unit(16, 24), Unit(24, 24))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.units(self.stem(x)).mean((2, 3)))


X = images(6, 16)
Y = torch.arange(6) % 5


def connected(name: str, **options: Any) -> tuple[nn.Module, Any]:
    """A trained-like network, and what comes out where attention is inserted and connected."""
    model = trained(Network, images(8, 16))
    with seeded(3):
        d: Any = dcafy.convert(model, attention=name, attention_reduction=4, example_inputs=X, **options)
    return model, d


def betas(d: nn.Module) -> list[float]:
    return [float(connection.beta.detach()) for connection in dcafy.connections(d).values()]


@pytest.mark.parametrize("message", ["plain", "centred"])
@pytest.mark.parametrize("name", STARTING)
def test_starts_exactly_and_learns_under_freeze_base(name: str, message: str) -> None:
    """β of every connection has a gradient within three steps, and so has every layer; but for ge-theta it starts
    at 0.5. (A bias right before the centring is the same for every image.)"""
    model, d = connected(name, message=message)
    assert set(betas(d)) == {0.0 if name == "ge-theta" else 0.5}
    with torch.no_grad():
        assert torch.equal(d.eval()(X), model(X))
    dcafy.freeze_base(d.double()).train()  # where what is 1e-12 is no rounding
    base = {key: value.clone() for key, value in d.state_dict().items() if key in model.state_dict()}
    optimizer = torch.optim.SGD(dcafy.parameter_groups(d, lr=0.01, connection_lr=0.1), momentum=0.9)
    living: set[str] = set()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(d(X.double()), Y).backward()
        grads = {key: p.grad for key, p in d.named_parameters() if p.grad is not None}
        living |= {key for key, grad in grads.items() if grad.abs().max() > 1e-12}
        optimizer.step()
    assert {key for key, p in d.named_parameters() if p.requires_grad and key.endswith("beta")} <= living
    matches = [c.match for c in dcafy.connections(d).values() if c.centre is not None]
    taken_off = {id(match[-1].bias) for match in matches if isinstance(match, nn.Sequential) and len(match) > 1}
    assert {key for key, p in d.named_parameters() if ".match." in key and id(p) not in taken_off} <= living
    assert all(torch.equal(d.state_dict()[key], value) for key, value in base.items()), "the base has moved"
    assert len(base) == len(model.state_dict())
    kept = dcafy.revert(d)
    assert not torch.equal(kept.eval()(X.double()), model.double()(X.double())), "revert keeps inserted attention"


@pytest.mark.parametrize("name", ["se", "cbam", "bam"])
def test_attention_that_was_trained_starts_at_nothing(name: str) -> None:
    """Its T depends on what it hears, and only β = 0 is exact."""
    model = dcafy.insert(trained(Network, images(8, 16)), name, reduction=4, example_inputs=X)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    d = dcafy.convert(model.eval(), example_inputs=X)
    assert set(betas(d)) == {0.0}
    with torch.no_grad():
        assert torch.equal(d(X), model(X))


def test_one_trained_block_among_others_starts_at_nothing() -> None:
    model = dcafy.insert(trained(Network, images(8, 16)), "se", reduction=4, example_inputs=X)
    with torch.no_grad():
        model.units[2].se.expand.bias[0] = 0.1
    assert betas(dcafy.convert(model, example_inputs=X)) == [0.5, 0.0]


@pytest.mark.parametrize("name", ["ge", "sk"])
def test_what_cannot_start_as_a_no_op_can_be_asked_for(name: str) -> None:
    with pytest.warns(UserWarning, match=f"'{name}' in its paper's own form is not the identity .* by up to \\d"):
        _, d = connected(name, attention_init="paper")
    with pytest.warns(UserWarning, match=f"The schema 'softmax' and '{name}' in its paper's own form are not"):
        connected(name, attention_init="paper", schema="softmax")
    assert set(betas(d)) == {0.0}
    assert dcafy.freeze_base(d).train() is d
    F.cross_entropy(d(X), Y).backward()
    assert all(bool(connection.beta.grad.any()) for connection in dcafy.connections(d).values())


def test_statistics_of_inserted_attention_move_under_freeze_base() -> None:
    _, d = connected("bam")
    before = {key: value.clone() for key, value in d.named_buffers()}
    dcafy.freeze_base(d).train()(X)
    moved = {key for key, value in d.named_buffers() if not torch.equal(value, before[key])}
    assert moved
    assert all("bam" in key.split(".") for key in moved)


def test_it_is_known_again_after_saving(tmp_path: Any) -> None:
    """A folder of a network that a zoo does not build: the same network, inserted and connected again."""
    model = trained(Network, images(8, 16))
    d = dcafy.convert(dcafy.insert(model, "se", reduction=4, example_inputs=X), example_inputs=X)
    dcafy.save(d, tmp_path / "model")
    loaded = dcafy.freeze_base(dcafy.load(tmp_path / "model", dcafy.insert(model, "se", reduction=4, example_inputs=X)))
    trained_ = {key for key, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trained_ == {key for key, _ in loaded.named_parameters() if "se" in key.split(".")}


def test_inserted_attention_is_trained_while_the_base_of_a_plain_network_is_frozen() -> None:
    model = dcafy.insert(Network(), "se", reduction=4, example_inputs=X)
    with frozen_base(model, (model.head,)):
        free = {key.split(".")[0] + "." * ("se" in key) for key, p in model.named_parameters() if p.requires_grad}
    assert free == {"head", "units."}
    assert all(parameter.requires_grad for parameter in model.parameters())


# Rates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", ["chain", "dense"])
def test_alpha_and_beta_have_a_rate_of_their_own(topology: str) -> None:
    """One step of plain SGD on a known gradient, written out."""
    _, d = connected("se", topology=topology)
    d = d.double()
    connections = dcafy.connections(d).values()
    scales = {id(value) for connection in connections for value in (connection.alpha, connection.beta)}
    new = {id(p) for key, p in d.named_parameters() if {"dca", "se"} & {*key.split(".")}}
    groups = dcafy.parameter_groups(d, lr=0.01, connection_lr=0.05, scale_lr=0.3, weight_decay=0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(d.parameters()))
    optimizer = torch.optim.SGD(groups)
    before = {key: p.detach().clone() for key, p in d.named_parameters()}
    for parameter in d.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    optimizer.step()
    for key, parameter in d.named_parameters():
        rate = 0.3 if id(parameter) in scales else 0.05 if id(parameter) in new else 0.01
        decay = 0.1 * before[key] if parameter.ndim > 1 else 0.0
        torch.testing.assert_close(parameter.detach(), before[key] - rate * (2.0 + decay), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["se", "rla", "mrla", "dia"])
def test_inserted_attention_learns_at_the_rate_of_what_is_new(name: str) -> None:
    """Also where nothing is connected; and alone under ``freeze_base``."""
    model = dcafy.insert(Network(), name, reduction=4, example_inputs=X)
    theirs = {id(p) for key, p in model.named_parameters() if key in BASE}
    for groups in (dcafy.parameter_groups(model, lr=0.01, connection_lr=0.1), groups_of(model, TrainingConfig())):
        rates = sorted({group["lr"] for group in groups})
        assert rates[1] == pytest.approx(10 * rates[0])
        for group in groups:
            assert {id(p) in theirs for p in group["params"]} == {group["lr"] == rates[0]}
    free = {key for key, p in dcafy.freeze_base(model).named_parameters() if p.requires_grad}
    assert free == {key for key, _ in model.named_parameters()} - BASE
    with pytest.raises(dcafy.InputError, match="no connections"):
        dcafy.parameter_groups(Network(), lr=0.01)


BASE = {key for key, _ in Network().named_parameters()}


@pytest.mark.parametrize("converted", [True, False])
@pytest.mark.parametrize("name", ["gc", "cbam"])
def test_norms_and_biases_have_no_decay_whatever_their_dimensions(name: str, converted: bool) -> None:
    """GC's LayerNorm is over ``[C, 1, 1]``; whether the network is connected changes nothing."""
    model = dcafy.insert(Network(), name, reduction=4, example_inputs=X)
    model = dcafy.convert(model, example_inputs=X) if converted else model
    groups = groups_of(model, TrainingConfig(optimizer="sgd", weight_decay=0.5))
    decayed = {id(p) for group in groups for p in group["params"] if group["weight_decay"]}
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            layer = isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and key == "weight"
            assert (id(parameter) in decayed) == layer, (path, key)


@pytest.mark.parametrize(
    ("given", "rates"),
    [
        ({"optimizer": "sgd"}, (0.01, 0.1, 0.1)),
        ({"optimizer": "sgd", "lr": 0.001}, (0.001, 0.01, 0.01)),
        ({"optimizer": "sgd", "lr": 0.1}, (0.1, 0.1, 0.1)),
        ({"optimizer": "sgd", "lr": 0.4}, (0.4, 0.4, 0.4)),
        ({"optimizer": "sgd", "lr": 0.1, "connection_lr": 1.0}, (0.1, 1.0, 1.0)),
        ({"optimizer": "sgd", "lr": 0.1, "scale_lr": 0.5}, (0.1, 0.1, 0.5)),
        ({"lr": 1e-3}, (1e-3, 5e-3, 5e-3)),
        ({}, (5e-4, 5e-3, 5e-3)),
    ],
    ids=str,
)
def test_rates_of_a_training(given: dict[str, Any], rates: tuple[float, float, float]) -> None:
    """Ten times the base's rate, but never 1.0 in silence."""
    config = TrainingConfig(**given)
    assert (config.base_rate, config.connection_rate, config.scale_rate) == pytest.approx(rates)
    _, d = connected("se")
    used = {group["lr"] for group in optimizer_for(d, config).param_groups}
    assert sorted(used) == pytest.approx(sorted(set(rates)))
