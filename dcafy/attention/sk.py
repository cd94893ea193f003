"""Selective kernels (Li et al., 2019, arXiv 1903.06586), with one descriptor per branch as DCANet has them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SK(nn.Module):
    """Two branches of other kernel sizes, weighed per channel against one another (eqs. 1 to 6 of the paper).

    The first branch is the convolution that a network has already: its input and its output come in.
    ``second`` is the other branch (convolution, BN, activation). ``forward(x, first)``: ``x`` is what both
    branches see, ``first`` what the first one made of it, ``[N, C, H, W]``.
    """

    def __init__(self, channels: int, second: nn.Module, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.second = second
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.relu = nn.ReLU()
        self.expand = nn.Conv2d(hidden, 2 * channels, 1, bias=False)

    def extract(self, branches: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """G of each branch: its channel means, ``[N, C, 1, 1]`` (eq. 2, before the sum of eq. 1)."""
        return self.pool(branches[0]), self.pool(branches[1])

    def transform(self, contexts: tuple[Tensor, Tensor]) -> Tensor:
        """T of each branch, ``[N, 2, C, 1, 1]``: per channel they sum to 1 (eqs. 3 to 5)."""
        z = self.relu(self.norm(self.reduce(contexts[0] + contexts[1])))
        return torch.softmax(self.expand(z).unflatten(1, (2, -1)), dim=1)

    def fuse(self, branches: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
        """The sum of the branches, each scaled by its T (eq. 6)."""
        return branches[0] * t[:, 0] + branches[1] * t[:, 1]

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        """The attended sum of both branches."""
        branches = (first, self.second(x))
        return self.fuse(branches, self.transform(self.extract(branches)))
