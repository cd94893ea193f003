"""The graph edits: in each module that holds a block, G is heard and T is told.

::

    pool = call_module[pool](x)              pool = call_module[pool](x)
    fc = call_module[fc](pool)       ─▶      hear = call_function[hear](dca, 0, pool)
    gate = sigmoid(fc)                       fc = call_module[fc](hear)
    mul = mul(x, gate)                       gate = sigmoid(fc)
                                             tell = call_function[tell](dca, 1, gate, pool)
                                             mul = mul(x, gate)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from dcafy.emit.dca import Connections
from dcafy.emit.ends import Ends, Heard, Line, Port, Told, Wire
from dcafy.emit.wire import behind_layer, hear, tell
from dcafy.emit.wiring import Wiring
from dcafy.find.roles import Found
from dcafy.graph.nodes import values_of
from dcafy.graph.ops import Op, alters_argument, op_of
from dcafy.graph.paths import below, joined
from dcafy.graph.rewritten import Forward, forward_of, hold, original_class, rewrite, taken_forward
from dcafy.graph.rows import rows_of
from dcafy.graph.source import require_writable
from dcafy.graph.usual import Usual, dtypes_of, reads, template
from dcafy.link.message import Message
from dcafy.link.region import Region
from dcafy.link.sites import Site
from dcafy.plan.blocks import Of
from dcafy.trace.fold import Folded


@dataclass(frozen=True)
class Hears:
    """One hearing: of which block, where, through which connection."""

    target: str
    site: Site
    wiring: Wiring
    batch: tuple[bool, ...]
    lines: tuple[tuple[Line, Line | None] | None, ...] = ()
    source: str = ""

    def heard(self, places: dict[int, str]) -> Heard:
        """As a port has it; ``places``: of the module of each wiring."""
        return Heard(self.target, places[id(self.wiring)], self.lines, self.batch, self.source)


@dataclass(frozen=True)
class Tells:
    """What ``of`` a block is told in one module; ``outputs``: which of its extraction outputs each value is of."""

    source: str
    of: Of
    sites: tuple[Site, ...]
    outputs: tuple[int, ...]
    what: Told


@dataclass
class Host:
    """A module that hears or tells, while it is being rewritten. ``path``: as seen from the region."""

    region: Region
    path: str
    repeats: bool
    hears: list[Hears] = field(default_factory=list)
    tells: list[Tells] = field(default_factory=list)
    wires: list[tuple[str, Wiring]] = field(default_factory=list)

    @property
    def is_layer(self) -> bool:
        return any(one.site.layer for one in self.hears) or any(one.sites[0].layer for one in self.tells)

    def rewrite(self, module: nn.Module, wire: Wire, number: int) -> None:
        """Puts the connections under ``module.dca`` and has it run the connected graph."""
        dca, addresses, places = self._dca()
        if self.is_layer:
            what: list[Heard | Told] = [*(one.what for one in self.tells), *(one.heard(places) for one in self.hears)]
            ports = tuple(Port((one,), i == 0) for i, one in enumerate(what))
            forward = Forward(behind=behind_layer)
        else:
            folded = self.region.sites.folded(self.path)
            ports = _Edits(self, folded, places).ports()
            training = self._in_training(places)
            stores = _return_stores([folded] if training is None else [folded, training])
            usual = dataclasses.replace(reads(module, original_class(module), stores), modes=self._modes())
            usual = self._called(usual)
            rows = None if training is None else rows_of(training.graph)
            forward = Forward(rows_of(folded.graph), usual, training=rows, stores=bool(stores))
        dca.ends = Ends(wire, None if self.repeats else wire.counts[number], ports, addresses)  # type: ignore[assignment]
        dca.train(module.training)
        hold(module, "dca", dca)
        if isinstance(module, fx.GraphModule) and not self.is_layer:  # which has a graph, and a class that goes with it
            dca.before = Forward(rows_of(module.graph), None)  # type: ignore[assignment]
            require_writable(folded.graph)
            module.graph = folded.graph
            return
        rewrite(module, dataclasses.replace(forward, own=taken_forward(module), below=forward_of(module)))

    def _called(self, usual: Usual) -> Usual:
        """With what the module was called, and what it asked of torch, in either mode."""
        call, recording, training = self.region.sites.calls(self.path)[0], self.region.recording, None
        if self.path in self.region.trainings:
            training = self.region.trainings[self.path].region.recording
        asked = dict.fromkeys(recording.asked.get(self.path, ()))
        asked.update(dict.fromkeys(() if training is None else training.asked.get("", ())))
        by_dtype = self.path in recording.by_dtype or (training is not None and "" in training.by_dtype)
        if by_dtype:  # what autocast has casted is no argument
            asked.update({("is_autocast_enabled", (kind,), torch.is_autocast_enabled(kind)): None for kind in _DEVICES})
        usual = dataclasses.replace(usual, asked=tuple(asked))
        if call is None:
            return usual
        named = tuple((key, template(value)) for key, value in call.kwargs.items())
        dtypes = dtypes_of(values_of((call.args, tuple(call.kwargs.values())))) if by_dtype else None
        return dataclasses.replace(usual, arguments=template(call.args), named=named, dtypes=dtypes)

    def _modes(self) -> tuple[str, ...]:
        """The parts of the module by whose mode it decides, in either mode of its own."""
        training = self.region.trainings.get(self.path)
        asked = self.region.recording.mode_read.get(self.path, frozenset())
        if training is not None:
            asked |= training.region.recording.mode_read.get("", frozenset())
        return tuple(sorted(asked - {""}))

    def _in_training(self, places: dict[int, str]) -> Folded | None:
        """The connected graph of the module in training, where it decides by its mode; with the same ports."""
        training = self.region.trainings.get(self.path)
        if training is None:
            return None
        sites, same = self.region.sites, training.nodes(self.region)
        first = {block.contexts[0]: name for name, block in ((n, self.region[n]) for n in training.blocks)}
        names = {self.region[name].map: name for name in training.blocks}

        def there(site: Site) -> Site:
            return Site("", 0, same[sites.canonical(site)], returned=site.returned)

        def name_of(found: Found, site: Site) -> str:
            context = sites.canonical(dataclasses.replace(site, node=found.contexts[0]))
            return first.get(context) or names[sites.canonical(dataclasses.replace(site, node=found.map))]

        host = Host(training.region, "", repeats=True)
        seen: set[Any] = set()
        for tells in self.tells:
            nodes = tuple(there(site) for site in tells.sites)
            if nodes not in seen:
                seen.add(nodes)
                host.tells.append(
                    dataclasses.replace(tells, source=name_of(self.region[tells.source], tells.sites[0]), sites=nodes)
                )
        for hears in self.hears:
            name, site = name_of(self.region[hears.target], hears.site), there(hears.site)
            if (name, site) not in seen:
                seen.add((name, site))
                host.hears.append(dataclasses.replace(hears, target=name, site=site))
        folded = training.region.sites.folded("")
        _Edits(host, folded, places).ports()
        return folded

    def _dca(self) -> tuple[nn.Module, tuple[tuple[str, str], ...], dict[int, str]]:
        """``dca``, the address of each connection by name, and the place of each wire's module."""
        places: dict[int, str] = {}
        addresses: list[tuple[str, str]] = []
        targets = list(dict.fromkeys(target for target, _ in self.wires))
        for target, wiring in self.wires:
            several = str(targets.index(target)) if len(targets) > 1 else ""
            places[id(wiring)] = at = joined(several, wiring.suffix)
            addresses += [(name, joined(at, inner)) for name, inner in wiring.names.items()]
        if len(self.wires) == 1 and not self.wires[0][1].suffix:
            return self.wires[0][1].module, tuple(addresses), places
        dca = Connections()
        for _, wiring in self.wires:
            *around, last = places[id(wiring)].split(".")
            parent: nn.Module = dca
            for part in around:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, wiring.module)
        return dca, tuple(addresses), places


