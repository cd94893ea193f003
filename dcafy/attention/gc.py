"""Global context (Cao et al., 2019, arXiv 1904.11492), of which the simplified non-local block is a special case."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from dcafy.attention.gate import zero_
from dcafy.plan.options import Init


class GC(nn.Module):
    """``x`` plus a vector that is made of its softmax-weighted mean over all places (eq. 5 of the paper).

    ``reduction``: C over the width of the bottleneck. ``None`` leaves the bottleneck out: one 1x1 convolution,
    the simplified non-local block (eq. 3).

    >>> x = torch.rand(2, 32, 8, 8)
    >>> torch.equal(GC(32)(x), x)
    True
    """

    def __init__(self, channels: int, reduction: int | None = 16, *, init: Init = "identity") -> None:
        super().__init__()
        self.weigh = nn.Conv2d(channels, 1, 1)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        width = channels
        if reduction is not None:
            width = max(channels // reduction, 1)
            layers["reduce"] = nn.Conv2d(channels, width, 1)
            if width > 1:  # over one channel a LayerNorm would put its bias in the place of everything
                layers["norm"] = nn.LayerNorm((width, 1, 1))
            layers["relu"] = nn.ReLU()
        layers["expand"] = nn.Conv2d(width, channels, 1)
        self.bottleneck = nn.Sequential(layers)
        if init == "identity":
            zero_(layers["expand"])

    def extract(self, x: Tensor) -> Tensor:
        """G: the mean over places, weighed by a softmax over them, ``[N, C, 1, 1]``."""
        weights = torch.softmax(self.weigh(x).flatten(2), dim=2)
        return torch.matmul(x.flatten(2), weights.transpose(1, 2)).unsqueeze(-1)

    def transform(self, g: Tensor) -> Tensor:
        """T: what is added to every place, ``[N, C, 1, 1]``; unbounded."""
        t: Tensor = self.bottleneck(g)
        return t

    def fuse(self, x: Tensor, t: Tensor) -> Tensor:
        """X plus T."""
        return x + t

    def forward(self, x: Tensor) -> Tensor:
        """The attended ``x``."""
        return self.fuse(x, self.transform(self.extract(x)))
