"""From a fusion and what a walk met behind it to a block: extraction, transformation, map, dimension, name."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from torch import Tensor, fx

from dcafy.find.dataflow import REDUCES, Dataflow, is_vector
from dcafy.graph.emitted import OWNER
from dcafy.graph.evaluator import node_value
from dcafy.graph.ops import Op, gate_of, op_name
from dcafy.plan.blocks import AttentionBlock, Dimension, FusionKind

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


_QUOTIENTS = frozenset({"div", "truediv", "itruediv", "true_divide"})

_ARITHMETIC = frozenset({Op.ELEMENTWISE, Op.ADD, Op.MULTIPLY, Op.LAYOUT, Op.EXPAND})

_SHUFFLES = frozenset({"channel_shuffle", "ChannelShuffle"})
_PERMUTES = frozenset({"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "rearrange"})

_JOINS = frozenset({Op.JOIN, Op.SLICE, Op.LAYOUT, Op.GATE, Op.MULTIPLY, Op.ELEMENTWISE})


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
            map_ = self._in_layout_of(contexts[0], first)
            return [self._block(contexts, map_, fusions, first.between - frontier, first.kind)]
        parts = []
        for contexts in by_dimension.values():
            own = self._reached_only_from(set(contexts), frontier, first.between)
            top = max(own | set(contexts), key=self.flow.order.__getitem__)
            shared = first.between - self._reached_only_from(frontier - set(contexts), frontier, first.between)
            part = self._block(contexts, self.flow.core(top), fusions, shared - frontier, first.kind)
            # The part is passed on from before the two were joined, where no gate has bounded it yet.
            parts.append(dataclasses.replace(part, bounded=any(gate_of(n, self.flow.modules) for n in own)))
        return parts

    def _in_layout_of(self, context: fx.Node, candidate: Candidate) -> fx.Node:
        """T where it has the axes of G: behind the gate, or behind what brings it back to them (frames of a video)."""
        wanted = _wide(node_value(context))
        operands = [n for n in candidate.fusion.all_input_nodes if self.flow.core(n) is candidate.map]
        steps = operands[:1]
        while steps and steps[-1] is not candidate.map:
            source = self.flow.first_tensor(steps[-1])
            assert source is not None
            steps.append(source)
        mixed = is_vector(node_value(context)) and any(self._mixes_channels(node) for node in steps[:-1])
        nearest = steps if mixed else reversed(steps)
        return next((node for node in nearest if _wide(node_value(node)) == wanted), candidate.map)

    def _mixes_channels(self, node: fx.Node) -> bool:
        name = op_name(node, self.flow.modules)
        return name in _SHUFFLES or (name in _PERMUTES and not is_vector(node_value(node)))

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
        """The frontier, with reductions replaced by what only joins them: a concatenation (CBAM), a quotient."""
        frontier = set(candidate.frontier)
        for node in sorted(candidate.between, key=self.flow.order.__getitem__):
            if op_name(node, self.flow.modules) in _QUOTIENTS:
                frontier = self._with_quotient(node, frontier, candidate.between)
            if self.flow.ops[node] is not Op.JOIN:
                continue
            sources = {self._before_layout(n, frontier) for n in self.flow.inputs(node)}
            if len(sources) > 1 and sources <= frontier and not any(is_vector(node_value(s)) for s in sources):
                frontier = (frontier - sources) | {node}
        return frozenset(frontier)

    def _with_quotient(self, node: fx.Node, frontier: set[fx.Node], between: frozenset[fx.Node]) -> set[fx.Node]:
        """``frontier`` with a weighted mean that is normalised by hand in place of the two sums of the quotient."""
        steps, pending = {node}, [node]
        while pending:
            for source in self.flow.inputs(pending.pop()):
                if source not in frontier and not self._is_arithmetic(source):
                    return frontier
                if source not in steps:
                    steps.add(source)
                    pending += [source] if source not in frontier else []
        joined = steps & frontier
        escapes = any(user in between and user not in steps for step in steps - {node} for user in step.users)
        return frontier if len(joined) < 2 or escapes else (frontier - joined) | {node}

    def _is_arithmetic(self, node: fx.Node) -> bool:
        """What a quotient of two sums may do to them: flatten, add an epsilon, keep away from 0."""
        floored = self.flow.ops[node] is Op.GATE and gate_of(node, self.flow.modules) is None  # clamp(min=...)
        return floored or self.flow.ops[node] in _ARITHMETIC

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
                inside = op in _JOINS and source.op != "placeholder"
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
        shape = tuple(node_value(node).shape)
        wide = [i for i, n in enumerate(shape) if i and n > 1]
        axis = self._axis(node, len(shape), len(wide))
        if len(wide) <= 1 and (len(shape) > 3 or axis is None or axis % len(shape) in (*wide, 0)):
            return "channel", 1, math.prod(shape[1:]), None
        if axis is not None:
            axis = axis % len(shape)
            size = tuple(n for i, n in enumerate(shape) if i not in (0, axis))
            return "spatial", 1 if axis == 1 else -1, shape[axis], size
        return "spatial", None, 1, shape[1:]

    def _axis(self, node: fx.Node, rank: int, wide: int) -> int | None:
        """Which axis of G holds the channels of what it reduced, if any does."""
        reduction = self._reduction(node)
        sources = [n for n in self.flow.inputs(reduction) if isinstance(node_value(n), Tensor)]
        source = max(sources, key=lambda n: self.flow.sizes[n], default=reduction)
        ranks = node_value(source).ndim if isinstance(node_value(source), Tensor) else rank
        if ranks == rank:
            return self._channel_axis(source)
        kept = [i for i in range(ranks) if i not in _reduced(reduction, ranks)]
        channels = self._channel_axis(source) % ranks
        known = wide > 1 and len(kept) == rank and channels in kept[1:] and not self._is_grouped(source)
        return kept.index(channels) if known else None

    def _is_grouped(self, node: fx.Node) -> bool:
        """Whether a view has split an axis of ``node`` in two (groups of channels, frames of a batch)."""
        while sources := [n for n in self.flow.inputs(node) if isinstance(node_value(n), Tensor)]:
            source = max(sources, key=lambda n: self.flow.sizes[n])
            ranks = node_value(source).ndim, node_value(node).ndim
            if ranks[0] != ranks[1]:
                return self.flow.ops[node] is Op.LAYOUT and ranks[0] < ranks[1]
            node = source
        return False

    def _reduction(self, node: fx.Node) -> fx.Node:
        """The reduction behind an output of several (``max(1)[0]``), or behind the quotient of a mean by hand."""
        while self.flow.inputs(node):
            source = max(self.flow.inputs(node), key=lambda n: self.flow.sizes[n])
            several = self.flow.ops[node] is Op.SLICE and not isinstance(node_value(source), Tensor)
            if not several and not self._is_arithmetic(node):
                break
            node = source
        return node

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


def _wide(value: object) -> tuple[int, ...]:
    """A tensor's sizes without axes of one."""
    return tuple(n for n in value.shape if n > 1) if isinstance(value, Tensor) else ()


def _reduced(node: fx.Node, rank: int) -> set[int]:
    """The axes that ``node`` reduces, of so many; none where it does not say."""
    given = node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else ()))
    axes = given if isinstance(given, tuple | list) else (given,)
    return {axis % rank for axis in axes if isinstance(axis, int)}
