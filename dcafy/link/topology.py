"""Who hears whom: a topology chooses among a block and the earlier ones that reach it; the rest is the same for all.

A new topology is a row of ``TOPOLOGIES``. One that does more with what it hears than add it up has a file of its own in
``dcafy/emit``, named in its row: see ``dcafy.emit.mixing`` for what is in it. Nothing else has to know of either.

Nothing here needs torch: the command reads the names from here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from dcafy.errors import PlanError
from dcafy.plan.blocks import AttentionBlock, Chain, Link, Of, Skipped, hearing
from dcafy.plan.plan import Plan
from dcafy.wording import shown

if TYPE_CHECKING:
    from dcafy.link.network import Network

B = TypeVar("B")
Blocks = tuple[B, ...]


@dataclass(frozen=True)
class Topology:
    """``hears``: (block, earlier ones that reach it, those that a plan has it hear) -> those that it hears.

    They are :class:`dcafy.AttentionBlock`, so that it may go by their widths, sizes and dimensions. The nearest of the
    earlier ones is the last; those of the block's own kind of map stand behind all others.
    ``every``: whether blocks that hear nothing in a plan, such as the first one, hear something all the same.
    ``mixing``: the file in ``dcafy/emit`` that says how what a block hears becomes one term (``dcafy.emit.mixing``);
    empty: it is added up, each with a β of its own.
    ``of``: what of a block is heard: its ``message`` T̃, or its ``context`` G.
    ``shares``: whether blocks of a part that is called several times have one connection for all of its calls.
    ``words``: what a block hears, as the help says it.
    ``what``: what it is, and where it comes from, where that is not the paper.
    """

    hears: Callable[[Any, Blocks[Any], Blocks[Any]], Blocks[Any]]
    words: str
    every: bool = False
    mixing: str = ""
    of: Of = "message"
    shares: bool = True
    what: str = ""


def _chain(block: B, earlier: Blocks[B], planned: Blocks[B]) -> Blocks[B]:
    """The nearest one, as in the paper; a plan that is followed says which."""
    return planned or earlier[-1:]


def _dense(block: B, earlier: Blocks[B], planned: Blocks[B]) -> Blocks[B]:
    """All of them (paper section 5)."""
    return tuple(dict.fromkeys((*earlier, *planned)))


def _tree(block: B, earlier: Blocks[B], planned: Blocks[B]) -> Blocks[B]:
    """The n-th of a chain hears the (n - 2^j)-th for every 2^j that divides n: a binary tree (paper section 5).

    >>> _tree("8", tuple("1234567"), ())
    ('4', '6', '7')
    """
    number = len(earlier) + 1
    steps = [2**j for j in range(number.bit_length()) if number % 2**j == 0 and 2**j < number]
    return tuple(dict.fromkeys((*(earlier[-step] for step in reversed(steps)), *planned)))


def _own(block: B, earlier: Blocks[B], planned: Blocks[B]) -> Blocks[B]:
    """Itself: what its G has in other images is its context."""
    return (block,)


def _hub(block: Any, earlier: Blocks[Any], planned: Blocks[Any]) -> Blocks[Any]:
    """The nearest one of its own width, whose cell has read all before that (``dcafy.emit.hub``)."""
    return tuple(other for other in earlier if other.channels == block.channels)[-1:]


TOPOLOGIES: dict[str, Topology] = {
    "chain": Topology(_chain, "the one before it"),
    "dense": Topology(_dense, "all before it"),
    "tree": Topology(_tree, "some before it, as a binary tree"),
    "own": Topology(_own, "itself", every=True),
    "depth": Topology(
        _dense,
        "all before it, weighed by a softmax over depth",
        mixing="depth",
        what="a block hears all earlier ones, weighed by a softmax over depth (layer attention: arXiv 2302.03985, "
        "2406.13392, 2603.15031)",
    ),
    "hub": Topology(
        _hub,
        "an LSTM cell that has read all before it",
        mixing="hub",
        of="context",
        shares=False,  # in each call a cell goes on from another one's state
        what="a block hears the state of one LSTM cell for each stage, which reads every G (DIA: arXiv 1905.10671, "
        "2210.16101)",
    ),
}
"""Name -> the topology."""


def _along(block: AttentionBlock, earlier: Blocks[AttentionBlock], planned: Blocks[Any]) -> Blocks[Any]:
    """The nearest one of its stage: of as many channels, in maps of the same size."""
    stage = [one for one in earlier if (one.channels, one.size) == (block.channels, block.size)]
    return planned or tuple(stage[-1:])


BY_NATURE: dict[str, Topology] = {
    "along": Topology(
        _along,
        "the one before it in its stage",
        mixing="along",
        what="attention that is connected by nature, each unit of a stage to the one before (MRLA-light: arXiv "
        "2302.03985, eq. 8)",
    )
}
"""Name -> the topology of blocks that are connected by nature, whatever is asked for: they hear those of their own."""


def links_in(
    network: Network, topology: str = "chain", plan: Plan | None = None, dimension: str = "all"
) -> tuple[list[Link], list[Skipped]]:
    """The links of a network's blocks, and what was wanted and cannot be heard, with the reason.

    With a ``plan`` only the blocks that hear something in it hear anything (or those that stand in it, where every
    block hears something), from blocks that stand in it; links that it has are its own, and new ones have the settings
    of their target's. ``dimension``: of the blocks that hear.
    """
    links, skipped = [], []
    planned = hearing(plan.links) if plan else {}
    kept = {name for chain in plan.chains for name in chain.blocks} if plan else set(network.order)
    for target in network.order:
        block = network[target].block
        name = block.nature or topology
        row = BY_NATURE[name] if block.nature else TOPOLOGIES[name]
        mixing = name if row.mixing else None
        earlier = tuple(one for one in network.nearest(target) if network[one].block.nature == block.nature)
        given = {link.source: link for link in planned.get(target, ())}
        asked = row.every and target in kept and dimension in ("all", block.dimension)
        if plan is not None and not given and not asked:
            continue
        blocks = ([network[name].block for name in names] for names in ([n for n in earlier if n in kept], given))
        for source in (one.name for one in row.hears(block, *map(tuple, blocks))):
            if source in given:
                own = given[source]
                links.append(dataclasses.replace(own, mixing=own.mixing or mixing))
                continue
            reason = network.obstacle(source, target, row.of)
            if reason is not None:
                skipped.append(Skipped(target, f"cannot hear {source}: {reason}"))
                continue
            new = Link(source, target, schema="direct", message="plain") if block.nature else Link(source, target)
            settings = next(iter(given.values()), new)
            links.append(dataclasses.replace(settings, source=source, mixing=settings.mixing or mixing))
    return _shared(links, planned, network), skipped


def _shared(links: list[Link], planned: Mapping[str, list[Link]], network: Network) -> list[Link]:
    """The links, with what those share that are made alike in each call of one part (``dcafy.link.sharing``).

    Links of a plan stay as they are.
    """
    first: dict[Any, str] = {}
    found: list[Link] = []
    for target, group in hearing(links).items():
        key = network.in_each_call(target, tuple(link.source for link in group))
        shares = target if key is None else first.setdefault(key, target)
        if planned.get(target) != group:
            group = [dataclasses.replace(link, shares=None if shares == target else shares) for link in group]
        found += group
    return found


def heard_of(link: Link) -> Of:
    """What of its source a link passes on; ``PlanError`` for a way of mixing that is not known."""
    return "message" if link.mixing is None else mixing_of(link).of


def ways(links: Iterable[Link]) -> tuple[str, ...]:
    """What these links are besides connections that are added up: each way by its name, and where it comes from."""
    names = dict.fromkeys(link.mixing for link in links if link.mixing)
    rows = {**TOPOLOGIES, **BY_NATURE}
    return tuple(f"{name}: {rows[name].what}" for name in names if name in rows)


def mixing_of(link: Link) -> Topology:
    """The topology that says how a link is mixed with the others into its target."""
    mixed = {name: row for name, row in (TOPOLOGIES | BY_NATURE).items() if row.mixing}
    if link.mixing not in mixed:
        raise PlanError(
            f"The plan's link from {link.source!r} to {link.target!r} has mixing={shown(link.mixing)}, which is not "
            f"known. Use one of: {', '.join(mixed) or 'none'}, or leave it out."
        )
    return mixed[link.mixing]


def grouped(blocks: Iterable[AttentionBlock], links: Collection[Link], home: Mapping[str, int]) -> tuple[Chain, ...]:
    """One chain for each set of blocks that links hold together, blocks in the order data meets them.

    ``home``: a number for each block that stands in a chain; those of one number stay together.
    """
    place = dict(home)
    heard = hearing(links)
    for link in links:
        joined = {place[link.source], place[link.target]}
        if len(joined) > 1:
            place = {name: min(joined) if number in joined else number for name, number in place.items()}
    chains = []
    for number in sorted(set(place.values())):
        own = [block for block in blocks if place.get(block.name) == number]
        names = tuple(block.name for block in own)
        chains.append(Chain(own[0].dimension, names, tuple(link for name in names for link in heard.get(name, ()))))
    return tuple(chains)


def shaped(plan: Plan, network: Network, *, dimension: str = "all", topology: str = "chain") -> Plan:
    """The plan with only one dimension's links, and with the links of a topology (``TOPOLOGIES``).

    ``dimension``: ``all``, ``channel`` or ``spatial`` (paper 4.2: DCA-All, DCA-C, DCA-S).
    """
    plan = _only(plan, dimension)
    links, left = links_in(network, topology, plan, dimension)
    skipped = tuple(item for item in dict.fromkeys(left) if item not in plan.skipped)
    if hearing(links) == hearing(plan.links):
        return dataclasses.replace(plan, skipped=plan.skipped + skipped)
    home = {name: number for number, chain in enumerate(plan.chains) for name in chain.blocks}
    return dataclasses.replace(plan, chains=grouped(plan.blocks, links, home), skipped=plan.skipped + skipped)


def _only(plan: Plan, dimension: str) -> Plan:
    """The plan without the links of other dimensions; their blocks are listed as skipped."""
    others = [
        chain
        for chain in plan.chains
        if dimension not in ("all", chain.dimension) and chain.links and not plan.block(chain.blocks[0]).nature
    ]
    skipped = tuple(
        Skipped(link.target, f"not connected: dimension={dimension!r} was asked for")
        for chain in others
        for link in chain.links
    )
    chains = tuple(dataclasses.replace(chain, links=()) if chain in others else chain for chain in plan.chains)
    return dataclasses.replace(plan, chains=chains, skipped=plan.skipped + skipped)
