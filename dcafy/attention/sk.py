"""Selective kernels (Li et al., 2019, arXiv 1903.06586), with one descriptor per branch as DCANet has them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dcafy.attention.units import Kernel, Reads, Unit
from dcafy.errors import InputError
from dcafy.plan.options import Init


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


def reads(unit: Unit, module: nn.Module) -> Reads:
    """What both branches see, and what the first one has made of it."""
    kernel = _kernel(unit)
    return {"": (kernel.input, kernel.output)}


def of_unit(unit: Unit, host: nn.Module, reduction: int, init: Init) -> SK:
    """SK whose second branch is the unit's convolution with twice its dilation, freshly initialised."""
    kernel = _kernel(unit)
    old = host.get_submodule(str(kernel.convolution.target))
    assert isinstance(old, nn.Conv2d)
    dilation = tuple(2 * d for d in old.dilation)
    padding: Any = old.padding
    if not isinstance(padding, str):
        # As much more padding as the larger reach takes, so that both branches' maps have one size.
        reach = zip(padding, old.dilation, old.kernel_size, strict=True)
        padding = tuple(p + d * (k - 1) // 2 for p, d, k in reach)
    convolution = nn.Conv2d(
        old.in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        padding,
        dilation,  # type: ignore[arg-type]
        old.groups,
        old.bias is not None,
    )
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    second = nn.Sequential(convolution, *_norm_and_activation(kernel, host))
    return SK(old.out_channels, second, reduction)


def _kernel(unit: Unit) -> Kernel:
    if unit.kernel is None:
        raise InputError(
            f"{unit.path} has no convolution larger than 1x1 followed by batch norm and an activation, which "
            "selective kernels would give a second branch to. Leave it out with where=, or use another attention."
        )
    return unit.kernel


def _norm_and_activation(kernel: Kernel, host: nn.Module) -> list[nn.Module]:
    norm = copy.deepcopy(host.get_submodule(str(kernel.norm.target)))
    assert isinstance(norm, nn.BatchNorm2d)
    norm.reset_parameters()
    if kernel.activation is None:
        return [norm]
    if kernel.activation.op == "call_module":
        return [norm, copy.deepcopy(host.get_submodule(str(kernel.activation.target)))]
    return [norm, nn.ReLU()]
