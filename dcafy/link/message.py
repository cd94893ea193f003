"""T̃: what a block passes on, and whether another can hear it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from dcafy.find.axes import Axes, Origins, first_shape
from dcafy.find.dataflow import REDUCES
from dcafy.find.layout import DIMENSIONS, Extent
from dcafy.find.roles import Found
from dcafy.graph.evaluator import Evaluator
from dcafy.graph.nodes import node_value, tensors_in
from dcafy.graph.ops import Op, op_of


@dataclass(frozen=True)
class Message:
    """T̃: what a block passes on to the block that hears it.

    ``product``   T ⊙ G: T is bounded
    ``map``       T itself: T is unbounded
    ``fused``     the extraction once more, on the fused output: T has a branch dimension or another width
                  than G, so that T ⊙ G has no meaning (SK, split attention, LR-ASPP)

    ``branches``  Tᵢ ⊙ Gᵢ, once per branch: there is a map and a descriptor of each (SK as the paper has it)
    ``context``   G itself, where a topology asks for that

    ``extents`` and ``kinds`` are those of what is passed on for each of the block's extraction outputs, the last one
    for all that follow; ``axis``: where T has its channels. ``maps`` holds each branch's map, in the order of the
    block's extraction outputs, for ``branches``; ``fused`` and ``extraction`` say how, for ``fused``: each tensor that
    is extracted from, with what takes its place, and the nodes that are repeated.
    """

    kind: Literal["product", "map", "fused", "branches", "context"]
    extents: tuple[Extent, ...]
    kinds: tuple[Origins, ...]
    axis: int | None
    fused: tuple[tuple[fx.Node, fx.Node], ...] = ()
    extraction: tuple[fx.Node, ...] = ()
    maps: tuple[fx.Node, ...] = ()

    @property
    def extent(self) -> Extent:
        """Channels and size of what is passed on for the first extraction output."""
        return self.extents[0]

    def heard_by(self, output: int) -> tuple[Extent, Origins]:
        """Extent and kind of what another block's extraction output of that number hears."""
        return self.extents[min(output, len(self.extents) - 1)], self.kinds[min(output, len(self.kinds) - 1)]


class Unlinkable(Exception):
    """Why nothing can be passed on from a block."""


def extents(found: Found) -> tuple[Extent, ...]:
    """The extent of each of a block's extraction outputs."""
    maps = DIMENSIONS[found.block.dimension]
    all_ = (maps.extent(node_value(context), found.axis) for context in found.contexts)
    return tuple(extent for extent in all_ if extent is not None)


def mismatch(message: Message, target: Found) -> str | None:
    """Why ``message`` cannot be brought to the size of the target's G, or ``None`` where it can."""
    if message.kind == "branches" and len(message.maps) != len(branch_maps(target)):
        return f"it has a map for each of its {len(message.maps)} branches, and this block has no such branches"
    maps = DIMENSIONS[target.block.dimension]
    if not maps.are_alike([node_value(context) for context in target.contexts]):
        return "its extraction yields statistics of different sizes"
    for i, (own, kind) in enumerate(zip(extents(target), target.kinds, strict=True)):
        reason = maps.mismatch(*message.heard_by(i), own, kind)
        if reason is not None:
            return reason
    return None


def message_of(found: Found, axes: Axes, evaluator: Evaluator) -> Message | Unlinkable:
    """What a block passes on, or why it cannot pass on anything; ``axes``: of the recorded graph it is in."""
    context, map_ = node_value(found.contexts[0]), node_value(found.map)
    if not isinstance(map_, Tensor) or not isinstance(context, Tensor):
        return Unlinkable("its attention map is not one tensor")
    if not found.bounded:
        return _unbounded(found, map_, context)
    maps, contexts = DIMENSIONS[found.block.dimension], [node_value(context) for context in found.contexts]
    own, branches = extents(found), branch_maps(found)
    if branches and maps.has_branches:
        return Message("branches", own, found.kinds, found.axis, maps=branches)
    for axis in maps.axis_of_map(map_, contexts, found.axis) if len(set(found.kinds)) == 1 else []:
        return Message("product", own, found.kinds, axis)
    try:
        return _Refusion(found, axes, evaluator).message()
    except Unlinkable as reason:
        return reason


