"""The batch of each map: two are of the same samples only if they are of as many at every size of the example.

Frames of clips, crops of images and groups of channels are folded into the batch. Of clips of one frame, and of one
crop of each image, there are as many as before that: so the graph is looked at with other sizes, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_arg

from dcafy.find.axes import first_shape
from dcafy.find.roles import Found
from dcafy.graph.evaluator import Evaluator
from dcafy.graph.nodes import mapped_tensors, node_value, tensors_in
from dcafy.trace.recording import Recording

Batch = tuple["int | None", ...]
"""How many samples a map is of: in the example, and in it at other sizes; ``None`` where it does not run at one."""


def batches(recording: Recording, found: tuple[Found, ...], evaluator: Evaluator) -> dict[str, Batch]:
    """Block name -> its batch."""
    needed, pending = set(), [block.contexts[0] for block in found]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
    nodes = [node for node in recording.graph.nodes if node in needed]
    looks = [_shapes(nodes, recording, evaluator, change) for change in _changes(nodes)] if len(found) > 1 else []
    return {
        block.name: tuple(
            shape[0] if shape else None for shape in (first_shape(node), *(one.get(node) for one in looks))
        )
        for block in found
        for node in block.contexts[:1]
    }


def other_batch(theirs: Batch, ours: Batch) -> str | None:
    """Why maps of one batch cannot be heard by those of another; ``None`` where they are of the same samples."""
    pairs = zip(theirs, ours, strict=False)  # of two recordings, which have sizes of their own, the example's alone
    if all(a == b for a, b in pairs if None not in (a, b)):
        return None
    return "the two are of different batches: of frames, crops or groups of channels, or of some of the samples only"


Change = Callable[[fx.Node, Tensor], tuple[int, ...]]
"""The sizes that a tensor of an input is given."""


def _changes(nodes: list[fx.Node]) -> Iterator[Change]:
    """More samples; more in each input than in the one before it; larger images; longer clips."""
    inputs = [node for node in nodes if node.op == "placeholder" and first_shape(node)]
    yield lambda _, tensor: (tensor.shape[0] + 1, *tensor.shape[1:])
    if len(inputs) > 1:
        yield lambda node, tensor: (tensor.shape[0] + 1 + inputs.index(node), *tensor.shape[1:])
    yield lambda _, tensor: (*tensor.shape[:2], *(2 * n for n in tensor.shape[2:]))
    if any(tensor.ndim > 4 for node in inputs for tensor in tensors_in(node_value(node))):
        yield lambda _, tensor: (*tensor.shape[:1], 2 * tensor.shape[1], *tensor.shape[2:])


def _shapes(
    nodes: list[fx.Node], recording: Recording, evaluator: Evaluator, change: Change
) -> dict[fx.Node, tuple[int, ...]]:
    """The shapes of what is computed of the changed inputs, as far as it can be."""
    values: dict[fx.Node, Any] = {}
    for node in nodes:
        if node.op == "get_attr":
            values[node] = node_value(node)
        elif node.op == "placeholder":
            values[node] = mapped_tensors(node_value(node), functools.partial(_changed, change, node))
        elif all(source in values for source in node.all_input_nodes):
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            try:
                values[node] = evaluator.node(node, recording.modules, tuple(args), dict(kwargs))
            except Exception:  # a network may refuse another size in any way: its batch is not known there
                continue
    tensors = {node: next(tensors_in(value), None) for node, value in values.items()}
    return {node: tuple(tensor.shape) for node, tensor in tensors.items() if tensor is not None}


def _changed(change: Change, node: fx.Node, value: Tensor) -> Tensor:
    return value.new_empty(change(node, value)) if value.ndim else value
