"""Is what a forward decided while it was recorded also true at another batch and image size?"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_arg

from dcafy.trace.recorder import OWNER, Recording
from dcafy.trace.values import Evaluator, node_value

__all__ = ["undecided"]


def undecided(recording: Recording, evaluator: Evaluator) -> dict[str, str]:
    """Path of a module -> what it decided by the example's batch or image size alone.

    Empty for almost every network: most decisions are about ranks, widths and options.
    """
    found: dict[str, str] = {}
    if not recording.settled:
        return found
    for what, change in (("batch", _other_batch), ("image", _other_image)):
        values = _values(recording, evaluator, change)
        for node in recording.settled:
            # At an image size that the network itself refuses, nothing was learned about it.
            if node in values and values[node] != node_value(node):
                found.setdefault(str(node.meta.get(OWNER, "")), f"its forward decides by the {what} size ({node.name})")
    return found


def _values(recording: Recording, evaluator: Evaluator, change: Any) -> dict[fx.Node, Any]:
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


def _other_batch(value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim > 1:
        return value.new_empty((value.shape[0] + 1, *value.shape[1:]))
    return value


def _other_image(value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim > 3:
        return value.new_empty((*value.shape[:2], *(2 * n for n in value.shape[2:])))
    return value