def branch_maps(found: Found) -> tuple[fx.Node, ...]:
    """The map of each branch, in the order of the extraction outputs; empty for a block without such branches.

    A branch has a fusion of its own, and a descriptor of its own that is extracted from the very tensor it fuses.
    """
    maps = []
    for context in found.contexts:
        sources = set(context.all_input_nodes)
        fusions = [f for f in found.fusions if not sources.isdisjoint(f.all_input_nodes)]
        own = [n for f in fusions for n in f.all_input_nodes if n not in sources]
        if len(fusions) != 1 or len(own) != 1 or node_value(own[0]).numel() != node_value(context).numel():
            return ()
        maps.append(own[0])
    return tuple(maps) if len(set(maps)) == len(found.fusions) > 1 else ()


def _unbounded(found: Found, map_: Tensor, context: Tensor) -> Message | Unlinkable:
    extent = DIMENSIONS[found.block.dimension].extent_of_map(map_, context, found.axis)
    return (
        Unlinkable("its attention map has other axes than its context")
        if extent is None
        else Message("map", (extent,), found.kinds[:1], found.axis)
    )


_EXTRACTS = REDUCES | {Op.JOIN, Op.ADD, Op.SLICE, Op.LAYOUT, Op.ELEMENTWISE, Op.MULTIPLY}
"""What lies between G and the tensor it is extracted from; a mean by hand is a sum that is divided by a number."""


_FUSES = REDUCES | {Op.JOIN, Op.ADD, Op.SLICE, Op.LAYOUT, Op.EXPAND, Op.ELEMENTWISE, Op.MULTIPLY}
"""What lies between a block's fusions and its fused output: branches are added up, and no layer works on them."""


_SEVERAL = "its extraction reads more than one tensor"
_OTHER_AXES = "its fused output has other axes than what it extracts from"


def _numel(node: fx.Node) -> int:
    return sum(tensor.numel() for tensor in tensors_in(node_value(node)))


