"""From a fusion and what a walk met behind it to a block: extraction, transformation, map, dimension, name."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from torch import Tensor, fx

from dcafy.blocks import AttentionBlock, Dimension, FusionKind
from dcafy.connected import OWNER
from dcafy.dataflow import REDUCES, Dataflow, is_vector
from dcafy.ops import Op, gate_of, op_name
from dcafy.trace.values import node_value

__all__ = ["Candidate", "Found", "Roles"]


@dataclass(frozen=True)
class Found:
    """A block with its nodes in the deep graph.

    ``contexts``   the nodes that are G, one per extraction output
    ``map``        the node that is T
    ``fusions``    the products or sums in which T meets X
    ``between``    the transformation: every node from G (excluded) to T
    ``bounded``    whether T itself is bounded
    ``axis``       where G has its channels: 1, -1, or ``None`` where it has no channel axis
    """

    block: AttentionBlock
    contexts: tuple[fx.Node, ...]
    map: fx.Node
    fusions: tuple[fx.Node, ...]
    between: frozenset[fx.Node]
    axis: int | None
    bounded: bool

    @property
    def name(self) -> str:
        """The block's name."""
        return self.block.name


@dataclass(frozen=True)
class Candidate:
    """A fusion that is attention: its map, and what the walk back from it met."""

    map: fx.Node
    fusion: fx.Node
    kind: FusionKind
    frontier: frozenset[fx.Node]
    between: frozenset[fx.Node]


