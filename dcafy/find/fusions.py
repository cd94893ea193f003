"""Graph -> attention blocks with their roles, by dataflow and shapes and never by class names.

It starts at a fusion (a product or sum of a small and a large tensor that both depend on the input) and
walks back from the small one. Every path must end at a *frontier*: a reduction of something much
larger. The frontier's outputs are G, what lies between is the transformation, its last node T.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from torch import Tensor, fx

from dcafy.find.dataflow import REARRANGES, REDUCES, Dataflow, is_vector, positions
from dcafy.find.roles import Candidate, Found, Roles
from dcafy.find.walk import RATIOS, Walk
from dcafy.graph.nodes import node_value
from dcafy.graph.ops import Op, gate_of, op_name
from dcafy.graph.paths import joined
from dcafy.plan.blocks import FusionKind
from dcafy.plan.gates import GATES

_COLOURS = 4
"""Up to so many channels what a network is given is an image, with transparency perhaps."""

_NUMBER_BY_NUMBER = REARRANGES | {Op.ADD, Op.MULTIPLY, Op.ELEMENTWISE, Op.GATE}

ROOT_NAME = "root"
"""The name of a block that the network's own forward holds."""


def find(flow: Dataflow, path: str = "") -> tuple[Found, ...]:
    """The attention blocks of a recorded graph, in the order data meets them; ``path``: the traced module's."""
    return _Finder(flow, path).blocks()


