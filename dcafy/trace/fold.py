"""Deep recording -> shallow graph: calls in which nothing of interest happens become the module again.

::

    x = placeholder                                   x = placeholder
    conv = call_module[block.conv](x)                 block = call_module[block](x)
    relu = call_function[torch.relu](conv)     ─▶     se_pool = call_module[se.pool](block)
    se_pool = call_module[se.pool](relu)              ...
    ...
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from dcafy.graph.nodes import OWNER, VALUE, leaves, node_value
from dcafy.graph.ops import alters_argument
from dcafy.graph.paths import outermost
from dcafy.trace.recording import Call, Decision, Recording, check_decision, passed_through


class CannotEnter(Exception):
    """Modules have to be entered, and their forwards may not be inlined: path -> the reason."""

    def __init__(self, reasons: dict[str, str]) -> None:
        self.reasons = {path: reasons[path] for path in outermost(reasons)}
        self.path, self.reason = next(iter(self.reasons.items()))
        super().__init__(self.reason)


@dataclass(frozen=True)
class Folded:
    """``graph``: the shallow graph; ``image``: deep node -> its node there; ``inside``: shallow node -> deep nodes."""

    graph: fx.Graph
    image: dict[fx.Node, fx.Node]
    inside: dict[fx.Node, tuple[fx.Node, ...]]
    entered: tuple[str, ...]


def fold(
    recording: Recording, visible: Iterable[fx.Node], apart: Iterable[tuple[fx.Node, frozenset[fx.Node]]] = ()
) -> Folded:
    """The graph in which only what must be seen is entered; everything else stays the user's module.

    ``visible``: deep nodes that need a node of their own. ``apart``: (node, users): in the result these users
    of the node must not share a call with other users of it. Raises :class:`CannotEnter` where
    modules that must be entered decide by their mode or store what they compute.
    """
    return _Fold(recording, frozenset(visible), tuple(apart)).run()


class _Fold:
    def __init__(
        self, recording: Recording, visible: frozenset[fx.Node], apart: tuple[tuple[fx.Node, frozenset[fx.Node]], ...]
    ) -> None:
        self.recording = recording
        self.visible = visible
        self.apart = apart
        self.modules = recording.modules
        self.graph = fx.Graph()
        self.image: dict[fx.Node, fx.Node] = {}
        self.inside: dict[fx.Node, tuple[fx.Node, ...]] = {}

    def run(self) -> Folded:
        folds, entered = self._plan()
        held: dict[fx.Node, list[Decision]] = {}
        for decision in self.recording.held:
            held.setdefault(decision.node, []).append(decision)
        skipped: set[fx.Node] = set()
        for node in self.recording.graph.nodes:
            if node in folds:
                call = folds[node]
                self._call(call)
                skipped.update(call.nodes)
            if node in skipped:
                continue
            if node.target is passed_through:
                self.image[node] = self.image[node.args[0]]
                continue
            copied = self.graph.node_copy(node, self.image.__getitem__)
            self.image[node] = copied
            self.inside[copied] = (node,)
            for decision in held.get(node, ()):
                owner = str(node.meta.get(OWNER) or type(self.recording.model).__name__)
                check = self.graph.call_function(check_decision, (copied, decision.answer, owner))
                check.meta[OWNER] = node.meta.get(OWNER, "")
        _drop_unused_queries(self.graph, self.image)
        return Folded(self.graph, self.image, self.inside, entered)

    def _plan(self) -> tuple[dict[fx.Node, Call], tuple[str, ...]]:
        """First node -> the call that is folded there; and the paths that are entered."""
        order = {node: i for i, node in enumerate(self.recording.graph.nodes)}
        folds: dict[fx.Node, Call] = {}
        entered: dict[str, None] = {}
        end = -1
        refused = dict(self._refusal(""))
        for call in self.recording.calls:
            if not call.nodes or order[call.nodes[0]] <= end:
                continue
            if self._can_fold(call):
                folds[call.nodes[0]] = call
                end = order[call.nodes[-1]]
            else:
                refused.update(self._refusal(call.path))
                entered[call.path] = None
        if refused:
            raise CannotEnter(refused)
        return folds, tuple(entered)

    def _refusal(self, path: str) -> Iterator[tuple[str, str]]:
        """Why a module may not be entered, if there is a reason."""
        if path in self.recording.mode_read:
            yield path, "its forward takes another path in training than in eval"
        elif path in self.recording.unwritten:
            yield path, self.recording.unwritten[path]

    def _can_fold(self, call: Call) -> bool:
        nodes = set(call.nodes)
        if not self.visible.isdisjoint(nodes) or not _foldable(call.output):
            return False
        outputs = {leaf for leaf in leaves(call.output) if isinstance(leaf, fx.Node)}
        for node in call.nodes:
            # What the call altered in place and did not return is still the caller's own tensor.
            own = node not in outputs and self._base(node) in nodes
            if own and any(user not in nodes for user in node.users):
                return False
        for node, users in self.apart:
            inner = {user for user in node.users if user in nodes}
            if node not in nodes and inner & users and inner - users:
                return False
        return True

    def _base(self, node: fx.Node) -> fx.Node:
        """The tensor that a chain of in-place operations works on."""
        while alters_argument(node, self.modules) and node.args and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        return node

    def _call(self, call: Call) -> None:
        args = map_arg(call.args, self.image.__getitem__)
        kwargs = map_arg(call.kwargs, self.image.__getitem__)
        node = self.graph.call_module(call.path, args, kwargs)
        node.meta[VALUE] = map_arg(call.output, node_value)
        self.inside[node] = tuple(call.nodes)
        self._bind(call.output, node)
        for inner in call.nodes:
            base = self._base(inner)
            if inner not in self.image and base in self.image:
                self.image[inner] = self.image[base]

    def _bind(self, output: Any, node: fx.Node) -> None:
        """The nodes of a folded call's output, as items of its result."""
        if isinstance(output, fx.Node):
            self.image.setdefault(output, node)
            return
        for key, item in _items(output):
            if any(isinstance(leaf, fx.Node) for leaf in leaves(item)):
                part = self.graph.call_function(operator.getitem, (node, key))
                self._bind(item, part)


def _items(output: Any) -> Iterable[tuple[Any, Any]]:
    """What can be taken out of a module's output, by key or index."""
    if isinstance(output, dict):
        return output.items()
    return enumerate(output) if isinstance(output, tuple | list) else ()


def _foldable(output: Any) -> bool:
    if isinstance(output, dict | tuple | list):
        return all(_foldable(item) for _, item in _items(output))
    return isinstance(output, fx.Node | int | float | str | bool | type(None))


_QUERIES = frozenset({getattr, operator.getitem})


def _drop_unused_queries(graph: fx.Graph, image: dict[fx.Node, fx.Node]) -> None:
    """Shape questions that only folded modules asked are asked no more."""
    for node in reversed(graph.nodes):
        query = node.op == "get_attr" or (node.op == "call_function" and node.target in _QUERIES)
        query = query or (node.op == "call_method" and node.target in ("size", "dim", "numel"))
        if query and not node.users:
            graph.erase_node(node)
    alive = set(graph.nodes)
    for deep in [deep for deep, shallow in image.items() if shallow not in alive]:
        del image[deep]
