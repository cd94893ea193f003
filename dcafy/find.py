"""Graph -> attention blocks with their roles, by dataflow and shapes and never by class names.

It starts at a fusion (a product or sum of a small and a large tensor that both depend on the input) and
walks back from the small one. Every path must end at a *frontier*: a reduction of something much
larger. The frontier's outputs are G, what lies between is the transformation, its last node T.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from dcafy.blocks import AttentionBlock, Dimension, FusionKind, Gate
from dcafy.connected import OWNER
from dcafy.ops import Op, gate_of, op_name, op_of
from dcafy.trace.values import node_value, tensors_in

__all__ = ["ROOT_NAME", "Found", "find"]

ROOT_NAME = "root"
"""The name of a block that the network's own forward holds."""

RATIOS = (16, 6, 3)
"""How many times smaller than what it reduces G must be; the lower ones are for tiny maps."""

_POOLED = 64
"""A tensor so many times smaller than X is pooled already: a sum over it belongs to the transformation."""

REACH = 128
"""More nodes than any transformation has: a walk this long has strayed into the network."""

_REARRANGES = frozenset({Op.LAYOUT, Op.EXPAND, Op.SLICE})
_REDUCES = frozenset({Op.REDUCE, Op.POOL, Op.CONTRACT})
_STRICT: frozenset[Gate] = frozenset({"sigmoid", "hard_sigmoid", "softmax", "tanh"})


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


