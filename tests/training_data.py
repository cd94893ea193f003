"""Small networks and images for the tests of training; in a module that other processes import quickly."""

from __future__ import annotations

import copy
import functools

import torch
from networks import Classifier, SELinear, with_attention
from torch import nn
from torch.utils.data import Dataset
from trained import seeded, trained_like

import dcafy

SIZE = 16
CLASSES = 4


class WithoutDropout(Classifier):
    """A classifier in which an image's outputs do not depend on where in the batch it is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))


def network(norm: bool = True, classes: int = CLASSES) -> nn.Module:
    """Three SE blocks; without ``norm`` nothing in it depends on who else is in the batch."""
    return copy.deepcopy(_network(norm, classes))


@functools.cache
def _network(norm: bool, classes: int) -> nn.Module:
    with seeded(0):
        model = with_attention(SELinear, (8, 8, 12))
    if not norm:
        model.__class__ = WithoutDropout
        for module in model.modules():
            for name, child in list(module.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    module.add_module(name, nn.GroupNorm(2, child.num_features))
    with seeded(1):
        last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
        parent, _, name = last.rpartition(".")
        old = model.get_submodule(last)
        assert isinstance(old, nn.Linear)
        setattr(model.get_submodule(parent), name, nn.Linear(old.in_features, classes))
        images = torch.stack([Stripes()[index][0] for index in range(16)])
    return trained_like(model, images).train()


def connected(norm: bool = True) -> torch.fx.GraphModule:
    return copy.deepcopy(_connected(norm))


@functools.cache
def _connected(norm: bool) -> torch.fx.GraphModule:
    with seeded(2):
        return dcafy.convert(network(norm), example_inputs=torch.zeros(2, 3, SIZE, SIZE))


class Stripes(Dataset[tuple[torch.Tensor, int]]):
    """Stripes of four kinds on noise: label 0 to 3; the noise is drawn anew each time, as augmentation is."""

    def __init__(self, length: int = 48, *, noise: float = 0.3) -> None:
        self.length, self.noise = length, noise

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        label = index % CLASSES
        rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
        wave = torch.sin((rows if label % 2 else columns) * (0.5 + label // 2) + index)
        return wave.expand(3, -1, -1) + self.noise * torch.randn(3, SIZE, SIZE), label
