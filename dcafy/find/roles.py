"""From a fusion and what a walk met behind it to a block: extraction, transformation, map, dimension, name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor, fx

from dcafy.find.axes import PERMUTES, Origins
from dcafy.find.dataflow import QUOTIENTS, REDUCES, Dataflow, is_vector
from dcafy.find.layout import Layouts, is_arithmetic
from dcafy.graph.nodes import PLACE, node_value
from dcafy.graph.ops import Op, gate_of, op_name
from dcafy.plan.blocks import AttentionBlock, FusionKind
from dcafy.plan.options import Dimension


@dataclass(frozen=True)
class Found:
    """A block with its nodes in the deep graph.

    ``contexts``   the nodes that are G, one per extraction output
    ``map``        the node that is T
    ``fusions``    the products or sums in which T meets X
    ``between``    the transformation: every node from G (excluded) to T
    ``bounded``    whether T itself is bounded
    ``axis``       where G has its channels: 1, -1, or ``None`` where it has no channel axis
    ``kinds``      what the axes of each G extend over: only maps of one kind are alike
    """

    block: AttentionBlock
    contexts: tuple[fx.Node, ...]
    map: fx.Node
    fusions: tuple[fx.Node, ...]
    between: frozenset[fx.Node]
    axis: int | None
    bounded: bool
    kinds: tuple[Origins, ...] = ()

    @property
    def name(self) -> str:
        """The block's name."""
        return self.block.name


_SHUFFLES = frozenset({"channel_shuffle", "ChannelShuffle"})
_TOTALS = frozenset({"sum", "nansum", "cumsum"})
"""What a number makes a mean of."""

