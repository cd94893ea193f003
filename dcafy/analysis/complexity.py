"""How large and how costly a network is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dcafy.draws import OwnDraws
from dcafy.graph.counting import multiply_adds
from dcafy.graph.modes import evaluating
from dcafy.graph.nodes import mapped_tensors


@dataclass(frozen=True)
class Complexity:
    """``parameters``, and ``gflops``: 1e9 multiply-adds of convolutions and matrix products, for one image."""

    parameters: int
    gflops: float


def complexity(model: nn.Module, *inputs: Tensor) -> Complexity:
    """The number of parameters of ``model``, and the cost of one image of ``inputs``' size in eval mode.

    Counted by ``torch.utils.flop_counter``: convolutions and matrix products only, a multiply-add as one, as the
    paper's columns do. ``inputs``: one batch; its values do not matter. The model is as it was.

    >>> import torch, torchvision
    >>> found = complexity(torchvision.models.resnet18(), torch.zeros(1, 3, 224, 224))
    >>> found.parameters, round(found.gflops, 2)
    (11689512, 1.81)
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Complexity(parameters, gflops_of(model, inputs))


def gflops_of(model: nn.Module, inputs: Any) -> float:
    """The cost of one image of ``inputs``' size; blank ones are made where they have no data. Random numbers of the
    network are drawn apart.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def one(value: Tensor) -> Tensor:
        first = value[:1] if value.ndim > 1 else value
        return torch.zeros(first.shape, dtype=first.dtype, device=device) if first.is_meta else first.to(device)

    given = mapped_tensors(tuple(inputs), one)
    with evaluating(model), OwnDraws():
        return multiply_adds(lambda: model(*given)) / 1e9
