"""How large and how costly a network is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from dcafy.graph.counting import multiply_adds
from dcafy.graph.modes import evaluating


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
    with evaluating(model):
        cost = multiply_adds(lambda: model(*(value[:1] for value in inputs)))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Complexity(parameters, cost / 1e9)
