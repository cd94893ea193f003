"""How G is laid out: what it varies over, where its channels are; and what a message in that layout is.

A dimension answers for its maps (:data:`DIMENSIONS`): how large one is, and which of them can hear which.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from dcafy.find.axes import PERMUTES, Axes, Origins, axes_named, extends_over_space, first_shape, puts_channels_last
from dcafy.find.dataflow import Dataflow
from dcafy.graph.nodes import node_value
from dcafy.graph.ops import Op, gate_of, op_name
from dcafy.plan.options import Dimension


@dataclass(frozen=True)
class Layout:
    """``dimension`` of the maps, ``axis`` of G's channels or ``None``, their number, G's spatial size, and its kind."""

    dimension: Dimension
    axis: int | None
    channels: int
    size: tuple[int, ...] | None
    kind: Origins = ()


Extent = tuple[int, "tuple[int, ...] | None"]
"""(channels, size) of a map, as a block has them."""


def widest(extents: Sequence[Extent]) -> Extent:
    """The extent that covers all: strips of rows and of columns have that of the map."""
    sizes = [size for _, size in extents if size is not None]
    return extents[0][0], tuple(max(along) for along in zip(*sizes, strict=True)) if sizes else None


class Maps:
    """What a dimension knows of its maps: here, of those with one number for each place, or a few.

    ``has_branches``: whether one map for each branch can be passed on.
    """

    has_branches = False

    def extent(self, value: Tensor, axis: int | None) -> Extent | None:
        """The extent of a tensor in the layout of G; ``None`` where it has other axes."""
        if axis is None:
            return 1, tuple(value.shape[1:])
        if value.ndim < 3 or not -value.ndim <= axis < value.ndim:
            return None
        shape = tuple(value.movedim(axis, 1).shape[1:])
        return shape[0], shape[1:]

    def extent_of_map(self, map_: Tensor, context: Tensor, axis: int | None) -> Extent | None:
        """The extent of T itself, passed on as it is; ``None`` where it has other axes than G."""
        return self.extent(map_, axis)

    def axis_of_map(self, map_: Tensor, contexts: Sequence[Tensor], axis: int | None) -> list[int | None]:
        """Where T has its channels, if T ⊙ G has a meaning for each G; empty where it has none."""
        return [one for one in dict.fromkeys((axis, 1, -1)) if self._is_like(map_, one, contexts, axis)][:1]

    def _is_like(self, map_: Tensor, map_axis: int | None, contexts: Sequence[Tensor], axis: int | None) -> bool:
        theirs = self.extent(map_, map_axis)
        for context in contexts:
            own = self.extent(context, axis)
            if theirs is None or own is None or theirs[0] not in (1, own[0]) or map_.shape[:1] != context.shape[:1]:
                return False
            sizes = (theirs[1] or (), own[1] or ())
            if len(sizes[0]) != len(sizes[1]) or any(a not in (1, b) for a, b in zip(*sizes, strict=True)):
                return False
        return True

    def are_alike(self, contexts: Sequence[Tensor]) -> bool:
        """Whether one connection can serve all of a block's extraction outputs."""
        return len({context.ndim for context in contexts}) == 1

    def mismatch(self, theirs: Extent, their_kind: Origins, ours: Extent, our_kind: Origins) -> str | None:
        """Why a message of one extent and kind cannot be brought to a G of another; ``None`` where it can."""
        (channels, size), (own_channels, own_size) = theirs, ours
        if size is None or own_size is None or len(size) != len(own_size):
            return f"its map {size} and this one {own_size} have different axes"
        along = zip(size, own_size, their_kind[1:], our_kind[1:], strict=True)
        for n, own, origin, own_origin in along:
            if origin != own_origin and (n != own or n > 1):
                return f"its map {size} and this one {own_size} extend over different axes"
            if n != own and len(origin) > 1:
                return f"its map {size} and this one {own_size} are flattened: pooling would mix their rows"
        if self.needs_layers(channels, own_channels) and their_kind[0] != our_kind[0]:
            return f"maps of {channels} and of {own_channels} channels, which are not of one kind"
        return None

    def needs_layers(self, channels: int, own: int) -> bool:
        """Whether only layers bring maps of so many channels to G's; few are averaged into one."""
        return max(own, channels) > _FEW and own != channels and 1 not in (own, channels)


class _ChannelMaps(Maps):
    """One number for each channel, in any arrangement: layers match any width (paper 3.3)."""

    has_branches = True

    def extent(self, value: Tensor, axis: int | None) -> Extent | None:
        return value[0].numel(), None

    def extent_of_map(self, map_: Tensor, context: Tensor, axis: int | None) -> Extent | None:
        return self.extent(map_, axis) if map_.shape[:1] == context.shape[:1] else None

    def axis_of_map(self, map_: Tensor, contexts: Sequence[Tensor], axis: int | None) -> list[int | None]:
        return [axis] if all(map_.shape[:1] == c.shape[:1] and map_.numel() == c.numel() for c in contexts) else []

    def are_alike(self, contexts: Sequence[Tensor]) -> bool:
        return len({context[0].numel() for context in contexts}) == 1

    def mismatch(self, theirs: Extent, their_kind: Origins, ours: Extent, our_kind: Origins) -> str | None:
        return None

    def needs_layers(self, channels: int, own: int) -> bool:
        return channels != own