class _Finder:
    def __init__(self, flow: Dataflow, path: str) -> None:
        self.flow = flow
        self.roles = Roles(flow)
        self.path = path

    def blocks(self) -> tuple[Found, ...]:
        candidates = self._without_inner(self._candidates(self.flow.graph.nodes, frozenset()))
        # Known maps end later walks: a block that already hears an earlier one keeps its own G.
        maps = frozenset(c.map for c in candidates)
        candidates = self._with_own(self._candidates(dict.fromkeys(c.fusion for c in candidates), maps))
        groups: dict[fx.Node, list[Candidate]] = {}
        for candidate in candidates:
            groups.setdefault(candidate.map, []).append(candidate)
        found = [part for group in groups.values() for part in self.roles.found(group)]
        found.sort(key=lambda f: min(self.flow.order[n] for n in f.fusions))
        return _with_unique_names(self._merged(found), self.path)

    def _merged(self, found: list[Found]) -> list[Found]:
        """One block for maps that one layer computes from one G: they cannot be connected apart.

        Coordinate attention has a map for the rows and one for the columns, behind a shared layer.
        """
        merged: dict[tuple[tuple[fx.Node, ...], frozenset[fx.Node]], Found] = {}
        for item in found:
            readers = frozenset(user for node in item.contexts for user in node.users if user in item.between)
            key = (item.contexts, readers)
            merged[key] = self._both(merged[key], item) if key in merged else item
        return list(merged.values())

    def _both(self, first: Found, second: Found) -> Found:
        def in_order(nodes: Iterable[fx.Node]) -> list[fx.Node]:
            return sorted(set(nodes), key=self.flow.order.__getitem__)

        steps = {*first.block.transformation, *second.block.transformation}
        fusions = tuple(in_order((*first.fusions, *second.fusions)))
        between = first.between | second.between
        block = dataclasses.replace(
            first.block,
            transformation=tuple(node.name for node in in_order(between) if node.name in steps),
            fusion=tuple(node.name for node in fusions),
        )
        return dataclasses.replace(first, block=block, fusions=fusions, between=between)

    def _candidates(self, nodes: Iterable[fx.Node], maps: frozenset[fx.Node]) -> list[Candidate]:
        return [c for node in nodes for c in self._candidate(node, maps)]

    def _without_inner(self, candidates: list[Candidate]) -> list[Candidate]:
        """Candidates that are no part of another one's transformation (BAM adds its two maps)."""
        inner = set().union(*(c.between for c in candidates)) if candidates else set()
        return [c for c in candidates if c.fusion not in inner]

    def _with_own(self, candidates: list[Candidate]) -> list[Candidate]:
        """Candidates without what earlier ones extracted and handed on (DIA's LSTM, from block to block)."""
        known: set[fx.Node] = set()
        kept = []
        for candidate in sorted(candidates, key=lambda c: self.flow.order[c.fusion]):
            own = candidate.frontier - known
            if own and own != candidate.frontier:
                between = set(own)
                for node in sorted(candidate.between, key=self.flow.order.__getitem__):
                    if any(source in between for source in node.all_input_nodes):
                        between.add(node)
                candidate = dataclasses.replace(candidate, frontier=own, between=frozenset(between - own))
            known |= candidate.frontier
            kept.append(candidate)
        return kept

    def _candidate(self, node: fx.Node, maps: frozenset[fx.Node]) -> Iterator[Candidate]:
        kind, operands = self._operands(node)
        if kind is None or not all(o in self.flow.depends for o in operands):
            return
        pairs = [(operands[0], operands[1]), (operands[1], operands[0])]
        pairs.sort(key=lambda pair: self.flow.sizes[self.flow.core(pair[0])])
        for small, large in pairs:
            core = self.flow.core(small)
            least = self.flow.sizes[core] + 1 if is_vector(node_value(core)) else self.flow.sizes[core]
            # What was only expanded to X's size is no X (a norm's statistics, of which each channel has one).
            if min(self.flow.sizes[large], self.flow.sizes[self.flow.core(large)]) < least or small is large:
                continue
            if self._is_foreign(core, large) or self._is_windows(large):
                continue
            walk = self._walk(core, large, kind, maps)
            if walk is None:
                continue
            walk.give_back_inner()
            if not (
                self._is_soft_pooling(node, core, walk)
                or self._gates_itself(core, large, walk)
                or self._weighs_an_image(core, large)
                or self._is_made_of(large, walk)
            ):
                yield Candidate(core, node, kind, frozenset(walk.frontier), frozenset(walk.between | {core}))
            return

    def _walk(self, core: fx.Node, large: fx.Node, kind: FusionKind, maps: frozenset[fx.Node]) -> Walk | None:
        """The walk back from a map that shows it to be attention, if one does."""
        found = self._at_ratios(core, large, kind, maps)
        if found is None and kind == "mul":
            walk = Walk(self.flow, RATIOS[0], large, maps, mixed=True)
            if walk.reaches_frontier(core, self.flow.sizes[core]) and self._is_attention(core, kind, walk):
                found = walk
        above = found is not None and found.spread and self._is_above(found.frontier, large)
        return None if above else found

    def _at_ratios(self, core: fx.Node, large: fx.Node, kind: FusionKind, maps: frozenset[fx.Node]) -> Walk | None:
        """The walk at the highest ratio that shows attention.

        One that ended at windows or a 1-channel layer and had let a reduction of narrow maps pass is the last choice:
        at a lower ratio that very reduction may be the extraction (CBAM's spatial part in 8 channels).
        """
        local = None
        for ratio in RATIOS:
            walk = Walk(self.flow, ratio, large, maps)
            shown = walk.reaches_frontier(core, self.flow.sizes[core]) and self._is_attention(core, kind, walk)
            if shown and not (walk.local and walk.narrow):
                return walk if local is None or walk.frontier != local.frontier else local
            local = local or (walk if shown else None)
            if not walk.narrow:
                break
        return local

    def _operands(self, node: fx.Node) -> tuple[FusionKind | None, list[fx.Node]]:
        """How ``node`` fuses, and the two tensors that it fuses."""
        tensors = [a for a in node.args if isinstance(a, fx.Node) and self.flow.sizes[a]]
        tensors += [a for a in node.kwargs.values() if isinstance(a, fx.Node) and self.flow.sizes[a]]
        name = op_name(node, self.flow.modules)
        if name == "addcmul" and len(tensors) == 3:
            return "mul", tensors[1:]
        if name == "lerp" and len(tensors) == 3:  # a + t · (b - a)
            *ends, weight = tensors
            return "mul", [weight, next((end for end in reversed(ends) if end in self.flow.depends), ends[0])]
        if len(tensors) != 2:
            return None, []
        largest = max(self.flow.sizes[n] for n in tensors)
        if self.flow.ops[node] is Op.MULTIPLY or (name == "einsum" and self.flow.sizes[node] == largest):
            return "mul", tensors
        return ("add", tensors) if self.flow.ops[node] is Op.ADD else (None, [])

    def _is_attention(self, core: fx.Node, kind: FusionKind, walk: Walk) -> bool:
        nodes = walk.between | {core}
        gated = any(GATES[gate].strict for n in nodes if (gate := gate_of(n, self.flow.modules)))
        parametric = any(self.flow.ops[n] is Op.PARAMETRIC for n in walk.between - walk.frontier)
        if not walk.frontier or core in walk.frontier:
            return False
        if walk.mixed:
            return gated and walk.has_layers_of_its_own()
        if kind == "add":
            return parametric and is_vector(node_value(core)) and not walk.local
        if walk.local or self._is_one_for_all(core, nodes):
            return gated
        return parametric or gated

    def _is_one_for_all(self, core: fx.Node, nodes: set[fx.Node]) -> bool:
        """Whether the map has one number for all channels of a place, which nothing bounds (the scale of XNOR-Net)."""
        value = node_value(core)
        one = isinstance(value, Tensor) and value.ndim > 3 and 1 in (value.shape[1], value.shape[-1])
        return one and positions(core) > 1 and not any(gate_of(node, self.flow.modules) for node in nodes)

    def _is_windows(self, large: fx.Node) -> bool:
        """Whether the operand is every window of a map: what weighs those is a kernel (involution), no attention.

        Windows lie over one another: together they hold more than the map. Its rows, one by one, are the map again.
        """
        node = self.flow.core(large)
        parts = [self.flow.core(part) for part in self.flow.inputs(node)]
        several = self.flow.ops[node] is Op.JOIN and len(parts) > 3 and len(set(parts)) == 1
        several = several and self.flow.sizes[node] > self.flow.sizes[parts[0]]
        return several or op_name(node, self.flow.modules).lower() in ("unfold", "im2col")

    def _weighs_an_image(self, small: fx.Node, large: fx.Node) -> bool:
        """Whether an image is weighed place by place, and no map of features: illumination, a mask (Retinex)."""
        value = node_value(large)
        if self.path or not isinstance(value, Tensor) or value.ndim < 4 or value.shape[1] > _COLOURS:
            return False
        node = large
        while self.flow.ops[node] in _NUMBER_BY_NUMBER and self.flow.inputs(node):
            node = max(self.flow.inputs(node), key=lambda n: self.flow.sizes[self.flow.core(n)])
        return node.op == "placeholder" and positions(small) > 1

    def _is_above(self, frontier: set[fx.Node], large: fx.Node) -> bool:
        """Whether X is computed from G: a decoder raises the maps of an encoder, and gates them by the way."""
        first = min(self.flow.order[node] for node in frontier)
        pending, seen = [large], {large}
        while pending:
            node = pending.pop()
            if node in frontier:
                return True
            for source in self.flow.inputs(node):
                if source not in seen and self.flow.order[source] >= first:
                    seen.add(source)
                    pending.append(source)
        return False

    def _is_made_of(self, large: fx.Node, walk: Walk) -> bool:
        """Whether X itself is computed from G and from nothing else: experts on a pooled vector, and their weights."""
        pooled = max(self.flow.sizes[n] for node in walk.frontier for n in self.flow.inputs(node))
        if self.flow.sizes[large] >= pooled:
            return False
        pending, seen = [large], {large}
        while pending:
            node = pending.pop()
            if node.op == "placeholder":
                return False
            for source in self.flow.inputs(node):
                if source not in seen and source not in walk.frontier:
                    seen.add(source)
                    pending.append(source)
        return True

    def _is_foreign(self, small: fx.Node, large: fx.Node) -> bool:
        """Whether the map hears less of the network's inputs than X: it was extracted from something else.

        A question's embedding or another image's style condition X; two inputs of an island may be of one image.
        """
        return not self.path and not self.flow.origins[large] <= self.flow.origins[small]

    def _gates_itself(self, small: fx.Node, large: fx.Node, walk: Walk) -> bool:
        """x · sigmoid(v · x), as in a learned activation: the operand that is no gate is no map of attention either.

        Nor is it where it was pooled and spread again (CAN's context, which is weighed by how far it is from X).
        """
        gates = {gate_of(node, self.flow.modules) for node in (*walk.between, small)} - {None}
        is_weight = not gates and gate_of(self.flow.core(large), self.flow.modules) is not None
        if self.flow.sizes[small] < self.flow.sizes[large] and not is_weight:
            return False
        pending, seen = [large], {large}
        while pending:
            for source in self.flow.inputs(pending.pop()):
                if source is small:
                    return True
                if source not in seen and self.flow.order[source] > self.flow.order[small]:
                    seen.add(source)
                    pending.append(source)
        return False

    def _is_soft_pooling(self, node: fx.Node, core: fx.Node, walk: Walk) -> bool:
        """x · w that is summed over positions is part of an extraction (GC), not a fusion.

        So it is where w is a softmax, or is itself summed, to divide by.
        """
        gates = {gate_of(n, self.flow.modules) for n in walk.between | {core}}
        normalised = "softmax" in gates or any(self.flow.ops[user] is Op.REDUCE for user in core.users)
        if not normalised or not walk.local:
            return False
        users = list(node.users)
        while len(users) == 1 and self.flow.ops[users[0]] is Op.LAYOUT:
            users = list(users[0].users)
        return bool(users) and all(self.flow.ops[u] in REDUCES for u in users)


def _with_unique_names(found: list[Found], path: str) -> tuple[Found, ...]:
    seen: dict[str, int] = {}
    named = []
    for item in found:
        name = joined(path, item.block.name) or ROOT_NAME
        seen[name] = seen.get(name, 0) + 1
        name = name if seen[name] == 1 else f"{name}#{seen[name]}"
        named.append(dataclasses.replace(item, block=dataclasses.replace(item.block, name=name)))
    return tuple(named)
