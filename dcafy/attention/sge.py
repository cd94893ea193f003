"""Spatial group-wise enhance (Li et al., 2019, arXiv 1905.09646)."""

from __future__ import annotations

from torch import Tensor, nn

from dcafy.attention.gate import Gate, zero_
from dcafy.plan.options import Init

LEAST = 4
"""Channels that a group has at least: what a descriptor of one or two channels weighs is those channels."""


class SGE(nn.Module):
    """``x`` with every place of every channel group scaled by how alike it is to the group's mean (eqs. 1 to 5).

    ``groups``: at most so many; the largest number that divides ``channels`` and leaves 4 channels to a group.

    >>> import torch
    >>> SGE(256).groups, SGE(24).groups
    (64, 6)
    >>> x = torch.rand(2, 32, 8, 8)
    >>> torch.equal(SGE(32)(x), x)
    True
    """

    def __init__(self, channels: int, groups: int = 64, *, init: Init = "identity") -> None:
        super().__init__()
        most = max(min(groups, channels // LEAST), 1)
        self.groups = next(n for n in range(most, 0, -1) if channels % n == 0)
        self.members = channels // self.groups
        self.pool = nn.AdaptiveAvgPool2d(1)
        # Each group's map over its own places, then a weight and a bias per group: eqs. 3 and 4 in one layer.
        self.norm = nn.GroupNorm(self.groups, self.groups)
        self.gate = Gate(init)
        zero_(self.norm)
        if init == "paper":
            nn.init.ones_(self.norm.bias)

    def extract(self, x: Tensor) -> Tensor:
        """G: the dot product of every place with its group's mean, ``[N, groups, H, W]`` (eqs. 1, 2)."""
        alike: Tensor = x * self.pool(x)
        return alike.reshape(x.shape[0], self.groups, self.members, *x.shape[2:]).sum(2)

    def transform(self, g: Tensor) -> Tensor:
        """T: a gate per group and place, ``[N, groups, H, W]`` (eqs. 3, 4)."""
        t: Tensor = self.gate(self.norm(g))
        return t

    def fuse(self, x: Tensor, t: Tensor) -> Tensor:
        """X scaled by T, group by group (eq. 5)."""
        return x * t.repeat_interleave(self.members, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The attended ``x``."""
        return self.fuse(x, self.transform(self.extract(x)))
