"""The optimizer and its schedule, as a configuration asks for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dcafy.converted import parameter_groups
from dcafy.emit.dca import is_connected
from dcafy.errors import InputError
from dcafy.training.options import TrainingConfig


def groups_of(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Optimizer groups of a converted model, or of one that is not; no decay on α, β, norms and biases."""
    if is_connected(model):
        return parameter_groups(
            model,
            lr=config.base_rate,
            connection_lr=config.connection_rate,
            scale_lr=config.scale_rate,
            weight_decay=config.decay,
        )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    split = ([p for p in trained if p.ndim > 1], config.decay), ([p for p in trained if p.ndim <= 1], 0.0)
    return [{"params": part, "lr": config.base_rate, "weight_decay": decay} for part, decay in split if part]


_OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], TrainingConfig], torch.optim.Optimizer]] = {
    "adamw": lambda groups, config: torch.optim.AdamW(groups),
    "sgd": lambda groups, config: torch.optim.SGD(
        groups, lr=config.base_rate, momentum=config.momentum, nesterov=config.momentum > 0
    ),
}


def optimizer_for(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer of everything in ``model`` that requires a gradient; ``InputError`` where nothing does."""
    groups = groups_of(model, config)
    if not groups:
        raise InputError("No parameter of the model requires a gradient, so there is nothing to train.")
    return _OPTIMIZERS[config.optimizer](groups, config)


def scheduler_for(optimizer: torch.optim.Optimizer, config: TrainingConfig, steps: int) -> LambdaLR:
    """The schedule of every group's rate; ``steps``: those of one epoch."""
    total, warmup = steps * config.epochs, config.warmup_epochs * steps
    falls: dict[str, Callable[[float], float]] = {
        "constant": lambda step: 1.0,
        "step": lambda step: 0.1 ** (step // (config.step_epochs * steps)),
        "multistep": lambda step: 0.1 ** sum(12 * step >= part * total for part in (8, 11)),
        "cosine": lambda step: 0.5 * (1 + math.cos(math.pi * min(max(step - warmup, 0) / max(total - warmup, 1), 1))),
    }
    fall = falls[config.schedule]
    return LambdaLR(optimizer, lambda step: min((step + 1) / (warmup + 1), 1.0) * fall(step))
