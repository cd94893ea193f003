"""Whose connection a link shares: what is made in each call of one part has one for all of its calls.

A backbone that is called for each image of a pair has one set of weights, and so one of everything that is connected
inside it: both sides stay alike whatever is learned. A unit that hears its own last call is connected to another call,
and has a connection for each.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dcafy.link.message import extents
from dcafy.link.network import Network
from dcafy.link.topology import heard_of, mixing_of
from dcafy.plan.blocks import Link, hearing
from dcafy.plan.plan import Plan


def settled(plan: Plan, network: Network) -> Plan:
    """The plan in which links share the connection of the first of those that share one, and fit it.

    Whom a plan names is no more than what its blocks have in common: the first may have been left out, and blocks that
    hear others of other sizes, or with other settings, have connections of their own.
    """
    groups, first = hearing(plan.links), dict[Any, str]()
    alone = {one.name: one for one in plan.alone}
    owner: dict[str, str] = {}
    for name in network.order:
        group = groups.get(name, [])
        if group:
            owner[name] = first.setdefault((group[0].shares or name, _heard(name, group, network)), name)
        elif name in alone:
            one = alone[name]
            owner[name] = first.setdefault((one.shares or name, one.schema, one.branched, _place(name, network)), name)

    def shares(name: str) -> str | None:
        return None if owner[name] == name else owner[name]

    left = tuple(dataclasses.replace(one, shares=shares(one.name)) for one in plan.alone)
    changed = plan.with_links(lambda link: dataclasses.replace(link, shares=shares(link.target)))
    return dataclasses.replace(changed, alone=left)


def _place(name: str, network: Network) -> tuple[Any, ...]:
    """Where a block hears, and what."""
    found = network[name]
    sites = tuple(site.path for site in network.region(name).hearing(name))
    return network.region(name).path, sites, found.block.dimension, found.axis, extents(found)


def _heard(name: str, group: list[Link], network: Network) -> tuple[Any, ...]:
    """What a block and another have in common that may share its connection."""
    if any(link.mixing and not mixing_of(link).shares for link in group):
        return (name,)
    found: list[Any] = [_place(name, network)]
    for link in group:
        message = network.message(link.source, name, heard_of(link))
        facts = [getattr(message, fact, None) for fact in ("kind", "extents", "axis")]
        found.append((dataclasses.replace(link, source="", target="", shares=None), *facts, network[link.source].axis))
    return tuple(found)
