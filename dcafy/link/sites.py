"""Where in the user's modules a block hears and tells: the module that makes G, the one in which T meets X.

Only a module whose own forward makes the node can hand it on; no module that the user calls is dissolved. What a layer
makes inside a container, whose class stays as it is, is taken behind that layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import fx, nn

from dcafy.find.roles import Found
from dcafy.graph.nodes import leaves
from dcafy.graph.rewritten import CONTAINERS, refusal
from dcafy.link.message import Message
from dcafy.trace.fold import CannotEnter, Folded, fold_call
from dcafy.trace.recorder import is_layer
from dcafy.trace.recording import Call, Recording, passed_through


class NoPlace(Exception):
    """Why a node cannot be heard or told anywhere: the path of the module that it would have to be in, and a reason."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(reason)


@dataclass(frozen=True)
class Site:
    """A node, and the module that hears or tells it.

    ``path``     of the module, as seen from the recording
    ``turn``     in which of its calls
    ``node``     what is heard or told
    ``layer``    the module is a layer, and the node its output
    ``returned`` what hears it is reached by what the module returns, too
    """

    path: str
    turn: int
    node: fx.Node
    layer: bool = False
    returned: bool = False


class Sites:
    """The sites of one recording, and the graphs of the calls that they are in.

    ``trained``: the modules that decide by their mode and have been recorded in training, too
    """

    def __init__(self, recording: Recording, trained: Collection[str] = ()) -> None:
        self.recording = recording
        self._trained = trained
        self._folded: dict[str, Folded | CannotEnter] = {}
        self._layers: dict[nn.Module, list[fx.Node]] = {}
        for node in recording.graph.nodes:
            if node.op == "call_module":
                self._layers.setdefault(recording.modules[str(node.target)], []).append(node)

    def calls(self, path: str) -> tuple[Call | None, ...]:
        """The calls of the module at ``path``; the recorded module itself is called once."""
        return self.recording.calls_of[path] if path else (None,)

    def times(self, site: Site) -> int:
        """How often the module of a site is called."""
        return 1 if site.layer else len(self.calls(site.path))

    def folded(self, path: str) -> Folded:
        """The graph of the module at ``path``; raises :class:`NoPlace` where there is none."""
        if path not in self._folded:
            self._folded[path] = self._fold(path)
        found = self._folded[path]
        if isinstance(found, CannotEnter):
            raise NoPlace(path, found.reason)
        return found

    def _fold(self, path: str) -> Folded | CannotEnter:
        module = self.recording.modules[path]
        reason = refusal(module)
        if reason is not None:
            return CannotEnter({path: reason})
        calls = self.calls(path)
        if any(not _alike(calls[0], other, self.recording) for other in calls[1:]):
            return CannotEnter({path: "it is called several times, and computes something else in each"})
        try:
            return fold_call(self.recording, calls[0], by_mode=path in self._trained)
        except CannotEnter as error:
            return error

    # -- hearing ---------------------------------------------------------------------------------

    def hearing(self, context: fx.Node, between: frozenset[fx.Node]) -> Site:
        """Where ``context``, which is G, is taken for all that transforms it and for nothing else."""
        first: NoPlace | None = None
        below: Call | None = None
        if between.isdisjoint(_readers(context)):
            raise NoPlace(self._path(context), "what it pools is read in a way that no graph shows")
        for call in self._upwards(context):
            try:
                return self._hears(call, below, context, between)
            except NoPlace as error:  # noqa: PERF203 (the next place may do)
                first = first or error
                below = call
        layer = self._layer(context)
        if layer is not None and all(user in between or _asks(user) for user in context.users):
            return layer
        assert first is not None
        raise first

    def _hears(self, call: Call | None, below: Call | None, context: fx.Node, between: frozenset[fx.Node]) -> Site:
        path = call.path if call else ""
        folded = self.folded(path)
        own = set(call.nodes) if call else None
        inner = set(below.nodes) if below else set()
        users = [user for user in _readers(context) if not _asks(user)]
        outside = [user for user in users if own is not None and user not in own]
        apart = [{user in between for user in group} for group in (outside, *self._shared(call, below, context, users))]
        if any(len(kinds) > 1 for kinds in apart) or any(user in inner and user in between for user in users):
            raise NoPlace(path, "what it pools is transformed and used otherwise by one and the same module")
        image = self._canonical(path, call, context)
        if image not in folded.image:
            raise NoPlace(path, "what it pools has no place of its own in its forward")
        return Site(path, self._turn(path, call), context, returned=any(user in between for user in outside))

    def _shared(
        self, call: Call | None, below: Call | None, context: fx.Node, users: list[fx.Node]
    ) -> Iterator[list[fx.Node]]:
        """The readers in each module that is called here."""
        for inner in self.recording.inside.get(call, ()):
            if inner is not below:
                nodes = set(inner.nodes)
                yield [user for user in users if user in nodes]

    # -- telling ---------------------------------------------------------------------------------

    def telling(self, nodes: tuple[fx.Node, ...], fusion: fx.Node) -> tuple[Site, ...]:
        """Where each of ``nodes`` is told: all where T meets X if they can be seen there, else where each is made."""
        try:
            return tuple(self._seen(self.recording.home.get(fusion), node) for node in nodes)
        except NoPlace as error:
            if len(nodes) > 1:
                return tuple(site for node in nodes for site in self.telling((node,), fusion))
            first = error
        for call in self._upwards(nodes[0]):
            try:
                return (self._seen(call, nodes[0]),)
            except NoPlace:  # noqa: PERF203 (the next place may do)
                continue
        layer = self._layer(nodes[0])
        if layer is None:
            raise first
        return (layer,)

    def together(self, nodes: tuple[fx.Node, ...], node: fx.Node) -> tuple[Site, ...]:
        """The sites of ``nodes`` in the module that makes ``node``."""
        return tuple(self._seen(self.recording.home.get(node), one) for one in nodes)

    def _seen(self, call: Call | None, node: fx.Node) -> Site:
        path = call.path if call else ""
        if self._canonical(path, call, node) not in self.folded(path).image:
            raise NoPlace(path, "its attention map is made in a module of its own, which hands on something else")
        return Site(path, self._turn(path, call), node)

    # -- calls -----------------------------------------------------------------------------------

    def canonical(self, site: Site) -> fx.Node:
        """The node that a site's has in the first call of its module."""
        return self._canonical(site.path, self.calls(site.path)[site.turn], site.node)

    def _canonical(self, path: str, call: Call | None, node: fx.Node) -> fx.Node:
        first = self.calls(path)[0]
        if call is first or call is None or first is None:
            return node
        if node in (own := _positions(call)):
            return first.nodes[own[node]]
        given = [leaf for leaf in leaves((call.args, call.kwargs)) if isinstance(leaf, fx.Node)]
        theirs = [leaf for leaf in leaves((first.args, first.kwargs)) if isinstance(leaf, fx.Node)]
        return theirs[given.index(node)] if node in given else node

    def _turn(self, path: str, call: Call | None) -> int:
        return self.calls(path).index(call)

    def _path(self, node: fx.Node) -> str:
        call = self.recording.home.get(node)
        return call.path if call else ""

    def _upwards(self, node: fx.Node) -> Iterator[Call | None]:
        """The call that makes ``node``, and those around it that it is handed on to."""
        call = self.recording.home.get(node)
        yield call
        while call is not None and node in _returned(call):
            call = self.recording.around[call]
            yield call

    def _layer(self, node: fx.Node) -> Site | None:
        """The site behind the layer that makes ``node``, where the layer is called for nothing else."""
        if node.op != "call_module":
            return None
        module = self.recording.modules[str(node.target)]
        single = self._layers[module] == [node] and is_layer(module) and not isinstance(module, CONTAINERS)
        return Site(str(node.target), 0, node, layer=True) if single and refusal(module) is None else None


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads ``node``, also where a module handed it on as it was."""
    for user in node.users:
        if user.target is passed_through:
            yield from _readers(user)
        else:
            yield user


def _asks(user: fx.Node) -> bool:
    """Whether ``user`` asks for a size or a type only."""
    return user.target is getattr or (user.op == "call_method" and user.target in ("size", "dim", "numel"))


def _returned(call: Call) -> set[fx.Node]:
    return {_source(leaf) for leaf in leaves(call.output) if isinstance(leaf, fx.Node)}


def _source(node: fx.Node) -> fx.Node:
    while node.target is passed_through:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _positions(call: Call) -> dict[fx.Node, int]:
    return {node: i for i, node in enumerate(call.nodes)}


def _alike(one: Call | None, other: Call | None, recording: Recording) -> bool:
    """Whether two calls of a module do the same, each with its own inputs."""
    if one is None or other is None:
        return one is other
    if len(one.nodes) != len(other.nodes) or one.kwargs.keys() != other.kwargs.keys():
        return False
    places = [_places(call) for call in (one, other)]
    described = [
        [_described(node.args, known), _described(node.kwargs, known), node.op, _what(node, recording)]
        for call, known in zip((one, other), places, strict=True)
        for node in call.nodes
    ]
    half = len(one.nodes)
    return described[:half] == described[half:]


def _places(call: Call) -> dict[fx.Node, object]:
    known: dict[fx.Node, object] = {node: i for i, node in enumerate(call.nodes)}
    given = [leaf for leaf in leaves((call.args, call.kwargs)) if isinstance(leaf, fx.Node)]
    for i, node in enumerate(given):
        known.setdefault(node, ("given", i))
    return known


def _described(arguments: object, known: dict[fx.Node, object]) -> list[object]:
    return [known.get(leaf, leaf.target) if isinstance(leaf, fx.Node) else leaf for leaf in leaves(arguments)]


def _what(node: fx.Node, recording: Recording) -> object:
    return recording.modules[str(node.target)] if node.op == "call_module" else node.target


def placed(found: Found, message: Message, sites: Sites) -> dict[str, Site]:
    """Name of each value that a block passes on -> where it is told; raises :class:`NoPlace`."""
    name, fusion = found.name, found.fusions[0]
    if message.kind == "context":
        names = [f"{name}|C{i}" for i in range(len(found.contexts))]
        return dict(zip(names, sites.telling(found.contexts, fusion), strict=True))
    if message.kind == "map":
        return dict(zip([f"{name}|T"], sites.telling((found.map,), fusion), strict=True))
    if message.kind == "product":
        names = [f"{name}|T", *(f"{name}|G{i}" for i in range(len(found.contexts)))]
        return dict(zip(names, sites.telling((found.map, *found.contexts), fusion), strict=True))
    if message.kind == "branches":
        names = [f"{name}|{role}{i}" for role in "TG" for i in range(len(found.contexts))]
        return dict(zip(names, sites.telling((*message.maps, *found.contexts), fusion), strict=True))
    sources, needed = [source for source, _ in message.fused], [output for _, output in message.fused]
    last = needed[-1]
    for node in message.extraction:
        needed += [n for n in node.all_input_nodes if n not in message.extraction and n not in sources]
    needed = [node for node in dict.fromkeys(needed) if node.op != "get_attr"]
    own = sites.together(tuple(needed), last)
    for node in message.extraction:
        if node.op == "call_module" and not str(node.target).startswith(f"{own[0].path}." if own[0].path else ""):
            raise NoPlace(own[0].path, "its extraction belongs to another module than its fusion")
    return {f"{name}|F{i}": own[0] for i in range(len(found.contexts))}
