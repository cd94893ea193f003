"""What a user does with a connected model: its connections, their optimizer groups, freezing, and the way back."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from dcafy.attention.inserted import inserted, inserted_modules, inserted_parameters
from dcafy.draws import OwnDraws
from dcafy.emit.connect import connect
from dcafy.emit.connection import Connection
from dcafy.emit.dca import (
    connections,
    dca_of,
    is_connected,
    is_ours,
    link_of,
    own_contexts,
    own_modules,
    own_parameters,
    recipes,
    require_connected,
    require_recipe,
    scale_parameters,
)
from dcafy.emit.root import close_runs
from dcafy.emit.schemas import SCHEMAS
from dcafy.errors import InputError, UsageError
from dcafy.graph.copies import own_copy, shared_copy
from dcafy.graph.modes import keep_in_eval
from dcafy.graph.rewritten import SAID, restore
from dcafy.graph.rows import graph_from
from dcafy.graph.source import require_writable
from dcafy.link.given import checked
from dcafy.link.sharing import settled
from dcafy.link.topology import grouped
from dcafy.plan.blocks import Alone, Chain, Link, Skipped, hearing
from dcafy.plan.plan import Plan
from dcafy.survey import survey
from dcafy.trace.inputs import from_data, in_dtype_of
from dcafy.wording import nearest, shown


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    connection_lr: float | None = None,
    scale_lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Optimizer groups: the base, the weights of what is new, α and β, and what no decay may shrink.

    No decay on α, β, norms and biases (all that has one dimension, and norms over maps). ``connection_lr`` (default:
    ``lr``) is the rate of what is new: everything under ``dca``, and inserted attention, which starts as a no-op as
    well. ``scale_lr`` is that of α and β, where they have their own. Parameters that do not require a gradient are left
    out. Raises ``InputError`` where nothing is new.

    >>> import dcafy, torch, torchvision
    >>> model = dcafy.convert(torchvision.models.mobilenet_v3_small(), verify=False)
    >>> optimizer = torch.optim.SGD(dcafy.parameter_groups(model, lr=0.01, connection_lr=0.1), momentum=0.9)
    >>> sorted({group["lr"] for group in optimizer.param_groups})
    [0.01, 0.1]
    """
    _require_new(model)
    new, scales = own_parameters(model) | inserted_parameters(model), scale_parameters(model)
    connection_lr = lr if connection_lr is None else connection_lr
    scale_lr = connection_lr if scale_lr is None else scale_lr
    spared = undecayed(model)
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            ours = id(parameter) in new
            rate = scale_lr if id(parameter) in scales else connection_lr if ours else lr
            groups.setdefault((ours, rate, id(parameter) not in spared), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": weight_decay if decays else 0.0}
        for (_, rate, decays), parameters in groups.items()
    ]


_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def undecayed(model: nn.Module) -> set[int]:
    """The identities of the parameters that no weight decay may shrink: α, β, norms and biases.

    A norm may have more than one dimension: GC's is over ``[C, 1, 1]``.
    """
    return {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim < 2 or name == "bias" or isinstance(module, _NORMS)
    }


