"""Links -> connection modules: what is made for one block that hears one or several earlier ones."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from dcafy.emit.connection import Connection, JoinedConnection, OwnContext
from dcafy.emit.matching import MATCHES, known
from dcafy.emit.mixing import Mixed, Shared, mixing_named
from dcafy.emit.schemas import SCHEMAS
from dcafy.errors import PlanError, UsageError
from dcafy.find.layout import widest
from dcafy.graph.counting import multiply_adds
from dcafy.graph.nodes import node_value
from dcafy.link.message import Message, Unlinkable, extents
from dcafy.link.network import Network
from dcafy.link.sharing import settled
from dcafy.link.topology import TOPOLOGIES, heard_of, mixing_of, shaped
from dcafy.plan.blocks import Alone, Cost, Link, hearing
from dcafy.plan.options import Linking, check
from dcafy.plan.plan import Plan


@dataclass(frozen=True)
class Wiring:
    """One module that takes the place of some of a block's extraction outputs.

    ``module``    a :class:`Connection`, or a :class:`JoinedConnection` where several blocks are heard
    ``contexts``  which of the block's extraction outputs it is called for
    ``suffix``    what its path has behind the block's: empty, or the branch it is for
    ``names``     name of each connection -> its path inside ``module`` (empty: ``module`` itself)
    """

    module: Connection | JoinedConnection
    contexts: tuple[int, ...]
    suffix: str
    names: dict[str, str]


def wires(network: Network, links: tuple[Link, ...], place: dict[str, Any], made: Shared) -> tuple[Wiring, ...]:
    """The modules for all links into one block, which have all their settings.

    A block that is passed one map per branch has one module per branch (SK), and so has a block of several extraction
    outputs where the module keeps statistics of them, or where they are made in several modules of the user's (which
    are called by themselves, too); any other has one for all of its extraction outputs. ``place``:
    device and dtype. ``made``: what the links of one conversion share, across blocks. Raises ``PlanError`` for a link
    that no connection can make.

    They are those of another block where the links share its connection (``dcafy.link.sharing``).
    """
    target = network[links[0].target]
    of_another: tuple[Wiring, ...] | None = made.get((Wiring, links[0].shares))
    if of_another is not None:
        return of_another
    messages = [message_for(network, link) for link in links]
    schemas = sorted({link.schema or "direct" for link in links})
    if len(schemas) > 1:
        raise PlanError(
            f"The links into {target.name} have the schemas {', '.join(schemas)}; what a block hears goes into one "
            "second term, so that they need the same one."
        )
    if len({link.mixing for link in links}) > 1:
        raise PlanError(f"The links into {target.name} are mixed in different ways; give all of them the same mixing.")
    mix = mixing_named(mixing_of(links[0]).mixing if links[0].mixing else "")
    every = tuple(range(len(target.contexts)))
    keeps = any(link.message == "centred" for link in links) or (
        SCHEMAS[schemas[0]].normalises and MATCHES[target.block.dimension].norm_has_statistics
    )
    branched = len(target.contexts) > 1 and (keeps or len(_hearing(target.name, network)) > 1)
    branched = branched or any(message.kind == "branches" for message in messages)
    found = []
    for contexts in [(i,) for i in every] if branched else [every]:
        suffix = f"branch{contexts[0]}" if branched else ""
        name = f"{target.name}[{contexts[0]}]" if branched else target.name
        matches: dict[Any, nn.Module] = {}
        parts = [_connection(network, link, place, matches, contexts[0], first=link is links[0]) for link in links]
        module = mix(parts, Mixed(target.block, extents(target)[contexts[0]], place, links, made))
        names = {f"{name}<-{link.source}": f"parts.{i}" for i, link in enumerate(links)}
        found.append(Wiring(module, contexts, suffix, {name: ""} if module is parts[0] else names))
    made[Wiring, target.name] = tuple(found)
    return tuple(found)


def _hearing(name: str, network: Network) -> set[str]:
    """The modules in which a block's extraction outputs are heard."""
    return {site.path for site in network.region(name).hearing(name)}


def own_contexts(network: Network, alone: Alone, place: dict[str, Any], shared: Shared) -> tuple[Wiring, ...]:
    """The modules of a block that hears nobody, as :func:`wires` makes them for one that does."""
    of_another: tuple[Wiring, ...] | None = shared.get((Alone, alone.shares))
    if of_another is not None:
        return of_another
    target, every = network[alone.name], tuple(range(len(network[alone.name].contexts)))
    known(SCHEMAS, alone.schema, "schema")
    matching, ends = MATCHES[target.block.dimension], SCHEMAS[alone.schema].normalises

    def made(output: int) -> OwnContext:
        norm = matching.norm(extents(target)[output], place) if ends else None
        return OwnContext(target.block.dimension, schema=alone.schema, target_axis=target.axis, norm=norm, **place)

    found = tuple(
        Wiring(
            made(contexts[0]),
            contexts,
            f"branch{contexts[0]}" if alone.branched else "",
            {f"{alone.name}[{contexts[0]}]" if alone.branched else alone.name: ""},
        )
        for contexts in ([(i,) for i in every] if alone.branched else [every])
    )
    shared[Alone, alone.name] = found
    return found


