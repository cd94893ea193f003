"""Efficient channel attention (Wang et al., 2020, arXiv 1910.03151)."""

from __future__ import annotations

from torch import Tensor, nn

from dcafy.attention.gate import Gate, zero_
from dcafy.emit.matching import neighbours
from dcafy.plan.options import Init


class ECA(nn.Module):
    """``x`` with every channel scaled by a gate on the means of its neighbours (eqs. 6 and 9 of the paper).

    >>> import torch
    >>> x = torch.rand(2, 32, 8, 8)
    >>> torch.equal(ECA(32)(x), x)
    True
    """

    def __init__(self, channels: int, *, init: Init = "identity") -> None:
        super().__init__()
        kernel = neighbours(channels)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)
        self.gate = Gate(init)
        if init == "identity":
            zero_(self.conv)

    def extract(self, x: Tensor) -> Tensor:
        """G: the mean of every channel, ``[N, 1, C]``."""
        g: Tensor = self.pool(x).flatten(2).transpose(1, 2)
        return g

    def transform(self, g: Tensor) -> Tensor:
        """T: a gate per channel, ``[N, 1, C]`` (eq. 6)."""
        t: Tensor = self.gate(self.conv(g))
        return t

    def fuse(self, x: Tensor, t: Tensor) -> Tensor:
        """X scaled by T."""
        return x * t.transpose(1, 2).unsqueeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        """The attended ``x``."""
        return self.fuse(x, self.transform(self.extract(x)))
