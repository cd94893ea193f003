"""How long networks take, in turns, so that what else the machine does hits all alike: a training step, an image."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcafy.graph.modes import evaluating


def _cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


def step_times(
    models: Mapping[str, nn.Module],
    images: Any,
    labels: Any,
    *,
    loss: Callable[[nn.Module, Any, Any], Tensor] = _cross_entropy,
    rounds: int = 7,
    warmup: int = 2,
) -> dict[str, list[float]]:
    """Name -> seconds of each of ``rounds`` training steps, the networks in turns and every round in another order.

    A step is forward, ``loss`` of (model, images, labels), backward and SGD with momentum. The networks are copied and
    not changed. Give one twice under two names to see what the machine's noise makes of equal things.
    """
    copies = {name: copy.deepcopy(model).train() for name, model in models.items()}
    optimizers = {
        name: torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4, momentum=0.9)
        for name, model in copies.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in copies}
    names = list(copies)
    with torch.random.fork_rng(devices=[]):
        for number in range(warmup + rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                seconds = _step(copies[name], optimizers[name], lambda model: loss(model, images, labels))
                if number >= warmup:
                    taken[name].append(seconds)
    return taken


@torch.no_grad()
def forward_times(
    models: Mapping[str, nn.Module], images: Tensor, *, rounds: int = 5, most: int = 60, enough: float = 2.0
) -> dict[str, list[float]]:
    """Name -> seconds that ``images`` take in eval mode, in each of at least ``rounds``, the networks in turns.

    Fast networks get up to ``most`` rounds, as long as all of it takes less than ``enough`` seconds: a few milliseconds
    are lost in what else the machine does.
    """
    taken: dict[str, list[float]] = {name: [] for name in models}
    with contextlib.ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
        begun = time.perf_counter()
        for number in range(most + 1):  # the first is to get warm
            if number > rounds and time.perf_counter() - begun > enough:
                break
            for name, model in list(models.items())[:: 1 if number % 2 else -1]:
                _wait(model)
                start = time.perf_counter()
                model(images)
                _wait(model)
                taken[name] += [time.perf_counter() - start] if number else []
    return taken


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[nn.Module], Tensor]) -> float:
    _wait(model)
    start = time.perf_counter()
    optimizer.zero_grad()
    torch.autograd.backward(loss(model))
    optimizer.step()
    _wait(model)
    return time.perf_counter() - start


def _wait(model: nn.Module) -> None:
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
