"""A node's value and owner; and values inside values, mapped in one place."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

VALUE = "value"
"""The key of a node's value in ``node.meta``."""

OWNER = "owner"
"""The key, in ``node.meta``, of the path of the module whose forward made the node."""

PLACE = "place"
"""The key of the path under which that module, or the one that the node calls, was called: a shared one has several."""


def node_value(node: fx.Node) -> Any:
    """What ``node`` computes on the example: a meta tensor, a number, a tuple, ... or ``None``."""
    return node.meta.get(VALUE)


def behind(node: fx.Node, *, past: Callable[[fx.Node], bool] = lambda _: True) -> Iterator[fx.Node]:
    """``node`` and what it is computed from, but for tensors and what is behind them; each once.

    ``past``: whether to go on behind a node.
    """
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current in seen or isinstance(node_value(current), Tensor):
            continue
        seen.add(current)
        yield current
        if past(current):
            pending += current.all_input_nodes


def values_of(arguments: Any) -> Any:
    """``arguments`` with every proxy and node replaced by its value."""
    return mapped(arguments, _value)


def _value(leaf: Any) -> Any:
    kind = type(leaf)
    if issubclass(kind, fx.Proxy):
        return node_value(leaf.node)
    if kind is fx.Node:
        return node_value(leaf)
    return False if hasattr(kind, "__fx_create_arg__") else leaf  # a mode, which is recorded as in eval


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors inside nested tuples, lists, dicts and dataclasses."""
    return (leaf for leaf in leaves(value) if isinstance(leaf, Tensor))


def mapped_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """``value`` with every tensor in it changed, and the rest as it is."""
    return mapped(value, lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf)


# --- values inside values -----------------------------------------------------------------------------------


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with what is in its containers, at any depth, changed; each container is a new one of its class.

    >>> mapped({"sizes": (1, [2, 3])}, lambda n: n + 1)
    {'sizes': (2, [3, 4])}
    """
    kind: Any = type(value)
    if kind is tuple or kind is list:  # nearly all of them
        return kind([mapped(item, change) for item in value])
    container = _container(kind)
    return change(value) if container is None else container.remade(value, lambda item: mapped(item, change))


def leaves(value: Any) -> Iterator[Any]:
    """What :func:`mapped` changes: everything in ``value`` that is no container, in order."""
    kind: Any = type(value)
    container = _container(kind)
    if container is None:
        yield value
    else:
        for item in container.items(value):
            yield from leaves(item)


@dataclass(frozen=True)
class _Container:
    """What a container holds, and how one like it is made that holds the same, changed."""

    items: Callable[[Any], Iterable[Any]]
    remade: Callable[[Any, Callable[[Any], Any]], Any]


@functools.lru_cache(maxsize=512)
def _container(kind: type[Any]) -> _Container | None:
    """How instances of ``kind`` hold others, which its class alone says: a proxy claims to be what it stands for."""
    if issubclass(kind, list) and not kind.__module__.startswith("torch.fx."):  # whose lists cannot be appended to
        return _Container(iter, _list)
    if issubclass(kind, tuple | list):
        made = list if issubclass(kind, list) else getattr(kind, "_make", kind)  # named tuples take items one by one
        if kind.__new__ is tuple.__new__ and not hasattr(kind, "_make"):
            made = functools.partial(tuple.__new__, kind)
        return _Container(iter, lambda value, change: made([change(item) for item in value]))
    if is_record(kind):
        return _Container(lambda value: value.values(), lambda value, change: Remake(kind)(*parts(value, change)))
    if issubclass(kind, dict):
        plain = collections.OrderedDict if issubclass(kind, collections.OrderedDict) else dict
        return _Container(
            lambda value: value.values(), lambda value, change: plain((k, change(item)) for k, item in value.items())
        )
    if kind is slice:
        return _Container(
            lambda value: (value.start, value.stop, value.step),
            lambda value, change: slice(change(value.start), change(value.stop), change(value.step)),
        )
    if dataclasses.is_dataclass(kind) and not issubclass(kind, nn.Module):
        return _Container(lambda value: [getattr(value, part.name) for part in dataclasses.fields(value)], _dataclass)
    return None


def _list(value: Any, change: Callable[[Any], Any]) -> Any:
    """A list of the same class with the same attributes, no constructor asked."""
    twin = copy.copy(value)
    twin[:] = [change(item) for item in value]
    return twin


def _dataclass(value: Any, change: Callable[[Any], Any]) -> Any:
    """A copy with its fields changed, and what its class derived from them; no constructor is asked."""
    twin = copy.copy(value)
    for name in dict.fromkeys((*(part.name for part in dataclasses.fields(value)), *getattr(value, "__dict__", ()))):
        object.__setattr__(twin, name, change(getattr(value, name)))
    return twin


def is_record(kind: type[Any]) -> bool:
    """Whether an instance of ``kind`` is a dictionary of a class that has attributes or ways of its own."""
    plain = (dict, collections.OrderedDict)
    return issubclass(kind, dict) and kind not in plain and not kind.__module__.startswith("torch.fx.")


@dataclass(frozen=True)
class Remake:
    """What a node calls to make a record: items and attributes as the forward left them, no constructor asked."""

    kind: type[dict[Any, Any]]

    @property
    def __name__(self) -> str:
        """What the generated code calls it."""
        return f"remake_{self.kind.__name__}"

    def __call__(self, items: list[tuple[Any, Any]], attributes: list[tuple[str, Any]]) -> Any:
        record = self.kind.__new__(self.kind)
        base = collections.OrderedDict if issubclass(self.kind, collections.OrderedDict) else dict
        for key, item in items:
            base.__setitem__(record, key, item)
        for name, value in attributes:
            record.__dict__[name] = value
        return record


def parts(record: dict[Any, Any], change: Callable[[Any], Any]) -> tuple[list[Any], list[Any]]:
    """The items and the attributes of a record, changed: what :class:`Remake` takes."""
    items = [(key, change(item)) for key, item in dict.items(record)]
    return items, [(name, change(value)) for name, value in getattr(record, "__dict__", {}).items()]


def as_plain(value: Any) -> Any:
    """``value``, with what it has under its keys as a plain dictionary where it is a record."""
    return dict(dict.items(value)) if is_record(type(value)) else value