class _Refusion:
    """The extraction, applied once more to the fused output."""

    def __init__(self, found: Found, axes: Axes, evaluator: Evaluator) -> None:
        self.found = found
        self.axes = axes
        self.modules = axes.flow.modules
        self.evaluator = evaluator

    def message(self) -> Message:
        """What is passed on; raises ``Unlinkable``."""
        try:
            return self._from(self._sources())
        except Unlinkable as reason:
            # X itself, where G is pooled from what layers made of it (polarized attention).
            whole = max((n for n in self.found.fusions[0].all_input_nodes if n is not self.found.map), key=_numel)
            try:
                return self._from((whole,))
            except Unlinkable:
                raise reason from None

    def _from(self, sources: tuple[fx.Node, ...]) -> Message:
        steps = self._steps(sources)
        fused = self._fused(sources)
        values = self._evaluate(fused, steps)
        contexts = [values[c] for c in self.found.contexts if c in values]
        if len(contexts) < len(self.found.contexts):
            raise Unlinkable(_SEVERAL)
        if not all(isinstance(v, Tensor) for v in contexts):
            raise Unlinkable("its extraction does not yield a tensor on the fused output")
        maps = DIMENSIONS[self.found.block.dimension]
        extents = tuple(e for v in contexts if (e := maps.extent(v, self.found.axis)) is not None)
        if len(extents) < len(contexts):
            raise Unlinkable("its extraction yields no map on the fused output")
        return Message("fused", extents, self.found.kinds, self.found.axis, fused, steps)

    def _sources(self) -> tuple[fx.Node, ...]:
        """The tensors that are extracted from, in the order of the graph."""
        sources: set[fx.Node] = set()
        pending = list(self.found.contexts)
        while pending:
            node = pending.pop()
            op = op_of(node, self.modules)
            inputs = [n for n in node.all_input_nodes if next(tensors_in(node_value(n)), None) is not None]
            if op not in _EXTRACTS or not inputs:
                sources.add(node)
                continue
            if op is Op.ADD and len(inputs) > 1:
                raise Unlinkable(_SEVERAL)
            if op in (Op.ELEMENTWISE, Op.MULTIPLY) and len(inputs) > 1:
                raise Unlinkable("its extraction is a mean whose weights belong to the unfused map")
            if op in REDUCES:
                sources.add(max(inputs, key=_numel))
            else:
                pending += inputs if op is Op.JOIN else [max(inputs, key=_numel)]
        if len(sources) > 1:
            sources = {self._viewed(node) for node in sources}
        return tuple(node for node in self.found.map.graph.nodes if node in sources)

    def _viewed(self, node: fx.Node) -> fx.Node:
        """What ``node`` is a view of, where that is what a fusion reads."""
        fused = {source for fusion in self.found.fusions for source in fusion.all_input_nodes}
        seen = node
        while seen not in fused and op_of(seen, self.modules) is Op.LAYOUT and seen.all_input_nodes:
            seen = seen.all_input_nodes[0]
        return seen if seen in fused else node

    def _fused(self, sources: tuple[fx.Node, ...]) -> tuple[tuple[fx.Node, fx.Node], ...]:
        """Each source, and what takes its place: of several, the output of the fusion that reads it."""
        if len(sources) == 1:
            return ((sources[0], self._fused_output(sources[0])),)
        pairs = []
        for source in sources:
            own = [fusion for fusion in self.found.fusions if source in fusion.all_input_nodes]
            if len(own) != 1:
                raise Unlinkable(_SEVERAL)
            if not self._has_axes_of(own[0], source):
                raise Unlinkable(_OTHER_AXES)
            pairs.append((source, own[0]))
        return tuple(pairs)

    def _steps(self, sources: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
        """The nodes from ``sources``, the first one first, to the contexts, all of which may run twice."""
        below = set(sources)
        for node in _from(sources[0], set(self.found.contexts)):
            if any(n in below for n in node.all_input_nodes):
                below.add(node)
        needed: set[fx.Node] = set()
        pending = list(self.found.contexts)
        while pending:
            node = pending.pop()
            if node in needed or node in sources or node not in below:
                continue
            needed.add(node)
            pending += node.all_input_nodes
        for node in needed:
            if any(isinstance(m, nn.modules.batchnorm._NormBase) for m in self._layers(node)):
                raise Unlinkable("its extraction updates statistics (batch norm) and cannot run twice")
        return tuple(n for n in _from(sources[0], set(self.found.contexts)) if n in needed)

    def _layers(self, node: fx.Node) -> list[nn.Module]:
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        return list(module.modules()) if module is not None else []

    def _has_axes_of(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether ``node`` has samples, channels, rows and columns where ``source`` has them, and as many samples."""
        ours, theirs = self.axes.of(node), self.axes.of(source)
        known = [(a, b) for a, b in zip(ours, theirs, strict=False) if a and b]
        same_batch = first_shape(node)[:1] == first_shape(source)[:1]
        return len(ours) == len(theirs) and same_batch and all(a == b for a, b in known)

    def _fused_output(self, source: fx.Node) -> fx.Node:
        """The first tensor with the axes of X, the ``source``, that all of the block's fusions have gone into."""
        wanted = set(self.found.fusions)
        seen: dict[fx.Node, set[fx.Node]] = {}
        for node in _from(self.found.fusions[0].prev, set()):
            through = {node} & wanted
            for operand in node.all_input_nodes:
                through |= seen.get(operand, set())
            if not through or (node not in wanted and op_of(node, self.modules) not in _FUSES):
                continue
            seen[node] = through
            value = node_value(node)
            if through == wanted and isinstance(value, Tensor) and self._has_axes_of(node, source):
                return node
        raise Unlinkable(_OTHER_AXES)

    def _evaluate(self, fused: tuple[tuple[fx.Node, fx.Node], ...], steps: tuple[fx.Node, ...]) -> dict[fx.Node, Any]:
        values: dict[fx.Node, Any] = {source: node_value(output) for source, output in fused}
        for node in steps:
            args = map_arg(node.args, lambda n: values.get(n, node_value(n)))
            kwargs = map_arg(node.kwargs, lambda n: values.get(n, node_value(n)))
            try:
                values[node] = self.evaluator.node(node, self.modules, args, kwargs)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                raise Unlinkable(f"its extraction does not fit the fused output ({error})") from error
        return values


def _from(start: fx.Node, last: set[fx.Node]) -> Iterator[fx.Node]:
    """The nodes after ``start``, up to the one that completes ``last``."""
    missing, node = set(last), start.next
    while node.op != "root":
        yield node
        missing.discard(node)
        if last and not missing:
            return
        node = node.next
