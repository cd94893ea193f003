"""Is what a forward decided while it was recorded also true at another batch and image size?"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate, map_arg

from dcafy.graph.evaluator import Evaluator
from dcafy.graph.nodes import behind, mapped_tensors, node_value
from dcafy.graph.paths import within
from dcafy.trace.fold import CannotEnter
from dcafy.trace.recording import Decision, Observed, Recording


def held(
    recording: Recording,
    evaluator: Evaluator,
    inputs: Observed,
    again: Callable[[Observed], Recording],
    only: Collection[str] | None = None,
) -> tuple[Decision, ...]:
    """The decisions that went the same way at every size tried, though sizes of the input are asked.

    ``only``: the paths of the modules whose decisions count.
    Raises ``CannotEnter`` where modules decided by the example's batch or image size alone.

    Most are about ranks, widths and options. Where one goes another way, the network is recorded ``again`` at the
    other size, and the graphs compared: a number that only an argument parser looked at is still symbolic in both.
    What ``if h % 8:`` was told is the same at twice the size, and yet not at every one: that is held.
    """
    settled = tuple(d for d in recording.settled if only is None or d.asker in only)
    if not settled:
        return ()
    at_both = _values(recording, evaluator, lambda value: _other_image(_other_batch(value)))
    everywhere = all(decision.node in at_both for decision in settled)
    if everywhere and not any(_asks_sizes(decision.node, at_both) for decision in settled):
        return ()
    looks = [(what, change, _values(recording, evaluator, change)) for what, change in _CHANGES]
    by_size = tuple(d for d in settled if any(_asks_sizes(d.node, values) for *_, values in looks))
    changed: set[Decision] = set()
    elsewhere: set[Decision] = set()
    for what, change, values in looks:
        other_way = {d for d in by_size if d.node in values and d.ask(values[d.node]) != d.answer}
        if not other_way:
            continue
        changed |= other_way
        try:
            other = again(Observed(*mapped_tensors((inputs.args, inputs.kwargs), change)))
        except Exception:  # a network may refuse another size in any way; then nothing else is to be learned
            if change is _other_batch:
                raise
            continue
        differences = _differences(recording, other)
        if change is _other_image:  # whoever goes another way there shows nothing of how the recorded way goes
            turned = _turned(settled, other)
            elsewhere.update(turned.values())
            differences = {path: node for path, node in differences.items() if path not in turned}
        baked = _innermost({path: node for path, node in differences.items() if only is None or path in only})
        if baked:
            why = f"its forward bakes the {what} size of its input into its computation"
            raise CannotEnter({path: f"{why} ({node.name})" for path, node in baked.items()})
    return tuple(d for d in settled if d in elsewhere or (d in by_size and d not in changed))


def _turned(settled: tuple[Decision, ...], other: Recording) -> dict[str, Decision]:
    """Those who were told otherwise in the other recording, each with the first such question."""
    turned: dict[str, Decision] = {}
    for asker in dict.fromkeys(decision.asker for decision in settled):
        ours, theirs = ([d for d in all_ if d.asker == asker] for all_ in (settled, other.settled))
        first = next((d for d, e in zip(ours, theirs, strict=False) if d.answer != e.answer), None)
        if first is not None and isinstance(first.answer, bool):
            turned[asker] = first
    return turned


def _asks_sizes(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    """Whether any number behind ``node`` is another one among ``values``, which were computed at another size."""
    # Which of the sizes was taken is what counts, not the others.
    asked = behind(node, past=lambda one: one.target is not operator.getitem)
    return any(one in values and values[one] != node_value(one) for one in asked)


def _values(recording: Recording, evaluator: Evaluator, change: Callable[[Any], Any]) -> dict[fx.Node, Any]:
    """Values of all that decisions depend on, on the changed example; up to the first failure."""
    needed: set[fx.Node] = set()
    pending = [decision.node for decision in recording.settled]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
    modules = recording.modules
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


_Key = tuple[str, int]
"""One entered call: the module's path, and how many times it had been called before."""


