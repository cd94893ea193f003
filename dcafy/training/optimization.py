"""The optimizer and its schedule, as a configuration asks for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dcafy.converted import has_new, parameter_groups, undecayed
from dcafy.errors import InputError
from dcafy.training.options import TrainingConfig


def groups_of(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Optimizer groups, with decay on what ``config`` says; what is new in the model has the connections' rate."""
    if has_new(model):
        groups = parameter_groups(
            model,
            lr=config.base_rate,
            connection_lr=config.connection_rate,
            scale_lr=config.scale_rate,
            weight_decay=config.decay,
        )
    else:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        apart = undecayed(model)
        split = (
            ([p for p in trained if id(p) not in apart], config.decay),
            ([p for p in trained if id(p) in apart], 0.0),
        )
        groups = [{"params": part, "lr": config.base_rate, "weight_decay": decay} for part, decay in split if part]
    return _decayed(model, groups, config)


def _decayed(model: nn.Module, groups: list[dict[str, Any]], config: TrainingConfig) -> list[dict[str, Any]]:
    """The groups with decay on what ``config`` says, where that is not what they have: on matrices and kernels."""
    if config.decayed == "weights":
        return groups
    spared = _spared(model) if config.decayed == "dense" else set()
    parted = []
    for group in groups:
        for decay in dict.fromkeys((config.decay, 0.0)):
            part = [p for p in group["params"] if (0.0 if id(p) in spared else config.decay) == decay]
            parted += [{**group, "params": part, "weight_decay": decay}] if part else []
    return parted


def _spared(model: nn.Module) -> set[int]:
    """Biases, and what batch norms and depthwise convolutions have: mobile networks are trained without decay on it."""
    return {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if "bias" in name or isinstance(module, nn.modules.batchnorm._NormBase) or getattr(module, "groups", 1) != 1
    }


_OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], TrainingConfig], torch.optim.Optimizer]] = {
    "adamw": lambda groups, config: torch.optim.AdamW(groups),
    "sgd": lambda groups, config: torch.optim.SGD(
        groups, lr=config.base_rate, momentum=config.momentum, nesterov=config.nesterov and config.momentum > 0
    ),
}


def optimizer_for(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer of everything in ``model`` that requires a gradient; ``InputError`` where nothing does."""
    groups = groups_of(model, config)
    if not groups:
        raise InputError("No parameter of the model requires a gradient, so there is nothing to train.")
    return _OPTIMIZERS[config.optimizer](groups, config)


def part_of_rate(config: TrainingConfig, steps: int) -> Callable[[float], float]:
    """Step -> the part of every group's rate that the schedule leaves at it; ``steps``: those of one epoch."""
    milestones = config.falls_at if config.schedule == "multistep" else ()
    total, warmup = steps * config.epochs, config.warmup_steps or config.warmup_epochs * steps
    falls: dict[str, Callable[[float], float]] = {
        "constant": lambda step: 1.0,
        "step": lambda step: 0.1 ** (step // (config.step_epochs * steps)),
        "multistep": lambda step: 0.1 ** sum(step >= fall * steps - 1e-6 for fall in milestones),
        "cosine": lambda step: 0.5 * (1 + math.cos(math.pi * min(max(step - warmup, 0) / max(total - warmup, 1), 1))),
    }
    fall = falls[config.schedule]
    start = config.warmup_from

    def rise(step: float) -> float:
        return (
            min(start + (1 - start) * step / warmup, 1.0) if start and warmup else min((step + 1) / (warmup + 1), 1.0)
        )

    return lambda step: rise(step) * fall(step)


def scheduler_for(optimizer: torch.optim.Optimizer, config: TrainingConfig, steps: int) -> LambdaLR:
    """The schedule of every group's rate; ``steps``: those of one epoch."""
    return LambdaLR(optimizer, part_of_rate(config, steps))


def rates_at(schedule: LambdaLR) -> list[float]:
    """Every group's rate at the step where the schedule stands, whatever it was under another schedule."""
    pairs = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    return [float(base * part(schedule.last_epoch)) for base, part in pairs]
