"""Plan -> GraphModule: connections inserted, and what a user does with the result.

::

    pool = call_module[se.pool](x)              pool = call_module[se.pool](x)
    fc = call_module[se.fc](pool)      ─▶       dca_se = call_module[dca.se](pool, T_prev, G_prev)
    ...                                         fc = call_module[se.fc](dca_se)
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from dcafy.emit.connection import Connection
from dcafy.emit.wiring import Wire, wires
from dcafy.errors import InputError
from dcafy.find.roles import Found
from dcafy.graph.copies import own_copy
from dcafy.graph.emitted import OWNER, ConnectedModule, Connections, Recipe
from dcafy.graph.ops import Op, alters_argument, op_of
from dcafy.link.message import Carried
from dcafy.plan.blocks import Link
from dcafy.survey import Region
from dcafy.trace.fold import Folded

__all__ = ["connect", "connections", "freeze_base", "parameter_groups", "revert"]


def connect(region: Region, links: tuple[Link, ...], host: nn.Module, recipe: Recipe) -> ConnectedModule:
    """``host`` (a copy of the module that ``region`` describes) as a graph with these links connected.

    ``links`` have all their settings. Raises ``PlanError`` for a link that no connection can make.
    """
    folded = region.fold(links)
    dca = Connections(recipe)
    into = {
        target: tuple(link for link in links if link.target == target)
        for target in dict.fromkeys(link.target for link in links)
    }
    made = {target: wires(region, group, _place(region.local(target), host)) for target, group in into.items()}
    places = {}
    for target in sorted(into, key=lambda target: target.count(".")):
        for wire in made[target]:
            at = ".".join(part for part in (region.local(target), wire.suffix) if part)
            places[id(wire)] = dca.add(wire.names, wire.module, at=at)
    passes = _Insertion(region, folded)
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
    return ConnectedModule(host, passes.graph, class_name=type(host).__name__)


def _place(name: str, host: nn.Module) -> dict[str, Any]:
    """Device and dtype of the block's own parameters, or of the nearest around it."""
    path = name.split("#")[0].split(".")
    while path:
        try:
            module = host.get_submodule(".".join(path))
        except AttributeError:
            module = None
        if module is not None:
            for parameter in module.parameters():
                if parameter.is_floating_point():
                    return {"device": parameter.device, "dtype": parameter.dtype}
        path.pop()
    floating = [p for p in host.parameters() if p.is_floating_point()]
    return {"device": floating[0].device, "dtype": floating[0].dtype} if floating else {}


class _Insertion:
    """Puts connections into one folded graph."""

    def __init__(self, region: Region, folded: Folded) -> None:
        self.region = region
        self.graph = folded.graph
        self.image = dict(folded.image)
        self.inside = folded.inside
        self.modules = dict(region.recording.model.named_modules())
        self._kept: dict[fx.Node, fx.Node] = {}
        self._fused: dict[str, tuple[fx.Node, ...]] = {}

    def insert(self, links: tuple[Link, ...], wire: Wire, path: str) -> None:
        """One call of the module per extraction output that it is for."""
        target = self.region[links[0].target]
        for i in wire.contexts:
            context = target.contexts[i]
            passed: tuple[fx.Node | None, ...] = ()
            for link in links:
                heard = self._passed(self.region[link.source], i, context)
                passed += heard if len(links) == 1 else (*heard, None)[:2]
            own = self.image[context]
            readers = [user for user in own.users if self._transforms(user, target)]
            with self.graph.inserting_after(own):
                call = self.graph.call_module(path, (own, *passed))
            for reader in readers:
                reader.replace_input_with(own, call)

    def _transforms(self, user: fx.Node, target: Found) -> bool:
        return not target.between.isdisjoint(self.inside.get(user, ()))

    def _passed(self, source: Found, i: int, reader: fx.Node) -> tuple[fx.Node, ...]:
        """(T, G) or (T,) of the earlier block, or its extraction on the fused output."""
        carried = self.region.carried[source.name]
        assert isinstance(carried, Carried)
        nearest = min(i, len(source.contexts) - 1)
        if carried.kind == "branches":
            return (self._readable(carried.maps[i], reader), self._readable(source.contexts[i], reader))
        if carried.kind == "fused":
            return (self._extract_again(source, carried)[nearest],)
        if carried.kind == "map":
            return (self._readable(source.map, reader),)
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

    def _extract_again(self, source: Found, carried: Carried) -> tuple[fx.Node, ...]:
        """The earlier block's extraction on its fused output, made once for all who hear it."""
        if source.name not in self._fused:
            assert carried.source is not None
            assert carried.fused_output is not None
            copies = {carried.source: self.image[carried.fused_output]}
            last = copies[carried.source]
            for node in carried.extraction:
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
        warnings.warn(
            f"The connected model computes inside these modules without calling them, so hooks on them no longer "
            f"fire: {', '.join(dca.bypassed_hooks)}. Hook one of their submodules, or the module around them.",
            stacklevel=5,
        )


