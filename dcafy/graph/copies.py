"""Copies of a model to work on, so that the user's own is never touched."""

from __future__ import annotations

import collections
import contextlib
import copy
import enum
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dcafy.errors import InputError
from dcafy.graph.paths import joined
from dcafy.wording import reason_of


def data_free_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` on the meta device, without hooks and in eval mode, to be traced."""
    twin = _bare(_twin(model, _without_data))
    for module in twin.modules():
        own: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in own:  # a class with a copying of its own may have made others
            held.update((name, _without_data(tensor)) for name, tensor in held.items() if tensor is not None)
        if isinstance(module, nn.DataParallel):
            module.device_ids = []  # there is nothing to scatter
    return twin


def running_copy(model: nn.Module) -> nn.Module:
    """A copy without hooks, in eval mode, to be run on data: it shares the parameters, and nothing else."""
    return _bare(copy_to_run(model))


def _bare(twin: nn.Module) -> nn.Module:
    for module in twin.modules():
        module.__dict__["training"] = False
        for name in _HOOKS.split():
            if module.__dict__.get(name):
                module.__dict__[name] = collections.OrderedDict()
    return twin


def has_own_hooks(module: nn.Module) -> bool:
    """Whether hooks of the user's see, and may change, what ``module`` is given or returns; no recording has them."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return not all(str(getattr(hook, "__module__", "")).startswith("dcafy.") for hook in hooks)


def own_copy(model: nn.Module) -> nn.Module:
    """A deep copy of ``model``; of a tensor with a history (a pruned weight, a kept activation) it has the values.

    Raises ``InputError`` that names what cannot be copied.
    """
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in _held(model) if not tensor.is_leaf}
    with _named_refusals(model, memo):
        return copy.deepcopy(model, dict(memo))


@contextlib.contextmanager
def _named_refusals(model: nn.Module, memo: dict[int, Any]) -> Iterator[None]:
    """Inside it an object that refuses to be copied becomes an ``InputError`` that says where the model has it."""
    try:
        yield
    except Exception as error:  # objects of the user's may refuse in any way
        raise InputError(
            f"{_uncopyable(model, memo) or type(model).__name__} cannot be copied: {reason_of(error)}. Take it off the "
            "model, and put it on the result where you need it."
        ) from error


def _uncopyable(model: nn.Module, memo: dict[int, Any]) -> str | None:
    """The first attribute, with its path, that a deep copy stops at."""
    own = ((path, name, value) for path, module in model.named_modules() for name, value in vars(module).items())
    stops = (joined(path, name) for path, name, value in own if name != "_modules" and not _copies(value, memo))
    return next(stops, None)


def _copies(value: Any, memo: dict[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:  # as above; the caller tells the reason
        return False
    return True


def _held(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that ``model`` has: in its modules, and in containers and plain objects that they have."""
    pending = [value for module in model.modules() for value in module.__dict__.values() if not is_nothing(value)]
    seen = set()
    while pending:
        value = pending.pop()
        if type(value) in _SHARED or isinstance(value, _ATOMS) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
            continue
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple | set | frozenset | collections.deque):
            pending += value
        pending += getattr(value, "__dict__", {}).values()


def is_nothing(value: Any) -> bool:
    """Whether a value of a module is plain or an empty container, as most of the dozen that ``nn.Module`` makes are."""
    kind = type(value)
    return kind in _SHARED or (kind in _EMPTY and not value)


_EMPTY = frozenset({dict, collections.OrderedDict, set, list, tuple})

_ATOMS = (nn.Module, type, types.FunctionType, types.ModuleType)
"""What is no container of its own: a module is looked into by its path, the rest is never copied."""


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy with modules of its own that shares every tensor with ``model``."""
    return _twin(model, lambda tensor: tensor)


def copy_to_run(model: nn.Module) -> nn.Module:
    """A copy that shares the parameters with ``model``, and nothing that a run alters."""
    return _twin(model, lambda tensor: tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone())


def _twin(model: nn.Module, tensor_of: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy whose tensors are ``tensor_of`` the model's.

    ``copy.deepcopy`` alone would do; it spends most of its time on the dozen empty dicts of every module.
    """
    memo: dict[int, Any] = {id(tensor): tensor_of(tensor) for tensor in _held(model)}
    modules = list(model.modules())
    ways = {kind: _copies_plainly(kind) for kind in {type(module) for module in modules}}
    plain = [module for module in modules if ways[type(module)]]
    for module in plain:
        memo[id(module)] = type(module).__new__(type(module))
    with _named_refusals(model, dict(memo)):
        for module in plain:
            copied = {
                name: value if type(value) in _SHARED else _copied(value, memo, tensor_of)
                for name, value in module.__dict__.items()
                if name != "_compiled_call_impl"  # which would go on calling the original
            }
            object.__setattr__(memo[id(module)], "__dict__", copied)
        return copy.deepcopy(model, memo)


def copies_plainly(model: nn.Module) -> bool:
    """Whether every module of ``model`` is copied without code of its own."""
    return all(map(_copies_plainly, {type(module) for module in model.modules()}))


_OWN_WAYS = ("__deepcopy__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__", "__new__")


def _copies_plainly(kind: type[nn.Module]) -> bool:
    """Whether an instance is its ``__dict__`` and nothing else (a GraphModule, for one, is copied in its own way).

    ``torch.nn`` itself only fills in what old pickles lack, and ``torch.compile``, once used, counts such modules.
    """
    ways = (getattr(getattr(kind, name, None), "__module__", None) for name in _OWN_WAYS)
    return all(home is None or home.startswith(("torch.nn.", "torch._dynamo.")) for home in ways)


_SHARED = frozenset({int, float, bool, str, bytes, complex, type(None), torch.Size, torch.dtype, torch.device})


def _copied(value: Any, memo: dict[int, Any], tensor_of: Callable[[Tensor], Tensor]) -> Any:
    kind = type(value)
    if kind in _SHARED or isinstance(value, enum.Enum):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor):  # in a cache of the module's own
        memo[id(value)] = tensor_of(value)
        return memo[id(value)]
    if kind in _EMPTY and not value:
        return kind()
    if kind is dict:
        twin = memo[id(value)] = {}
        twin.update((key, _copied(item, memo, tensor_of)) for key, item in value.items())
        return twin
    if kind is tuple and all(type(item) in _SHARED for item in value):
        return value
    return copy.deepcopy(value, memo)


_HOOKS = (
    "_forward_hooks _forward_hooks_with_kwargs _forward_hooks_always_called _forward_pre_hooks "
    "_forward_pre_hooks_with_kwargs _backward_hooks _backward_pre_hooks"
)


def _without_data(tensor: Tensor) -> Tensor:
    if tensor.device.type == "meta":
        return tensor
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
