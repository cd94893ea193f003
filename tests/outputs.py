"""What networks are asked, and what they answer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from trained import seeded


def images(batch: int = 2, size: int = 64, seed: int = 1) -> torch.Tensor:
    """Random images of three channels; the same ones at every call."""
    with seeded(seed):
        return torch.randn(batch, 3, size, size)


def evaluate(model: nn.Module, *inputs: object) -> Any:
    """The output without gradients, in the mode that the model is in."""
    with torch.no_grad():
        return model(*inputs)
