"""Is what a forward decided while it was recorded also true at another batch and image size?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_aggregate, map_arg

from dcafy.connected import OWNER
from dcafy.trace.recorder import Recording
from dcafy.trace.values import Evaluator, node_value

__all__ = ["undecided"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def undecided(
    recording: Recording, evaluator: Evaluator, inputs: Inputs, again: Callable[[Inputs], Recording]
) -> dict[str, str]:
    """Path of a module -> what it decided by the example's batch or image size alone.

    Empty for almost every network: most decisions are about ranks, widths and options. Where a value that
    was asked for does vary, the network is recorded ``again`` at the other size, and the graphs compared: a
    number that only an argument parser looked at is still symbolic in both.
    """
    if not _varies(recording, evaluator, lambda value: _other_image(_other_batch(value))):
        return {}
    for what, change in (("batch", _other_batch), ("image", _other_image)):
        if not _varies(recording, evaluator, change):
            continue
        try:
            other = again((_changed(inputs[0], change), _changed(inputs[1], change)))
        except Exception:  # a network may refuse another size in any way; then nothing else is to be learned
            if what == "batch":
                raise
            continue
        different = _first_difference(recording.graph, other.graph)
        if different is not None:
            owner = str(different.meta.get(OWNER, ""))
            return {owner: f"its forward bakes the {what} size of its input into its computation ({different.name})"}
    return {}


def _varies(recording: Recording, evaluator: Evaluator, change: Callable[[Any], Any]) -> bool:
    """Whether some value that a forward asked for is another one on the changed example."""
    values = _values(recording, evaluator, change)
    return any(node in values and values[node] != node_value(node) for node in recording.settled)


def _values(recording: Recording, evaluator: Evaluator, change: Callable[[Any], Any]) -> dict[fx.Node, Any]:
    """Values of all that the settled nodes depend on, on the changed example; up to the first failure."""
    needed: set[fx.Node] = set()
    pending = list(recording.settled)
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
    modules = dict(recording.model.named_modules())
    values: dict[fx.Node, Any] = {}
    for node in recording.graph.nodes:
        if node not in needed:
            continue
        if node.op == "placeholder":
            values[node] = change(node_value(node))
        elif node.op == "get_attr":
            values[node] = node_value(node)
        else:
            try:
                args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = evaluator.node(node, modules, tuple(args), dict(kwargs))
            except Exception:  # any user code may refuse another size in any way; the caller reads what is there
                return values
    return values


def _first_difference(one: fx.Graph, other: fx.Graph) -> fx.Node | None:
    """The first node of ``one`` that ``other`` does not have in its place."""
    order: dict[fx.Node, int] = {}

    def numbered(value: Any) -> Any:
        return order[value] if isinstance(value, fx.Node) else value

    ours: list[fx.Node] = list(one.nodes)
    theirs: list[fx.Node] = list(other.nodes)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        order[a] = order[b] = i
        written = [(n.op, str(n.target), map_aggregate((n.args, n.kwargs), numbered)) for n in (a, b)]
        if written[0] != written[1]:
            return a
    return None if len(ours) == len(theirs) else ours[min(len(ours), len(theirs)) - 1]


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(_changed(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _changed(item, change) for key, item in value.items()}
    return value


def _other_batch(value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim > 1:
        return value.new_empty((value.shape[0] + 1, *value.shape[1:]))
    return value


def _other_image(value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim > 3:
        return value.new_empty((*value.shape[:2], *(2 * n for n in value.shape[2:])))
    return value
