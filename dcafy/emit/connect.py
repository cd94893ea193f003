"""Links -> the connected module: the edits of its graph.

::

    pool = call_module[se.pool](x)              pool = call_module[se.pool](x)
    fc = call_module[se.fc](pool)      ─▶       dca_se = call_module[dca.se](pool, T_prev, G_prev)
    ...                                         fc = call_module[se.fc](dca_se)
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from dcafy.emit.dca import Connections, Recipe
from dcafy.emit.wiring import Wire, wires
from dcafy.find.roles import Found
from dcafy.graph.emitted import EmittedModule
from dcafy.graph.nodes import OWNER
from dcafy.graph.ops import Op, alters_argument, op_of
from dcafy.graph.paths import above, joined
from dcafy.link.message import Message
from dcafy.link.region import Region
from dcafy.plan.blocks import Link, hearing
from dcafy.trace.fold import Folded
from dcafy.wording import warn


def connect(region: Region, links: tuple[Link, ...], host: nn.Module, recipe: Recipe) -> EmittedModule:
    """``host`` (a copy of the module that ``region`` describes) as a graph with these links connected.

    ``links`` have all their settings. Raises ``PlanError`` for a link that no connection can make.
    """
    folded = region.fold(links)
    dca = Connections(recipe)
    into = {target: tuple(heard) for target, heard in hearing(links).items()}
    modules = dict(host.named_modules(remove_duplicate=False))
    made = {target: wires(region, group, _place(region.local(target), modules)) for target, group in into.items()}
    places = {}
    for target in sorted(into, key=lambda target: target.count(".")):
        for wire in made[target]:
            at = joined(region.local(target), wire.suffix)
            places[id(wire)] = dca.add(wire.names, wire.module, at=at)
    passes = _Connecting(region, folded)
    for target in sorted(into, key=lambda target: region.order[region[target].contexts[0]]):
        for wire in made[target]:
            passes.insert(into[target], wire, f"dca.{places[id(wire)]}")
            dca.addresses.update({name: dca.addresses.pop(name) for name in wire.names})  # in the order of the data
    passes.graph.lint()
    for node in passes.graph.nodes:
        node.meta = {OWNER: node.meta.get(OWNER, "")}  # values are of the example and of no use to anybody else
    dca.train(host.training)
    host.add_module("dca", dca)
    dca.bypassed_hooks = tuple(path for path in folded.entered if _has_hooks(host.get_submodule(path)))
    _report_bypassed_hooks(dca)
    return EmittedModule(host, passes.graph, class_name=type(host).__name__)


def _place(name: str, modules: dict[str, nn.Module]) -> dict[str, Any]:
    """Device and dtype of the block's own parameters, or of the nearest around it."""
    path = name.split("#")[0]
    near = (modules[at].parameters() for at in (path, *above(path)) if at in modules)
    first = next((p for parameters in near for p in parameters if p.is_floating_point()), None)
    return {} if first is None else {"device": first.device, "dtype": first.dtype}


class _Connecting:
    """Puts connections into one folded graph."""

    def __init__(self, region: Region, folded: Folded) -> None:
        self.region = region
        self.graph = folded.graph
        self.image = dict(folded.image)
        self.inside = folded.inside
        self.modules = region.recording.modules
        self._kept: dict[fx.Node, fx.Node] = {}
        self._fused: dict[str, tuple[fx.Node, ...]] = {}

    def insert(self, links: tuple[Link, ...], wire: Wire, path: str) -> None:
        """One call of the module per extraction output that it is for."""
        target = self.region[links[0].target]
        for i in wire.contexts:
            context = target.contexts[i]
            messages: tuple[fx.Node | None, ...] = ()
            for link in links:
                messages += self._message(self.region[link.source], i, context)
            own = self.image[context]
            readers = [user for user in own.users if self._transforms(user, target)]
            with self.graph.inserting_after(own):
                call = self.graph.call_module(path, (own, *messages))
            for reader in readers:
                reader.replace_input_with(own, call)

    def _transforms(self, user: fx.Node, target: Found) -> bool:
        return not target.between.isdisjoint(self.inside.get(user, ()))

    def _message(self, source: Found, i: int, reader: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        """(T, G) of the earlier block; (T, ``None``), or its extraction on the fused output in the place of T."""
        message = self.region.messages[source.name]
        assert isinstance(message, Message)
        nearest = min(i, len(source.contexts) - 1)
        if message.kind == "branches":
            return (self._readable(message.maps[i], reader), self._readable(source.contexts[i], reader))
        if message.kind == "fused":
            return (self._extract_again(source, message)[nearest], None)
        if message.kind == "map":
            return (self._readable(source.map, reader), None)
        return (self._readable(source.map, reader), self._readable(source.contexts[nearest], reader))

    def _readable(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        """The image of ``node``, copied where something alters it in place before ``reader`` reads it."""
        image = self._kept.get(node, self.image[node])
        if node in self._kept or not self._altered_between(node, reader):
            return image
        with self.graph.inserting_after(image):
            copied = self.graph.call_method("clone", (image,))
        self._kept[node] = copied
        return copied

    def _altered_between(self, node: fx.Node, reader: fx.Node) -> bool:
        same = self._aliases(node)
        first, last = self.region.order[node], self.region.order[reader]
        return any(
            first < self.region.order[user] < last and alters_argument(user, self.modules) and user.args[:1] == (alias,)
            for alias in same
            for user in alias.users
        )

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
        return alters_argument(node, self.modules) or op_of(node, self.modules) in (Op.LAYOUT, Op.SLICE, Op.EXPAND)

    def _extract_again(self, source: Found, message: Message) -> tuple[fx.Node, ...]:
        """The earlier block's extraction on its fused output, made once for all who hear it."""
        if source.name not in self._fused:
            assert message.source is not None
            assert message.fused_output is not None
            copies = {message.source: self.image[message.fused_output]}
            last = copies[message.source]
            for node in message.extraction:
                with self.graph.inserting_after(last):
                    last = self.graph.node_copy(node, lambda n: copies[n] if n in copies else self.image[n])
                copies[node] = last
            self._fused[source.name] = tuple(copies[c] for c in source.contexts)
        return self._fused[source.name]


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind, None) for kind in kinds)


def _report_bypassed_hooks(dca: Connections) -> None:
    if dca.bypassed_hooks:
        warn(
            f"The connected model computes inside these modules without calling them, so hooks on them no longer "
            f"fire: {', '.join(dca.bypassed_hooks)}. Hook one of their submodules, or the module around them."
        )