@dataclass
class _Walk:
    """What a walk back from a fusion's small operand has met."""

    ratio: float
    other: fx.Node
    frontier: set[fx.Node] = field(default_factory=set)
    between: set[fx.Node] = field(default_factory=set)
    local: bool = False  # a frontier that only pools over windows, or only is a 1-channel convolution
    narrow: bool = False  # a reduction was met that a lower ratio would have let pass
    verdicts: dict[fx.Node, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class _Candidate:
    map: fx.Node
    fusion: fx.Node
    kind: FusionKind
    frontier: frozenset[fx.Node]
    between: frozenset[fx.Node]


def find(graph: fx.Graph, modules: dict[str, nn.Module], path: str = "") -> tuple[Found, ...]:
    """The attention blocks of a recorded graph, in the order data meets them.

    ``graph`` is a :class:`~dcafy.trace.recorder.Recording`'s, ``modules`` those of its model, by path.
    """
    finder = _Finder(graph, modules)
    return finder.blocks(path)


class _Finder:
    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
        self.graph = graph
        self.modules = modules
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.ops = {node: op_of(node, modules) for node in graph.nodes}
        self.sizes = {node: sum(t.numel() for t in tensors_in(node_value(node))) for node in graph.nodes}
        self.depends: set[fx.Node] = set()
        for node in graph.nodes:
            if self.sizes[node] and (
                node.op == "placeholder" or any(source in self.depends for source in node.all_input_nodes)
            ):
                self.depends.add(node)

    # -- candidates ------------------------------------------------------------------------------

    def blocks(self, path: str) -> tuple[Found, ...]:
        candidates = self._without_inner(self._candidates(frozenset()))
        # Known maps end later walks: a block that already hears an earlier one keeps its own G.
        maps = frozenset(c.map for c in candidates)
        fusions = {c.fusion for c in candidates}
        candidates = [c for c in self._candidates(maps) if c.fusion in fusions]
        groups: dict[fx.Node, list[_Candidate]] = {}
        for candidate in candidates:
            groups.setdefault(candidate.map, []).append(candidate)
        found = [part for group in groups.values() for part in self._found(group)]
        found.sort(key=lambda f: min(self.order[n] for n in f.fusions))
        return _with_unique_names(found, path)

    def _candidates(self, maps: frozenset[fx.Node]) -> list[_Candidate]:
        return [c for node in self.graph.nodes for c in self._candidate(node, maps)]

    def _without_inner(self, candidates: list[_Candidate]) -> list[_Candidate]:
        """Candidates that are no part of another one's transformation (BAM adds its two maps)."""
        inner = set().union(*(c.between for c in candidates)) if candidates else set()
        return [c for c in candidates if c.fusion not in inner]

    def _candidate(self, node: fx.Node, maps: frozenset[fx.Node]) -> Iterator[_Candidate]:
        kind, operands = self._operands(node)
        if kind is None or not all(o in self.depends for o in operands):
            return
        pairs = [(operands[0], operands[1]), (operands[1], operands[0])]
        pairs.sort(key=lambda pair: self.sizes[self._core(pair[0])])
        for small, large in pairs:
            core = self._core(small)
            least = self.sizes[core] + 1 if _is_vector(node_value(core)) else self.sizes[core]
            if self.sizes[large] < least or small is large:
                continue
            for ratio in RATIOS:
                walk = _Walk(ratio, large)
                if self._reaches_frontier(core, self.sizes[core], walk, maps) and self._is_attention(core, kind, walk):
                    if not self._is_soft_pooling(node, core, walk):
                        yield _Candidate(core, node, kind, frozenset(walk.frontier), frozenset(walk.between | {core}))
                    return
                if not walk.narrow:
                    break

    def _operands(self, node: fx.Node) -> tuple[FusionKind | None, list[fx.Node]]:
        """How ``node`` fuses, and the two tensors that it fuses."""
        tensors = [a for a in node.args if isinstance(a, fx.Node) and self.sizes[a]]
        tensors += [a for a in node.kwargs.values() if isinstance(a, fx.Node) and self.sizes[a]]
        name = op_name(node, self.modules)
        if name == "addcmul" and len(tensors) == 3:
            return "mul", tensors[1:]
        if len(tensors) != 2:
            return None, []
        largest = max(self.sizes[n] for n in tensors)
        if self.ops[node] is Op.MULTIPLY or (name == "einsum" and self.sizes[node] == largest):
            return "mul", tensors
        return ("add", tensors) if self.ops[node] is Op.ADD else (None, [])

    def _core(self, node: fx.Node) -> fx.Node:
        """The node before it was only viewed, expanded or sliced: where the map itself is computed."""
        while self.ops[node] in _REARRANGES:
            source = self._first_tensor(node)
            if source is None or source not in self.depends:
                break
            node = source
        return node

    def _first_tensor(self, node: fx.Node) -> fx.Node | None:
        return next((n for n in node.all_input_nodes if self.sizes[n]), None)

    def _is_connection(self, node: fx.Node) -> bool:
        return node.op == "call_module" and getattr(self.modules.get(str(node.target)), "is_connection", False)

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        # A connection that dcafy made takes (G, T, G): the block's own extraction is its first argument.
        if self._is_connection(node):
            return [node.args[0]] if isinstance(node.args[0], fx.Node) else []
        if self.ops[node] in (Op.LAYOUT, Op.EXPAND):  # x.expand_as(y) holds nothing of y
            first = self._first_tensor(node)
            return [first] if first in self.depends else []
        return [n for n in node.all_input_nodes if n in self.depends]

    # -- the walk --------------------------------------------------------------------------------

    def _reaches_frontier(self, node: fx.Node, ref: float, walk: _Walk, maps: frozenset[fx.Node]) -> bool:
        """Whether every path from ``node`` back meets a reduction of something ``ratio`` times ``ref``."""
        if node not in self.depends or (node in maps and walk.between):
            return True
        if node in walk.verdicts:
            return walk.verdicts[node]
        if node is walk.other or node.op == "placeholder":
            return False
        walk.verdicts[node] = False  # no cycles in a graph; this is for re-entry on shared subtrees
        verdict = self._judge(node, min(ref, self.sizes[node]), walk, maps)
        walk.verdicts[node] = verdict
        return verdict

    def _judge(self, node: fx.Node, ref: float, walk: _Walk, maps: frozenset[fx.Node]) -> bool:
        op = self.ops[node]
        inputs = self._inputs(node)
        if not inputs:
            return False
        if op is Op.SLICE and self.ops[inputs[0]] in _REDUCES and not isinstance(node_value(inputs[0]), Tensor):
            return self._is_frontier(inputs[0], ref, walk) and self._mark(node, walk)  # max(dim=1)[0]
        if op in _REDUCES and self._is_frontier(node, ref, walk):
            return self._mark(node, walk)
        if op is Op.PARAMETRIC:
            return self._through_layer(node, ref, walk, maps, inputs)
        if op is Op.SLICE:  # a slice is no reduction: what is asked for is a reduction to the whole
            ref = max(ref, self.sizes[inputs[0]])
        elif op in (Op.OTHER, *_REDUCES) and any(self.sizes[n] != self.sizes[node] for n in inputs):
            largest = max(self.sizes[n] for n in inputs)
            if op is Op.OTHER or (largest > walk.ratio * ref and not self._is_pooled(largest, walk)):
                return False
        elif op is Op.QUERY:
            return True
        return self._pass(node, ref, walk, maps, inputs)

    def _pass(self, node: fx.Node, ref: float, walk: _Walk, maps: frozenset[fx.Node], inputs: list[fx.Node]) -> bool:
        walk.between.add(node)
        if len(walk.between) > REACH:
            return False
        return all(self._reaches_frontier(source, ref, walk, maps) for source in inputs)

    def _mark(self, node: fx.Node, walk: _Walk) -> bool:
        walk.frontier.add(node)
        return True

    def _is_pooled(self, size: int, walk: _Walk) -> bool:
        return size * _POOLED < self.sizes[walk.other]

    def _is_frontier(self, node: fx.Node, ref: float, walk: _Walk) -> bool:
        """Whether ``node`` reduces a neighbourhood to something of the map's size."""
        largest = max((self.sizes[n] for n in self._inputs(node)), default=0)
        own = max((t.numel() for t in tensors_in(node_value(node))), default=1)
        if largest < 2 * own or self._is_pooled(largest, walk):
            return False
        if largest >= walk.ratio * ref:
            return True
        walk.narrow = walk.narrow or largest >= RATIOS[-1] * ref
        if self.ops[node] is Op.POOL and own > 1 and _positions(node) > 1:
            walk.local = True
            return True
        return False

    def _through_layer(
        self, node: fx.Node, ref: float, walk: _Walk, maps: frozenset[fx.Node], inputs: list[fx.Node]
    ) -> bool:
        """A layer is passed where it works on pooled data; one on the full map ends the walk.

        A convolution to one channel may be the extraction itself (spatial squeeze-excite), where nothing
        behind it reduces.
        """
        full = any(self.sizes[n] >= self.sizes[walk.other] and _positions(n) >= _positions(walk.other) for n in inputs)
        if not full:
            snapshot = (set(walk.frontier), set(walk.between), dict(walk.verdicts), walk.local)
            if self._pass(node, ref, walk, maps, inputs):
                return True
            walk.frontier, walk.between, walk.verdicts, walk.local = snapshot
        value, source = node_value(node), node_value(inputs[0])
        squeezes = isinstance(value, Tensor) and isinstance(source, Tensor) and value.ndim == source.ndim >= 3
        if (
            squeezes
            and _positions(node) > 1
            and value.numel() * 2 <= source.numel()
            and 1 in (value.shape[1], value.shape[-1])
        ):
            walk.local = True
            return self._mark(node, walk)
        return False

    # -- verdicts --------------------------------------------------------------------------------

    def _is_attention(self, core: fx.Node, kind: FusionKind, walk: _Walk) -> bool:
        nodes = walk.between | {core}
        gates = {gate_of(n, self.modules) for n in nodes} - {None}
        parametric = any(self.ops[n] is Op.PARAMETRIC for n in walk.between - walk.frontier)
        if not walk.frontier or core in walk.frontier:
            return False
        if kind == "add":
            return parametric and _is_vector(node_value(core)) and not walk.local
        if walk.local:
            return bool(gates & _STRICT)
        return parametric or bool(gates & _STRICT)

    def _is_soft_pooling(self, node: fx.Node, core: fx.Node, walk: _Walk) -> bool:
        """x · softmax(...) that is summed over positions is part of an extraction (GC), not a fusion."""
        gates = {gate_of(n, self.modules) for n in walk.between | {core}}
        if "softmax" not in gates or not walk.local:
            return False
        users = list(node.users)
        while len(users) == 1 and self.ops[users[0]] is Op.LAYOUT:
            users = list(users[0].users)
        return bool(users) and all(self.ops[u] in _REDUCES for u in users)

    # -- from candidates to blocks ---------------------------------------------------------------

    def _found(self, group: list[_Candidate]) -> list[Found]:
        """The block of one map; two blocks where a channel part and a spatial part were joined (BAM)."""
        first = group[0]
        frontier = self._joined(first)
        fusions = tuple(sorted((c.fusion for c in group), key=self.order.__getitem__))
        by_dimension: dict[Dimension, list[fx.Node]] = {}
        for node in sorted(frontier, key=self.order.__getitem__):
            by_dimension.setdefault(self._layout(node)[0], []).append(node)
        if len(by_dimension) == 1:
            contexts = next(iter(by_dimension.values()))
            return [self._block(contexts, first.map, fusions, first.between - frontier, first.kind)]
        parts = []
        for contexts in by_dimension.values():
            own = self._reached_only_from(set(contexts), frontier, first.between)
            top = max(own | set(contexts), key=self.order.__getitem__)
            shared = first.between - self._reached_only_from(frontier - set(contexts), frontier, first.between)
            part = self._block(contexts, self._core(top), fusions, shared - frontier, first.kind)
            # The part is passed on from before the two were joined, where no gate has bounded it yet.
            parts.append(dataclasses.replace(part, bounded=any(gate_of(n, self.modules) for n in own)))
        return parts

    def _reached_only_from(
        self, contexts: set[fx.Node] | frozenset[fx.Node], frontier: frozenset[fx.Node], between: frozenset[fx.Node]
    ) -> frozenset[fx.Node]:
        others = frontier - contexts
        tainted, own = set(others), set(contexts)
        for node in sorted(between, key=self.order.__getitem__):
            if any(n in tainted for n in node.all_input_nodes):
                tainted.add(node)
            elif any(n in own for n in node.all_input_nodes):
                own.add(node)
        return frozenset(own - contexts)

    def _joined(self, candidate: _Candidate) -> frozenset[fx.Node]:
        """The frontier, with reductions that are only concatenated replaced by their concatenation (CBAM)."""
        frontier = set(candidate.frontier)
        for node in sorted(candidate.between, key=self.order.__getitem__):
            if self.ops[node] is not Op.JOIN:
                continue
            sources = {self._before_layout(n, frontier) for n in self._inputs(node)}
            if len(sources) > 1 and sources <= frontier and not any(_is_vector(node_value(s)) for s in sources):
                frontier = (frontier - sources) | {node}
        return frozenset(frontier)

    def _before_layout(self, node: fx.Node, frontier: set[fx.Node]) -> fx.Node:
        while node not in frontier and self.ops[node] is Op.LAYOUT and self._inputs(node):
            node = self._inputs(node)[0]
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
        gates = [g for n in sorted(between, key=self.order.__getitem__) if (g := gate_of(n, self.modules))]
        extraction = sorted(self._extraction(contexts), key=self.order.__getitem__)
        visible = sorted((n for n in between if self.ops[n] is not Op.QUERY), key=self.order.__getitem__)
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
            op = self.ops[node]
            for source in self._inputs(node):
                weighted = self.ops[source] is Op.MULTIPLY and len(source.users) == 1
                weights = op is Op.CONTRACT or (op is Op.REDUCE and weighted)
                inside = op in (Op.JOIN, Op.SLICE, Op.LAYOUT, Op.GATE, Op.MULTIPLY) and source.op != "placeholder"
                if op is Op.PARAMETRIC or not (weights or inside) or source in nodes:
                    continue
                if self._is_extraction_step(source):
                    nodes.add(source)
                    pending.append(source)
        return {n for n in nodes if self.ops[n] not in (Op.LAYOUT, Op.SLICE) or n in contexts}

    def _is_extraction_step(self, node: fx.Node) -> bool:
        """Part of the pooling rather than of X: a reduction, softmax weights, a 1-channel mask."""
        op = self.ops[node]
        if op is Op.SLICE:
            return any(self.ops[source] in _REDUCES for source in self._inputs(node))
        if op in _REDUCES or op is Op.MULTIPLY or gate_of(node, self.modules) == "softmax":
            return True
        value = node_value(node)
        one_channel = isinstance(value, Tensor) and value.ndim >= 3 and 1 in value.shape[1:]
        return one_channel and op in (Op.LAYOUT, Op.PARAMETRIC)

    # -- shapes ----------------------------------------------------------------------------------

    def _layout(self, node: fx.Node) -> tuple[Dimension, int | None, int, tuple[int, ...] | None]:
        """Dimension, channel axis, channels and spatial size of G, read off its shape and what it reduced."""
        value = node_value(node)
        shape = tuple(value.shape)
        sources = [n for n in self._inputs(node) if isinstance(node_value(n), Tensor)]
        source = max(sources, key=lambda n: self.sizes[n], default=node)
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
            op, value = self.ops[node], node_value(node)
            if op is Op.PARAMETRIC:
                name = op_name(node, self.modules).lower()
                return -1 if "linear" in name or name in ("layernorm", "layer_norm") else 1
            if op_name(node, self.modules) == "permute":
                order = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
                return -1 if tuple(order)[-1] == 1 else 1
            sources = [n for n in self._inputs(node) if isinstance(node_value(n), Tensor)]
            same = [n for n in sources if isinstance(value, Tensor) and node_value(n).ndim == value.ndim]
            if not same:
                return 1
            node = max(same, key=lambda n: self.sizes[n])
        return 1

    def _home(self, nodes: list[fx.Node]) -> str:
        """The path of the innermost module that holds all of ``nodes``."""
        own = [n for n in nodes if not self._is_connection(n)]
        paths = [str(n.target) if n.op == "call_module" else str(n.meta.get(OWNER, "")) for n in own]
        common = paths[0].split(".")
        for path in paths[1:]:
            parts = path.split(".")
            same = next((i for i, (a, b) in enumerate(zip(common, parts, strict=False)) if a != b), None)
            common = common[: same if same is not None else min(len(common), len(parts))]
        return ".".join(common)


def _is_vector(value: object) -> bool:
    return isinstance(value, Tensor) and sum(n > 1 for n in value.shape[1:]) <= 1


def _positions(node: fx.Node) -> int:
    """Over how many places a map [N, C, ...] extends."""
    value = node_value(node)
    return math.prod(value.shape[2:]) if isinstance(value, Tensor) and value.ndim > 2 else 1


def _with_unique_names(found: list[Found], path: str) -> tuple[Found, ...]:
    seen: dict[str, int] = {}
    named = []
    for item in found:
        name = ".".join(part for part in (path, item.block.name) if part) or ROOT_NAME
        seen[name] = seen.get(name, 0) + 1
        name = name if seen[name] == 1 else f"{name}#{seen[name]}"
        named.append(dataclasses.replace(item, block=dataclasses.replace(item.block, name=name)))
    return tuple(named)