_JOINS = frozenset({Op.JOIN, Op.ADD, Op.SLICE, Op.LAYOUT, Op.GATE, Op.MULTIPLY, Op.ELEMENTWISE})


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
        self.layouts = Layouts(flow)

    def found(self, group: list[Candidate]) -> list[Found]:
        """The block of one map; two blocks where a channel part and a spatial part were joined (BAM)."""
        first = group[0]
        frontier = self._joined(first)
        fusions = tuple(sorted((c.fusion for c in group), key=self.flow.order.__getitem__))
        by_dimension: dict[Dimension, list[fx.Node]] = {}
        for node in sorted(frontier, key=self.flow.order.__getitem__):
            by_dimension.setdefault(self.layouts.of(node).dimension, []).append(node)
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
        return name in _SHUFFLES or (name in {*PERMUTES, "rearrange"} and not is_vector(node_value(node)))

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
        frontier = {self._mean(node, candidate.between) for node in candidate.frontier}
        for node in sorted(candidate.between, key=self.flow.order.__getitem__):
            if op_name(node, self.flow.modules) in QUOTIENTS:
                frontier = self._with_quotient(node, frontier, candidate.between)
            if self.flow.ops[node] not in (Op.JOIN, Op.ADD):
                continue
            sources = {self._before_layout(n, frontier) for n in self.flow.inputs(node)}
            if len(sources) < 2 or not sources <= frontier:
                continue
            # Strips of rows and of columns stay apart: each is brought to another size along its own axis.
            layouts = [self.layouts.of(source) for source in sources]
            if len({(layout.dimension, layout.kind) for layout in layouts}) > 1:
                continue
            # Statistics of one tensor are heard one by one (CBAM), vectors of several tensors as one (MMTM).
            several = self.flow.ops[node] is Op.JOIN and len({self._pooled(source) for source in sources}) > 1
            if layouts[0].dimension == "spatial" or several:
                frontier = (frontier - sources) | {node}
        return frozenset(self._unfolded(node, candidate.between) for node in frontier)

    def _pooled(self, node: fx.Node) -> fx.Node:
        """The tensor that a reduction pools."""
        return self.flow.core(max(self.flow.inputs(self.layouts.reduction(node)), key=self.flow.sizes.__getitem__))

    def _unfolded(self, node: fx.Node, between: frozenset[fx.Node]) -> fx.Node:
        """A flattened map where it has its rows and columns again, if nothing reads it before that."""
        if not any(len(origin) > 1 for origin in self.layouts.axes.of(node)):
            return node
        view, readers = node, _readers(node, self.flow)
        while len(readers) == 1 and readers[0] in between and self.flow.ops[readers[0]] is Op.LAYOUT:
            (view,) = readers
            if all(len(origin) < 2 for origin in self.layouts.axes.of(view)):
                return view
            readers = _readers(view, self.flow)
        return node

    def _mean(self, node: fx.Node, between: frozenset[fx.Node]) -> fx.Node:
        """The mean that a number makes of the sum ``node``, where nothing reads the sum itself; else ``node``."""
        if op_name(node, self.flow.modules) in _TOTALS or node in self.flow.windows:
            readers = _readers(node, self.flow)
            scales = {*QUOTIENTS, "mul", "imul", "multiply"}
            if len(readers) == 1 and readers[0] in between and op_name(readers[0], self.flow.modules) in scales:
                (mean,) = readers
                sums = [source for source in self.flow.inputs(mean) if not self.flow.counts(source, mean)]
                if sums == [node] and self.flow.sizes[mean] == self.flow.sizes[node]:
                    return mean
        return node

    def _with_quotient(self, node: fx.Node, frontier: set[fx.Node], between: frozenset[fx.Node]) -> set[fx.Node]:
        """``frontier`` with a weighted mean that is normalised by hand in place of the two sums of the quotient."""
        steps, pending = {node}, [node]
        while pending:
            for source in self.flow.inputs(pending.pop()):
                if source not in frontier and not is_arithmetic(source, self.flow):
                    return frontier
                if source not in steps:
                    steps.add(source)
                    pending += [source] if source not in frontier else []
        joined = steps & frontier
        escapes = any(user in between and user not in steps for step in steps - {node} for user in step.users)
        return frontier if len(joined) < 2 or escapes else (frontier - joined) | {node}

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
        layout = self.layouts.of(contexts[0])
        between |= self.flow.writers({*contexts, *between})
        gates = [g for n in sorted(between, key=self.flow.order.__getitem__) if (g := gate_of(n, self.flow.modules))]
        extraction = sorted(self._extraction(contexts), key=self.flow.order.__getitem__)
        visible = sorted(
            (n for n in between if self.flow.ops[n] is not Op.QUERY and n not in extraction),
            key=self.flow.order.__getitem__,
        )
        block = AttentionBlock(
            name=self._home([*extraction, *visible]),
            dimension=layout.dimension,
            channels=layout.channels,
            size=layout.size,
            gate=gates[-1] if gates else "none",
            fusion_kind=kind,
            extraction=tuple(n.name for n in extraction),
            transformation=tuple(n.name for n in visible if not self.flow.is_connection(n)),
            fusion=tuple(n.name for n in fusions),
        )
        kinds = tuple(self.layouts.of(context).kind for context in contexts)
        return Found(block, tuple(contexts), map_, fusions, between, layout.axis, block.bounded, kinds)

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
        if op in (Op.SLICE, Op.ADD) or op_name(node, self.flow.modules) in QUOTIENTS:
            return any(self.flow.ops[source] in REDUCES for source in self.flow.inputs(node))
        if op in REDUCES or op is Op.MULTIPLY or gate_of(node, self.flow.modules) == "softmax":
            return True
        value = node_value(node)
        one_channel = isinstance(value, Tensor) and value.ndim >= 3 and 1 in value.shape[1:]
        return one_channel and op in (Op.LAYOUT, Op.PARAMETRIC)

    def _home(self, nodes: list[fx.Node]) -> str:
        """The path of the innermost module that holds all of ``nodes``, as they are called there."""
        own = [n for n in nodes if not self.flow.is_connection(n)]
        paths = [str(n.meta.get(PLACE, "")) for n in own]
        common = paths[0].split(".")
        for path in paths[1:]:
            parts = path.split(".")
            same = next((i for i, (a, b) in enumerate(zip(common, parts, strict=False)) if a != b), None)
            common = common[: same if same is not None else min(len(common), len(parts))]
        return ".".join(common)


def _readers(node: fx.Node, flow: Dataflow) -> list[fx.Node]:
    """Who reads ``node``, and not only its size."""
    return [user for user in node.users if flow.ops[user] is not Op.QUERY]


def _wide(value: object) -> tuple[int, ...]:
    """A tensor's sizes without axes of one."""
    return tuple(n for n in value.shape if n > 1) if isinstance(value, Tensor) else ()
