"""Where the axes of a tensor come from: which of them extends over samples, over channels, over rows, over columns."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, fx

from dcafy.find.dataflow import Dataflow
from dcafy.graph.nodes import node_value, tensors_in
from dcafy.graph.ops import Op, op_name

Origins = tuple[str, ...]
"""Per axis what it extends over: ``n`` samples, ``c`` channels, ``0``, ``1``, ``2`` the axes of space, in order.

Several letters are axes that were flattened into one, ``0+1`` strips one after the other; the empty string is an axis
of one place, or one along which statistics were stacked.
"""

_PATTERNS = frozenset({"rearrange", "reduce", "repeat"})
"""What einops does to the axes that a pattern names."""

PERMUTES = frozenset({"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t"})


class Axes:
    """Reads the origins of axes off the nodes of one graph, from the last layer on a full map."""

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        self._known: dict[fx.Node, Origins] = {}
        self._guessed: set[fx.Node] = set()

    def of(self, node: fx.Node) -> Origins:
        """The origin of each axis of what ``node`` yields (of the first, where it yields several)."""
        if node not in self._known:
            shape, path = first_shape(node), []
            source: fx.Node | None = node
            while source is not None and source not in self._known:  # networks are deeper than Python's stack
                path.append(source)
                source = self._source(source)
            for step in reversed(path):
                self._known[step] = self._seen(step)
            assert len(self._known[node]) == len(shape)
        return self._known[node]

    def are_sure(self, node: fx.Node) -> bool:
        """Whether a layer says where the axes of ``node`` come from; else they are those that maps usually have."""
        layer = self._layer(node)
        name = op_name(layer, self.flow.modules).lower() if layer else ""
        if layer is None or not name.startswith(_SURELY_LAST):
            return name.startswith(_SURELY_SECOND)
        given = self.flow.inputs(layer)[0]  # of which it may work along an axis of space (MLP-Mixer)
        return not (extends_over_space(self.of(given)[-1:]) and self._layer(given))

    def _layer(self, node: fx.Node) -> fx.Node | None:
        """The layer whose map ``node`` is, where each step from that map is understood."""
        self.of(node)
        while (source := self._source(node)) is not None:
            if node in self._guessed:
                return None
            node = source
        return node if self.flow.ops[node] is Op.PARAMETRIC and self.flow.inputs(node) else None

    def _source(self, node: fx.Node) -> fx.Node | None:
        """The tensor whose axes ``node`` has, in some way; ``None`` where it makes a map of its own."""
        if self.flow.ops[node] in (Op.PARAMETRIC, Op.OTHER, Op.FRESH) or node not in self.flow.depends:
            return None
        sources = [n for n in self.flow.inputs(node) if first_shape(n)]
        return max(sources, key=lambda n: self.flow.sizes[n], default=None)

    def _seen(self, node: fx.Node) -> Origins:
        source, shape = self._source(node), first_shape(node)
        if source is None:
            return self._made(node, shape)
        origins, given = self._known[source], first_shape(source)
        name, op = op_name(node, self.flow.modules), self.flow.ops[node]
        if name in _PATTERNS and len(node.args) > 1 and isinstance(node.args[1], str):
            origins = _named(node.args[1], origins)
        elif op is Op.LAYOUT and name in PERMUTES and node.op != "call_module":
            origins = _permuted(node, origins)
        elif op is Op.JOIN:
            origins = self._joined(node, name, shape)
        elif op is Op.CONTRACT:
            origins = self._contracted(node, name, shape)
        elif len(given) != len(shape) or (op is Op.LAYOUT and given != shape):
            origins = _kept(node, origins, given, shape) or _regrouped(origins, given, shape) or ()
        if len(origins) == len(shape):
            return _without_single(origins, shape)
        self._guessed.add(node)
        return _usual(shape)

    def _made(self, node: fx.Node, shape: tuple[int, ...]) -> Origins:
        """A layer's map has its channels second, or last behind a Linear and what makes sequences."""
        if len(shape) < 3 or not puts_channels_last(op_name(node, self.flow.modules)):
            return _usual(shape)
        layer = self.flow.modules.get(str(node.target)) if node.op == "call_module" else None
        steps_first = len(shape) == 3 and getattr(layer, "batch_first", True) is False
        return _without_single(("0", "n", "c") if steps_first else ("n", *_space(len(shape) - 2), "c"), shape)

    def _joined(self, node: fx.Node, name: str, shape: tuple[int, ...]) -> Origins:
        parts = [self.of(part) for part in self.flow.inputs(node)]
        axis = next(iter(axes_named(node, len(shape))), 0)
        first = list(parts[0])
        if name == "stack":
            return (*first[:axis], "", *first[axis:])
        along = dict.fromkeys(part[axis] for part in parts if axis < len(part))
        first[axis % len(first)] = "+".join(along) if len(along) > 1 else next(iter(along), "")
        return tuple(first)

    def _contracted(self, node: fx.Node, name: str, shape: tuple[int, ...]) -> Origins:
        operands = [n for n in node.all_input_nodes if first_shape(n)]
        origins = [self.of(n) if n in self.flow.depends else _usual(first_shape(n)) for n in operands]
        if name in ("matmul", "bmm") and len(operands) == 2 and min(map(len, origins)) == len(shape) > 1:
            return (*max(origins, key=len)[:-2], origins[0][-2], origins[1][-1])
        if name == "einsum" and isinstance(node.args[0], str) and "." not in node.args[0]:
            terms, _, result = node.args[0].replace(" ", "").partition("->")
            known = {
                letter: origin
                for term, one in zip(terms.split(","), origins, strict=False)
                for letter, origin in zip(term, one, strict=False)
            }
            return tuple(known.get(letter, "") for letter in result)
        return ()


