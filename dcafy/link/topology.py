"""Which blocks hear which: the paper's chain, or every block all earlier ones; and what that costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from dcafy.emit.wiring import parameter_count
from dcafy.errors import UsageError
from dcafy.link.message import Unlinkable, earlier, mismatch
from dcafy.plan.blocks import Chain, Cost, Link, Plan, Skipped
from dcafy.settings import Settings
from dcafy.survey import Region, Survey

__all__ = ["DIMENSIONS", "TOPOLOGIES", "cost", "costs", "shaped"]

DIMENSIONS = ("all", "channel", "spatial")
"""What may be connected (paper 4.2): DCA-All, DCA-C, DCA-S."""


def shaped(plan: Plan, known: Survey, *, dimension: str = "all", topology: str = "chain") -> Plan:
    """The plan with only one dimension's links, and with the links of a topology.

    Raises ``UsageError`` for a dimension or a topology that there is not.
    """
    for name, value, choices in (("dimension", dimension, DIMENSIONS), ("topology", topology, tuple(TOPOLOGIES))):
        if value not in choices:
            raise UsageError(f"{name}={value!r} is not known. Use one of: {', '.join(choices)}.")
    return TOPOLOGIES[topology](_only(plan, dimension), known)


def costs(plan: Plan, known: Survey, settings: Settings) -> tuple[Cost, ...]:
    """What each topology would add to the model, with these settings."""
    return tuple(cost(name, shaped(plan, known, topology=name), known, settings) for name in TOPOLOGIES)


def cost(topology: str, plan: Plan, known: Survey, settings: Settings) -> Cost:
    """What this plan's links add to the model; ``topology`` is what it is called."""
    complete = [settings.complete(link) for link in plan.links]
    parts = [(region, tuple(link for link in complete if link.target in region)) for region in known.regions]
    return Cost(topology, len(complete), sum(parameter_count(region, links) for region, links in parts))


def _only(plan: Plan, dimension: str) -> Plan:
    """The plan without the links of other dimensions; their blocks are listed as skipped."""
    others = [chain for chain in plan.chains if dimension not in ("all", chain.dimension) and chain.links]
    skipped = tuple(
        Skipped(link.target, f"not connected: dimension={dimension!r} was asked for")
        for chain in others
        for link in chain.links
    )
    chains = tuple(dataclasses.replace(chain, links=()) if chain in others else chain for chain in plan.chains)
    return dataclasses.replace(plan, chains=chains, skipped=plan.skipped + skipped)


def _chain(plan: Plan, known: Survey) -> Plan:
    """The plan as it is: each block hears the nearest earlier one."""
    return plan


def _dense(plan: Plan, known: Survey) -> Plan:
    """Each block that hears one hears all earlier ones of its dimension that reach it (paper section 5)."""
    kept = {name for chain in plan.chains for name in chain.blocks}
    hearing = {link.target for link in plan.links}
    links: dict[str, list[Link]] = {link.target: [] for link in plan.links}
    given = {(link.source, link.target): link for link in plan.links}
    skipped = []
    for region in known.regions:
        reached = earlier(region.recording.graph, region.modules, region.found)
        for target, sources in reached.items():
            for source in sources if target in hearing else ():
                reason = _obstacle(region, source, target)
                if (source, target) in given or (source in kept and reason is None):
                    links[target].append(given.get((source, target), _like(plan, source, target)))
                elif source in kept:
                    skipped.append(Skipped(target, f"cannot hear {source}: {reason}"))
    chains = tuple(_grouped(plan, links))
    new = tuple(item for item in dict.fromkeys(skipped) if item not in plan.skipped)
    return dataclasses.replace(plan, chains=chains, skipped=plan.skipped + new)


def _like(plan: Plan, source: str, target: str) -> Link:
    """A link with the settings of the target's own one."""
    own = next(link for link in plan.links if link.target == target)
    return dataclasses.replace(own, source=source)


def _obstacle(region: Region, source: str, target: str) -> str | None:
    """Why ``target`` cannot hear ``source``, or ``None`` where it can."""
    passed = region.carried[source]
    return str(passed) if isinstance(passed, Unlinkable) else mismatch(passed, region[source], region[target])


def _grouped(plan: Plan, links: dict[str, list[Link]]) -> list[Chain]:
    """One chain for each set of blocks that links hold together, blocks in the order data meets them."""
    home = {name: i for i, chain in enumerate(plan.chains) for name in chain.blocks}
    for heard in links.values():
        for link in heard:
            joined = {home[link.source], home[link.target]}
            home = {name: min(joined) if place in joined else place for name, place in home.items()}
    chains = []
    for place in sorted(set(home.values())):
        blocks = tuple(block.name for block in plan.blocks if home.get(block.name) == place)
        own = tuple(link for name in blocks for link in links.get(name, ()))
        chains.append(Chain(plan.block(blocks[0]).dimension, blocks, own))
    return chains


TOPOLOGIES: dict[str, Callable[[Plan, Survey], Plan]] = {"chain": _chain, "dense": _dense}
"""Name -> the plan in that topology."""