def freeze_base(model: nn.Module) -> nn.Module:
    """``model`` with only ``dca.*`` and inserted attention trainable, like an adapter; its batch norms stay in eval.

    Raises ``InputError`` for a model without connections and inserted attention.

    Frozen running statistics must not drift, so the base's batch norms stay in eval through ``.train()``. Attention
    that :func:`dcafy.insert` put in is no base: it starts as a no-op, and with its last layer frozen at zero nothing
    behind it would get a gradient. Statistics that connections and inserted attention keep themselves go on moving.
    """
    _require_new(model)
    own = own_parameters(model) | inserted_parameters(model)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in own)
    new = own_modules(model) | inserted_modules(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and id(module) not in new:
            keep_in_eval(module)
    return model


def has_new(model: nn.Module) -> bool:
    """Whether there are connections in ``model``, or attention that was put in."""
    return is_connected(model) or next(inserted(model), None) is not None


def _require_new(model: nn.Module) -> None:
    if not has_new(model):
        require_connected(model)


def revert(model: nn.Module) -> nn.Module:
    """A new model without connections, of the user's own classes, with the base weights as they are now.

    Its state dict has exactly the keys of the model that was converted; inserted attention is part of that.
    """
    require_connected(model)
    return _unconnected(own_copy(model))


def drop(model: nn.Module, names: str | Iterable[str], *, copy: bool = True) -> nn.Module:
    """A new model without these connections, which computes what ``model`` does where their messages are none.

    ``names``: of connections, as :func:`dcafy.connections` has them; :func:`dcafy.usage` says which nobody listens to.
    Their β and matching layers are gone, from the optimizer's groups too, and what only they heard is told no more. A
    block that then hears nobody keeps its α where that is not 1: f is αG. The blocks behind it hear it as before.
    Where nothing is left, the result is what :func:`revert` gives. The network is looked at and connected anew, as
    :func:`dcafy.load` does it.

    ``copy``: share nothing with ``model``; ``False`` shares its parameters and buffers.

    Raises ``InputError`` for what is no converted model, ``UsageError`` for a name that it does not have, and for one
    branch of several: the connections of one link go together. ``model`` is as it was in every case.

    >>> import dcafy, torchvision
    >>> model = dcafy.convert(torchvision.models.mobilenet_v3_small(), verify=False)
    >>> first, *others = dcafy.connections(model)
    >>> list(dcafy.connections(dcafy.drop(model, [first]))) == others
    True
    """
    recipe = require_recipe(model)
    asked = [names] if isinstance(names, str) else list(names) if isinstance(names, Iterable) else [names]
    if not all(isinstance(name, str) for name in asked):
        raise UsageError(f"names should be those of connections, not {shown(names)}: see dcafy.connections(model).")
    asked = list(dict.fromkeys(asked))
    if not asked:
        return own_copy(model) if copy else shared_copy(model)
    plan = _without(recipe.plan, asked, connections(model))
    twin = own_copy(model) if copy else shared_copy(model)
    before = {_heard_by(name, recipe.plan): one for name, one in connections(twin).items()}
    before |= {(reader, ""): one for (reader, _), one in list(before.items())}  # of which the α may be all that stays
    before |= {(reader, ""): one for reader, one in own_contexts(twin).items()}
    # Of several that a block hears the first has what is of all: a norm, what mixes them.
    every: dict[str, dict[str, nn.Module]] = {}
    for (reader, _), one in reversed(before.items()):
        every.setdefault(reader, {}).update(one.named_modules())
    example = dca_of(twin).example.inputs
    made = _unconnected(twin)
    if not plan.links and not plan.alone:
        return made
    inputs = None if recipe.inputs is None else in_dtype_of(made, from_data(recipe.inputs))
    seen = survey(made, inputs)
    plan = settled(checked(plan, seen.plan, seen.network), seen.network)
    with OwnDraws():  # layers are made, and then given what there was
        connect(made, seen.network, dataclasses.replace(recipe, plan=plan), example, whole=seen.whole)
    for name, one in connections(made).items():
        _take(one, before[_heard_by(name, plan)], name, every)
    for name, one in own_contexts(made).items():
        _take(one, before[name, ""], name, every)
    return made


def _without(plan: Plan, asked: Iterable[str], own: Mapping[str, Connection]) -> Plan:
    """The plan without the links of these connections."""
    links = {name: link_of(name, plan.links) for name in own}
    gone = []
    for name in asked:
        if name not in own:
            known = list(own)
            raise UsageError(
                f"The model has no connection {name!r}.{nearest(str(name), known)} Its connections are: "
                f"{', '.join(known) or 'none'}."
            )
        others = [other for other, link in links.items() if link == links[name] and other not in asked]
        if others:
            raise UsageError(
                f"{name} and {others[0]} are of one link, from {links[name].source}: drop both, or neither."
            )
        gone += _with_those_that_share(links[name], plan)
    left = [link for link in plan.links if link not in gone]
    alone = []
    for target, shares in dict.fromkeys((link.target, link.shares) for link in gone):
        mine = {name: own[name] for name, link in links.items() if link.target == (shares or target)}
        one = next(iter(mine.values()))
        stays = any(connection.alpha.item() != 1 for connection in mine.values()) or not SCHEMAS[one.schema].exact
        if stays and not any(link.target == target for link in left):
            branched = "[" in next(iter(mine)).removeprefix(shares or target)
            alone.append(Alone(target, one.schema, branched, shares))
    told = tuple(Skipped(link.target, f"hears {link.source} no more: taken out with dcafy.drop") for link in gone)
    chains = tuple(part for chain in plan.chains for part in _parted(plan, chain, gone))
    return dataclasses.replace(plan, chains=chains, skipped=plan.skipped + told, alone=(*plan.alone, *alone))


def _with_those_that_share(link: Link, plan: Plan) -> list[Link]:
    """The link, and those of other calls of the same part, whose connection is its own."""
    heard = hearing(plan.links)
    number = heard[link.target].index(link)
    return [link, *(others[number] for others in heard.values() if others[0].shares == link.target)]


def _parted(plan: Plan, chain: Chain, gone: Collection[Link]) -> tuple[Chain, ...]:
    """What is left of a chain: one for each set of blocks that links still hold together."""
    left = [link for link in chain.links if link not in gone]
    if len(left) == len(chain.links):
        return (chain,)
    home = {name: number for number, name in enumerate(chain.blocks)}
    return grouped([block for block in plan.blocks if block.name in home], left, home)


def _heard_by(name: str, plan: Plan) -> tuple[str, str]:
    """The block, or its branch, and the one that it hears, in one way whether that is one of several or not."""
    reader, _, source = name.partition("<-")
    return reader, source or link_of(name, plan.links).source


def _take(connection: nn.Module, before: nn.Module, name: str, every: Mapping[str, Mapping[str, nn.Module]]) -> None:
    """Gives a connection the parameters, buffers and modes of what it was made anew for; ``every``: by block."""
    theirs = {**every[name.partition("<-")[0]], **dict(before.named_modules())}
    for path, module in connection.named_modules():
        other = theirs.get(path)
        kept: tuple[str, ...] = ("_parameters", "_buffers")
        if other is None or any(getattr(module, held).keys() - getattr(other, held).keys() for held in kept):
            raise InputError(
                f"The connection {name} is not as dcafy made it: something has been put around or in the place of its "
                "layers. Take that off first (peft: merge_and_unload)."
            )
        for held in kept:
            ours = getattr(module, held)
            ours.update({key: getattr(other, held)[key] for key in ours})
        module.training = other.training


def apart_by_nature(model: nn.Module, *, copy: bool) -> tuple[nn.Module, dict[str, Connection]]:
    """A twin of ``model`` without its connections, and these, where all are by nature; else the model itself."""
    plans = [recipe.plan for _, recipe in recipes(model)] if is_connected(model) else []
    if not plans or not all(plan.block(link.target).nature for plan in plans for link in plan.links):
        return model, {}
    twin = own_copy(model) if copy else shared_copy(model)
    natures = dict(connections(twin))
    return _unconnected(twin), natures


def take_over(connected: nn.Module, before: Mapping[str, Connection]) -> None:
    """Gives the connections of ``connected`` what those of the same names were ``before``, where there were any."""
    for name, one in connections(connected).items() if before else ():
        if name in before:
            _take(one, before[name], name, {name: {}})


def _unconnected(twin: nn.Module) -> nn.Module:
    """``twin``, which is nobody else's, without its connections."""
    for module in [module for module in twin.modules() if is_ours(dca_of(module))]:
        before = getattr(dca_of(module), "before", None)
        if before is not None:
            graph = graph_from(before.rows)
            require_writable(graph)
            module.graph = graph  # type: ignore[assignment]
        restore(module)
        own = dca_of(module)
        for held in (module._modules, module.__dict__):
            for name in [name for name, value in held.items() if value is own]:
                del held[name]
        module.__dict__.pop(SAID, None)
    for module in twin.modules():
        close_runs(module)
    return twin
