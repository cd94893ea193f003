"""Blocks -> plan: which block hears which, and what the earlier one passes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from dcafy.find.roles import Found
from dcafy.graph.evaluator import Evaluator, node_value, tensors_in
from dcafy.graph.ops import Op, alters_argument, op_of
from dcafy.plan.blocks import Chain, Link, Skipped

__all__ = ["Carried", "Unlinkable", "branch_maps", "carried_by", "chains", "earlier", "mismatch", "predecessors"]


@dataclass(frozen=True)
class Carried:
    """T̃: what a block passes on to the block that hears it.

    ``product``   T ⊙ G: T is bounded
    ``map``       T itself: T is unbounded
    ``fused``     the extraction once more, on the fused output: T has a branch dimension or another width
                  than G, so that T ⊙ G has no meaning (SK, split attention, LR-ASPP)

    ``branches``  Tᵢ ⊙ Gᵢ, once per branch: there is a map and a descriptor of each (SK as the paper has it)

    ``maps`` holds each branch's map, in the order of the block's extraction outputs, for ``branches``;
    ``fused_output`` and ``extraction`` (with ``source``, which it is to be replaced by) say how, for ``fused``.
    """

    kind: Literal["product", "map", "fused", "branches"]
    channels: int
    size: tuple[int, ...] | None
    source: fx.Node | None = None
    fused_output: fx.Node | None = None
    extraction: tuple[fx.Node, ...] = ()
    maps: tuple[fx.Node, ...] = ()


class Unlinkable(Exception):
    """Why nothing can be passed on from a block."""


def predecessors(graph: fx.Graph, modules: dict[str, nn.Module], found: tuple[Found, ...]) -> dict[str, str]:
    """Block name -> the nearest earlier block of its dimension whose fused output reaches it."""
    return {target: sources[-1] for target, sources in earlier(graph, modules, found).items()}


def earlier(graph: fx.Graph, modules: dict[str, nn.Module], found: tuple[Found, ...]) -> dict[str, tuple[str, ...]]:
    """Block name -> all earlier blocks of its dimension whose fused outputs reach it, nearest last."""
    bit = {node: 1 << i for i, block in enumerate(found) for node in block.fusions}
    bits: dict[fx.Node, int] = {}
    for i, block in enumerate(found):
        for node in block.fusions:
            bit[node] |= 1 << i
    reach: dict[fx.Node, int] = {}
    for node in graph.nodes:
        reach[node] = bit.get(node, 0)
        for source in node.all_input_nodes:
            reach[node] |= reach[source]
        altered = node.args[0] if alters_argument(node, modules) and node.args else None
        while isinstance(altered, fx.Node):  # whoever reads the altered tensor later hears it, too
            reach[altered] |= reach[node]
            altered = next(iter(altered.all_input_nodes), None) if op_of(altered, modules) is Op.SLICE else None
        bits[node] = reach[node]
    heard: dict[str, tuple[str, ...]] = {}
    for block in found:
        reaching = 0
        for context in block.contexts:
            for source in context.all_input_nodes:
                reaching |= bits[source]
        before = tuple(
            other.name
            for i, other in enumerate(found)
            if reaching >> i & 1 and other is not block and other.block.dimension == block.block.dimension
        )
        if before:
            heard[block.name] = before
    return heard


def chains(
    found: tuple[Found, ...], heard: dict[str, str], carried: dict[str, Carried | Unlinkable]
) -> tuple[tuple[Chain, ...], tuple[Skipped, ...]]:
    """The forest of chains, and every block that could have been connected and is not, with the reason."""
    by_name = {block.name: block for block in found}
    links: dict[str, Link] = {}
    skipped = []
    for target, source in heard.items():
        passed = carried[source]
        reason = str(passed) if isinstance(passed, Unlinkable) else mismatch(passed, by_name[source], by_name[target])
        if reason:
            skipped.append(Skipped(target, f"cannot hear {source}: {reason}"))
        else:
            links[target] = Link(source, target)
    home: dict[str, int] = {}
    groups: list[list[str]] = []
    for block in found:
        link = links.get(block.name)
        home[block.name] = home[link.source] if link else len(groups)
        if not link:
            groups.append([])
        groups[home[block.name]].append(block.name)
    made = tuple(
        Chain(by_name[group[0]].block.dimension, tuple(group), tuple(links[n] for n in group if n in links))
        for group in groups
    )
    return made, tuple(skipped)


def mismatch(passed: Carried, source: Found, target: Found) -> str | None:
    """Why ``passed`` cannot be brought to the size of the target's G, or ``None`` where it can."""
    if passed.kind == "branches" and len(passed.maps) != len(branch_maps(target)):
        return f"it has a map for each of its {len(passed.maps)} branches, and this block has no such branches"
    contexts = [node_value(context) for context in target.contexts]
    kinds = {value[0].numel() if target.block.dimension == "channel" else value.ndim for value in contexts}
    if len(kinds) > 1:
        return "its extraction yields statistics of different sizes"
    if target.block.dimension == "channel":
        return None
    ours, theirs = target.block.channels, passed.channels
    if passed.size is None or target.block.size is None or len(passed.size) != len(target.block.size):
        return f"its map {passed.size} and this one {target.block.size} have different axes"
    if max(ours, theirs) > _FEW and ours != theirs and 1 not in (ours, theirs):
        return f"maps of {theirs} and of {ours} channels, which only a layer of their own could match"
    strips = 1 in (*passed.size, *target.block.size)
    if strips and passed.size != target.block.size:
        return f"its map {passed.size} and this one {target.block.size} are strips of different lengths"
    return None


