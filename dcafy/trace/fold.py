"""Deep recording -> shallow graph: calls in which nothing of interest happens become the module again.

::

    x = placeholder                                   x = placeholder
    conv = call_module[block.conv](x)                 block = call_module[block](x)
    relu = call_function[torch.relu](conv)     ─▶     se_pool = call_module[se.pool](block)
    se_pool = call_module[se.pool](relu)              ...
    ...
"""

from __future__ import annotations

import collections
import inspect
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from dcafy.graph.nodes import OWNER, VALUE, Remake, leaves, node_value
from dcafy.graph.ops import alters_argument
from dcafy.graph.paths import below, joined, outermost, within
from dcafy.trace.recording import Call, Decision, Recording, check_decision, passed_through


class CannotEnter(Exception):
    """Modules have to be entered, and their forwards may not be inlined: path -> the reason."""

    def __init__(self, reasons: dict[str, str]) -> None:
        self.reasons = {path: reasons[path] for path in outermost(reasons)}
        self.path, self.reason = next(iter(self.reasons.items()))
        super().__init__(self.reason)


@dataclass(frozen=True)
class Folded:
    """``graph``: the shallow graph; ``image``: deep node -> its node there; ``inside``: shallow node -> deep nodes.

    ``stores``: attribute of the module -> the node that makes what its forward stores there. ``entered``: the paths of
    the modules inside that are no calls there.
    """

    graph: fx.Graph
    image: dict[fx.Node, fx.Node]
    inside: dict[fx.Node, tuple[fx.Node, ...]]
    stores: dict[str, fx.Node]
    entered: tuple[str, ...] = ()


def fold(recording: Recording, visible: Iterable[fx.Node] = ()) -> Folded:
    """The graph in which only what must be seen is entered; everything else stays the user's module.

    ``visible``: deep nodes that need a node of their own. Raises :class:`CannotEnter` where
    modules that must be entered decide by their mode or store what they compute.
    """
    return _Fold(recording, frozenset(visible)).run()


def fold_call(recording: Recording, call: Call | None, *, by_mode: bool = False) -> Folded:
    """The graph of one call: what its module's own forward does, with what it calls as its own submodules.

    ``None``: the call of the recorded module itself. ``by_mode``: it may decide by its mode. Raises
    :class:`CannotEnter` where the forward cannot be written down on its own.
    """
    made = _Fold(recording, frozenset()) if call is None else _Slice(recording, call)
    made.by_mode, made.alone = by_mode, True
    return made.run()


class _Fold:
    path = ""
    call: Call | None = None
    by_mode = alone = False

    def __init__(self, recording: Recording, visible: frozenset[fx.Node]) -> None:
        self.recording = recording
        self.visible = visible
        self.modules = recording.modules
        self.graph = fx.Graph()
        self.graph._graph_namespace.create_name("self", None)  # which is the module: a node may not be called so
        self.image: dict[fx.Node, fx.Node] = {}
        self.inside: dict[fx.Node, tuple[fx.Node, ...]] = {}

    @property
    def stores(self) -> dict[str, fx.Node]:
        """What a module that is folded on its own stores as attributes."""
        return self.recording.stores.get(self.path, {}) if self.alone else {}

    def run(self) -> Folded:
        """The folded graph; one module's own raises where a module inside would have to be entered."""
        folds, entered = self._plan()
        if self.alone and entered:
            raise CannotEnter({entered[0]: "what it computes is used outside of it, past what it returns"})
        held: dict[fx.Node, list[Decision]] = {}
        for decision in self.recording.held:
            held.setdefault(decision.node, []).append(decision)
        self._begin()
        skipped: set[fx.Node] = set()
        for node in self._nodes():
            if node in folds:
                call = folds[node]
                self._call(call)
                skipped.update(call.nodes)
            if node in skipped:
                continue
            if node.target is passed_through:
                self.image[node] = self._image(node.all_input_nodes[0])
                continue
            copied = self._copy(node)
            self.image[node] = copied
            self.inside[copied] = (node,)
            for decision in held.get(node, ()):
                owner = str(node.meta.get(OWNER) or type(self.recording.model).__name__)
                check = self.graph.call_function(check_decision, (copied, decision.answer, owner))
                check.meta[OWNER] = node.meta.get(OWNER, "")
        self._end()
        _drop_unused_queries(self.graph, self.image)
        if not self.image.keys() >= {*self.stores.values()}:
            raise CannotEnter({self.path: self.recording.unwritten[self.path]})
        stores = {name: self.image[node] for name, node in self.stores.items()}
        return Folded(self.graph, self.image, self.inside, stores, entered)

    def _nodes(self) -> Iterable[fx.Node]:
        return self.recording.graph.nodes

    def _begin(self) -> None:
        """What stands before the nodes; the root's placeholders are among them."""

    def _end(self) -> None:
        """What stands behind them."""

    def _image(self, node: fx.Node) -> fx.Node:
        return self.image[node]

    def _copy(self, node: fx.Node) -> fx.Node:
        return self.graph.node_copy(node, self._image)

    def _plan(self) -> tuple[dict[fx.Node, Call], tuple[str, ...]]:
        """First node -> the call that is folded there; and the paths that are entered."""
        folds: dict[fx.Node, Call] = {}
        entered: dict[str, None] = {}
        refused = dict(self._refusal(self.path))
        pending = list(reversed(self.recording.inside.get(self.call, ())))
        while pending:
            call = pending.pop()
            if self._can_fold(call):
                folds[call.nodes[0]] = call
            else:
                refused.update(self._refusal(call.path))
                entered[call.path] = None
                pending += reversed(self.recording.inside.get(call, ()))
        if refused:
            raise CannotEnter(refused)
        return folds, tuple(entered)

    def _refusal(self, path: str) -> Iterator[tuple[str, str]]:
        """Why a module may not be entered, if there is a reason."""
        if path in self.recording.mode_read and not (self.by_mode and path == self.path):
            yield path, self.recording.unwritten.get(path, "its forward takes another path in training than in eval")
        elif path in self.recording.unwritten and not (self.alone and path == self.path and self.stores):
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
        # What it hears of another module, no argument brings it.
        given = {leaf for leaf in leaves((call.args, call.kwargs)) if isinstance(leaf, fx.Node)}
        given.update(held for leaf in tuple(given) if _makes(leaf) for held in leaf.all_input_nodes)
        for node in call.nodes:
            for source in node.all_input_nodes:
                if source not in nodes and source not in given and not _is_own(source):
                    return False
        return True

    def _base(self, node: fx.Node) -> fx.Node:
        """The tensor that a chain of in-place operations works on."""
        while alters_argument(node, self.modules) and node.args and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        return node

    def _call(self, call: Call) -> None:
        args = map_arg(call.args, self._image)
        kwargs = map_arg(call.kwargs, self._image)
        node = self.graph.call_module(self._local(call.path), args, kwargs)
        node.meta[VALUE] = map_arg(call.output, node_value)
        self.inside[node] = tuple(call.nodes)
        self._bind(call.output, node)
        for inner in call.nodes:
            base = self._base(inner)
            if inner not in self.image and base in self.image:
                self.image[inner] = self.image[base]

    def _local(self, path: str) -> str:
        return path

    def _bind(self, output: Any, node: fx.Node) -> None:
        """The nodes of a folded call's output, as items of its result."""
        if isinstance(output, fx.Node):
            self.image.setdefault(output, node)
            return
        for key, item in _items(output):
            if any(isinstance(leaf, fx.Node) for leaf in leaves(item)):
                part = self.graph.call_function(operator.getitem, (node, key))
                self._bind(item, part)


