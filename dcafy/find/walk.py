"""The walk back from a fusion's small operand, through the transformation, to the reductions behind it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, fx

from dcafy.find.dataflow import REDUCES, Dataflow, positions
from dcafy.graph.nodes import node_value, tensors_in
from dcafy.graph.ops import Op

RATIOS = (16, 6, 3, 2)
"""How many times smaller than what it reduces G must be; the lower ones are for tiny maps.

At the last one only a reduction of all channels counts: of two, to one (CBAM in 2 channels, a group of 2 in SGE).
"""

POOLED = 64
"""A tensor so many times smaller than X is pooled already: a sum over it belongs to the transformation."""

_KEEPS = frozenset({Op.ADD, Op.MULTIPLY, Op.ELEMENTWISE, Op.GATE, Op.LAYOUT, Op.SLICE, Op.EXPAND, Op.PARAMETRIC})
"""What makes a map of a map of the same size."""

REACH = 128
"""More nodes than any transformation has: a walk this long has strayed into the network."""


@dataclass
class Walk:
    """One walk, and what it has met.

    ``other``      the fusion's large operand, X
    ``maps``       attention maps of earlier blocks, at which a walk ends
    ``frontier``   the reductions at which it ended
    ``between``    the nodes that it passed
    ``local``      whether a frontier only pools over windows, or only is a 1-channel convolution
    ``narrow``     whether a reduction was met that a lower ratio would have let pass
    ``mixed``      whether paths may end at a layer on X, as long as others end at a frontier (ESA of RFDN)
    ``direct``     the layers on X at which such paths ended
    ``spread``     whether a layer was passed that works on what was pooled and spread over the map again
    """

    flow: Dataflow
    ratio: float
    other: fx.Node
    maps: frozenset[fx.Node]
    frontier: set[fx.Node] = field(default_factory=set)
    between: set[fx.Node] = field(default_factory=set)
    local: bool = False
    narrow: bool = False
    mixed: bool = False
    direct: set[fx.Node] = field(default_factory=set)
    spread: bool = False
    verdicts: dict[fx.Node, bool] = field(default_factory=dict)

    def reaches_frontier(self, node: fx.Node, ref: float) -> bool:
        """Whether every path from ``node`` back meets a reduction of something ``ratio`` times ``ref``."""
        if node not in self.flow.depends or (node in self.maps and self.between):
            return True
        if node in self.verdicts:
            return self.verdicts[node]
        if node is self.other or node.op == "placeholder":
            return False
        self.verdicts[node] = False  # no cycles in a graph; this is for re-entry on shared subtrees
        verdict = self._judge(node, min(ref, self.flow.sizes[node]))
        self.verdicts[node] = verdict
        return verdict

    def _judge(self, node: fx.Node, ref: float) -> bool:
        op = self.flow.ops[node]
        inputs = self.flow.inputs(node)
        if not inputs:
            return False
        if op is Op.SLICE and self.flow.ops[inputs[0]] in REDUCES and not isinstance(node_value(inputs[0]), Tensor):
            return self._is_frontier(inputs[0], ref) and self._mark(node)  # max(dim=1)[0]
        if op in REDUCES and self._is_frontier(node, ref):
            return self._mark(node)
        if op is Op.PARAMETRIC:
            return self._through_layer(node, ref, inputs)
        if op is Op.SLICE:  # a slice is no reduction: what is asked for is a reduction to the whole
            ref = max(ref, self.flow.sizes[inputs[0]])
        elif op in (Op.OTHER, *REDUCES) and any(self.flow.sizes[n] != self.flow.sizes[node] for n in inputs):
            largest = max(self.flow.sizes[n] for n in inputs)
            passes = self._is_pooled(largest) or self._mixes_features(node)
            if op is Op.OTHER or (largest > self.ratio * ref and not passes):
                return False
        elif op is Op.QUERY:
            return True
        return self._pass(node, ref, [source for source in inputs if not self.flow.counts(source, node)])

    def _pass(self, node: fx.Node, ref: float, inputs: list[fx.Node]) -> bool:
        self.between.add(node)
        if len(self.between) > REACH:
            return False
        return all(self.reaches_frontier(source, ref) for source in inputs)

    def _mark(self, node: fx.Node) -> bool:
        self.frontier.add(node)
        return True

    def _is_pooled(self, size: int) -> bool:
        return size * POOLED < self.flow.sizes[self.other]

    def _is_full(self, node: fx.Node) -> bool:
        """Whether ``node`` has as much as X in as many places: a full map, no stack of statistics, nothing pooled."""
        if not self._is_large(node):
            return False
        if self._is_spread(node):
            self.spread = self.spread or self.flow.ops[node] is not Op.JOIN
            return False
        return True

    def _is_large(self, node: fx.Node) -> bool:
        return self.flow.sizes[node] >= self.flow.sizes[self.other] and positions(node) >= positions(self.other)

    def _is_spread(self, node: fx.Node) -> bool:
        """Whether ``node`` holds what was expanded or interpolated to X's size, whatever was computed of it since.

        A stack of reductions is as large as X where X is narrow.
        """
        large, pending, steps = False, [node], 0
        while pending:
            node, steps = pending.pop(), steps + 1
            op, sources = self.flow.ops[node], self.flow.inputs(node)
            expanded = op is Op.EXPAND and bool(sources) and not self._is_large(sources[0])
            if expanded or (op is Op.JOIN and all(self._stacks(part) for part in sources)):
                large = True
            elif op is Op.LAYOUT and sources and steps < REACH:  # which may put the channels last, and places elsewhere
                pending += sources
            elif op in _KEEPS and steps < REACH and any(self._is_large(source) for source in sources):
                pending += [source for source in sources if self._is_large(source)]
            else:
                return False
        return large

    def _stacks(self, part: fx.Node) -> bool:
        """Whether ``part`` is a statistic of something larger, in whatever arrangement, a mean by hand too."""
        node = self.flow.core(part)
        while self.flow.ops[node] is Op.ELEMENTWISE and len(self.flow.inputs(node)) == 1:
            node = self.flow.core(self.flow.inputs(node)[0])
        return self.flow.ops[node] in REDUCES and self._is_frontier(node, self.flow.sizes[part])

    def has_layers_of_its_own(self) -> bool:
        """Whether a layer works on what was pooled alone, and paths that end at X bring nothing to it."""
        tainted = set(self.direct)
        for node in sorted(self.between, key=self.flow.order.__getitem__):
            if any(source in tainted for source in self.flow.inputs(node)):
                tainted.add(node)
        layers = self.between - tainted - self.frontier
        return bool(self.direct) and any(self.flow.ops[node] is Op.PARAMETRIC for node in layers)

    def _mixes_features(self, node: fx.Node) -> bool:
        """Scores of a self-attention (features times features); a pooling's weights are far smaller than X."""
        sizes = sorted(self.flow.sizes[n] for n in self.flow.inputs(node))
        return self.flow.ops[node] is Op.CONTRACT and len(sizes) > 1 and sizes[-1] < 2 * sizes[-2]

    def give_back_inner(self) -> None:
        """Reductions that read only what other frontiers yield are steps of the transformation (SGE's mean and std)."""
        met = sorted(self.frontier, key=self.flow.order.__getitem__)
        node, yielded = met[0], {met[0]}
        while node is not met[-1]:
            node = node.next
            sources = self.flow.inputs(node) if node in self.flow.depends else []
            if sources and yielded.issuperset(sources):
                yielded.add(node)
                if node in self.frontier:
                    self.frontier.discard(node)
                    self._pass_back_to_frontier(node)
            elif node in self.frontier:
                yielded.add(node)

    def _pass_back_to_frontier(self, node: fx.Node) -> None:
        pending = [node]
        while pending:
            node = pending.pop()
            if node not in self.between and node not in self.frontier:
                self.between.add(node)
                pending += self.flow.inputs(node)

    def _is_frontier(self, node: fx.Node, ref: float) -> bool:
        """Whether ``node`` reduces a neighbourhood to something of the map's size."""
        largest = max((self.flow.sizes[n] for n in self.flow.inputs(node)), default=0)
        own = max((t.numel() for t in tensors_in(node_value(node))), default=1)
        if node in self.flow.windows:
            return self.flow.windows[node] >= self.ratio
        if largest < 2 * own or self._is_pooled(largest) or self._mixes_features(node):
            return False
        # A sum of windows or branches as large as X (a convolution by unfolding, maxout) gathers no context.
        if own >= self.flow.sizes[self.other] or self._joins_samples(node):
            return False
        if positions(node) == 1 and not self.flow.covers(node):
            return False
        if largest >= max(self.ratio, RATIOS[-2]) * ref or (largest >= self.ratio * ref and self._reduces_all(node)):
            return True
        self.narrow = self.narrow or largest >= RATIOS[-1] * ref
        if self.flow.ops[node] is Op.POOL and own > 1 and positions(node) > 1:
            self.local = True
            return True
        return False

    def _reduces_all(self, node: fx.Node) -> bool:
        """Whether ``node`` makes one of all channels that X has, or that a group of them has; no branches."""
        value, source = node_value(node), node_value(self.flow.inputs(node)[0])
        if isinstance(value, tuple | list):
            value = value[0]
        if not isinstance(source, Tensor) or source.numel() != self.flow.sizes[self.other]:
            return False
        shape, left = tuple(source.shape), tuple(value.shape)
        axes = [
            i for i in range(1, len(shape)) if left in (shape[:i] + shape[i + 1 :], (*shape[:i], 1, *shape[i + 1 :]))
        ]
        return any(axis > 1 or len(shape) <= 4 for axis in axes)

    def _joins_samples(self, node: fx.Node) -> bool:
        """Whether ``node`` reduces the first axis: that of a batch, or of tokens that come first."""
        values = [node_value(n) for n in (node, *self.flow.inputs(node)[:1])]
        shapes = [v.shape for v in values if isinstance(v, Tensor) and v.ndim]
        return len(shapes) == 2 and len(shapes[0]) == len(shapes[1]) and shapes[0][0] == 1 < shapes[1][0]

    def _through_layer(self, node: fx.Node, ref: float, inputs: list[fx.Node]) -> bool:
        """A layer is passed where it works on pooled data; one on the full map ends the walk.

        A convolution to one channel may be the extraction itself (spatial squeeze-excite), where nothing
        behind it reduces.
        """
        full = [n for n in inputs if self._is_full(n)]
        if self.mixed and full and all(n is self.other for n in full):
            self.direct.add(node)
            return self._pass(node, ref, [n for n in inputs if n not in full])
        if not full:
            snapshot = (set(self.frontier), set(self.between), dict(self.verdicts), self.local)
            if self._pass(node, ref, inputs):
                return True
            self.frontier, self.between, self.verdicts, self.local = snapshot
        value, source = node_value(node), node_value(inputs[0])
        ranks = isinstance(value, Tensor) and isinstance(source, Tensor) and value.ndim == source.ndim >= 3
        squeezes = ranks and any(value.shape[i] == 1 < source.shape[i] for i in (1, -1))
        if squeezes and positions(node) > 1 and value.numel() * 2 <= source.numel() <= self.flow.sizes[self.other]:
            self.local = True
            return self._mark(node)
        return False
