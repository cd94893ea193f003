"""Everything about a network that a conversion must leave alone, as comparable data."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch
from torch import Tensor, nn

HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_load_state_dict_post_hooks",
    "_load_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)
CONTAINERS = ("_buffers", "_modules", "_parameters")


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Modules with their modes, hooks and attributes, tensors with identity and values, and the random states."""
    facts: dict[str, Any] = {"rng torch": torch.get_rng_state().numpy().tobytes(), "rng python": random.getstate()}
    name, keys, position, has_gauss, cached = numpy.random.get_state()
    facts["rng numpy"] = (name, keys.tobytes(), position, has_gauss, cached)
    facts["gradients enabled"] = torch.is_grad_enabled()
    for path, module in model.named_modules(remove_duplicate=False):
        facts[f"module {path}"] = (id(module), type(module), module.training)
        facts[f"forward {path}"] = module.__dict__.get("forward")
        for kind in HOOKS:
            facts[f"{kind} {path}"] = [(key, id(hook)) for key, hook in getattr(module, kind).items()]
        plain = {key: value for key, value in vars(module).items() if key not in (*HOOKS, *CONTAINERS)}
        facts[f"attributes {path}"] = {key: _plain(value) for key, value in plain.items()}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for path, tensor in tensors:
        facts[f"tensor {path}"] = (id(tensor), tensor.requires_grad, tensor.is_leaf, _values(tensor))
        facts[f"gradient {path}"] = None if tensor.grad is None else (id(tensor.grad), _values(tensor.grad))
    return facts


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is not as it was, by name."""
    return sorted(key for key in before.keys() | after.keys() if before.get(key, ...) != after.get(key, ...))


def _plain(value: object) -> object:
    return value if isinstance(value, str | int | float | bool | tuple | type(None)) else id(value)


def _values(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.is_meta or isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
        return (str(tensor.dtype), str(tensor.device))
    data = tensor.detach()
    return (str(data.dtype), tuple(data.shape), data.stride(), data.data_ptr(), data.contiguous().numpy().tobytes())