# -- what a user does with the result -------------------------------------------------------------------


def connected_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Connections]]:
    """(path, module, its ``dca``) of every connected graph in ``model``: the root, or its islands."""
    for path, module in model.named_modules():
        dca = getattr(module, "dca", None)
        if isinstance(dca, Connections):
            yield path, module, dca


def _require_connected(model: nn.Module) -> list[tuple[str, nn.Module, Connections]]:
    found = list(connected_modules(model))
    if not found:
        raise InputError(f"{type(model).__name__} has no connections: convert it first with dcafy.convert(model).")
    return found


def connections(model: nn.Module) -> dict[str, Connection]:
    """Name of the receiving block -> its :class:`Connection`, in the order data meets them.

    A block that hears several others has one under ``name<-source`` for each; a block with one map per branch (SK)
    has one under ``name[0]``, ``name[1]``, ... for each branch.

    Raises ``InputError`` for a model that was not converted.
    """
    return {name: dca.connection(name) for _, _, dca in _require_connected(model) for name in dca.addresses}


def parameter_groups(
    model: nn.Module, *, lr: float, connection_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Optimizer groups: the base, the matching layers' weights, and what no decay may shrink.

    No decay on α, β, norms and biases (everything of one dimension). ``connection_lr`` (default: ``lr``) is
    the rate of everything under ``dca``. Parameters that do not require a gradient are left out.

    >>> import dcafy, torch, torchvision
    >>> model = dcafy.convert(torchvision.models.mobilenet_v3_small(), verify=False)
    >>> optimizer = torch.optim.SGD(dcafy.parameter_groups(model, lr=0.01, connection_lr=0.1), momentum=0.9)
    >>> sorted({group["lr"] for group in optimizer.param_groups})
    [0.01, 0.1]
    """
    own = {id(p) for _, _, dca in _require_connected(model) for p in dca.parameters()}
    rates = {False: lr, True: lr if connection_lr is None else connection_lr}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in own, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": parameters, "lr": rates[ours], "weight_decay": weight_decay if decays else 0.0}
        for (ours, decays), parameters in groups.items()
    ]


def freeze_base(model: nn.Module) -> nn.Module:
    """``model`` with only ``dca.*`` trainable, like an adapter; batch norm of the base stays in eval.

    Frozen running statistics must not drift, so the base's batch norms stay in eval through ``.train()``.
    """
    own = {id(p) for _, _, dca in _require_connected(model) for p in dca.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in own)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            keep_in_eval(module)
    return model


def keep_in_eval(module: nn.Module) -> None:
    """Puts ``module`` in eval mode, where it stays through ``.train()``."""
    module.eval()
    # On the instance, so that the class stays the user's; a partial, so that it can be pickled.
    module.__dict__["train"] = functools.partial(_stay_in_eval, module)


def stays_in_eval(module: nn.Module) -> bool:
    """Whether :func:`keep_in_eval` was called on ``module``."""
    own = module.__dict__.get("train")
    return isinstance(own, functools.partial) and own.func is _stay_in_eval


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    module.training = False
    return module


def revert(model: nn.Module) -> nn.Module:
    """A new model without connections, with the base weights as they are now.

    Its state dict has exactly the keys of the model that was converted.
    """
    _require_connected(model)
    twin = own_copy(model)
    for _, module, _ in list(connected_modules(twin)):
        assert isinstance(module, ConnectedModule)
        module.graph = _disconnected(module.graph)
        del module._modules["dca"]
    return twin


def _disconnected(graph: fx.Graph) -> fx.Graph:
    """The graph with G in the place of every connection, and without what only connections read."""
    for node in reversed(graph.nodes):
        if node.op == "call_module" and str(node.target).startswith("dca."):
            passed = node.args[1:]
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            for source in passed:
                _erase_unread(graph, source)
    graph.lint()
    return graph


def _erase_unread(graph: fx.Graph, node: Any) -> None:
    """A message that nobody hears any more, and what was computed for it alone."""
    if not isinstance(node, fx.Node) or node.users or node.op == "placeholder":
        return
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        _erase_unread(graph, source)
