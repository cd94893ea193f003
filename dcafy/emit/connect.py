"""Links -> the connected model: who hears whom, over which lines, in which modules."""

from __future__ import annotations

import dataclasses
import functools
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from dcafy.emit.dca import Recipe
from dcafy.emit.ends import Before, Told, Wire, wire_of
from dcafy.emit.hosts import Hears, Host, Tells
from dcafy.emit.mixing import Shared
from dcafy.emit.relay import Call, Calls, join
from dcafy.emit.root import open_runs
from dcafy.emit.wiring import Wiring, own_contexts, wires
from dcafy.graph.nodes import node_value
from dcafy.graph.paths import above, joined
from dcafy.graph.rewritten import forward_of
from dcafy.link.message import Message
from dcafy.link.network import Network
from dcafy.link.region import Region
from dcafy.link.sites import Site
from dcafy.link.topology import heard_of
from dcafy.plan.blocks import Alone, Link, Of, hearing


def connect(model: nn.Module, network: Network, recipe: Recipe, example: Any, *, whole: bool) -> None:
    """Connects the links of the recipe's plan in ``model``, a copy of what the network describes.

    ``example``: inputs to write its graph with, where the ``whole`` can be written. Raises ``PlanError`` for a link
    that no connection can make.
    """
    links, below = recipe.plan.links, forward_of(model)
    asked = _Connecting(network, dict(model.named_modules(remove_duplicate=False)))
    for target, heard in sorted(hearing(links).items(), key=lambda item: network.order.index(item[0])):
        asked.hear(target, tuple(heard))
    for one in sorted(recipe.plan.alone, key=lambda one: network.order.index(one.name)):
        asked.alone(one)
    for source, of in dict.fromkeys((link.source, heard_of(link)) for link in links if link.source != link.target):
        asked.tell(source, of)
    wire = wire_of(uuid.uuid4().hex, len(asked.names), len(asked.hosts), _before(network, links, asked.hears))
    asked.rewrite(wire)
    open_runs(model, recipe, wire, example, whole=whole, below=below)
    _hand_on(model, network, links, asked.wired)


@dataclass
class _Connecting:
    """Who is to hear what of whom, in which modules, before any is rewritten.

    ``hosts``     (region, module) -> what it hears and tells
    ``names``     (what is told, who hears it) -> the number of its line
    ``hears``     each hearing in its host, with the numbers of its lines
    ``made``      layers that connections share
    ``wired``     block -> the modules that it is connected by, in the order data meets them
    """

    network: Network
    modules: dict[str, nn.Module]
    hosts: dict[tuple[str, str], Host] = field(default_factory=dict)
    names: dict[tuple[str, str], int] = field(default_factory=dict)
    heard_by: dict[str, list[str]] = field(default_factory=dict)
    hears: list[tuple[Host, Hears, tuple[Numbers, ...]]] = field(default_factory=list)
    told: list[tuple[Host, str, Of, list[tuple[str, Site]]]] = field(default_factory=list)
    made: Shared = field(default_factory=dict)
    wired: list[tuple[str, Wiring]] = field(default_factory=list)

    def host(self, region: Region, site: Site) -> Host:
        key = region.path, site.path
        if key not in self.hosts:
            alike = not self.network.repeats.isdisjoint((region.path, joined(*key)))
            self.hosts[key] = Host(region, site.path, alike)
        return self.hosts[key]

    def hear(self, target: str, heard: tuple[Link, ...]) -> None:
        """A block hears others, or itself, in as many connections as its outputs need."""
        network, region = self.network, self.network.region(target)
        sites = region.hearing(target)
        single = heard[0].source if len(heard) == 1 and heard[0].source != target else ""
        for wiring in wires(network, heard, _place(target, self.modules), self.made):
            self._add(target, wiring, self.host(region, sites[wiring.contexts[0]]))
            for i in wiring.contexts:
                pairs = (None if link.source == target else _source(network, link, i) for link in heard)
                to_here = functools.partial(self._line, f"{target}|{i}")
                numbered = tuple(_changed(pair, to_here) for pair in pairs)
                batch = tuple(_same_batch(network, link, i) for link in heard)
                hears = Hears(target, sites[i], wiring, batch, source=single)
                self.hears.append((self.host(region, sites[i]), hears, numbered))

    def _add(self, name: str, wiring: Wiring, host: Host) -> None:
        """A module that a block is connected by, which may be that of another call of the same part."""
        self.wired.append((name, wiring))
        if all(wiring is not other for _, other in host.wires):
            host.wires.append((name, wiring))

    def alone(self, one: Alone) -> None:
        """A block that hears nobody has an f of its own."""
        region = self.network.region(one.name)
        sites = region.hearing(one.name)
        for wiring in own_contexts(self.network, one, _place(one.name, self.modules), self.made):
            self._add(one.name, wiring, self.host(region, sites[wiring.contexts[0]]))
            self.hears += [
                (self.host(region, sites[i]), Hears(one.name, sites[i], wiring, ()), ()) for i in wiring.contexts
            ]

    def tell(self, source: str, of: Of) -> None:
        """A block tells what somebody hears, in each call of each module where it is made."""
        region = self.network.region(source)
        told: dict[tuple[str, int], list[tuple[str, Site]]] = {}
        for name, site in region.telling(source, of).items():
            if name in self.heard_by:
                told.setdefault((site.path, site.turn), []).append((name, site))
        self.told += [(self.host(region, values[0][1]), source, of, values) for values in told.values()]

    def _line(self, reader: str, name: str) -> int:
        self.heard_by.setdefault(name, []).append(reader)
        return self.names.setdefault((name, reader), len(self.names))

    def rewrite(self, wire: Wire) -> None:
        """Each host hears and tells over ``wire``."""
        for host, hears, numbered in self.hears:
            lines = tuple(_changed(pair, wire.lines.__getitem__) for pair in numbered)
            host.hears.append(dataclasses.replace(hears, lines=lines))
        for host, source, of, values in self.told:
            to = tuple(tuple(wire.lines[self.names[name, who]] for who in self.heard_by[name]) for name, _ in values)
            outputs = tuple(int(name.rpartition("|")[2][1:] or 0) for name, _ in values)
            host.tells.append(Tells(source, of, tuple(site for _, site in values), outputs, Told(source, to)))
        for number, ((path, local), host) in enumerate(self.hosts.items()):
            host.rewrite(self.modules[joined(path, local)], wire, number)


