"""Blocks of different batches do not hear one another, and all others do, at whatever size the example has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from networks import SELinear, SpatialGate, conv_norm
from torch import Tensor, nn
from trained import seeded, trained_like

import dcafy

Attention = Callable[[int], nn.Module]


def channel(width: int) -> nn.Module:
    return SELinear(width, reduction=1)


def spatial(width: int) -> nn.Module:
    return SpatialGate()


class Grouped(nn.Module):
    """Spatial group-wise enhancement: the groups stand in the batch."""

    def __init__(self, width: int, groups: int = 4) -> None:
        super().__init__()
        self.groups = groups
        self.weight, self.bias = nn.Parameter(torch.rand(1, groups, 1, 1)), nn.Parameter(torch.rand(1, groups, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.view(n * self.groups, -1, h, w)
        g = (y * y.mean((2, 3), keepdim=True)).sum(1, keepdim=True)
        t = g.view(n * self.groups, -1)
        t = ((t - t.mean(1, keepdim=True)) / (t.std(1, keepdim=True) + 1e-5)).view(n, self.groups, h, w)
        return (y * (t * self.weight + self.bias).view(n * self.groups, 1, h, w).sigmoid()).view(n, c, h, w)


class GroupedChannels(nn.Module):
    """Channel attention within each group; the groups stand in the batch."""

    def __init__(self, width: int, groups: int = 4) -> None:
        super().__init__()
        self.groups, self.fc = groups, nn.Linear(width // groups, width // groups)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.reshape(n * self.groups, -1, h, w)
        return (y * self.fc(y.mean((2, 3))).sigmoid()[..., None, None]).reshape(n, c, h, w)


class Halves(nn.Module):
    """Attention, and again behind what ``between`` makes of the maps."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.before = nn.Sequential(conv_norm(3, 8, stride=2), attention(8), conv_norm(8, 8), attention(8))
        self.behind = nn.Sequential(conv_norm(8, 8), attention(8), conv_norm(8, 8), attention(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.between(self.before(x))).mean((2, 3))

    def between(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Rows(Halves):
    """As many maps as there are indices, which another input has."""

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        return self.behind(self.before(x)[which]).mean((2, 3))


class Clips(Halves):
    """Frame by frame, then the mean of each clip."""

    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        maps = self.before(x.flatten(0, 1))
        return self.behind(maps.view(n, t, *maps.shape[1:]).mean(1)).mean((2, 3))


class Tiles(Halves):
    """Tiles of 8 x 8 in the batch: of a map of that size there is one."""

    def between(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, c, h // 8, 8, w // 8, 8).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, 8, 8)


class Chosen(Halves):
    """The brighter half of the samples."""

    def between(self, x: Tensor) -> Tensor:
        return x[x.mean((1, 2, 3)).topk(max(1, x.shape[0] // 2))[1]]


@dataclass(frozen=True)
class Case:
    """A network, and the shapes of inputs: the first is the example."""

    network: type[Halves]
    shapes: tuple[tuple[int, ...], ...]

    def inputs(self, shape: tuple[int, ...]) -> tuple[Any, ...]:
        images = torch.rand(shape)
        if self.network is Rows:
            return images, torch.arange(3 if len(images) > 1 else 1) % len(images)
        return (images,)


CASES = [
    Case(Rows, ((2, 3, 32, 32), (1, 3, 32, 32), (5, 3, 40, 32))),
    Case(Rows, ((1, 3, 32, 32), (2, 3, 32, 32))),
    Case(Clips, ((2, 4, 3, 32, 32), (1, 3, 3, 32, 32), (2, 1, 3, 32, 32))),
    Case(Clips, ((2, 1, 3, 32, 32), (1, 4, 3, 32, 32))),
    Case(Tiles, ((2, 3, 32, 32), (1, 3, 32, 16))),
    Case(Tiles, ((2, 3, 16, 16), (2, 3, 32, 32))),
    Case(Chosen, ((4, 3, 32, 32), (1, 3, 32, 32), (6, 3, 32, 32))),
    Case(Chosen, ((1, 3, 32, 32), (4, 3, 32, 32))),
]


@pytest.mark.parametrize("attention", [channel, spatial])
@pytest.mark.parametrize("case", CASES, ids=[f"{case.network.__name__} {case.shapes[0]}" for case in CASES])
def test_only_blocks_of_one_batch_are_linked(case: Case, attention: Attention) -> None:
    with seeded(2):
        model = case.network(attention).eval()
        inputs = [case.inputs(shape) for shape in case.shapes]
    plan = dcafy.inspect(model, example_inputs=inputs[0])
    assert [(link.source, link.target) for link in plan.links] == [("before.1", "before.3"), ("behind.1", "behind.3")]
    (skipped,) = [item for item in plan.skipped if item.name == "behind.1"]
    assert "different batches" in skipped.reason
    connected = dcafy.convert(model, example_inputs=inputs[0]).eval()
    with torch.no_grad():
        assert all(torch.equal(model(*given), connected(*given)) for given in inputs)
        for name, connection in dcafy.connections(connected).items():
            connection.beta.fill_(0.5)
            assert not any(torch.equal(model(*given), connected(*given)) for given in inputs), name
            connection.beta.zero_()


PAIRS = [
    (Grouped, spatial),
    (GroupedChannels, channel),
    (functools.partial(Grouped, groups=2), Grouped),
    (functools.partial(GroupedChannels, groups=2), GroupedChannels),
]


@pytest.mark.parametrize("pair", PAIRS, ids=["groups and maps", "groups and vectors", "2 and 4", "2 and 4 of vectors"])
def test_each_hears_the_last_of_its_own_batch(pair: tuple[Attention, Attention]) -> None:
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    with seeded(3):
        layers = [conv_norm(3, 16), *(layer for kind in pair * 2 for layer in (kind(16), conv_norm(16, 16)))]
        model = trained_like(nn.Sequential(*layers), images).eval()
    plan = dcafy.inspect(model, example_inputs=images)
    assert [(link.source, link.target) for link in plan.links] == [("1", "5"), ("3", "7")]
    assert [item.name for item in plan.skipped if "different batches" in item.reason] == ["3"]
    connected = dcafy.convert(model, example_inputs=images).eval()
    other = torch.rand(3, 3, 32, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(images), connected(images))
        assert torch.equal(model(other), connected(other))