class _Slice(_Fold):
    """The graph of one call below the root."""

    def __init__(self, recording: Recording, call: Call) -> None:
        super().__init__(recording, frozenset())
        self.call = call
        self.path = call.path
        self.host = recording.modules[call.path]

    def _nodes(self) -> Iterable[fx.Node]:
        assert self.call is not None
        return self.call.nodes

    def _begin(self) -> None:
        assert self.call is not None
        if self.call.record:
            raise CannotEnter({self.path: "it returns a container of a class of its own"})
        names = iter(inspect.signature(self.host.forward).parameters.values())
        given = [*enumerate(self.call.args), *self.call.kwargs.items()]
        parameter = None
        for key, value in given:
            name = str(key)
            if isinstance(key, int):
                if parameter is None or parameter.kind is not parameter.VAR_POSITIONAL:
                    parameter = next(names)
                several = parameter.kind is parameter.VAR_POSITIONAL
                name = f"{parameter.name}_{key}" if several else parameter.name
            self._bind(value, self.graph.placeholder(name))

    def _end(self) -> None:
        assert self.call is not None
        self.graph.output(map_arg(self.call.output, self._image))

    def _image(self, node: fx.Node) -> fx.Node:
        if node not in self.image:
            if not _is_own(node):
                raise CannotEnter({self.path: f"its forward reads what another made ({node.name})"})
            read = [self._image(source) for source in node.all_input_nodes]
            first = next(iter(self.graph.nodes))
            with self.graph.inserting_after(read[0]) if read else self.graph.inserting_before(first):
                self.image[node] = self._copy(node)
        return self.image[node]

    def _copy(self, node: fx.Node) -> fx.Node:
        """As the module sees it, and named by that: modules of one class and code are to have one source."""
        args, kwargs = map_arg((node.args, node.kwargs), self._image)
        copied = self.graph.create_node(node.op, self._target(node), args, kwargs)
        copied.meta = dict(node.meta)
        return copied

    def _target(self, node: fx.Node) -> Any:
        """Where what the node calls or reads is, as seen from the module."""
        if node.op == "call_module":
            return self._local(str(node.target))
        if node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            if path in self.modules and within(path, self.path):
                return joined(self._local(path), name)
            return self._tied(str(node.target))
        return node.target

    def _local(self, path: str) -> str:
        if within(path, self.path):
            return below(path, self.path)
        for local, module in self.host.named_modules(remove_duplicate=False):
            if module is self.modules[path]:
                return str(local)
        raise CannotEnter({self.path: f"its forward calls {path}, which is no submodule of it"})

    def _tied(self, target: str) -> str:
        """The name, inside the module, of a tensor that the recording knows by another module's."""
        owner, _, name = target.rpartition(".")
        tensor = getattr(self.modules[owner], name, None)
        for local, module in self.host.named_modules(remove_duplicate=False):
            for own, value in (*module._parameters.items(), *module._buffers.items()):
                if value is tensor and tensor is not None:
                    return joined(local, own)
        raise CannotEnter({self.path: f"its forward reads {target}, which is not its own"})


def _is_own(node: fx.Node) -> bool:
    """Whether ``node`` reads what a module has, or an item of a list or dictionary that it has."""
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.op == "get_attr"


def _items(output: Any) -> Iterable[tuple[Any, Any]]:
    """What can be taken out of a module's output, by key or index."""
    if isinstance(output, dict):
        return output.items()
    return enumerate(output) if isinstance(output, tuple | list) else ()


def _makes(node: fx.Node) -> bool:
    """Whether ``node`` makes a container, whose items are at hand without it."""
    return node.op == "call_function" and (node.target is collections.OrderedDict or isinstance(node.target, Remake))


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
