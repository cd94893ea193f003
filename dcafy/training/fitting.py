"""Whether a checkpoint is one that this training can have written: looked over before anything is put back."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from dcafy.records import Wrong, read, within
from dcafy.training.history import Epoch

_COUNT = within(0, 2**53)


def _finite(value: Any, where: str) -> Any:
    if not math.isfinite(value) or value < 0:
        raise Wrong(where, "a finite number that is not negative", value)
    return value


@dataclass(frozen=True)
class _Progress:
    epoch: Annotated[int, _COUNT]
    batch: Annotated[int, _COUNT]
    step: Annotated[int, _COUNT]
    seconds: Annotated[float, _finite]
    losses: float
    right: float | None
    images: Annotated[int, _COUNT]
    broken: bool
    rate: Annotated[float, _finite] = 0.0  # which checkpoints did not always have


@dataclass(frozen=True)
class _Schedule:
    last_epoch: Annotated[int, _COUNT]
    _step_count: Annotated[int, _COUNT]
    _last_lr: tuple[Annotated[float, _finite], ...]


def _above_zero(value: Any, where: str) -> Any:
    if value <= 0:
        raise Wrong(where, "above 0", value)
    return value


@dataclass(frozen=True)
class _Scaler:
    scale: Annotated[float, _finite, _above_zero]  # with 0 no step would ever be taken
    growth_factor: Annotated[float, _finite, _above_zero]
    backoff_factor: Annotated[float, _finite, _above_zero]
    growth_interval: Annotated[int, _COUNT]
    _growth_tracker: Annotated[int, _COUNT]


def check_facts(facts: Mapping[str, Any], groups: int, *, scales: bool) -> None:
    """Nothing where what is no tensor in a checkpoint is of the right kinds; ``Wrong`` or ``Unknown`` says what is not.

    ``groups``: how many groups of parameters the optimizer has. ``scales``: whether the loss is scaled, as with fp16.
    """
    read(_Progress, facts["progress"], "progress")
    schedule = read(_Schedule, facts["schedule"], "schedule", whole=True)
    if len(schedule._last_lr) != groups:
        raise Wrong("schedule._last_lr", f"{groups} rates", list(schedule._last_lr))
    if scales:
        read(_Scaler, facts["scaler"], "scaler", whole=True)
    read(dict[str, str], facts["tied"], "tied")
    read(tuple[str, ...], facts["skipped"], "skipped")
    for row in facts["epochs"]:
        Epoch.from_dict(row)


def check_tensors(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str) -> None:
    """Nothing where the tensors have the names, shapes and types of our ``own``; ``Wrong`` says which has not."""
    for name in {**tensors, **own}:
        if name not in own or name not in tensors:
            raise Wrong(f"{where}.{name}", "there" if name in own else "absent", "absent" if name in own else "there")
        check_tensor(tensors[name], own[name], f"{where}.{name}")


def check_tensor(tensor: Tensor, like: Tensor, where: str) -> None:
    """Nothing where the tensor has the shape and the type of ``like``; else ``Wrong``."""
    kinds = [f"{tuple(one.shape)} of {str(one.dtype).removeprefix('torch.')}" for one in (like, tensor)]
    if kinds[0] != kinds[1]:
        raise Wrong(where, kinds[0], kinds[1])


def check_optimizer(state: Mapping[Tensor, Mapping[str, Tensor]], optimizer: torch.optim.Optimizer) -> None:
    """Nothing where each parameter's state is what this optimizer keeps for one of its shape; else ``Wrong``."""
    for parameter, kept in state.items():
        check_tensors(kept, _usual_state(optimizer, parameter), "the optimizer's state")


def _usual_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """What the optimizer keeps for such a parameter, found by one step on a parameter of our own."""
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    probe = torch.zeros_like(parameter, device="cpu").requires_grad_()
    probe.grad = torch.zeros_like(probe)
    taken = inspect.signature(type(inner)).parameters  # AdamW has defaults of Adam's that it does not take
    defaults = {**inner.defaults, "lr": 0.0, "foreach": False, "fused": None, "capturable": False}
    twin = type(inner)([probe], **{name: value for name, value in defaults.items() if name in taken})
    twin.step()
    return {name: torch.as_tensor(value) for name, value in twin.state[probe].items() if value is not None}


def check_draws(generators: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Nothing where random numbers can be drawn from these states; else one of the errors of those who refuse."""
    check_tensor(generators["torch"], torch.get_rng_state(), "torch's generator")
    torch.Generator().set_state(generators["torch"])
    np.random.RandomState().set_state(numpy_state(plain))
    random.Random().setstate(python_state(plain))


def numpy_state(plain: Mapping[str, Any]) -> tuple[Any, ...]:
    """The state of numpy's generator, as it was written down."""
    kind, keys, *rest = plain["numpy"]
    return (kind, np.array(keys, dtype=np.uint32), *rest)


def python_state(plain: Mapping[str, Any]) -> tuple[Any, ...]:
    """The state of Python's generator, as it was written down."""
    version, words, following = plain["python"]
    return (version, tuple(words), following)
