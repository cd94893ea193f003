"""How an attention map is bounded: σ as the papers have it, or 2σ, which is exactly 1 where its input is 0."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor, nn

from dcafy.errors import UsageError
from dcafy.plan.options import Init


class Gate(nn.Module):
    """σ(z) for ``init="paper"``, 2σ(z) for ``init="identity"``.

    >>> Gate("identity")(torch.zeros(3))
    tensor([1., 1., 1.])
    """

    def __init__(self, init: Init) -> None:
        super().__init__()
        if init not in get_args(Init):
            raise UsageError(f"init={init!r} is not known. Use one of: {', '.join(get_args(Init))}.")
        self.doubled = init == "identity"

    def forward(self, z: Tensor) -> Tensor:
        """The attention map for the logits ``z``."""
        return 2 * torch.sigmoid(z) if self.doubled else torch.sigmoid(z)

    def extra_repr(self) -> str:
        return "2σ" if self.doubled else "σ"


def zero_(layer: nn.Module) -> None:
    """The layer's output becomes 0 for every input: what an exact no-op at the start needs."""
    for parameter in layer.parameters(recurse=False):
        nn.init.zeros_(parameter)