def _differences(one: Recording, other: Recording) -> dict[str, fx.Node]:
    """Path of a module -> the first node of its own in which one of its calls differs between the recordings.

    A call is compared by its own steps, with those of the calls inside it left out: so one that follows
    another decision is not blamed for it.
    """
    (ours, our_places), (theirs, their_places) = _steps(one), _steps(other)
    common = [key for key in ours if key in theirs]
    changed: dict[_Key, fx.Node] = {}
    for key in common:
        pairs = list(zip(ours[key], theirs[key], strict=False))
        first = next((a for (said, a), (wanted, _) in pairs if said != wanted), None)
        if first is None and len(ours[key]) != len(theirs[key]):
            first = ours[key][min(len(pairs), len(ours[key]) - 1)][1]
        if first is not None:
            changed[key] = first
    for key in [key for key in common if key not in changed]:
        for (_, a), (_, b) in zip(ours[key], theirs[key], strict=True):
            if any(our_places[source][0] in changed for source in a.all_input_nodes):
                continue
            left = map_aggregate((a.args, a.kwargs), lambda v: our_places[v] if isinstance(v, fx.Node) else v)
            right = map_aggregate((b.args, b.kwargs), lambda v: their_places[v] if isinstance(v, fx.Node) else v)
            if left != right:
                changed[key] = a
                break
    paths: dict[str, fx.Node] = {}
    for (path, _), node in changed.items():
        paths.setdefault(path, node)
    return paths


def _steps(recording: Recording) -> tuple[dict[_Key, list[tuple[Any, fx.Node]]], dict[fx.Node, tuple[_Key, int]]]:
    """What each call does itself, in order, with the calls that it makes as one step; and where each node stands."""
    home: dict[fx.Node, _Key] = {}
    starts: dict[fx.Node, list[tuple[_Key, _Key]]] = {}
    times: dict[str, int] = {}
    root: _Key = ("", 0)
    for call in recording.calls:
        if not call.nodes:
            continue
        times[call.path] = times.get(call.path, 0) + 1
        key = (call.path, times[call.path])
        starts.setdefault(call.nodes[0], []).append((home.get(call.nodes[0], root), key))
        home.update(dict.fromkeys(call.nodes, key))
    steps: dict[_Key, list[tuple[Any, fx.Node]]] = {root: []}
    places: dict[fx.Node, tuple[_Key, int]] = {}
    for node in recording.graph.nodes:
        for outer, inner in starts.get(node, ()):
            steps.setdefault(outer, []).append((("call", inner[0]), node))
        own = steps.setdefault(home.get(node, root), [])
        places[node] = (home.get(node, root), len(own))
        own.append(((node.op, str(node.target)), node))
    return steps, places


def _innermost(paths: dict[str, fx.Node]) -> dict[str, fx.Node]:
    """Without modules around others: what those do may only follow from what these hand them."""
    return {
        path: node for path, node in paths.items() if not any(other != path and within(other, path) for other in paths)
    }


def _resized(least_rank: int, sizes: Callable[[torch.Size], tuple[int, ...]]) -> Callable[[Any], Any]:
    """What gives a tensor of at least that rank other sizes, and leaves everything else as it is."""

    def change(value: Any) -> Any:
        fits = isinstance(value, Tensor) and value.ndim >= least_rank
        return value.new_empty(sizes(value.shape)) if fits else value

    return change


_other_batch = _resized(2, lambda shape: (shape[0] + 1, *shape[1:]))
_single = _resized(2, lambda shape: (1, *shape[1:]))  # a batch of one image, which many a forward treats by itself
_other_image = _resized(3, lambda shape: (*shape[:2], *(2 * n for n in shape[2:])))

OTHER_SIZES = (_other_batch, _other_image)
"""What gives an example another batch, and another image size."""

_CHANGES = (("batch", _other_batch), ("batch", _single), ("image", _other_image))
"""What is changed for a look at other sizes, in this order."""
