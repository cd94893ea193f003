"""The emitted module: a ``GraphModule`` that keeps its original's containers and survives copying.

``torch.fx.GraphModule`` keeps only the submodules that its graph calls, and is pickled as source that
is traced again when it is loaded. Both would lose what a user of the original relies on: unused
modules and plain attributes, and a graph that reads a module's mode while it runs.
"""

from __future__ import annotations

import copy
import importlib
import sys
import types
import warnings
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.fx.node import map_aggregate

from dcafy.graph.nodes import OWNER


class EmittedModule(fx.GraphModule):
    """A module as a graph, connected, with inserted attention or with taps; see the file's docstring."""

    def __init__(self, host: nn.Module, graph: fx.Graph, class_name: str = "GraphModule") -> None:
        super().__init__(nn.Module(), fx.Graph(), class_name)
        own = dict(self.__dict__)
        self.__dict__.update(host.__dict__)
        self.__dict__.pop("forward", None)
        for name in _GRAPH_STATE.split():
            if name in own:
                self.__dict__[name] = own[name]
        # Which class the network is of shows nowhere else: a GraphModule is a class of its own.
        self.__dict__.setdefault("_converted_from", f"{type(host).__module__}.{type(host).__qualname__}")
        self._take_modes_of(host)
        graph._tracer_cls = None
        self.graph = graph

    def recompile(self) -> Any:
        with warnings.catch_warnings():
            # A get_attr node that reads ``some.module.training`` is neither parameter nor buffer.
            warnings.filterwarnings("ignore", message="Node .* target .* of .* does not reference")
            return super().recompile()

    def train(self, mode: bool = True, *args: Any, **kwargs: Any) -> EmittedModule:
        """Sets the mode as the network's own class does it: many keep their batch norms in eval here."""
        nn.Module.train(self, mode) if self._own is None else self._own.train(mode, *args, **kwargs)
        return self

    def eval(self) -> EmittedModule:
        """Sets the mode to eval, as :meth:`train` does."""
        nn.Module.eval(self) if self._own is None else self._own.eval()
        return self

    def _take_modes_of(self, host: nn.Module) -> None:
        for name in ("train", "eval"):
            if not isinstance(host, EmittedModule) and getattr(type(host), name) is not getattr(nn.Module, name):
                self.__dict__["_mode_class"] = type(host)
            patched = host.__dict__.get(name)
            if isinstance(patched, types.MethodType) and patched.__self__ is host:
                self.__dict__[name] = types.MethodType(patched.__func__, self)

    @property
    def _own(self) -> Any:
        """This module as an instance of the network's own class, where that has its own way with modes.

        Both have one ``__dict__``, so that its methods find what they know, and what they set is set here.
        """
        kind = self.__dict__.get("_mode_class")
        if kind is None:
            return None
        own = object.__new__(kind)
        object.__setattr__(own, "__dict__", self.__dict__)
        return own

    def _state(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_graph", "_code")}

    def __deepcopy__(self, memo: dict[int, Any]) -> EmittedModule:
        twin = _empty(type(self).__name__)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self._state(), memo))
        twin.graph = _graph_from(_rows(self.graph))
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        rows = [(op, name, _by_name(target), *rest) for op, name, target, *rest in _rows(self.graph)]
        return _rebuild, (type(self).__name__, rows, self._state())


_GRAPH_STATE = (
    "_graph _code _tracer_cls _tracer_extras meta _replace_hooks _create_node_hooks _erase_node_hooks "
    "_deepcopy_hooks shape_env"
)
"""What belongs to a ``GraphModule`` itself and not to the network in it."""


def _empty(class_name: str) -> EmittedModule:
    return EmittedModule(nn.Module(), fx.Graph(), class_name)


def _rebuild(class_name: str, rows: list[Any], state: dict[str, Any]) -> EmittedModule:
    module = _empty(class_name)
    module.__dict__.update(state)
    module.graph = _graph_from(rows)
    return module


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


def _rows(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """The graph as data: (op, name, target, args, kwargs, owner), nodes as references."""

    def refer(value: Any) -> Any:
        return _Ref(value.name) if isinstance(value, fx.Node) else value

    return [
        (n.op, n.name, n.target, map_aggregate(n.args, refer), map_aggregate(n.kwargs, refer), n.meta.get(OWNER, ""))
        for n in graph.nodes
    ]


def _graph_from(rows: list[tuple[Any, ...]]) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def resolve(value: Any) -> Any:
        return nodes[value.name] if isinstance(value, _Ref) else value

    for op, name, target, args, kwargs, owner in rows:
        target = target.found() if isinstance(target, _Function) else target
        node = graph.create_node(op, target, map_aggregate(args, resolve), map_aggregate(kwargs, resolve), name=name)
        node.meta[OWNER] = owner
        nodes[name] = node
    return graph