def _parameter_count(network: Network, links: tuple[Link, ...], alone: tuple[Alone, ...] = ()) -> int:
    """How many parameters the connections of these links have, which have all their settings."""
    groups, place, shared = hearing(links).values(), {"device": "meta"}, Shared()
    made = [wire.module for group in groups for wire in wires(network, tuple(group), place, shared)]
    made += [wire.module for one in alone for wire in own_contexts(network, one, place, shared)]
    return sum({id(p): p.numel() for module in made for p in module.parameters()}.values())


def _multiply_adds(network: Network, links: tuple[Link, ...]) -> int:
    """What the connections of these links compute for one image of the example."""
    total, shared = 0, Shared()
    for target, group in hearing(links).items():
        contexts = [node_value(context)[:1] for context in network[target].contexts]
        for wiring in wires(network, tuple(group), {"device": "meta"}, shared):
            for i in wiring.contexts:
                given = [value for link in group for value in _heard_values(network, link, i)]
                G = torch.empty_like(contexts[i], device="meta", dtype=torch.float32)
                total += multiply_adds(functools.partial(wiring.module, G, *given))
    return total


def _heard_values(network: Network, link: Link, output: int) -> tuple[Tensor, Tensor | None]:
    """T and G of what is heard, without data, as the wire brings them."""
    source, message = network[link.source], message_for(network, link)
    nearest = source.contexts[min(output, len(source.contexts) - 1)]

    def like(node: fx.Node) -> Tensor:
        return torch.empty_like(node_value(node)[:1], device="meta", dtype=torch.float32)

    if message.kind == "branches":
        return like(message.maps[output]), like(source.contexts[output])
    if message.kind == "fused":  # the extraction once more, of another width perhaps
        channels, size = message.heard_by(output)[0]
        return torch.empty((1, channels, *(size or ())), device="meta"), None
    if message.kind == "context" or link.source == link.target:
        return like(nearest), None
    return like(source.map), like(nearest) if message.kind == "product" else None


def message_for(network: Network, link: Link) -> Message:
    """What the source of a link passes on; ``PlanError`` where the target cannot hear it."""
    source, target, of = network[link.source], network[link.target], heard_of(link)
    message = network.message(link.source, link.target, of)
    reason = network.obstacle(link.source, link.target, of)
    if reason or isinstance(message, Unlinkable):
        raise PlanError(f"{link.target} cannot hear {link.source}: {reason}. Leave the link out of the plan.")
    if source.block.dimension != target.block.dimension:
        raise PlanError(
            f"{link.target} varies over {target.block.dimension}, {link.source} over {source.block.dimension}."
        )
    return message


def _connection(
    network: Network, link: Link, place: dict[str, Any], matches: dict[Any, nn.Module], output: int, *, first: bool
) -> Connection:
    """``matches``: matching layers that are there already, by what they match; those of one width are shared.

    ``output``: the first of the block's extraction outputs that hears it. ``first``: whether it is the first one of its
    block, which has what f ends with.
    """
    source, target, message = network[link.source], network[link.target], message_for(network, link)
    matching = MATCHES[target.block.dimension]
    extent, own = widest(message.extents), widest(extents(target))
    key = (
        *(getattr(link, option) for option in matching.options),
        link.reduction,
        link.min_hidden,
        link.message,
        extent,
    )
    if key not in matches:
        matches[key] = matching.layers(link, extent, own, place)
    schema, centred = link.schema or "direct", link.message == "centred"
    return Connection(
        target.block.dimension,
        matches[key],
        schema=schema,
        bounded=message.kind in ("product", "branches"),
        source_axis=source.axis,
        map_axis=message.axis,
        target_axis=target.axis,
        averages=extent[0] not in (1, own[0]) and not matching.needs_layers(extent[0], own[0]),
        grows=any(a < b for a, b in zip(extent[1] or (), own[1] or (), strict=False)),
        centre=matching.centre(message.heard_by(output)[0], extents(target)[output], place) if centred else None,
        norm=matching.norm(extents(target)[output], place) if first and SCHEMAS[schema].normalises else None,
        **place,
    )


def completed(link: Link, options: Linking) -> Link:
    """The link with every setting that it leaves open filled in; ``PlanError`` where one is not known.

    What a block hears of itself is always centred: G itself once more would add nothing.
    """
    merged = Linking(**options.overridden(link))
    if link.source == link.target:
        if link.message == "plain":
            raise PlanError(
                f"The plan has {link.target!r} hear itself with message='plain', which is G once more. Leave the "
                "message out, or use 'centred'."
            )
        merged = dataclasses.replace(merged, message="centred")
    try:
        check(merged, {"schema": SCHEMAS}, dashes=False)
    except UsageError as error:
        raise PlanError(f"The plan's link from {link.source!r} to {link.target!r}: {error}") from error
    return dataclasses.replace(link, **dataclasses.asdict(merged))


def costs(plan: Plan, network: Network, options: Linking) -> tuple[Cost, ...]:
    """What each topology in which blocks hear others would add to the model, with these options."""
    names = [name for name, row in TOPOLOGIES.items() if not row.every]
    return tuple(cost(name, shaped(plan, network, topology=name), network, options) for name in names)


def cost(topology: str, plan: Plan, network: Network, options: Linking) -> Cost:
    """What this plan's links add to the model; ``topology`` is what it is called."""
    plan = settled(plan.with_links(lambda link: completed(link, options)), network)
    parameters = _parameter_count(network, plan.links, plan.alone)
    return Cost(topology, len(plan.links), parameters, _multiply_adds(network, plan.links))
