"""Squeeze-and-excitation (Hu et al., 2018, arXiv 1709.01507)."""

from __future__ import annotations

from torch import Tensor, nn

from dcafy.attention.gate import Gate, zero_
from dcafy.plan.options import Init


class SE(nn.Module):
    """``x`` with every channel scaled by a gate that all channel means decide on (eqs. 2 to 4 of the paper).

    ``x``: ``[N, C, H, W]``. ``reduction``: C over the width of the bottleneck.

    >>> import torch
    >>> x = torch.rand(2, 32, 8, 8)
    >>> torch.equal(SE(32)(x), x)
    True
    """

    def __init__(self, channels: int, reduction: int = 16, *, init: Init = "identity") -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.relu = nn.ReLU()
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.gate = Gate(init)
        if init == "identity":
            zero_(self.expand)

    def extract(self, x: Tensor) -> Tensor:
        """G: the mean of every channel, ``[N, C, 1, 1]`` (eq. 2, squeeze)."""
        g: Tensor = self.pool(x)
        return g

    def transform(self, g: Tensor) -> Tensor:
        """T: a gate per channel, ``[N, C, 1, 1]`` (eq. 3, excitation)."""
        t: Tensor = self.gate(self.expand(self.relu(self.reduce(g))))
        return t

    def fuse(self, x: Tensor, t: Tensor) -> Tensor:
        """X scaled by T (eq. 4)."""
        return x * t

    def forward(self, x: Tensor) -> Tensor:
        """The attended ``x``."""
        return self.fuse(x, self.transform(self.extract(x)))