def _hand_on(model: nn.Module, network: Network, links: tuple[Link, ...], made: list[tuple[str, Wiring]]) -> None:
    """Has connections that hand a state on hear that of the block that they hear, each for the same output."""
    relays: dict[str, Any] = {}
    place: dict[tuple[str, int], Call] = {}
    paths: dict[int, str] = {}
    turns: dict[str, int] = {}
    for name, wiring in made:
        if hasattr(wiring.module, "relay"):
            path = paths.setdefault(id(wiring), f"{name}|{wiring.suffix}")
            relays[path] = wiring.module.relay
            for i in wiring.contexts:
                turns[path] = turns.get(path, -1) + 1
                place[name, i] = path, turns[path]
    source = {link.target: link.source for link in links}  # the last one, where several are heard
    calls: dict[str, list[Call | None]] = {path: [] for path in relays}
    for (name, i), (path, _) in place.items():
        calls[path].append(place.get((source[name], min(i, len(network[source[name]].contexts) - 1))))
    repeats = {path for (name, _), (path, _) in place.items() if network.region(name).path in network.repeats}
    if relays:
        join(model, relays, {path: Calls(tuple(heard), path in repeats) for path, heard in calls.items()})


Numbers = tuple[int, "int | None"] | None
"""The lines of a T, and of its G if that is heard too, by their numbers; ``None`` where a block hears itself."""

A = TypeVar("A")
B = TypeVar("B")


def _changed(pair: tuple[A, A | None] | None, change: Callable[[A], B]) -> tuple[B, B | None] | None:
    """What belongs to a T and to its G, changed where it is there."""
    if pair is None:
        return None
    T, G = pair
    return change(T), None if G is None else change(G)


def _before(
    network: Network, links: tuple[Link, ...], asked: Iterable[tuple[Any, Hears, tuple[Numbers, ...]]]
) -> Before:
    """For blocks that may be taken out: who hears them could hear what they heard, which is of the same size."""
    heard, sources = hearing(links), {link.source for link in links}
    found: Before = {}
    for _, hears, numbered in asked:
        if hears.target not in heard:  # it hears nobody
            continue
        (link, *more), pair = heard[hears.target], numbered[0]
        single = pair is not None and not more and heard_of(link) == "message"
        if pair is not None and single and hears.target not in found and hears.target in sources:
            found[hears.target] = (link.source, *pair)
    return {name: row for name, row in found.items() if _size(network, name) == _size(network, row[0])}


def _size(network: Network, source: str) -> tuple[object, ...]:
    """What connections depend on in the messages of a block."""
    message, found = network.message(source), network[source]
    assert isinstance(message, Message)
    single = len(found.contexts) == 1 and message.kind in ("product", "map")
    return message.kind, message.extents, message.kinds, message.axis, found.axis, single or source


def _source(network: Network, link: Link, i: int) -> tuple[str, str | None]:
    """The names of what a target's i-th extraction output hears of a block: (T, G), or what stands for T."""
    message, source = network.message(link.source, of=heard_of(link)), network[link.source]
    assert isinstance(message, Message)
    nearest = min(i, len(source.contexts) - 1)
    if message.kind == "context":
        return f"{source.name}|C{nearest}", None
    if message.kind == "branches":
        return f"{source.name}|T{i}", f"{source.name}|G{i}"
    if message.kind == "fused":
        return f"{source.name}|F{nearest}", None
    return f"{source.name}|T", f"{source.name}|G{nearest}" if message.kind == "product" else None


def _same_batch(network: Network, link: Link, i: int) -> bool:
    T, G = node_value(network[link.source].contexts[0]), node_value(network[link.target].contexts[i])
    return isinstance(T, Tensor) and isinstance(G, Tensor) and T.shape[:1] == G.shape[:1]


def _place(name: str, modules: dict[str, nn.Module]) -> dict[str, Any]:
    """Device and dtype of the block's own parameters, or of the nearest around it."""
    path = name.split("#")[0]
    near = (modules[at].parameters() for at in (path, *above(path)) if at in modules)
    first = next((p for parameters in near for p in parameters if p.is_floating_point()), None)
    return {} if first is None else {"device": first.device, "dtype": first.dtype}
