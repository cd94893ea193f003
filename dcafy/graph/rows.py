"""A graph as data that copies and pickles: one row for each node."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.node import map_aggregate

Rows = tuple[tuple[Any, ...], ...]
"""(op, name, target, args, kwargs) of each node, nodes as references."""


@dataclass(frozen=True)
class _Ref:
    """A node of a graph that is written down as data."""

    name: str


@dataclass(frozen=True)
class _Function:
    """A function that pickle does not find by itself: ``F.max_pool2d`` is a closure under a module's name."""

    module: str
    name: str

    def found(self) -> Any:
        return getattr(importlib.import_module(self.module), self.name)


def _by_name(target: Any) -> Any:
    """What a node calls, as something that pickle can write."""
    if "<locals>" not in getattr(target, "__qualname__", ""):
        return target
    known = _Function(target.__module__, target.__name__)
    return known if getattr(sys.modules.get(known.module), known.name, None) is target else target


def rows_of(graph: fx.Graph) -> Rows:
    """The graph as data."""

    def refer(value: Any) -> Any:
        return _Ref(value.name) if isinstance(value, fx.Node) else value

    return tuple(
        (n.op, n.name, n.target, map_aggregate(n.args, refer), map_aggregate(n.kwargs, refer)) for n in graph.nodes
    )


def graph_from(rows: Rows) -> fx.Graph:
    """The graph that :func:`rows_of` wrote down."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def resolve(value: Any) -> Any:
        return nodes[value.name] if isinstance(value, _Ref) else value

    for op, name, target, args, kwargs in rows:
        nodes[name] = graph.create_node(
            op, target, map_aggregate(args, resolve), map_aggregate(kwargs, resolve), name=name
        )
    return graph


def portable(rows: Rows) -> Rows:
    """The rows with what their nodes call by name, where pickle does not find it by itself."""
    return _targets(rows, _by_name)


def found(rows: Rows) -> Rows:
    """The rows that :func:`portable` made so, as they were."""
    return _targets(rows, lambda target: target.found() if isinstance(target, _Function) else target)


def _targets(rows: Rows, change: Callable[[Any], Any]) -> Rows:
    return tuple((op, name, change(target), *rest) for op, name, target, *rest in rows)
