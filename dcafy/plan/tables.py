"""How a plan is shown: chains, what was skipped, and the nodes of every block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import RenderableType
from rich.text import Text

from dcafy.display import printed
from dcafy.plan.blocks import AttentionBlock, Chain, Contents, Link, hearing
from dcafy.plan.options import Linking
from dcafy.tables import NONE, WIDTH, Cell, Column, Sheet, shown
from dcafy.wording import counted, printable


def link_matches(plan: Contents, link: Link) -> tuple[str | None, str | None]:
    """How convert will match channels and sizes on this link; ``None`` where they are equal already.

    Maps that have a size are broadcast over channels, not matched.
    """
    source, target, options = plan.block(link.source), plan.block(link.target), Linking().overridden(link)
    channels = target.size is None and source.channels != target.channels
    sizes = target.size is not None and source.size != target.size
    return options["channel_match"] if channels else None, options["spatial_match"] if sizes else None


def plan_tables(plan: Contents) -> Iterator[RenderableType]:
    """The plan as rich renderables: a headline, and what :func:`plan_sheets` has."""
    yield Text.assemble((printable(plan.model or "model"), "bold"), f": {headline(plan)}\n")
    yield from plan_sheets(plan)


def plan_sheets(plan: Contents) -> Iterator[Sheet]:
    """The plan as tables: the chains, the islands, what was skipped, and what it would cost."""
    connected = [chain for chain in plan.chains if chain.links]
    for number, chain in enumerate(connected, start=1):
        counts = f"{counted(len(chain.blocks), 'block')}, {counted(len(chain.links), 'connection')}"
        yield _block_sheet(plan, [chain], f"chain {number}: {counts}, {chain.dimension} attention")
    alone = [chain for chain in plan.chains if not chain.links]
    if alone:
        yield _block_sheet(plan, alone, "on their own: no connection leads to or from these blocks")
    if plan.islands:
        rows = tuple((path,) for path in plan.islands)
        yield Sheet((Column("submodule", "name"),), rows, "islands: submodules that were traced on their own")
    if plan.skipped:
        columns = (Column("name", "name"), Column("reason", "text"))
        yield Sheet(columns, tuple((row.name, row.reason) for row in plan.skipped), "skipped: seen and left alone")
    if plan.costs:
        costs = tuple(
            (
                one.topology,
                str(one.connections),
                f"{one.parameters:,}",
                "" if one.multiply_adds is None else f"{one.multiply_adds:,}",
            )
            for one in plan.costs
        )
        yield Sheet(_COSTS, costs, "what each topology would add, with convert's defaults")


_COSTS = (
    Column("topology"),
    Column("connections", "number"),
    Column("parameters", "number"),
    Column("multiply-adds", "number"),
)


def headline(plan: Contents) -> str:
    """How much there is of what."""
    counts = ((plan.blocks, "attention block"), (plan.chains, "chain"), (plan.links, "connection"))
    return ", ".join([*(counted(len(some), what) for some, what in counts), f"{len(plan.skipped)} skipped"])


def node_table(plan: Contents) -> Sheet:
    """Every node of every block with its role, in the order data meets the blocks.

    The names are those of the graph in which everything was entered; they inform and do not address.
    """
    rows: list[tuple[Cell, ...] | None] = []
    for block in plan.blocks:
        roles = {"extraction": block.extraction, "transformation": block.transformation, "fusion": block.fusion}
        rows += [(block.name, role, node) for role, nodes in roles.items() for node in nodes]
        rows.append(None)
    return Sheet((Column("block", "name"), Column("role"), Column("node", "name")), tuple(rows[:-1]), "nodes")


def as_text(plan: Contents, *, nodes: bool = False) -> str:
    """The plan as plain text, without colour, as wide as the terminal or else of at most 120 columns."""
    return printed(_tables(plan, nodes), WIDTH)


def written(plan: Contents, *, nodes: bool = False, terminal: bool = False) -> str:
    """The plan as the command line prints it (:func:`dcafy.tables.shown`)."""
    return shown(_tables(plan, nodes), terminal=terminal)


def _tables(plan: Contents, nodes: bool) -> list[RenderableType]:
    return [*plan_tables(plan), *([node_table(plan)] if nodes and plan.blocks else [])]


def numbered(plan: Contents) -> Mapping[str, int]:
    """Block -> its number, counted from 1 in the order data meets them."""
    return {block.name: number for number, block in enumerate(plan.blocks, start=1)}


def _block_sheet(plan: Contents, chains: Sequence[Chain], title: str) -> Sheet:
    """One row for each block; a block that hears several others has them under one another."""
    rows: list[tuple[Cell, ...]] = []
    several = len({chain.dimension for chain in chains}) > 1
    for chain in chains:
        heard = hearing(chain.links)
        for name in chain.blocks:
            block, links = plan.block(name), heard.get(name, [])
            rows.append(
                (
                    name,
                    block.dimension if several or not chain.links else NONE,
                    str(block.channels),
                    "x".join(map(str, block.size)) if block.size else NONE,
                    block.gate if block.fusion_kind == "mul" else f"{block.gate}, {block.fusion_kind}",
                    tuple(link.source for link in links),
                    next((link.shares for link in links if link.shares), NONE),
                    tuple(_match(plan, block, link) for link in links),
                )
            )
    return Sheet(_BLOCK, tuple(rows), title, numbered(plan))


_BLOCK = (
    Column("block", "name"),
    Column("dimension"),
    Column("channels", "number"),
    Column("size"),
    Column("gate"),
    Column("hears", "row"),
    Column("connection of", "row"),
    Column("match"),
)


def _match(plan: Contents, target: AttentionBlock, link: Link) -> str:
    """What a link does to fit, in one word or two: ``fc2 96 to 144``."""
    source = plan.block(link.source)
    channel, spatial = link_matches(plan, link)
    parts = [f"{channel} {source.channels} to {target.channels}"] if channel else []
    if spatial:
        here, there = ("x".join(map(str, size)) if size else "?" for size in (source.size, target.size))
        parts.append(f"{spatial} {here} to {there}")
    if link.schema not in (None, Linking().schema):
        parts.append(f"({link.schema})")
    return " ".join(parts) or NONE
