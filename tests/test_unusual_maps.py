"""Maps that are neither plain vectors nor plain maps, and networks that are no straight line: found in either case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from networks import BAM, SELinear, conv_norm
from torch import Tensor, nn
from trained import seeded, trained_like

import dcafy

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def same_and_alive(model: nn.Module, connected: nn.Module) -> None:
    """Equal outputs at other batch and image sizes, and other ones once any single connection is moved."""
    with torch.no_grad(), seeded(1):
        for shape in ((2, 3, 64, 64), (3, 3, 64, 64), (1, 3, 96, 64)):
            images = torch.rand(shape)
            assert torch.equal(model(images), connected(images)), shape
        expected = model(IMAGES)
        for name, connection in dcafy.connections(connected).items():
            connection.beta.fill_(0.5)
            assert not torch.equal(connected(IMAGES), expected), name
            connection.beta.zero_()


class Stages(nn.Module):
    """A stem, stages of one convolution and one attention each, a head; ``strides``: of the stages."""

    def __init__(
        self, attention: Callable[[int], nn.Module], widths: tuple[int, ...], strides: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.stem = conv_norm(3, widths[0], stride=2)
        inner = (widths[0], *widths[:-1])
        self.convs = nn.ModuleList(
            [conv_norm(a, b, stride=s) for a, b, s in zip(inner, widths, strides, strict=True)],
        )
        self.attention = nn.ModuleList([attention(width) for width in widths])
        self.head = nn.Linear(widths[-1], 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv, attention in zip(self.convs, self.attention, strict=True):
            x = attention(F.relu(conv(x)))
        return self.head(x.mean((2, 3)))


class Coordinate(nn.Module):
    """Coordinate attention: a strip of averages for each axis, one shared layer, and a gate for each axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shared = conv_norm(width, 8, kernel=1)
        self.rows, self.columns = nn.Conv2d(8, width, 1), nn.Conv2d(8, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        strips = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)], 2)
        rows, columns = F.hardswish(self.shared(strips)).split([height, width], 2)
        return x * self.rows(rows).sigmoid() * self.columns(columns.transpose(2, 3)).sigmoid()


class LongRange(nn.Module):
    """The decoupled attention of GhostNetV2: a map of all channels, computed at half the resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Sequential(
            conv_norm(width, width, kernel=1),
            nn.Conv2d(width, width, (1, 5), padding=(0, 2), groups=width, bias=False),
            nn.Conv2d(width, width, (5, 1), padding=(2, 0), groups=width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        gate = self.map(F.avg_pool2d(x, 2, 2)).sigmoid()
        return x * F.interpolate(gate, size=x.shape[-2:], mode="nearest")


@dataclass(frozen=True)
class Case:
    """Attention in three stages: how many blocks each has, and which of them can hear the stage before.

    ``same``      where all stages have one width and one size
    ``different`` where each stage is wider and smaller than the one before
    """

    attention: Callable[[int], nn.Module]
    blocks: int
    same: int
    different: int


CASES = {
    "coordinate": Case(Coordinate, blocks=1, same=1, different=0),
    "long range": Case(LongRange, blocks=1, same=1, different=0),
    "bottleneck": Case(BAM, blocks=2, same=2, different=2),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shrinking", [False, True], ids=["same", "different"])
def test_unusual_maps(name: str, shrinking: bool) -> None:
    """Every stage's blocks are found, and each hears the stage before or is listed with the reason."""
    case = CASES[name]
    widths, strides = ((16, 24, 32), (1, 2, 2)) if shrinking else ((16, 16, 16), (1, 1, 1))
    with seeded(2):
        model = trained_like(Stages(case.attention, widths, strides), IMAGES).eval()
    plan = dcafy.inspect(model, example_inputs=IMAGES)
    stages = [f"attention.{i}" for i in range(3)]
    expected = sorted(stages * case.blocks)
    assert sorted(block.name.split("#")[0] for block in plan.blocks) == expected
    heard = case.different if shrinking else case.same
    assert sorted(link.target.split("#")[0] for link in plan.links) == sorted(stages[1:] * heard)
    told = [item.name.split("#")[0] for item in plan.skipped if item.reason.startswith("cannot hear")]
    assert sorted(told) == sorted(stages[1:] * (case.blocks - heard))
    if plan.links:
        same_and_alive(model, dcafy.convert(model, example_inputs=IMAGES).eval())


