"""Gather-excite (Hu et al., 2018, arXiv 1810.12348), without parameters (θ⁻) and with a learned gather (θ)."""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn import functional as F

from dcafy.attention.gate import Gate, zero_
from dcafy.errors import UsageError
from dcafy.plan.options import Init


class GEPlain(nn.Module):
    """GE-θ⁻: ``x`` scaled by σ of its own means, over the whole map or over windows (section 3 of the paper).

    Nothing in it can be trained, so that it cannot start as a no-op. ``extent``: side of the windows;
    0 gathers over the whole map.
    """

    def __init__(self, extent: int = 0) -> None:
        super().__init__()
        self.extent = extent
        self.gather = (
            nn.AvgPool2d(extent, ceil_mode=True, count_include_pad=False) if extent else nn.AdaptiveAvgPool2d(1)
        )
        self.gate = Gate("paper")

    def extract(self, x: Tensor) -> Tensor:
        """G: the means, ``[N, C, 1, 1]`` or one per window."""
        g: Tensor = self.gather(x)
        return g

    def transform(self, g: Tensor) -> Tensor:
        """T: σ(G), in the shape of G."""
        t: Tensor = self.gate(g)
        return t

    def fuse(self, x: Tensor, t: Tensor) -> Tensor:
        """X scaled by T, which is repeated over every window."""
        return x * (F.interpolate(t, size=x.shape[-2:], mode="nearest") if self.extent else t)

    def forward(self, x: Tensor) -> Tensor:
        """The attended ``x``."""
        return self.fuse(x, self.transform(self.extract(x)))


class GETheta(nn.Module):
    """GE-θ: ``x`` scaled by a gate on what depth-wise convolutions gathered (section 4 of the paper).

    The paper's global gather is one depth-wise kernel as large as the map, which fits one image size only.
    Here ``steps`` depth-wise 3x3 convolutions of stride 2 (each with BN, ReLU between them; one of stride 1
    where ``steps`` is 0) gather locally, and a mean takes what is left, so that every image size works.
    """

    def __init__(self, channels: int, steps: int = 3, *, init: Init = "identity") -> None:
        super().__init__()
        if steps < 0:
            raise UsageError(f"steps must be at least 0, not {steps}.")
        strides = [2] * steps or [1]
        layers = [
            (
                nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            )
            for stride in strides
        ]
        self.gather = nn.Sequential(*list(itertools.chain.from_iterable(layers))[:-1])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gate = Gate(init)
        if init == "identity":
            zero_(self.gather[-1])

    def extract(self, x: Tensor) -> Tensor:
        """G: what the depth-wise convolutions gathered, ``[N, C, 1, 1]``."""
        g: Tensor = self.pool(self.gather(x))
        return g

    def transform(self, g: Tensor) -> Tensor:
        """T: a gate per channel."""
        t: Tensor = self.gate(g)
        return t

    def fuse(self, x: Tensor, t: Tensor) -> Tensor:
        """X scaled by T."""
        return x * t

    def forward(self, x: Tensor) -> Tensor:
        """The attended ``x``."""
        return self.fuse(x, self.transform(self.extract(x)))
