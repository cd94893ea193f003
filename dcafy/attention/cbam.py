"""Convolutional block attention (Woo et al., 2018, arXiv 1807.06521)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dcafy.attention.gate import Gate, zero_
from dcafy.plan.options import Init


class ChannelAttention(nn.Module):
    """``x`` with every channel scaled by a gate on its mean and its maximum (eq. 2 of the paper)."""

    def __init__(self, channels: int, reduction: int = 16, *, init: Init = "identity") -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.maximum = nn.AdaptiveMaxPool2d(1)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.relu = nn.ReLU()
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.gate = Gate(init)
        if init == "identity":
            zero_(self.expand)

    def extract(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """G, twice: the mean and the maximum of every channel, ``[N, C, 1, 1]``."""
        return self.mean(x), self.maximum(x)

    def transform(self, contexts: tuple[Tensor, Tensor]) -> Tensor:
        """T: a gate on the sum of what one shared MLP makes of both."""
        mean, maximum = (self.expand(self.relu(self.reduce(g))) for g in contexts)
        t: Tensor = self.gate(mean + maximum)
        return t

    def fuse(self, x: Tensor, t: Tensor) -> Tensor:
        """X scaled by T (eq. 1)."""
        return x * t

    def forward(self, x: Tensor) -> Tensor:
        """The attended ``x``."""
        return self.fuse(x, self.transform(self.extract(x)))


class SpatialAttention(nn.Module):
    """``x`` with every place scaled by a gate on the mean and the maximum over channels (eq. 3 of the paper)."""

    def __init__(self, *, init: Init = "identity") -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(1)
        self.gate = Gate(init)
        if init == "identity":
            zero_(self.norm)

    def extract(self, x: Tensor) -> Tensor:
        """G: maximum and mean over the channels, ``[N, 2, H, W]``."""
        return torch.cat((x.amax(1, keepdim=True), x.mean(1, keepdim=True)), 1)

    def transform(self, g: Tensor) -> Tensor:
        """T: a gate per place, ``[N, 1, H, W]``."""
        t: Tensor = self.gate(self.norm(self.conv(g)))
        return t

    def fuse(self, x: Tensor, t: Tensor) -> Tensor:
        """X scaled by T (eq. 1)."""
        return x * t

    def forward(self, x: Tensor) -> Tensor:
        """The attended ``x``."""
        return self.fuse(x, self.transform(self.extract(x)))


class CBAM(nn.Module):
    """``x`` after channel attention and then spatial attention (eq. 1 of the paper).

    >>> x = torch.rand(2, 32, 8, 8)
    >>> torch.equal(CBAM(32)(x), x)
    True
    """

    def __init__(self, channels: int, reduction: int = 16, *, init: Init = "identity") -> None:
        super().__init__()
        self.channel = ChannelAttention(channels, reduction, init=init)
        self.spatial = SpatialAttention(init=init)

    def forward(self, x: Tensor) -> Tensor:
        """The attended ``x``."""
        attended: Tensor = self.spatial(self.channel(x))
        return attended