class Streams(nn.Module):
    """Two resolutions side by side that exchange what they hold, as in HRNet, with attention in both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.start = conv_norm(3, 8, stride=2), conv_norm(8, 16, stride=2)
        self.high = nn.ModuleList([SELinear(8) for _ in range(2)])
        self.low = nn.ModuleList([SELinear(16) for _ in range(2)])
        self.down, self.up = conv_norm(8, 16, stride=2), conv_norm(16, 8, kernel=1)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        high = F.relu(self.stem(x))
        low = F.relu(self.start(high))
        high, low = self.high[0](high), self.low[0](low)
        raised = F.interpolate(self.up(low), size=high.shape[-2:])
        high, low = F.relu(high + raised), F.relu(low + self.down(high))
        high, low = self.high[1](high), self.low[1](low)
        return self.head(torch.cat([high.mean((2, 3)), low.mean((2, 3))], 1))


class Nested(nn.Module):
    """A decoder with nodes between encoder and output, as in UNet++: a node reads all nodes of its row."""

    def __init__(self) -> None:
        super().__init__()
        self.top, self.bottom = conv_norm(3, 8, stride=2), conv_norm(8, 16, stride=2)
        self.encoder = SELinear(16)
        self.middle, self.last = conv_norm(24, 8), conv_norm(32, 8)
        self.attention, self.output = SELinear(8), SELinear(8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        top = F.relu(self.top(x))
        bottom = self.encoder(F.relu(self.bottom(top)))
        raised = F.interpolate(bottom, size=top.shape[-2:])
        middle = self.attention(F.relu(self.middle(torch.cat([top, raised], 1))))
        return self.head(self.output(F.relu(self.last(torch.cat([top, middle, raised], 1)))))


class TwoPaths(nn.Module):
    """A context path and a detail path that a third block joins, as in BiSeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.detail, self.context = conv_norm(3, 8, stride=2), conv_norm(3, 8, stride=4)
        self.refine, self.join = SELinear(8), SELinear(16)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        detail = F.relu(self.detail(x))
        context = F.interpolate(self.refine(F.relu(self.context(x))), size=detail.shape[-2:])
        joined = torch.cat([detail, context], 1)
        return self.head(joined + self.join(joined))


LINKS: dict[type[nn.Module], set[tuple[str, str]]] = {
    Streams: {("low.0", "high.1"), ("low.0", "low.1")},
    Nested: {("encoder", "attention"), ("attention", "output")},
    TwoPaths: {("refine", "join")},
}
"""Who hears whom: along the data, and of several that reach a block the last one that was computed."""


@pytest.mark.parametrize("network", LINKS, ids=[network.__name__ for network in LINKS])
def test_networks_that_are_no_straight_line(network: type[nn.Module]) -> None:
    with seeded(3):
        model = trained_like(network(), IMAGES).eval()
    plan = dcafy.inspect(model, example_inputs=IMAGES)
    assert {(link.source, link.target) for link in plan.links} == LINKS[network]
    same_and_alive(model, dcafy.convert(model, example_inputs=IMAGES).eval())


class CarriesState(nn.Module):
    """One attention module for all stages, with a cell that it hands on from call to call (DIANet)."""

    def __init__(self, width: int, stages: int) -> None:
        super().__init__()
        self.stem = conv_norm(3, width, stride=2)
        self.convs = nn.ModuleList([conv_norm(width, width) for _ in range(stages)])
        self.forget, self.write = nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        cell = torch.zeros_like(x[:, :, 0, 0])
        for conv in self.convs:
            y = conv(x)
            g = y.mean((2, 3))
            cell = torch.sigmoid(self.forget(g)) * cell + torch.tanh(self.write(g))
            x = x + y * torch.sigmoid(cell)[:, :, None, None]
        return self.head(x.mean((2, 3)))


def test_a_state_that_is_handed_on_brings_no_contexts_of_earlier_blocks() -> None:
    model = trained_like(CarriesState(8, 4), IMAGES)
    plan = dcafy.inspect(model, example_inputs=IMAGES)
    assert [len(block.extraction) for block in plan.blocks] == [1, 1, 1, 1]
    connected = dcafy.convert(model, example_inputs=IMAGES).eval()
    assert len(dcafy.connections(connected)) == 3
    same_and_alive(model, connected)