_DEVICES = ("cpu", "cuda")


def _return_stores(graphs: list[Folded]) -> set[str]:
    """The attributes that a module stores tensors in, in either mode; its graphs return those as well, if any."""
    stores = {name for folded in graphs for name in folded.stores}
    for folded in graphs if stores else ():
        output = folded.graph.output_node()
        output.args = ((output.args[0], dict(folded.stores)),)
    return stores


class _Edits:
    """The edits of one module's graph."""

    def __init__(self, host: Host, folded: Folded, places: dict[int, str]) -> None:
        self.host = host
        self.sites = host.region.sites
        self.recording = host.region.recording
        self.graph = folded.graph
        self.image = folded.image
        self.inside = folded.inside
        self.places = places
        self.turns = len(self.sites.calls(host.path))
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            self.dca = self.graph.get_attr("dca")
        self._kept: dict[fx.Node, fx.Node] = {}

    def ports(self) -> tuple[Port, ...]:
        """Makes the edits; what happens at each."""
        tells: dict[tuple[fx.Node, ...], dict[int, Tells]] = {}
        for one in self.host.tells:
            nodes = tuple(self.sites.canonical(site) for site in one.sites)
            tells.setdefault(nodes, {})[one.sites[0].turn] = one
        made: list[tuple[fx.Node, list[Heard | Told | None]]] = []
        for nodes, told in tells.items():
            said = {turn: one.what for turn, one in told.items()}
            made.append((self._tell(nodes, tuple(told.values())), self._calls(said)))
        for context, hears in self._by_port():
            what = {turn: one.heard(self.places) for turn, one in hears.items()}
            made.append((self._hear(context, next(iter(hears.values()))), self._calls(what)))
        numbers = {node: number for number, (node, _) in enumerate(made)}
        for node, number in numbers.items():
            node.args = (node.args[0], number, *node.args[2:])
        first = next(node for node in self.graph.nodes if node in numbers)
        self.graph.lint()
        for node in self.graph.nodes:
            node.meta = {}  # values are of the example and of no use to anybody else
        return tuple(Port(tuple(calls), node is first) for node, calls in made)

    def _by_port(self) -> Iterable[tuple[fx.Node, dict[int, Hears]]]:
        """The hearings at each node; blocks that pool with one node hear it one after the other."""
        found: dict[tuple[fx.Node, int], dict[int, Hears]] = {}
        for one in self.host.hears:
            node, place = self.sites.canonical(one.site), 0
            while one.site.turn in found.get((node, place), ()):
                place += 1
            found.setdefault((node, place), {})[one.site.turn] = one
        return [(node, hears) for (node, _), hears in found.items()]

    def _calls(self, what: dict[int, Any]) -> list[Heard | Told | None]:
        return [what.get(turn) for turn in range(1 if self.host.repeats else self.turns)]

    def _hear(self, context: fx.Node, one: Hears) -> fx.Node:
        """G goes through its connection, for all that transforms it."""
        between = self._canonical(self.host.region[one.target].between, one.site)
        own = self.image[context]
        readers = [
            user
            for user in own.users
            if not between.isdisjoint(self.inside.get(user, ())) or (user.op == "output" and one.site.returned)
        ]
        with self.graph.inserting_after(own):
            call = self.graph.call_function(hear, (self.dca, 0, own))
        for reader in readers:
            reader.replace_input_with(own, call)
        return call

    def _canonical(self, nodes: Iterable[fx.Node], site: Site) -> set[fx.Node]:
        return {self._first(site, node) for node in nodes}

    def _first(self, site: Site, node: fx.Node) -> fx.Node:
        return self.sites.canonical(dataclasses.replace(site, node=node))

    def _tell(self, nodes: tuple[fx.Node, ...], calls: tuple[Tells, ...]) -> fx.Node:
        """What a block passes on is told as soon as all of it is there; ``calls``: the same in each call."""
        messages = [self._message(one) for one in calls]
        if messages[0].kind == "fused":
            each_call = zip(*([output for _, output in message.fused] for message in messages), strict=True)
            outputs = [self._unaltered(each, self._first(calls[0].sites[0], each[0])) for each in each_call]
            values = self._extract_again(calls[0], messages[0], outputs)
        else:
            each_call = zip(*([site.node for site in one.sites] for one in calls), strict=True)
            found = self.host.region[calls[0].source]
            maps = {self._first(calls[0].sites[0], node) for node in (found.map, *messages[0].maps)}
            values = tuple(
                self._unaltered(each, node, found.fusions[0] if node in maps else None)
                for node, each in zip(nodes, each_call, strict=True)
            )
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        with self.graph.inserting_after(max(values, key=order.__getitem__)):
            return self.graph.call_function(tell, (self.dca, 0, *values))

    def _message(self, one: Tells) -> Message:
        message = self.host.region.message(one.source, one.of)
        assert isinstance(message, Message)
        return message

    def _unaltered(self, calls: tuple[fx.Node, ...], node: fx.Node, fusion: fx.Node | None = None) -> fx.Node:
        """The image of ``node``, copied where something alters it in place later, be it in one of the ``calls``.

        A map is as the ``fusion`` reads it: what is written into it before that belongs to it.
        """
        image, order = self.image[node], self.recording.order
        if node in self._kept or not any(self._is_altered(one) for one in calls):
            return self._kept.get(node, image)
        until = -1 if fusion is None else order[fusion]
        own = (user for user in self._alterations(node) if order[user] < until and user in self.image)
        with self.graph.inserting_after(self.image[max(own, key=order.__getitem__, default=node)]):
            self._kept[node] = self.graph.call_method("clone", (image,))
        return self._kept[node]

    def _alterations(self, node: fx.Node) -> Iterator[fx.Node]:
        """What alters ``node`` in place, or what shares its memory, after it was made."""
        order, modules = self.recording.order, self.recording.modules
        for alias in self._aliases(node):
            for user in alias.users:
                if order[node] < order[user] and alters_argument(user, modules) and user.args[:1] == (alias,):
                    yield user

    def _is_altered(self, node: fx.Node) -> bool:
        """Whether something alters ``node``, or may where it is handed on to what is not recorded."""
        handed_on = (user.op == "output" for alias in self._aliases(node) for user in alias.users)
        return any(self._alterations(node)) or (bool(self.host.region.path) and any(handed_on))

    def _aliases(self, node: fx.Node) -> set[fx.Node]:
        """Nodes that may share memory with ``node``: what it is a view of, and what is a view of it."""
        same = {node}
        pending = [node]
        while pending:
            current = pending.pop()
            viewed = [n for n in current.all_input_nodes if self._shares(current)]
            for other in (*viewed, *(user for user in current.users if self._shares(user))):
                if other not in same:
                    same.add(other)
                    pending.append(other)
        return same

    def _shares(self, node: fx.Node) -> bool:
        modules = self.recording.modules
        return alters_argument(node, modules) or op_of(node, modules) in (Op.LAYOUT, Op.SLICE, Op.EXPAND)

    def _extract_again(self, one: Tells, message: Message, outputs: list[fx.Node]) -> tuple[fx.Node, ...]:
        """The block's extraction on its fused outputs."""
        site = one.sites[0]
        canonical = functools.partial(self._first, site)
        copies = {source: output for (source, _), output in zip(message.fused, outputs, strict=True)}
        last = next(node for node in reversed(self.graph.nodes) if node in copies.values())
        for node in message.extraction:
            with self.graph.inserting_after(last):
                last = self.graph.node_copy(node, lambda n: copies[n] if n in copies else self._read(n, canonical(n)))
            if node.op == "call_module":
                last.target = below(str(node.target), self.host.path)
            copies[node] = last
        contexts = self.host.region[one.source].contexts
        return tuple(copies[contexts[i]] for i in one.outputs)

    def _read(self, node: fx.Node, canonical: fx.Node) -> fx.Node:
        if canonical in self.image:
            return self.image[canonical]
        assert node.op == "get_attr"
        with self.graph.inserting_before(self.dca):
            self.image[canonical] = self.graph.get_attr(below(str(node.target), self.host.path))
        return self.image[canonical]
