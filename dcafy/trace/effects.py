"""What a forward leaves behind in Python: attributes, lists and objects that it changes, which no graph has.

A counter (``self.step += 1``) would keep its value of the recording for ever, and a list that is appended to
would hold what stands for a tensor there.
"""

from __future__ import annotations

import collections
import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, fx, nn

from dcafy.graph.nodes import OWNER

_PLAIN = (int, float, complex, str, bytes, bool, type(None))
_CONTAINERS = (list, tuple, set, dict, collections.OrderedDict, collections.defaultdict, collections.deque)
_OPAQUE = (nn.Module, Tensor, fx.Proxy, type, FunctionType, ModuleType)
_BOOKKEEPING = frozenset(nn.Module().__dict__)

State = dict[str, tuple[Any, ...]]
"""Name of an attribute -> its value, or what is in it where it is a container or a plain object."""


def python_state(module: nn.Module) -> State:
    """What ``module`` keeps beside its tensors and submodules."""
    return {name: _described(value) for name, value in module.__dict__.items() if name not in _BOOKKEEPING}


def changed(before: State, after: State) -> list[str]:
    """The attributes in which two states of a module differ."""
    names = dict.fromkeys((*before, *after))
    return [n for n in names if n not in before or n not in after or not _alike(before[n], after[n])]


def _described(value: Any) -> tuple[Any, ...]:
    return (type(value), *_items(value)) if type(value) in _CONTAINERS else (value, *_items(value))


def _alike(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if type(one) is tuple:
        return len(one) == len(other) and all(map(_alike, one, other))
    return type(one) in _PLAIN and bool(one == other)


def _items(value: Any) -> tuple[Any, ...]:
    """What is in a container or a plain object, one level deep."""
    if type(value) in _PLAIN or isinstance(value, _OPAQUE):
        return ()
    if isinstance(value, dict):
        return (*value.keys(), *value.values())
    if type(value) in _CONTAINERS:
        return tuple(value)
    attributes = getattr(value, "__dict__", {})
    return (*attributes.keys(), *attributes.values())


def proxies_in(value: Any, depth: int = 3) -> Iterator[fx.Proxy]:
    """What stands for a tensor while a trace runs, in ``value`` or at some depth in it."""
    if issubclass(type(value), fx.Proxy):
        yield value
    elif depth:
        for item in _items(value):
            yield from proxies_in(item, depth - 1)


def holds_proxy(value: Any) -> bool:
    """Whether there is any of them in ``value``."""
    return next(proxies_in(value), None) is not None


@contextlib.contextmanager
def watched_globals(modules: Iterable[nn.Module], tell: Callable[[str, str], object]) -> Iterator[None]:
    """Has ``tell(path, reason)`` called for forwards that put what they compute into a global list, set or dict.

    What was put there while tracing stands for a tensor and is of no use to anybody: it is taken out again.
    """
    scopes = {id(scope): scope for scope in map(forward_globals, modules)}
    before = [
        (name, value, value.copy())
        for scope in scopes.values()
        for name, value in scope.items()
        if type(value) in _CONTAINERS and type(value) is not tuple and not name.startswith("__")
    ]
    try:
        yield
    finally:
        for name, value, was in before:
            if _alike(_described(was), _described(value)):
                continue
            found = list(proxies_in(value))
            if found:
                value.clear()
                (value.extend if isinstance(value, list | collections.deque) else value.update)(was)
            for proxy in found:  # which is computed by the forward that stored it, as a rule
                tell(str(proxy.node.meta.get(OWNER, "")), f"its forward stores what it computes in the global {name}")


def forward_globals(module: nn.Module) -> dict[str, Any]:
    """The global names of a module's forward."""
    return getattr(inspect.unwrap(module.forward), "__globals__", {})
