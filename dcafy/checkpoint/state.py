"""What a state dict does not hold: modes, frozen parameters, the dtype of buffers that are not saved."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dcafy.checkpoint.description import State
from dcafy.checkpoint.tensors import dtype_named
from dcafy.errors import CheckpointError
from dcafy.graph.modes import keep_in_eval, stays_in_eval
from dcafy.graph.paths import joined
from dcafy.wording import printable

__all__ = ["restore", "state_of"]


def state_of(model: nn.Module) -> State:
    """The state of ``model``."""
    modes = {path: module.training for path, module in model.named_modules()}
    return State(
        training=model.training,
        modes={path: mode for path, mode in modes.items() if path and mode != modes[_around(path, modes)]},
        kept_in_eval=tuple(path for path, module in model.named_modules() if stays_in_eval(module)),
        frozen=tuple(name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad),
        unsaved={
            joined(path, name): str(buffer.dtype).removeprefix("torch.")
            for path, module, name, buffer in _unsaved(model)
        },
    )


def restore(model: nn.Module, state: State) -> None:
    """``model`` in that state; ``CheckpointError`` where a frozen parameter is not there."""
    modules = dict(model.named_modules())
    modes: dict[str, bool] = {}
    for path, module in modules.items():  # outer before inner
        inherited = modes[_around(path, modes)] if path else state.training
        module.training = modes[path] = state.modes.get(path, inherited)
        if path in state.kept_in_eval:
            keep_in_eval(module)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unknown = [name for name in state.frozen if name not in parameters]
    if unknown:
        raise CheckpointError(f"{printable(unknown[0])} is a frozen parameter in the folder and none of the network's.")
    for name, parameter in parameters.items():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(name not in state.frozen)
    for path, module, name, buffer in _unsaved(model):
        wanted = state.unsaved.get(joined(path, name))
        if wanted is not None:
            module._buffers[name] = buffer.to(_floating(wanted))


def _around(path: str, known: dict[str, bool]) -> str:
    """The nearest module around ``path``; a module that is used twice is listed under its first path only."""
    parent = path.rpartition(".")[0]
    while parent and parent not in known:
        parent = parent.rpartition(".")[0]
    return parent


def _unsaved(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(path, module, name, buffer) of floating-point buffers that the state dict leaves out."""
    for path, module in model.named_modules():
        for name in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.is_floating_point():
                yield path, module, name, buffer


def _floating(name: str) -> torch.dtype:
    try:
        dtype = dtype_named(name)
    except KeyError:
        dtype = torch.bool
    if not dtype.is_floating_point:
        raise CheckpointError(f"{printable(name)} is no dtype of a floating-point buffer.")
    return dtype