_FEW = 4
"""Up to so many channels a map is a stack of descriptors (CBAM's mean and max), not a feature map."""


def carried_by(found: Found, modules: dict[str, nn.Module], evaluator: Evaluator) -> Carried | Unlinkable:
    """What a block passes on, or why it cannot pass on anything; ``modules``: the traced model's, by path."""
    context, map_ = node_value(found.contexts[0]), node_value(found.map)
    if not isinstance(map_, Tensor) or not isinstance(context, Tensor):
        return Unlinkable("its attention map is not one tensor")
    if not found.bounded:
        return _unbounded(found, map_, context)
    maps = branch_maps(found)
    if maps and found.block.dimension == "channel":
        return Carried("branches", found.block.channels, None, maps=maps)
    if _same_extent(found, map_, context):
        channels = found.block.channels
        return Carried("product", channels, found.block.size)
    try:
        return _Refusion(found, modules, evaluator).carried()
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


def _unbounded(found: Found, map_: Tensor, context: Tensor) -> Carried | Unlinkable:
    if found.block.dimension == "channel" and map_.shape[:1] == context.shape[:1]:
        return Carried("map", map_[0].numel(), None)
    if found.block.dimension == "channel":
        return Unlinkable("its attention map has other axes than its context")
    shape = _as_map(map_, found.axis)
    if shape is None:
        return Unlinkable("its attention map has other axes than its context")
    return Carried("map", shape[0], shape[1:])


def _as_map(map_: Tensor, axis: int | None) -> tuple[int, ...] | None:
    """(channels, *size) of a map in the layout of its block's G."""
    if axis is None:
        return (1, *map_.shape[1:])
    if map_.ndim < 3:
        return None
    return (map_.shape[-1], *map_.shape[1:-1]) if axis == -1 else tuple(map_.shape[1:])


def _same_extent(found: Found, map_: Tensor, context: Tensor) -> bool:
    if found.block.dimension == "channel":
        return all(map_.shape[:1] == c.shape[:1] and map_.numel() == c.numel() for c in map(node_value, found.contexts))
    if map_.ndim != context.ndim:
        return False
    shape = _as_map(map_, found.axis)
    return shape is not None and shape[1:] == found.block.size and shape[0] in (1, found.block.channels)


