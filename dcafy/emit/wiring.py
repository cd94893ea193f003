"""Links -> connection modules: what is made for one block that hears one or several earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from dcafy.emit.connection import Connection, JoinedConnection, channel_match, spatial_match
from dcafy.errors import PlanError
from dcafy.find.roles import Found
from dcafy.link.message import Carried, Unlinkable, mismatch
from dcafy.plan.blocks import Link
from dcafy.survey import Region

__all__ = ["Wire", "parameter_count", "passed_on", "wires"]


@dataclass(frozen=True)
class Wire:
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


def wires(region: Region, links: tuple[Link, ...], place: dict[str, Any]) -> tuple[Wire, ...]:
    """The modules for all links into one block, which have all their settings.

    A block that is passed one map per branch has one module per branch (SK); any other has one for all of its
    extraction outputs. ``place``: device and dtype. Raises ``PlanError`` for a link that no connection can make.
    """
    target = region[links[0].target]
    passed = [passed_on(region, link) for link in links]
    schemas = sorted({link.schema or "direct" for link in links})
    if len(schemas) > 1:
        raise PlanError(
            f"The links into {target.name} have the schemas {', '.join(schemas)}; what a block hears goes into one "
            "second term, so that they need the same one."
        )
    every = tuple(range(len(target.contexts)))
    branched = any(carried.kind == "branches" for carried in passed)
    made = []
    for contexts in [(i,) for i in every] if branched else [every]:
        suffix = f"branch{contexts[0]}" if branched else ""
        name = f"{target.name}[{contexts[0]}]" if branched else target.name
        matches: dict[Any, nn.Module] = {}
        parts = [_connection(region, link, place, matches) for link in links]
        if len(parts) == 1:
            made.append(Wire(parts[0], contexts, suffix, {name: ""}))
        else:
            names = {f"{name}<-{link.source}": f"parts.{i}" for i, link in enumerate(links)}
            made.append(Wire(JoinedConnection(parts), contexts, suffix, names))
    return tuple(made)


def parameter_count(region: Region, links: tuple[Link, ...]) -> int:
    """How many parameters the connections of these links have, which have all their settings."""
    into: dict[str, list[Link]] = {}
    for link in links:
        into.setdefault(link.target, []).append(link)
    made = [wire.module for group in into.values() for wire in wires(region, tuple(group), {"device": "meta"})]
    return sum(parameter.numel() for module in made for parameter in module.parameters())


def passed_on(region: Region, link: Link) -> Carried:
    """What the source of a link passes on; ``PlanError`` where the target cannot hear it."""
    source, target = region[link.source], region[link.target]
    passed = region.carried[link.source]
    reason = str(passed) if isinstance(passed, Unlinkable) else mismatch(passed, source, target)
    if reason or isinstance(passed, Unlinkable):
        raise PlanError(f"{link.target} cannot hear {link.source}: {reason}. Leave the link out of the plan.")
    if source.block.dimension != target.block.dimension:
        raise PlanError(
            f"{link.target} varies over {target.block.dimension}, {link.source} over {source.block.dimension}."
        )
    return passed


def _connection(region: Region, link: Link, place: dict[str, Any], matches: dict[Any, nn.Module]) -> Connection:
    """``matches``: matching layers that are there already, by what they match; those of one width are shared."""
    source, target, passed = region[link.source], region[link.target], passed_on(region, link)
    kind = link.channel_match if target.block.dimension == "channel" else link.spatial_match
    key = (kind, link.reduction, link.min_hidden, passed.channels, passed.size)
    if key not in matches:
        matches[key] = _match(passed, target, link, place)
    return Connection(
        target.block.dimension,
        matches[key],
        schema=link.schema or "direct",
        bounded=passed.kind in ("product", "branches"),
        source_axis=source.axis,
        target_axis=target.axis,
        **place,
    )


def _match(passed: Carried, target: Found, link: Link, place: dict[str, Any]) -> nn.Module:
    assert link.channel_match is not None
    assert link.spatial_match is not None
    assert link.reduction is not None
    assert link.min_hidden is not None
    if target.block.dimension == "channel":
        return channel_match(
            link.channel_match,
            passed.channels,
            target.block.channels,
            reduction=link.reduction,
            min_hidden=link.min_hidden,
            **place,
        )
    channels = passed.channels if passed.channels == target.block.channels else 1
    size, own = passed.size or (), target.block.size or ()
    return spatial_match(link.spatial_match, size, own, channels=channels, **place)
