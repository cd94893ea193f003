"""What the nodes of a recorded graph do, how much they hold, and which depend on the input: computed once."""

from __future__ import annotations

import math

from torch import Tensor, fx, nn

from dcafy.ops import Op, op_name, op_of
from dcafy.trace.values import node_value, tensors_in, values_of

__all__ = ["REARRANGES", "REDUCES", "Dataflow", "is_vector", "positions"]

REARRANGES = frozenset({Op.LAYOUT, Op.EXPAND, Op.SLICE})
REDUCES = frozenset({Op.REDUCE, Op.POOL, Op.CONTRACT})


class Dataflow:
    """A recorded graph, seen as data that flows.

    ``order``     node -> its place in the graph
    ``ops``       node -> what it does
    ``sizes``     node -> how many elements it yields
    ``depends``   the nodes whose tensors depend on the network's input
    """

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
        self.graph = graph
        self.modules = modules
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.ops = {node: op_of(node, modules) for node in graph.nodes}
        self.sizes = {node: sum(t.numel() for t in tensors_in(node_value(node))) for node in graph.nodes}
        self.depends: set[fx.Node] = set()
        for node in graph.nodes:
            if self.ops[node] is Op.FRESH or not self.sizes[node]:
                continue
            if node.op == "placeholder" or any(source in self.depends for source in node.all_input_nodes):
                self.depends.add(node)
        self._inputs: dict[fx.Node, list[fx.Node]] = {}

    def core(self, node: fx.Node) -> fx.Node:
        """The node before it was only viewed, expanded or sliced: where the map itself is computed."""
        while self.ops[node] in REARRANGES:
            source = self.first_tensor(node)
            if source is None or source not in self.depends:
                break
            node = source
        return node

    def first_tensor(self, node: fx.Node) -> fx.Node | None:
        """The first tensor that ``node`` takes."""
        return next((n for n in node.all_input_nodes if self.sizes[n]), None)

    def is_connection(self, node: fx.Node) -> bool:
        """Whether ``node`` calls a connection that dcafy made."""
        return node.op == "call_module" and getattr(self.modules.get(str(node.target)), "is_connection", False)

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """The tensors that ``node`` computes its own from, as far as they depend on the network's input."""
        if node not in self._inputs:
            self._inputs[node] = self._read(node)
        return self._inputs[node]

    def covers(self, node: fx.Node) -> bool:
        """Whether a pooling to one place looks at the whole map, and would at other sizes.

        One whose window is smaller than the map leaves one place at the example's size by accident.
        """
        name, source = op_name(node, self.modules).lower(), node_value(self.inputs(node)[0])
        if self.ops[node] is not Op.POOL or "adaptive" in name or not isinstance(source, Tensor):
            return True
        place = 2 if name.startswith("lp") else 1
        given = node.kwargs.get("kernel_size", node.args[place] if len(node.args) > place else None)
        window = values_of(getattr(self.modules.get(str(node.target)), "kernel_size", given))
        sides = source.shape[2:]
        windows = window if isinstance(window, tuple | list) else [window] * len(sides)
        return all(k >= n for k, n in zip(windows, sides, strict=False))

    def _read(self, node: fx.Node) -> list[fx.Node]:
        # A connection takes (G, T, G): the block's own extraction is its first argument.
        if self.is_connection(node):
            return [node.args[0]] if isinstance(node.args[0], fx.Node) else []
        if self.ops[node] in (Op.LAYOUT, Op.EXPAND):  # x.expand_as(y) holds nothing of y
            first = self.first_tensor(node)
            return [first] if first in self.depends else []
        return [n for n in node.all_input_nodes if n in self.depends]


def is_vector(value: object) -> bool:
    """Whether a value is a tensor of one number per channel (or one in all), in whatever layout."""
    return isinstance(value, Tensor) and sum(n > 1 for n in value.shape[1:]) <= 1


def positions(node: fx.Node) -> int:
    """Over how many places a map [N, C, ...] extends."""
    value = node_value(node)
    return math.prod(value.shape[2:]) if isinstance(value, Tensor) and value.ndim > 2 else 1