class _Refusion:
    """The extraction, applied once more to the fused output."""

    def __init__(self, found: Found, modules: dict[str, nn.Module], evaluator: Evaluator) -> None:
        self.found = found
        self.modules = modules
        self.evaluator = evaluator

    def carried(self) -> Carried:
        source = self._source()
        steps = self._steps(source)
        fused = self._fused_output(node_value(source).ndim)
        values = self._evaluate(source, steps, fused)
        contexts = [values[c] for c in self.found.contexts]
        if not all(isinstance(v, Tensor) for v in contexts):
            raise Unlinkable("its extraction does not yield a tensor on the fused output")
        if self.found.block.dimension == "channel":
            return Carried("fused", contexts[0][0].numel(), None, source, fused, steps)
        shape = _as_map(contexts[0], self.found.axis)
        if shape is None:
            raise Unlinkable("its extraction yields no map on the fused output")
        return Carried("fused", shape[0], shape[1:], source, fused, steps)

    def _source(self) -> fx.Node:
        """The tensor that is extracted from, before it was only rearranged."""
        sources = set()
        for context in self.found.contexts:
            node = context
            if op_of(node, self.modules) is Op.ELEMENTWISE:
                raise Unlinkable("its extraction is a mean whose weights belong to the unfused map")
            while op_of(node, self.modules) in (Op.JOIN, Op.SLICE, Op.LAYOUT, Op.REDUCE, Op.POOL, Op.CONTRACT):
                inputs = [n for n in node.all_input_nodes if any(True for _ in tensors_in(node_value(n)))]
                if not inputs:
                    break
                reduces = op_of(node, self.modules) in (Op.REDUCE, Op.POOL, Op.CONTRACT)
                node = max(inputs, key=lambda n: sum(t.numel() for t in tensors_in(node_value(n))))
                if reduces and op_of(node, self.modules) is not Op.LAYOUT:
                    break
            sources.add(node)
        if len(sources) != 1:
            raise Unlinkable("its extraction reads more than one tensor")
        return sources.pop()

    def _steps(self, source: fx.Node) -> tuple[fx.Node, ...]:
        """The nodes from ``source`` to the contexts, all of which may run twice."""
        below = {source}
        for node in _from(source, set(self.found.contexts)):
            if any(n in below for n in node.all_input_nodes):
                below.add(node)
        needed: set[fx.Node] = set()
        pending = list(self.found.contexts)
        while pending:
            node = pending.pop()
            if node in needed or node is source or node not in below:
                continue
            needed.add(node)
            pending += node.all_input_nodes
        for node in needed:
            if any(isinstance(m, nn.modules.batchnorm._NormBase) for m in self._layers(node)):
                raise Unlinkable("its extraction updates statistics (batch norm) and cannot run twice")
        return tuple(n for n in _from(source, set(self.found.contexts)) if n in needed)

    def _layers(self, node: fx.Node) -> list[nn.Module]:
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        return list(module.modules()) if module is not None else []

    def _fused_output(self, rank: int) -> fx.Node:
        """The first tensor of X's rank that all of the block's fusions have gone into."""
        wanted = set(self.found.fusions)
        seen: dict[fx.Node, set[fx.Node]] = {}
        for node in _from(self.found.fusions[0].prev, set()):
            through = {node} & wanted
            for source in node.all_input_nodes:
                through |= seen.get(source, set())
            if not through:
                continue
            seen[node] = through
            value = node_value(node)
            if through == wanted and isinstance(value, Tensor) and value.ndim == rank:
                return node
        raise Unlinkable("its fused output has other axes than what it extracts from")

    def _evaluate(self, source: fx.Node, steps: tuple[fx.Node, ...], fused: fx.Node) -> dict[fx.Node, Any]:
        values: dict[fx.Node, Any] = {source: node_value(fused)}
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
