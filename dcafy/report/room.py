"""What of the findings a page has room for: one that is sent to somebody stays under 5 MB, whatever the network."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dcafy.plan.blocks import Chain, Contents, Contribution, Link
from dcafy.plan.drawing import Lane
from dcafy.report.findings import Findings

MOST = 4_900_000
"""Bytes that a page may have."""

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Room:
    """How much of everything a page may show.

    ``blocks``, ``connections``  of them in the picture of the network; ``connections``: rows of tables, too
    ``histograms``               of blocks
    ``rows``                     of other lists
    ``data``                     characters of each CSV file
    ``pictures``, ``maps``       characters of all pictures together, and of the maps in them as CSV
    """

    blocks: int = 600
    connections: int = 300
    histograms: int = 200
    rows: int = 100
    data: int = 150_000
    pictures: int = 1_900_000
    maps: int = 600_000

    def smaller(self) -> Iterator[Room]:
        """This one, then half of everything, and so on, down to next to nothing."""
        values = dataclasses.astuple(self)
        while True:
            yield Room(*values)
            if max(values) <= 1:
                return
            values = tuple(max(value // 2, 1) for value in values)


def weightiest(findings: Findings, room: Room) -> tuple[tuple[int, Contribution], ...]:
    """The connections that are shown, with their places from 1 on: those that weigh most, in the order of the data."""
    measured = {} if findings.usage is None else {row.name: abs(row.cut.loss) for row in findings.usage.connections}
    weight = measured or findings.shares
    rows = list(enumerate(findings.contributions, 1))
    most = sorted(rows, key=lambda row: -weight.get(row[1].name, 0.0))[: room.connections]
    return tuple(sorted(most, key=lambda row: row[0]))


def left_out(findings: Findings, room: Room) -> str:
    """What is said of connections and blocks that are not shown; empty where all are."""
    told = []
    of = len(findings.contributions or findings.plan.links)
    if of > room.connections:
        why = "the first" if not findings.contributions else (
            "those whose cutting changes the loss most" if findings.usage else "those with the largest message share"
        )  # fmt: skip
        told.append(f"There is room for {room.connections:,} of the {of:,} connections: {why}.")
    if len(findings.plan.blocks) > room.blocks:
        told.append(f"The picture has {room.blocks:,} of the {len(findings.plan.blocks):,} attention blocks.")
    return " ".join(told)


def spread(things: Sequence[Thing], most: int) -> tuple[Thing, ...]:
    """Up to ``most`` of them, evenly spread.

    >>> spread("abcdefgh", 3)
    ('a', 'c', 'f')
    """
    count = min(most, len(things))
    return tuple(things[place * len(things) // count] for place in range(count))


def excerpt(findings: Findings, room: Room, shown: Iterable[Contribution]) -> tuple[Contents, tuple[Lane, ...]]:
    """The plan and its stages as they are drawn: with the connections that are shown, and as many blocks as there is
    room for, those between which they run first.
    """
    plan = findings.plan
    links: Sequence[Link] = plan.links
    if findings.contributions:
        heard = {(row.source, row.target) for row in shown}
        links = [link for link in links if (link.source, link.target) in heard]
    links = links[: room.connections]
    if len(links) == len(plan.links) and len(plan.blocks) <= room.blocks:
        return plan, findings.lanes
    ends = {name for link in links for name in (link.source, link.target)}
    names = [block.name for block in plan.blocks]
    kept = set(sorted(names, key=lambda name: name not in ends)[: room.blocks])
    drawn = {(link.source, link.target) for link in links if {link.source, link.target} <= kept}
    chains = tuple(
        Chain(
            chain.dimension,
            tuple(name for name in chain.blocks if name in kept),
            tuple(link for link in chain.links if (link.source, link.target) in drawn),
        )
        for chain in plan.chains
    )
    lanes = (dataclasses.replace(lane, blocks=tuple(n for n in lane.blocks if n in kept)) for lane in findings.lanes)
    whole = len(kept) == len(names)
    blocks = tuple(block for block in plan.blocks if block.name in kept)
    return Contents(blocks, chains, model=plan.model), tuple(lane for lane in lanes if whole or lane.blocks)
