"""Which models dcafy works on, and what the others are told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from dcafy.errors import InputError
from dcafy.graph.paths import joined
from dcafy.graph.source import ALLOWED, is_plain
from dcafy.trace.effects import is_filled
from dcafy.trace.recorder import is_layer
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
            if _keeps_hold_of_a_module(module.__dict__.get(name)):
                raise InputError(
                    f"{joined(path, name)} was replaced by a function that keeps hold of a module, and in a copy of "
                    "the model it would go on using that very module. Write it into a subclass, or as a function of "
                    "self and set it with types.MethodType(function, module)."
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
        held: dict[str, Iterable[Any]] = {
            "module": module._modules,
            "parameter": module._parameters,
            "buffer": module._buffers,
            "tensor": [name for name, value in module.__dict__.items() if isinstance(value, torch.Tensor)],
        }
        for what, names in held.items():
            for name in names:
                if not is_plain(name):
                    raise InputError(f"A {what} is named {quoted(str(name))}; {ALLOWED}. Rename it.")
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


def _keeps_hold_of_a_module(value: Any) -> bool:
    """Whether a function has a module, or a method of one, in the scope it was made in."""
    pending, seen = [value], set()
    while pending:
        function = pending.pop()
        if not isinstance(function, FunctionType) or function in seen:
            continue
        seen.add(function)
        held = [cell.cell_contents for cell in function.__closure__ or () if is_filled(cell)]
        held += function.__defaults__ or ()
        if any(isinstance(getattr(item, "__self__", item), nn.Module) for item in held):
            return True
        pending += held
    return False
