"""Dictionaries of a class of their own (``ModelOutput`` and its like) in a graph, which knows plain ones only."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Remake", "as_plain", "is_record", "parts", "remapped"]

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