def first_shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of what ``node`` yields, of the first tensor where it yields several; empty for what is none."""
    value = next(tensors_in(node_value(node)), None)
    return tuple(value.shape) if isinstance(value, Tensor) else ()


_CHANNELS_LAST = frozenset({"layernorm", "layer_norm", "rnn", "lstm", "gru", "multiheadattention", "embedding"})


def puts_channels_last(name: str) -> bool:
    """Whether a layer whose operation has this name yields its channels behind the places."""
    return "linear" in name.lower() or name.lower() in _CHANNELS_LAST


_SURELY_SECOND = ("conv", "lazyconv", "batchnorm", "batch_norm", "groupnorm", "group_norm")
"""How the names of layers begin that have the channels of a map second, whatever it is."""

_SURELY_LAST = ("linear", "rnn", "lstm", "gru", "multiheadattention")
"""How the names of layers begin that have them last."""


def extends_over_space(origins: Origins) -> bool:
    """Whether axes of these origins extend over rows or columns, and over nothing else."""
    return bool("".join(origins)) and "".join(origins).replace("+", "").isdigit()


def _space(axes: int) -> list[str]:
    return [str(i) for i in range(axes)]


def _usual(shape: tuple[int, ...]) -> Origins:
    return _without_single(("n", "c", *_space(len(shape) - 2))[: len(shape)], shape)


def _without_single(origins: Origins, shape: tuple[int, ...]) -> Origins:
    return tuple("" if i and n == 1 else origin for i, (origin, n) in enumerate(zip(origins, shape, strict=True)))


def axes_named(node: fx.Node, rank: int) -> set[int]:
    """The axes that ``node`` is told to reduce or to make, of so many; none where it does not say."""
    given = node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else ()))
    axes = given if isinstance(given, tuple | list) else (given,)
    return {axis % rank for axis in axes if isinstance(axis, int)}


def _permuted(node: fx.Node, origins: Origins) -> Origins:
    order = torch.empty([i + 1 for i in range(len(origins))], device="meta")
    permuted = getattr(order, op_name(node, {}))(*node.args[1:], **node.kwargs)
    return tuple(origins[n - 1] for n in permuted.shape)


def _named(pattern: str, origins: Origins) -> Origins:
    """The axes behind a pattern of einops, such as ``b c h w -> b c (h w)``."""
    before, after = ([axis.strip("() ") for axis in re.findall(r"\([^)]*\)|\S+", side)] for side in pattern.split("->"))
    known = {name: origin for axis, origin in zip(before, origins, strict=False) for name in axis.split()}
    return tuple("".join(dict.fromkeys(known.get(name, "") for name in axis.split())) for axis in after)


def _kept(node: fx.Node, origins: Origins, given: tuple[int, ...], shape: tuple[int, ...]) -> Origins | None:
    """The axes that a reduction to fewer of them leaves."""
    reduced = axes_named(node, len(given)) if len(given) > len(shape) else set()
    left = [i for i in range(len(given)) if i not in reduced]
    return tuple(origins[i] for i in left) if reduced and [given[i] for i in left] == list(shape) else None


def _regrouped(origins: Origins, given: tuple[int, ...], shape: tuple[int, ...]) -> Origins | None:
    """The axes behind a view: those of equal products go together."""
    if math.prod(given) != math.prod(shape):
        return None
    found: list[str] = []
    i = j = 0
    while i < len(given) and j < len(shape):
        start, end = (i, j), (given[i], shape[j])
        i, j = i + 1, j + 1
        while end[0] != end[1]:
            if end[0] < end[1]:
                end, i = (end[0] * given[i], end[1]), i + 1
            else:
                end, j = (end[0], end[1] * shape[j]), j + 1
        found += _shared_out([origin for origin in origins[start[0] : i] if origin], shape[start[1] : j])
    return tuple(found + [""] * (len(shape) - len(found)))


def _shared_out(origins: list[str], sizes: tuple[int, ...]) -> list[str]:
    """The origins of axes of these sizes, which together extend over what those do."""
    wide = [i for i, n in enumerate(sizes) if n > 1] or [0]
    if len(wide) == 1:
        parts = ["".join(origins)]
    elif len(origins) == 1 and len(origins[0]) == len(wide):
        parts = list(origins[0])
    else:
        parts = origins if len(origins) == len(wide) else ["".join(origins)] * len(wide)
    found = [""] * len(sizes)
    for i, part in zip(wide, parts, strict=True):
        found[i] = part
    return found
