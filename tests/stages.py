"""Networks of stages with one attention each, and what their conversion is asked."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from networks import conv_norm
from torch import Tensor, nn
from trained import seeded

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
