"""A network and its optimizer as Accelerate trains them: whole in every process (DDP), or in shards (FSDP)."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dcafy.errors import UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator


class Replicated:
    """Every process has the whole network; DDP where there are several.

    ``model`` and ``optimizer``: what a training step uses. To be made anew where other parameters are trained: DDP
    looks only once.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._accelerator, self._model = accelerator, model
        self._own = {name: model.__dict__[name] for name in _LEFT if name in model.__dict__}
        model.__dict__.pop(_PREPARED, None)
        try:
            self.model = accelerator.prepare_model(model)
            self.optimizer = accelerator.prepare_optimizer(optimizer)
        except BaseException:
            self._clear()
            raise

    def gather(self) -> None:
        """Brings the user's network up to date, which it is."""

    def whole(self) -> AbstractContextManager[None]:
        """Inside it the user's network and optimizer are up to date, in every process."""
        return nullcontext()

    def close(self, *, failed: bool) -> None:
        """Gives network and optimizer back."""
        self._accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self._clear()

    def _clear(self) -> None:
        """Takes off the user's network what Accelerate leaves on it."""
        for name in _LEFT:
            self._model.__dict__.pop(name, None)
        self._model.__dict__.update(self._own)


class Sharded:
    """FSDP2: what is trained is a copy in shards; gradients and the optimizer's state exist in shards alone.

    The user's network stays whole in every process, for validation and for what is kept; it is brought up to date at
    the end, for a checkpoint, and at every step for an average. Buffers are the main process's, as in DDP.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._whole, self._plain = model, optimizer
        shards, state = copy.deepcopy(model), _state(optimizer, model)
        _point(optimizer, model, shards)
        optimizer.state.clear()
        # Every process has read all weights already; and what Accelerate would do instead takes no buffers.
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
        self.model, self.optimizer = accelerator.prepare(shards, optimizer)
        _fill(optimizer, self.model, state, _shard)

    @torch.no_grad()
    def gather(self) -> None:
        """Brings the user's network up to date; all processes have to call it."""
        shards = dict(self.model.named_parameters())
        for name, parameter in self._whole.named_parameters():
            parameter.copy_(_full(shards[name]))
        for ours, theirs in zip(self._whole.buffers(), self.model.buffers(), strict=True):
            ours.copy_(theirs)
            dist.broadcast(ours, 0)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside it the user's network and optimizer are up to date, in every process; all have to call it."""
        state = self._give_back()
        try:
            yield
        finally:
            _point(self._plain, self._whole, self.model)
            _fill(self._plain, self.model, state, lambda value, parameter: value)

    def close(self, *, failed: bool) -> None:
        """Gives network and optimizer back, up to date but where a process ``failed``: it would be waited for."""
        if not failed:
            self._give_back()

    def _give_back(self) -> dict[str, dict[str, Any]]:
        """Brings network and optimizer up to date; the state in shards."""
        self.gather()
        state = _state(self._plain, self.model)
        _point(self._plain, self.model, self._whole)
        _fill(self._plain, self._whole, state, lambda value, parameter: _full(value))
        return state


_KINDS: Mapping[str, Callable[..., Replicated | Sharded]] = {
    "NO": Replicated,
    "MULTI_CPU": Replicated,
    "MULTI_GPU": Replicated,
    "FSDP": Sharded,
}
"""Accelerate's kinds of training -> how a network is wrapped for it."""

_PREPARED = "_is_accelerate_prepared"
"""With this on it Accelerate hands a network back as it is: in float32, though its precision is bf16."""

_LEFT = ("forward", "_original_forward", _PREPARED)
"""What Accelerate leaves on a network; the forward is bound to that very object, and a copy would call it."""


def check_kind(accelerator: Accelerator) -> None:
    """Raises ``UsageError`` where Accelerate's configuration asks for a kind of training that is not done here."""
    kind = accelerator.distributed_type.value
    if kind not in _KINDS:
        raise UsageError(
            f"Accelerate's configuration asks for {kind}, and networks are not trained that way here. Train with DDP "
            "(torchrun, or accelerate launch --multi_gpu) or with FSDP (accelerate launch --use_fsdp --fsdp_version 2)."
        )
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if kind == "FSDP" and (getattr(plugin, "fsdp_version", 1) != 2 or plugin.activation_checkpointing):
        raise UsageError(
            "Accelerate's configuration asks for FSDP of version 1 or with activation checkpointing; shards are kept "
            "with version 2, and batch norms would see every batch twice. Set fsdp_version: 2 and "
            "fsdp_activation_checkpointing: false."
        )


def as_accelerate_trains(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Replicated | Sharded:
    """``model`` and ``optimizer`` as Accelerate trains them here."""
    return _KINDS[accelerator.distributed_type.value](accelerator, model, optimizer)


# --- an optimizer, moved from one network's parameters to another's -----------------------------------------


def _state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict[str, Any]]:
    """Name of a parameter of ``model`` -> what the optimizer keeps of it."""
    return {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}


def _point(optimizer: torch.optim.Optimizer, old: nn.Module, new: nn.Module) -> None:
    """Points the optimizer from the parameters of one network to those of the same names in another."""
    names = {id(parameter): name for name, parameter in old.named_parameters()}
    theirs = dict(new.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [theirs[names[id(parameter)]] for parameter in group["params"]]


def _fill(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    state: Mapping[str, Mapping[str, Any]],
    change: Callable[[Any, nn.Parameter], Any],
) -> None:
    """Gives the optimizer this state, each value as ``change`` makes it of the value and its parameter."""
    parameters = dict(model.named_parameters())
    optimizer.state = collections.defaultdict(dict)
    for name, row in state.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {key: change(value, parameter) for key, value in row.items()}


def _shard(value: Any, parameter: nn.Parameter) -> Any:
    """``value`` split as the parameter in shards is; what has another shape (a count of steps) is left whole."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not (isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def _full(value: Any) -> Any:
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value
