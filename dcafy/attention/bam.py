"""Bottleneck attention (Park et al., 2018, arXiv 1807.06514)."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from dcafy.attention.gate import Gate, zero_
from dcafy.plan.options import Init


class BAM(nn.Module):
    """``x`` scaled by one gate on the sum of a channel map and a spatial map (eqs. 1 to 5 of the paper).

    The paper applies ``1 + σ(...)``; with ``init="identity"`` it is ``2σ(...)``, which can be 1.

    >>> import torch
    >>> x = torch.rand(2, 32, 8, 8)
    >>> torch.equal(BAM(32).eval()(x), x)
    True
    """

    def __init__(self, channels: int, reduction: int = 16, dilation: int = 4, *, init: Init = "identity") -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.channel = nn.Sequential(
            OrderedDict(
                reduce=nn.Conv2d(channels, hidden, 1),
                relu=nn.ReLU(),
                expand=nn.Conv2d(hidden, channels, 1),
                norm=nn.BatchNorm2d(channels),
            )
        )
        self.squeeze = nn.Sequential(
            OrderedDict(
                reduce=nn.Conv2d(channels, hidden, 1),
                dilated1=nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation),
                relu1=nn.ReLU(),
                dilated2=nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation),
                relu2=nn.ReLU(),
                project=nn.Conv2d(hidden, 1, 1),
            )
        )
        self.norm = nn.BatchNorm2d(1)
        self.gate = Gate(init)
        self.residual = init == "paper"
        if init == "identity":
            zero_(self.channel[-1])
            zero_(self.norm)

    def extract(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """G of each dimension: channel means ``[N, C, 1, 1]``, and one learned map ``[N, 1, H, W]`` (eqs. 4, 5)."""
        return self.pool(x), self.squeeze(x)

    def transform(self, contexts: tuple[Tensor, Tensor]) -> Tensor:
        """T: a gate on the sum of both maps, ``[N, C, H, W]`` (eq. 3)."""
        channel, spatial = contexts
        t: Tensor = self.gate(self.channel(channel) + self.norm(spatial))
        return t

    def fuse(self, x: Tensor, t: Tensor) -> Tensor:
        """X scaled by T, as a residual in the paper's form (eq. 1)."""
        return x + x * t if self.residual else x * t

    def forward(self, x: Tensor) -> Tensor:
        """The attended ``x``."""
        return self.fuse(x, self.transform(self.extract(x)))
