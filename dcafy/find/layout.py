"""How G is laid out: what it varies over, where its channels are; and what a message in that layout is.

A dimension answers for its maps (:data:`DIMENSIONS`): how large one is, and which of them can hear which.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dcafy.find.dataflow import Dataflow
from dcafy.graph.nodes import node_value
from dcafy.graph.ops import Op, gate_of, op_name
from dcafy.plan.options import Dimension


@dataclass(frozen=True)
class Layout:
    """``dimension`` of the maps, ``axis`` of G's channels (1, -1 or ``None``), their number, and G's spatial size."""

    dimension: Dimension
    axis: int | None
    channels: int
    size: tuple[int, ...] | None


Extent = tuple[int, "tuple[int, ...] | None"]
"""(channels, size) of a map, as a block has them."""


class Maps:
    """What a dimension knows of its maps: here, of those with one number for each place, or a few.

    ``has_branches``: whether one map for each branch can be passed on.
    """

    has_branches = False

    def extent(self, value: Tensor, axis: int | None) -> Extent | None:
        """The extent of a tensor in the layout of G; ``None`` where it has other axes."""
        if axis is None:
            return 1, tuple(value.shape[1:])
        if value.ndim < 3:
            return None
        shape = (value.shape[-1], *value.shape[1:-1]) if axis == -1 else tuple(value.shape[1:])
        return shape[0], shape[1:]

    def extent_of_map(self, map_: Tensor, context: Tensor, axis: int | None) -> Extent | None:
        """The extent of T itself, passed on as it is; ``None`` where it has other axes than G."""
        return self.extent(map_, axis)

    def is_like(self, map_: Tensor, contexts: Sequence[Tensor], own: Extent, axis: int | None) -> bool:
        """Whether T ⊙ G has a meaning."""
        found = self.extent(map_, axis) if map_.ndim == contexts[0].ndim else None
        return found is not None and found[1] == own[1] and found[0] in (1, own[0])

    def mismatch(self, theirs: Extent, contexts: Sequence[Tensor], ours: Extent) -> str | None:
        """Why a message of ``theirs`` cannot be brought to these extraction outputs; ``None`` where it can."""
        if len({context.ndim for context in contexts}) > 1:
            return _UNLIKE
        (channels, size), (own_channels, own_size) = theirs, ours
        if size is None or own_size is None or len(size) != len(own_size):
            return f"its map {size} and this one {own_size} have different axes"
        if max(own_channels, channels) > _FEW and own_channels != channels and 1 not in (own_channels, channels):
            return f"maps of {channels} and of {own_channels} channels, which only a layer of their own could match"
        if 1 in (*size, *own_size) and size != own_size:
            return f"its map {size} and this one {own_size} are strips of different lengths"
        return None


class _ChannelMaps(Maps):
    """One number for each channel, in any arrangement: layers match any width (paper 3.3)."""

    has_branches = True

    def extent(self, value: Tensor, axis: int | None) -> Extent | None:
        return value[0].numel(), None

    def extent_of_map(self, map_: Tensor, context: Tensor, axis: int | None) -> Extent | None:
        return self.extent(map_, axis) if map_.shape[:1] == context.shape[:1] else None

    def is_like(self, map_: Tensor, contexts: Sequence[Tensor], own: Extent, axis: int | None) -> bool:
        return all(map_.shape[:1] == c.shape[:1] and map_.numel() == c.numel() for c in contexts)

    def mismatch(self, theirs: Extent, contexts: Sequence[Tensor], ours: Extent) -> str | None:
        return _UNLIKE if len({context[0].numel() for context in contexts}) > 1 else None


_UNLIKE = "its extraction yields statistics of different sizes"

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

    def of(self, node: fx.Node) -> Layout:
        """The layout of the extraction output ``node``, read off its shape and what it reduced."""
        shape = tuple(node_value(node).shape)
        wide = [i for i, n in enumerate(shape) if i and n > 1]
        axis = self._axis(node, len(shape), len(wide))
        if len(wide) <= 1 and (len(shape) > 3 or axis is None or axis % len(shape) in (*wide, 0)):
            return Layout("channel", 1, math.prod(shape[1:]), None)
        if axis is not None:
            axis = axis % len(shape)
            size = tuple(n for i, n in enumerate(shape) if i not in (0, axis))
            return Layout("spatial", 1 if axis == 1 else -1, shape[axis], size)
        return Layout("spatial", None, 1, shape[1:])

    def _axis(self, node: fx.Node, rank: int, wide: int) -> int | None:
        """Which axis of G holds the channels of what it reduced, if any does."""
        if op_name(node, self.flow.modules) == "stack" and wide > 1:
            (axis,) = _reduced(node, rank) or {0}
            return axis
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
            if not several and not is_arithmetic(node, self.flow):
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
            if op_name(node, self.flow.modules) in PERMUTES and isinstance(value, Tensor):
                return -1 if _comes_last(node, value) else 1
            sources = [n for n in self.flow.inputs(node) if isinstance(node_value(n), Tensor)]
            same = [n for n in sources if isinstance(value, Tensor) and node_value(n).ndim == value.ndim]
            if not same:
                return 1
            node = max(same, key=lambda n: self.flow.sizes[n])
        return 1


PERMUTES = frozenset({"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"})


def _comes_last(node: fx.Node, value: Tensor) -> bool:
    """Whether the axis after the first, where maps have their channels, is the last one behind a permutation."""
    axes = torch.empty([1, 2, *(1 for _ in value.shape[2:])], device="meta")
    return bool(getattr(axes, op_name(node, {}))(*node.args[1:], **node.kwargs).shape[-1] == 2)


def _reduced(node: fx.Node, rank: int) -> set[int]:
    """The axes that ``node`` reduces, or makes, of so many; none where it does not say."""
    given = node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else ()))
    axes = given if isinstance(given, tuple | list) else (given,)
    return {axis % rank for axis in axes if isinstance(axis, int)}
