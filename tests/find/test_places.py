"""Whether G is of channels or of places is decided by the axis of X that is left in it, however many axes it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from trained import seeded, trained_like

import dcafy

Mean = Callable[[Tensor], Tensor]


def over_channels(x: Tensor) -> Tensor:
    return x.mean(1)


def kept(x: Tensor) -> Tensor:
    return x.mean(1, keepdim=True)


def stacked(x: Tensor) -> Tensor:
    return torch.stack([x.mean(1), x.max(1)[0]], 1)


class OverTime(nn.Module):
    """A number for each moment of a signal [N, C, L], by a convolution."""

    def __init__(self, mean: Mean) -> None:
        super().__init__()
        self.mean, self.conv = mean, nn.Conv1d(2 if mean is stacked else 1, 1, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        g = self.mean(x)
        return x * torch.sigmoid(self.conv(g if g.ndim == 3 else g[:, None]))


class OverAxes(nn.Module):
    """A number for each place along one axis of a map, the mean of all ``others``."""

    def __init__(self, *others: int, keepdim: bool = False) -> None:
        super().__init__()
        self.others, self.keepdim = others, keepdim
        self.conv = nn.Conv1d(1, 1, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        g = x.mean(self.others, keepdim=self.keepdim)
        t = self.conv(g.flatten(1)[:, None]).sigmoid()
        sizes = [1 if i in self.others else n for i, n in enumerate(x.shape)]
        return x * t.view(sizes)


class Vector(nn.Module):
    """Squeeze-excitation of maps with any number of axes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.flatten(2).mean(2)).sigmoid().view(*x.shape[:2], *[1] * (x.ndim - 2))


class Recurrent(nn.Module):
    """Channels last, behind a GRU: a gate for each moment, then one for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru, self.fc = nn.GRU(width, 16, batch_first=True), nn.Linear(16, 16)
        self.conv = nn.Conv1d(1, 1, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gru(x)[0]
        x = x * self.conv(x.mean(2)[:, None]).sigmoid().transpose(1, 2)
        return x * self.fc(x.mean(1)).sigmoid()[:, None]


class Mixing(nn.Module):
    """Tokens, mixed by a layer along the places, with the channels second there: a gate for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix, self.fc = nn.LayerNorm(width), nn.Linear(24, 24), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.norm(x).transpose(1, 2))
        return (x * self.fc(x.mean(2)).sigmoid()[..., None]).transpose(1, 2)


class MixingBack(Mixing):
    """The same, with the tokens back in their order where they are pooled."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x * self.fc(x.mean(1)).sigmoid()[:, None]


def signals(mean: Mean) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(3, 8, 5, padding=2), Vector(8), OverTime(mean)),
        *(nn.Conv1d(8, 12, 5, 2, 2), Vector(12), OverTime(mean)),
    )


def spectrograms(*, keepdim: bool) -> nn.Module:
    """Frequencies, then time."""

    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        axes = (OverAxes(1, 3, keepdim=keepdim), OverAxes(1, 2, keepdim=keepdim))
        return [nn.Conv2d(inputs, outputs, 3, padding=1), *axes]

    return nn.Sequential(*stage(1, 8), *stage(8, 12))


def videos() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv3d(3, 8, 3, padding=1), Vector(8), OverAxes(1, 3, 4)),
        *(nn.Conv3d(8, 12, 3, 2, 1), Vector(12), OverAxes(1, 3, 4)),
    )


@dataclass(frozen=True)
class Case:
    """A network, its blocks' dimensions, its links, the shape of its example and another that it takes."""

    name: str
    build: Callable[[], nn.Module]
    dimensions: str
    links: tuple[tuple[str, str], ...]
    shape: tuple[int, ...]
    other: tuple[int, ...]


TWO_AND_TWO = (("1", "4"), ("2", "5"))

CASES = [
    *(
        Case(mean.__name__, lambda mean=mean: signals(mean), "cscs", TWO_AND_TWO, (4, 3, 64), (3, 3, 80))
        for mean in (over_channels, kept, stacked)
    ),
    Case(
        "frequency and time", lambda: spectrograms(keepdim=False), "ssss", TWO_AND_TWO, (4, 1, 20, 50), (3, 1, 20, 64)
    ),
    Case("both, kept", lambda: spectrograms(keepdim=True), "ssss", TWO_AND_TWO, (4, 1, 20, 50), (3, 1, 26, 64)),
    Case("videos", videos, "cscs", TWO_AND_TWO, (4, 3, 8, 12, 12), (3, 3, 12, 12, 14)),
    Case(
        "recurrent",
        lambda: nn.Sequential(Recurrent(12), Recurrent(16)),
        "scsc",
        (("0", "1"), ("0#2", "1#2")),
        (4, 30, 12),
        (3, 44, 12),
    ),
    *(
        Case(
            kind.__name__,
            lambda kind=kind: nn.Sequential(nn.Linear(12, 16), kind(16), kind(16)),
            "cc",
            (("1", "2"),),
            (4, 24, 12),
            (3, 24, 12),
        )
        for kind in (Mixing, MixingBack)
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_what_is_left_of_x_decides(case: Case) -> None:
    with seeded(2):
        example, other = torch.rand(case.shape), torch.rand(case.other)
        model = trained_like(case.build(), example).eval()
    plan = dcafy.inspect(model, example_inputs=example)
    assert "".join(block.dimension[0] for block in plan.blocks) == case.dimensions
    assert sorted((link.source, link.target) for link in plan.links) == list(case.links)
    connected = dcafy.convert(model, example_inputs=example).eval()
    with torch.no_grad():
        for images in (example, other):
            expected = model(images)
            assert torch.equal(connected(images), expected)
            for name, connection in dcafy.connections(connected).items():
                connection.beta.fill_(0.5)
                assert not torch.equal(connected(images), expected), name
                connection.beta.zero_()