_FEW = 4
"""Up to so many channels a map is a stack of descriptors (CBAM's mean and max), not a feature map."""

DIMENSIONS: dict[str, Maps] = {"channel": _ChannelMaps(), "spatial": Maps()}
"""Dimension -> what it knows of its maps."""

_ARITHMETIC = frozenset({Op.ELEMENTWISE, Op.ADD, Op.MULTIPLY, Op.LAYOUT, Op.EXPAND})


def is_arithmetic(node: fx.Node, flow: Dataflow) -> bool:
    """What a quotient of two sums may do to them: flatten, add an epsilon, keep away from 0."""
    floored = flow.ops[node] is Op.GATE and gate_of(node, flow.modules) is None  # clamp(min=...)
    return floored or flow.ops[node] in _ARITHMETIC


class Layouts:
    """Reads layouts off the nodes of one graph."""

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        self.axes = Axes(flow)

    def of(self, node: fx.Node) -> Layout:
        """The layout of the extraction output ``node``, read off its shape and what it reduced."""
        shape = tuple(node_value(node).shape)
        wide = [i for i, n in enumerate(shape) if i and n > 1]
        axis = self._axis(node, len(shape), len(wide))
        origins = self.axes.of(node)
        # What is left of X decides: the mean over channels of a signal [N, C, L] is [N, L], as that over L is [N, C].
        places = len(wide) == 1 and extends_over_space(origins[wide[0] :][:1]) and self.axes.are_sure(node)
        if places and axis is not None and axis % len(shape) in wide:
            axis = next((i for i in (1, len(shape) - 1) if i not in wide), None)
        elif not places and len(wide) <= 1 and (len(shape) > 3 or axis is None or axis % len(shape) in (*wide, 0)):
            return Layout("channel", 1, math.prod(shape[1:]), None)
        if axis is None and len(shape) > 3 and shape[1] == 1:
            axis = 1
        if axis is None:
            return Layout("spatial", None, 1, shape[1:], ("", *origins[1:]))
        axis = axis % len(shape)
        if not origins[axis] and "c" in origins:  # a map over channels and columns (triplet attention)
            axis = origins.index("c")
        others = [i for i in range(1, len(shape)) if i != axis]
        kind = (origins[axis], *(origins[i] for i in others))
        last = axis == len(shape) - 1
        return Layout("spatial", -1 if last else axis, shape[axis], tuple(shape[i] for i in others), kind)

    def _axis(self, node: fx.Node, rank: int, wide: int) -> int | None:
        """Which axis of G holds the channels of what it reduced, if any does."""
        if op_name(node, self.flow.modules) == "stack" and wide > 1:
            (axis,) = axes_named(node, rank) or {0}
            return axis
        reduction = self.reduction(node)
        sources = [n for n in self.flow.inputs(reduction) if isinstance(node_value(n), Tensor)]
        source = max(sources, key=lambda n: self.flow.sizes[n], default=reduction)
        ranks = node_value(source).ndim if isinstance(node_value(source), Tensor) else rank
        if ranks == rank:
            return self._channel_axis(source)
        kept = [i for i in range(ranks) if i not in axes_named(reduction, ranks)]
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

    def reduction(self, node: fx.Node) -> fx.Node:
        """The reduction behind an output of several (``max(1)[0]``), or behind the quotient of a mean by hand."""
        while self.flow.inputs(node):
            source = max(self.flow.inputs(node), key=lambda n: self.flow.sizes[n])
            several = self.flow.ops[node] is Op.SLICE and not isinstance(node_value(source), Tensor)
            if not several and not is_arithmetic(node, self.flow):
                break
            node = source
        return node

    def _channel_axis(self, node: fx.Node) -> int:
        """Where ``node`` has its channels: behind, for what a Linear, LayerNorm or permute made of a map."""
        for _ in range(64):
            if self.flow.ops[node] is Op.PARAMETRIC:
                return -1 if puts_channels_last(op_name(node, self.flow.modules)) else 1
            if op_name(node, self.flow.modules) in PERMUTES:
                return -1 if self.axes.of(node)[-1:] == ("c",) else 1
            rank = len(first_shape(node))
            same = [n for n in self.flow.inputs(node) if rank and len(first_shape(n)) == rank]
            if not same:
                return 1
            node = max(same, key=lambda n: self.flow.sizes[n])
        return 1
