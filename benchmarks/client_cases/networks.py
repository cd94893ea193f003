"""The small networks that clients are given: random weights, with values as after training."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from trained import images, seeded, trained

CLASSES = 6


def timm_network(name: str = "seresnet18", **options: Any) -> nn.Module:
    return trained(lambda: timm.create_model(name, num_classes=CLASSES, **options), pictures(8))


def torchvision_network(name: str = "mobilenet_v3_small", **options: Any) -> nn.Module:
    get = torchvision.models.get_model
    return trained(lambda: get(name, weights=None, num_classes=CLASSES, **options), pictures(8))


def pictures(batch: int = 2, size: int = 64, seed: int = 1) -> Tensor:
    return images(batch, size, seed)


def labels(batch: int) -> Tensor:
    return torch.arange(batch) % CLASSES


def step(model: nn.Module, batch: int = 4) -> float:
    """The loss of a training step's forward and backward, under a seed of its own."""
    with seeded(7):
        loss = cross_entropy(model(pictures(batch)), labels(batch))
        loss.backward()
    return loss.item()


def recomputing(model: nn.Module, path: str) -> list[int]:
    """Grows by one whenever the module at ``path`` runs: by two in a step where it is checkpointed."""
    runs: list[int] = []
    model.get_submodule(path).register_forward_pre_hook(lambda _module, _inputs: runs.append(1))
    return runs
