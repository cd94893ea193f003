"""A node's value and owner; and values inside values, mapped in one place."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

__all__ = [
    "OWNER",
    "VALUE",
    "Remake",
    "as_plain",
    "is_record",
    "node_value",
    "parts",
    "remapped",
    "tensors_in",
    "values_of",
]


VALUE = "value"
"""The key of a node's value in ``node.meta``."""


def node_value(node: fx.Node) -> Any:
    """What ``node`` computes on the example: a meta tensor, a number, a tuple, ... or ``None``."""
    return node.meta.get(VALUE)


def tensors_in(value: Any) -> Iterable[Tensor]:
    """The tensors inside nested tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for part in dataclasses.fields(value):
            yield from tensors_in(getattr(value, part.name))


def values_of(arguments: Any) -> Any:
    """``arguments`` with every proxy and node replaced by its value."""
    kind = type(arguments)
    if issubclass(kind, fx.Proxy):
        return node_value(arguments.node)
    if kind is fx.Node:
        return node_value(arguments)
    if hasattr(kind, "__fx_create_arg__"):  # a mode, which is recorded as in eval
        return False
    if kind is tuple or kind is list:
        return kind([values_of(item) for item in arguments])
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return kind(*[values_of(item) for item in arguments])
    if kind is dict or kind is collections.OrderedDict:
        return kind((key, values_of(item)) for key, item in arguments.items())
    if is_record(arguments):
        return remapped(arguments, values_of)
    if kind is slice:
        return slice(values_of(arguments.start), values_of(arguments.stop), values_of(arguments.step))
    if dataclasses.is_dataclass(arguments) and not isinstance(arguments, type):
        return dataclasses.replace(
            arguments, **{f.name: values_of(getattr(arguments, f.name)) for f in dataclasses.fields(arguments)}
        )
    if issubclass(kind, list):
        return [values_of(item) for item in arguments]
    return arguments


OWNER = "owner"
"""The key, in ``node.meta``, of the path of the module whose forward made the node."""


_PLAIN = (dict, collections.OrderedDict)


def is_record(value: Any) -> bool:
    """Whether ``value`` is a dictionary of a class that has attributes or ways of its own."""
    kind = type(value)
    return issubclass(kind, dict) and kind not in _PLAIN and not kind.__module__.startswith("torch.fx.")


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


def remapped(record: dict[Any, Any], change: Callable[[Any], Any]) -> Any:
    """A record of the same class with everything in it changed."""
    return Remake(type(record))(*parts(record, change))


def parts(record: dict[Any, Any], change: Callable[[Any], Any]) -> tuple[list[Any], list[Any]]:
    """The items and the attributes of a record, changed: what :class:`Remake` takes."""
    items = [(key, change(item)) for key, item in dict.items(record)]
    return items, [(name, change(value)) for name, value in getattr(record, "__dict__", {}).items()]


def as_plain(value: Any) -> Any:
    """``value``, with what it has under its keys as a plain dictionary where it is a record."""
    return dict(dict.items(value)) if is_record(value) else value
