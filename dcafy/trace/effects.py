"""What a forward leaves behind in Python: attributes, lists and objects that it changes, which no graph has.

A counter (``self.step += 1``) would keep its value of the recording for ever, and a list that is appended to
would hold what stands for a tensor there.
"""

from __future__ import annotations

import collections
import contextlib
import inspect
import itertools
import operator
import random
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, fx, nn

from dcafy.graph.nodes import OWNER, leaves
from dcafy.graph.reading import Beside

_PLAIN = (int, float, complex, str, bytes, bool, type(None))
_CONTAINERS = (list, tuple, set, dict, collections.OrderedDict, collections.defaultdict, collections.deque)
_OPAQUE = (nn.Module, Tensor, fx.Proxy, type, FunctionType, ModuleType)
BOOKKEEPING = frozenset(nn.Module().__dict__)

State = dict[str, tuple[Any, ...]]
"""Name of an attribute -> its value, or what is in it where it is a container or a plain object."""


def python_state(module: nn.Module) -> State:
    """What ``module`` keeps beside its tensors and submodules."""
    return {name: _described(value) for name, value in module.__dict__.items() if name not in BOOKKEEPING}


def beside_state(beside: Iterable[Beside]) -> State:
    """What stands beside code under its title (two words), but for functions, classes and modules."""
    state: State = {}
    for one in beside:
        with contextlib.suppress(NameError):
            value = one.read()
            if not isinstance(value, _OPAQUE) and not callable(value):
                state[one.title] = _described(value)
    return state


def changed(before: State, after: State) -> list[str]:
    """The attributes in which two states of a module differ."""
    names = dict.fromkeys((*before, *after))
    return [n for n in names if n not in before or n not in after or not _alike(before[n], after[n])]


def _described(value: Any) -> tuple[Any, ...]:
    if isinstance(value, random.Random):
        return type(value), value.getstate()
    if isinstance(value, np.random.Generator):
        return type(value), repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return type(value), repr(value.get_state())
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


def writes(before: Any, after: Any, own: Any) -> Iterator[tuple[Any, Any, Any]]:
    """(container, key, value) of what a call wrote into lists and dictionaries that it was given, at any depth.

    ``before``, ``after``: copies of the caller's ``own``. What is not there any more has the value ``GONE``.
    """
    if isinstance(own, dict):
        rows = [(key, before.get(key, GONE), after.get(key, GONE)) for key in dict.fromkeys((*before, *after))]
    elif isinstance(own, list | tuple):
        pairs = itertools.zip_longest(before, after, fillvalue=GONE)
        rows = [(key, *pair) for key, pair in enumerate(pairs)]
    else:
        return
    for key, was, now in rows:
        if type(was) is type(now) and isinstance(was, list | tuple | dict):
            yield from writes(was, now, own[key])
        elif not _alike(tuple(leaves(was)), tuple(leaves(now))):
            yield own, key, now


GONE = object()


def holds_proxy(value: Any) -> bool:
    """Whether there is any of them in ``value``."""
    return next(proxies_in(value), None) is not None


class Kept:
    """What modules hold in Python, and what is in containers and plain objects: to be put back.

    A forward that was tried and given up, or is run a second time, leaves nothing behind.
    """

    def __init__(self, modules: Iterable[nn.Module], given: Iterable[Any] = ()) -> None:
        self._modules, self._given = tuple(modules), tuple(given)
        self._held: dict[int, tuple[_Way, Any, Any]] = {}
        self._seen: dict[int, Any] = {}
        for module in self._modules:
            own = module.__dict__
            self._keep(own["_buffers"], 0)
            self._held[id(own)] = _WAYS[dict], own, own.copy()
            for name in own.keys() - BOOKKEEPING:
                self._keep(own[name], _DEPTH)
        for value in self._given:
            self._keep(value, _DEPTH)

    def _keep(self, value: Any, depth: int) -> None:
        kind = type(value)
        if kind in _PLAIN or issubclass(kind, _OPAQUE) or id(value) in self._seen or len(self._seen) > _MOST:
            return
        self._seen[id(value)] = value
        way = next((way for base, way in _WAYS.items() if issubclass(kind, base)), None)
        if way is not None:
            self._held[id(value)] = way, value, way.copy(value)
        elif not issubclass(kind, tuple):
            own = kind.__module__.startswith(("dcafy.", "torch.", "_thread"))
            value = () if own else getattr(value, "__dict__", ())  # of an object, which is no container itself
            if type(value) is not dict or id(value) in self._held:
                return
            self._held[id(value)] = _WAYS[dict], value, value.copy()
        if depth:
            for item in list(dict.values(value) if isinstance(value, dict) else value):
                self._keep(item, depth - 1)

    def put_back(self) -> None:
        """Everything holds again what it held."""
        for way, value, content in self._held.values():
            if len(value) != len(content) or not all(map(operator.is_, _row(value), _row(content))):
                way.clear(value)
                way.fill(value, content)

    def now(self) -> Kept:
        """What they hold at present."""
        return Kept(self._modules, self._given)


_DEPTH = 4
"""How deep containers are looked into."""

_MOST = 1000
"""How many of them: a trainer that a module keeps leads everywhere."""


class _Way(NamedTuple):
    """How a container is copied, emptied and filled, whatever a class derived from it makes of that."""

    copy: Callable[[Any], Any]
    clear: Callable[[Any], object]
    fill: Callable[[Any, Any], object]


_WAYS: dict[Any, _Way] = {
    collections.OrderedDict: _Way(dict.copy, collections.OrderedDict.clear, collections.OrderedDict.update),
    dict: _Way(dict.copy, dict.clear, dict.update),
    list: _Way(list.copy, list.clear, list.extend),
    set: _Way(set.copy, set.clear, set.update),
    collections.deque: _Way(list, collections.deque.clear, collections.deque.extend),
}


def _row(value: Any) -> Iterable[Any]:
    return (item for pair in dict.items(value) for item in pair) if isinstance(value, dict) else value


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
