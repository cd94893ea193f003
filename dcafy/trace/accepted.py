"""Which models dcafy works on, and what the others are told."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from dcafy.errors import InputError
from dcafy.graph.paths import joined
from dcafy.graph.reading import closed_over
from dcafy.graph.source import ALLOWED, is_hidden, is_plain
from dcafy.trace.recorder import REWRITE, is_layer
from dcafy.wording import quoted


def require_module(model: Any) -> None:
    """Nothing for a model that dcafy can work on; ``InputError`` says what else it is, and what to do."""
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise InputError(f"{model.__name__} is a class; an nn.Module instance is needed: {model.__name__}(...).")
    if not isinstance(model, nn.Module):
        raise InputError(
            f"A torch.nn.Module is needed, not {type(model).__name__}. Build the network first; "
            "weights alone are loaded into it with load_state_dict."
        )
    wrapper = type(model).__name__
    if wrapper in _WRAPPERS:
        known_as, inner = _WRAPPERS[wrapper]
        raise InputError(f"The model is wrapped by {known_as}. Pass model.{inner}, and wrap the result again.")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("A TorchScript module holds no Python to trace. Pass the model it was scripted from.")
    _require_plain_names(model)
    tensors = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for path, module in model.named_modules():
        if type(module).__name__ in _WRAPPERS and not isinstance(module, LOOKED_THROUGH):
            known_as, inner = _WRAPPERS[type(module).__name__]
            raise InputError(
                f"{path} is wrapped by {known_as}. Put model.{path}.{inner} in its place, and wrap that part of the "
                "result again."
            )
        quantized = type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized"))
        if quantized and type(module).__name__ != "FloatFunctional":  # which only adds, in float
            raise InputError(f"{path or wrapper} is quantized. Connect the float model before quantizing it.")
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(f"{path} is a TorchScript module. Pass a model built from Python modules.")
        for name in _REPLACEABLE:
            if _keeps_hold_of_a_part(module.__dict__.get(name), tensors):
                raise InputError(
                    f"{joined(path, name)} was replaced by a function that keeps hold of a module or its weights, and "
                    f"in a copy of the model it would go on using those very ones. {REWRITE}"
                )
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if torch.nn.parameter.is_lazy(tensor):
                raise InputError(
                    f"{joined(path, name)} is not initialized yet (a lazy module). Run the model once on an input "
                    "first."
                )


def _require_plain_names(model: nn.Module) -> None:
    """Every name below becomes source, whatever file or code it is from; see :mod:`dcafy.graph.source`."""
    pending, seen = [model], {model}
    while pending:
        module = pending.pop()
        held: dict[str, Any] = {"module": module._modules, "parameter": module._parameters, "buffer": module._buffers}
        tensors = [name for name, value in module.__dict__.items() if isinstance(value, torch.Tensor)]
        for what, names in {**held, "tensor": tensors}.items():
            for name in getattr(names, "keys", lambda given=names: given)():  # TorchScript's give out values, or pairs
                if not is_plain(name):
                    raise InputError(f"A {what} is named {quoted(str(name))}; {ALLOWED}. Rename it.")
        for what, things in held.items():
            for name, thing in things.items():
                if thing is not None and is_hidden(module, name, thing):
                    raise InputError(
                        f"A {what} is named {quoted(name)}, as something else that every {type(module).__name__} has: "
                        "one hides the other. Rename it."
                    )
        inner = [child for child in module._modules.values() if isinstance(child, nn.Module) and child not in seen]
        seen.update(inner)
        pending += inner


_WRAPPERS = {
    "DistributedDataParallel": ("DistributedDataParallel", "module"),
    "DataParallel": ("DataParallel", "module"),
    "FullyShardedDataParallel": ("FullyShardedDataParallel", "module"),
    "OptimizedModule": ("torch.compile", "_orig_mod"),
}
"""Class of a wrapper -> what it is called, and where the model is in it."""


LOOKED_THROUGH = (nn.DataParallel,)
"""Wrappers that may stay inside a model: what they hold becomes an island."""


def kept_whole(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(path, reason) of the submodules whose own call does what their forward does not."""
    for path, inner in module.named_modules():
        if path and isinstance(inner, LOOKED_THROUGH):
            yield path, f"{type(inner).__name__} runs copies of it, so what it holds is connected on its own"
        elif (
            path
            and not is_layer(inner)
            and any(isinstance(h, _REPARAMETRIZING) for h in inner._forward_pre_hooks.values())
        ):
            yield path, "a hook computes its weights anew whenever it is called"


_REPARAMETRIZING = (BasePruningMethod, SpectralNorm, WeightNorm)
"""Hooks that compute a weight from the parameters (``torch.nn.utils.parametrizations`` does without hooks)."""


_REPLACEABLE = ("forward", "train", "eval")


def _keeps_hold_of_a_part(value: Any, tensors: set[int]) -> bool:
    """Whether a function has a module, a method of one or one of the ``tensors`` in the scope it was made in.

    Functions are never copied, and so neither is what they keep; other objects are, with what they keep themselves.
    """
    pending, seen = [(value, False)], set()
    while pending:
        item, within = pending.pop()
        if within and (isinstance(getattr(item, "__self__", item), nn.Module) or id(item) in tensors):
            return True
        if isinstance(item, nn.Module | Tensor) or id(item) in seen:
            continue
        seen.add(id(item))
        pending += _held_by_function(item) if callable(item) else ()
        if isinstance(item, dict):
            pending += [(inner, within) for inner in item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            pending += [(inner, within) for inner in item]
        elif isinstance(item, functools.partial):
            pending += [(inner, within) for inner in (item.func, item.args, item.keywords)]
        elif not isinstance(item, type | ModuleType | MethodType):
            pending += [(inner, within) for inner in getattr(item, "__dict__", {}).values()]
    return False


def _held_by_function(item: Any) -> list[tuple[Any, bool]]:
    """What is in a function's closure, defaults and attributes, or behind what ``functools`` made of it."""
    function = getattr(item, "__func__", item)
    cells = list(closed_over(function))
    held = [*cells, *(getattr(function, "__defaults__", None) or ())]
    held += (getattr(function, "__kwdefaults__", None) or {}).values()
    if isinstance(function, FunctionType) or hasattr(function, "cache_info"):
        held += [*getattr(function, "__dict__", {}).values(), getattr(function, "__wrapped__", None)]
    return [(inner, True) for inner in held]
