"""What the nodes of a recorded graph do, how much they hold, and which depend on the input: computed once."""

from __future__ import annotations

import math
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, fx, nn

from dcafy.graph.nodes import leaves, node_value, tensors_in, values_of
from dcafy.graph.ops import Op, alters_argument, op_name, op_of

REARRANGES = frozenset({Op.LAYOUT, Op.EXPAND, Op.SLICE})
_SUMS = frozenset({"add", "iadd"})
_DIFFERENCES = frozenset({"sub", "isub", "subtract"})
REDUCES = frozenset({Op.REDUCE, Op.POOL, Op.CONTRACT})
QUOTIENTS = frozenset({"div", "truediv", "itruediv", "true_divide"})


class Dataflow:
    """A recorded graph, seen as data that flows.

    ``order``     node -> its place in the graph
    ``ops``       node -> what it does
    ``sizes``     node -> how many elements it yields
    ``depends``   the nodes whose tensors depend on the network's input
    ``origins``   node -> the network's inputs that its tensors depend on
    ``windows``   the last difference of running sums, which sums over windows -> the places in a window
    ``written``   a tensor that begins without the input -> the nodes that write something of the input into it
    """

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
        self.graph = graph
        self.modules = modules
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.ops = {node: op_of(node, modules) for node in graph.nodes}
        self.sizes = {node: sum(t.numel() for t in tensors_in(node_value(node))) for node in graph.nodes}
        self.depends: set[fx.Node] = set()
        self.origins: dict[fx.Node, frozenset[fx.Node]] = {}
        self.written: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            self._follow(node)
        for node in self.depends:
            if self.ops[node] is Op.CONTRACT and self._is_layer(node):
                self.ops[node] = Op.PARAMETRIC
            elif self.ops[node] is Op.PARAMETRIC and self._sums_up(node):
                self.ops[node] = Op.REDUCE
        self._inputs: dict[fx.Node, list[fx.Node]] = {}
        self.windows: dict[fx.Node, int] = {}
        for node in self.order:
            if node in self.depends and op_name(node, modules) in _DIFFERENCES and (places := self._window(node)):
                self.windows[node] = places
                self.ops[node] = Op.POOL

    def _follow(self, node: fx.Node) -> None:
        """Whether ``node`` depends on the input, and what it writes into."""
        sources = [source for source in node.all_input_nodes if source in self.depends]
        if node.all_input_nodes and alters_argument(node, self.modules):
            self._write(node, sources)
        if self.ops[node] is Op.FRESH or not (self.sizes[node] or _may_hold_tensors(node_value(node))):
            return
        if node.op == "placeholder":
            self.origins[node] = frozenset({node})
        elif sources:
            self.origins[node] = frozenset().union(*(self.origins[source] for source in sources))
        if node in self.origins:
            self.depends.add(node)

    def _write(self, node: fx.Node, sources: list[fx.Node]) -> None:
        """What ``node`` writes into (``out[:, :k] = x``) holds from here on what the input brings."""
        altered, values = node.all_input_nodes[0], [n for n in sources if n is not node.all_input_nodes[0]]
        base: fx.Node | None = altered
        while base is not None and self.ops[base] in (Op.LAYOUT, Op.SLICE):  # a view of what was made before
            base = self.first_tensor(base)
        if base is None or base.op == "get_attr" or (base in self.depends and base not in self.written):
            return
        while values:
            self.depends.add(altered)
            self.written.setdefault(altered, []).extend(values)
            brought = frozenset().union(*(self.origins[value] for value in values))
            self.origins[altered] = self.origins.get(altered, frozenset()) | brought
            seen_through = self.first_tensor(altered) if self.ops[altered] in (Op.LAYOUT, Op.SLICE) else None
            if seen_through is None:
                return
            altered = seen_through

    def _is_layer(self, node: fx.Node) -> bool:
        """Whether a sum of products is one with weights, as a layer's; one that leaves a vector of a map pools it."""
        operands = [source for source in node.all_input_nodes if self.sizes[source]]
        pools = is_vector(node_value(node)) and not any(is_vector(node_value(n)) for n in operands if n in self.depends)
        return not pools and not all(operand in self.depends for operand in operands)

    def _sums_up(self, node: fx.Node) -> bool:
        """Whether a convolution makes one number of each channel: a pooling with weights (GE-θ, global)."""
        layer = self.modules.get(str(node.target)) if node.op == "call_module" else None
        if not op_name(node, self.modules).lower().startswith("conv"):
            return False
        source, made = node_value(node.all_input_nodes[0]), node_value(node)
        weight = getattr(layer, "weight", None) if layer else node_value(node.all_input_nodes[1])
        if not (isinstance(source, Tensor) and isinstance(made, Tensor) and isinstance(weight, Tensor)):
            return False
        alone = weight.ndim == source.ndim and weight.shape[1] == 1 < source.shape[1]
        return alone and weight.shape[2:] == source.shape[2:] != made.shape[2:] == (1,) * (made.ndim - 2)

    def _window(self, node: fx.Node) -> int:
        """How many places the windows have over which ``node`` yields the sum of each; 0 for anything else."""
        corners, pending = [], [node]
        while pending:
            source = pending.pop()
            if op_name(source, self.modules) in (*_DIFFERENCES, *_SUMS):
                pending += self.inputs(source)
            elif self.ops[source] is not Op.SLICE:
                return 0
            else:
                corners.append(source)
        whole = {corner.all_input_nodes[0] for corner in corners}
        last = any(op_name(user, self.modules) in (*_DIFFERENCES, *_SUMS) for user in node.users)
        if len(corners) < 2 or len(whole) > 1 or last or not self._is_running_sum(*whole):
            return 0
        sizes = zip(node_value(whole.pop()).shape, node_value(node).shape, strict=True)
        return math.prod(given - made for given, made in sizes if given != made)

    def _is_running_sum(self, node: fx.Node) -> bool:
        while self.ops[node] in REARRANGES and self.inputs(node):
            node = self.inputs(node)[0]
        return op_name(node, self.modules) == "cumsum"

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
        """Whether ``node`` is where a connected block hears another."""
        return node.op == "call_function" and getattr(node.target, "is_connection", False)

    def writers(self, nodes: Set[fx.Node]) -> frozenset[fx.Node]:
        """What writes one of the ``nodes`` into another one of them (``out[:, :k] = x``)."""
        values = {value for base in self.written.keys() & nodes for value in self.written[base] if value in nodes}
        users = {user for value in values for user in value.users}
        return frozenset(
            user for user in users if alters_argument(user, self.modules) and user.all_input_nodes[0] not in values
        )

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """The tensors that ``node`` computes its own from, as far as they depend on the network's input."""
        if node not in self._inputs:
            self._inputs[node] = self._read(node)
        return self._inputs[node]

    def counts(self, node: fx.Node, quotient: fx.Node) -> bool:
        """Whether ``node`` is what a ``quotient`` divides by, and an input gives: a length for each sample."""
        if op_name(quotient, self.modules) not in QUOTIENTS or self.inputs(quotient)[-1:] != [node]:
            return False
        value, source = node_value(node), node
        while len(self.inputs(source)) == 1 and self.sizes[source] == self.sizes[node]:
            (source,) = self.inputs(source)
        single = isinstance(value, Tensor) and value.numel() == value.shape[:1].numel()
        return single and source.op == "placeholder" and self.sizes[source] == self.sizes[node]

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
        if self.is_connection(node):  # it takes G last; what it hears comes by the wire
            return [node.args[-1]] if isinstance(node.args[-1], fx.Node) else []
        if node in self.written:
            return list(dict.fromkeys(self.written[node]))
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


_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.layout, slice, range)


def _may_hold_tensors(value: Any) -> bool:
    """Whether a value without tensors in sight is an object that may have some (a detector's ``ImageList``)."""
    return any(not isinstance(leaf, _PLAIN) for leaf in leaves(value))