class Roles:
    """Gives the nodes of candidates their roles."""

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow

    def found(self, group: list[Candidate]) -> list[Found]:
        """The block of one map; two blocks where a channel part and a spatial part were joined (BAM)."""
        first = group[0]
        frontier = self._joined(first)
        fusions = tuple(sorted((c.fusion for c in group), key=self.flow.order.__getitem__))
        by_dimension: dict[Dimension, list[fx.Node]] = {}
        for node in sorted(frontier, key=self.flow.order.__getitem__):
            by_dimension.setdefault(self._layout(node)[0], []).append(node)
        if len(by_dimension) == 1:
            contexts = next(iter(by_dimension.values()))
            return [self._block(contexts, first.map, fusions, first.between - frontier, first.kind)]
        parts = []
        for contexts in by_dimension.values():
            own = self._reached_only_from(set(contexts), frontier, first.between)
            top = max(own | set(contexts), key=self.flow.order.__getitem__)
            shared = first.between - self._reached_only_from(frontier - set(contexts), frontier, first.between)
            part = self._block(contexts, self.flow.core(top), fusions, shared - frontier, first.kind)
            # The part is passed on from before the two were joined, where no gate has bounded it yet.
            parts.append(dataclasses.replace(part, bounded=any(gate_of(n, self.flow.modules) for n in own)))
        return parts

    def _reached_only_from(
        self, contexts: set[fx.Node] | frozenset[fx.Node], frontier: frozenset[fx.Node], between: frozenset[fx.Node]
    ) -> frozenset[fx.Node]:
        others = frontier - contexts
        tainted, own = set(others), set(contexts)
        for node in sorted(between, key=self.flow.order.__getitem__):
            if any(n in tainted for n in node.all_input_nodes):
                tainted.add(node)
            elif any(n in own for n in node.all_input_nodes):
                own.add(node)
        return frozenset(own - contexts)

    def _joined(self, candidate: Candidate) -> frozenset[fx.Node]:
        """The frontier, with reductions that are only concatenated replaced by their concatenation (CBAM)."""
        frontier = set(candidate.frontier)
        for node in sorted(candidate.between, key=self.flow.order.__getitem__):
            if self.flow.ops[node] is not Op.JOIN:
                continue
            sources = {self._before_layout(n, frontier) for n in self.flow.inputs(node)}
            if len(sources) > 1 and sources <= frontier and not any(is_vector(node_value(s)) for s in sources):
                frontier = (frontier - sources) | {node}
        return frozenset(frontier)

    def _before_layout(self, node: fx.Node, frontier: set[fx.Node]) -> fx.Node:
        while node not in frontier and self.flow.ops[node] is Op.LAYOUT and self.flow.inputs(node):
            node = self.flow.inputs(node)[0]
        return node

    def _block(
        self,
        contexts: list[fx.Node],
        map_: fx.Node,
        fusions: tuple[fx.Node, ...],
        between: frozenset[fx.Node],
        kind: FusionKind,
    ) -> Found:
        dimension, axis, channels, size = self._layout(contexts[0])
        gates = [g for n in sorted(between, key=self.flow.order.__getitem__) if (g := gate_of(n, self.flow.modules))]
        extraction = sorted(self._extraction(contexts), key=self.flow.order.__getitem__)
        visible = sorted((n for n in between if self.flow.ops[n] is not Op.QUERY), key=self.flow.order.__getitem__)
        block = AttentionBlock(
            name=self._home([*extraction, *visible]),
            dimension=dimension,
            channels=channels,
            size=size,
            gate=gates[-1] if gates else "none",
            fusion_kind=kind,
            extraction=tuple(n.name for n in extraction),
            transformation=tuple(n.name for n in visible),
            fusion=tuple(n.name for n in fusions),
        )
        return Found(block, tuple(contexts), map_, fusions, between, axis, block.bounded)

    def _extraction(self, contexts: list[fx.Node]) -> set[fx.Node]:
        """The contexts, what they concatenate, and the weights of a soft pooling (GC's mask)."""
        nodes = set(contexts)
        pending = list(contexts)
        while pending:
            node = pending.pop()
            op = self.flow.ops[node]
            for source in self.flow.inputs(node):
                weighted = self.flow.ops[source] is Op.MULTIPLY and len(source.users) == 1
                weights = op is Op.CONTRACT or (op is Op.REDUCE and weighted)
                inside = op in (Op.JOIN, Op.SLICE, Op.LAYOUT, Op.GATE, Op.MULTIPLY) and source.op != "placeholder"
                if op is Op.PARAMETRIC or not (weights or inside) or source in nodes:
                    continue
                if self._is_extraction_step(source):
                    nodes.add(source)
                    pending.append(source)
        return {n for n in nodes if self.flow.ops[n] not in (Op.LAYOUT, Op.SLICE) or n in contexts}

    def _is_extraction_step(self, node: fx.Node) -> bool:
        """Part of the pooling rather than of X: a reduction, softmax weights, a 1-channel mask."""
        op = self.flow.ops[node]
        if op is Op.SLICE:
            return any(self.flow.ops[source] in REDUCES for source in self.flow.inputs(node))
        if op in REDUCES or op is Op.MULTIPLY or gate_of(node, self.flow.modules) == "softmax":
            return True
        value = node_value(node)
        one_channel = isinstance(value, Tensor) and value.ndim >= 3 and 1 in value.shape[1:]
        return one_channel and op in (Op.LAYOUT, Op.PARAMETRIC)

    # -- shapes ----------------------------------------------------------------------------------

    def _layout(self, node: fx.Node) -> tuple[Dimension, int | None, int, tuple[int, ...] | None]:
        """Dimension, channel axis, channels and spatial size of G, read off its shape and what it reduced."""
        value = node_value(node)
        shape = tuple(value.shape)
        sources = [n for n in self.flow.inputs(node) if isinstance(node_value(n), Tensor)]
        source = max(sources, key=lambda n: self.flow.sizes[n], default=node)
        rank = node_value(source).ndim if isinstance(node_value(source), Tensor) else len(shape)
        axis = self._channel_axis(source) if rank == len(shape) else None
        wide = [i for i, n in enumerate(shape) if i and n > 1]
        if len(wide) <= 1 and (len(shape) > 3 or axis is None or axis % len(shape) in (*wide, 0)):
            return "channel", 1, math.prod(shape[1:]), None
        if axis is not None:
            axis = axis % len(shape)
            size = tuple(n for i, n in enumerate(shape) if i not in (0, axis))
            return "spatial", 1 if axis == 1 else -1, shape[axis], size
        return "spatial", None, 1, shape[1:]

    def _channel_axis(self, node: fx.Node) -> int:
        """Where ``node`` has its channels: behind, for what a Linear, LayerNorm or permute made of a map."""
        for _ in range(64):
            op, value = self.flow.ops[node], node_value(node)
            if op is Op.PARAMETRIC:
                name = op_name(node, self.flow.modules).lower()
                return -1 if "linear" in name or name in ("layernorm", "layer_norm") else 1
            if op_name(node, self.flow.modules) == "permute":
                order = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
                return -1 if tuple(order)[-1] == 1 else 1
            sources = [n for n in self.flow.inputs(node) if isinstance(node_value(n), Tensor)]
            same = [n for n in sources if isinstance(value, Tensor) and node_value(n).ndim == value.ndim]
            if not same:
                return 1
            node = max(same, key=lambda n: self.flow.sizes[n])
        return 1

    def _home(self, nodes: list[fx.Node]) -> str:
        """The path of the innermost module that holds all of ``nodes``."""
        own = [n for n in nodes if not self.flow.is_connection(n)]
        paths = [str(n.target) if n.op == "call_module" else str(n.meta.get(OWNER, "")) for n in own]
        common = paths[0].split(".")
        for path in paths[1:]:
            parts = path.split(".")
            same = next((i for i, (a, b) in enumerate(zip(common, parts, strict=False)) if a != b), None)
            common = common[: same if same is not None else min(len(common), len(parts))]
        return ".".join(common)
