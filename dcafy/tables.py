"""How a plan is shown: chains, what was skipped, and the nodes of every block.

Names come from other people's networks and files. They are put into ``rich.text.Text``, never into
markup, and what is not printable in them is escaped.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from dcafy.blocks import AttentionBlock, Chain, Link, Plan

__all__ = ["as_text", "link_matches", "node_table", "plan_tables", "printable"]

DEFAULT_CHANNEL_MATCH = "fc2"
DEFAULT_SPATIAL_MATCH = "avg"
"""What :func:`dcafy.convert` does where nothing else is asked for."""

WIDTH = 120
"""Columns of a plan as plain text."""


def printable(name: str) -> str:
    """``name`` with everything that could steer a terminal written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)


def link_matches(plan: Plan, link: Link) -> tuple[str | None, str | None]:
    """How convert will match channels and sizes on this link; ``None`` where they are equal already.

    Maps of the dimension ``spatial`` with different numbers of channels are broadcast, not matched.
    """
    source, target = plan.block(link.source), plan.block(link.target)
    channels = target.dimension == "channel" and source.channels != target.channels
    sizes = target.dimension == "spatial" and source.size != target.size
    return (
        (link.channel_match or DEFAULT_CHANNEL_MATCH) if channels else None,
        (link.spatial_match or DEFAULT_SPATIAL_MATCH) if sizes else None,
    )


def plan_tables(plan: Plan) -> Iterator[RenderableType]:
    """The plan as rich renderables: a headline, the chains, the islands and what was skipped."""
    yield _headline(plan)
    connected = [chain for chain in plan.chains if chain.links]
    alone = [chain for chain in plan.chains if not chain.links]
    for number, chain in enumerate(connected, start=1):
        title = f"chain {number}: {_count(len(chain.blocks), 'block')}, {_count(len(chain.links), 'connection')}"
        yield _block_table(plan, [chain], title)
    if alone:
        yield _block_table(plan, alone, "on their own: no block of the same dimension comes before or after")
    if plan.islands:
        yield _island_table(plan.islands)
    if plan.skipped:
        yield _skipped_table(plan)


def node_table(plan: Plan) -> Table:
    """Every node of every block with its role, in the order data meets the blocks.

    The names are those of the graph in which everything was entered; they inform and do not address.
    """
    table = _table("nodes", "block", "role", "node")
    for block in plan.blocks:
        roles = {"extraction": block.extraction, "transformation": block.transformation, "fusion": block.fusion}
        for role, nodes in roles.items():
            for node in nodes:
                table.add_row(_name(block.name), role, _name(node))
        table.add_section()
    return table


def as_text(plan: Plan, *, nodes: bool = False) -> str:
    """The plan as plain text of at most 120 columns, without colour."""
    return rendered([*plan_tables(plan), *([node_table(plan)] if nodes else [])], width=WIDTH)


def rendered(renderables: Iterable[RenderableType], *, width: int | None = None, colour: bool = False) -> str:
    """What rich makes of these, as one string; in the terminal's own width and colours where asked."""
    if colour:
        console = Console(width=width, highlight=False)
    else:
        console = Console(
            file=io.StringIO(), width=width or WIDTH, color_system=None, force_terminal=False, highlight=False
        )
    with console.capture() as capture:
        for renderable in renderables:
            console.print(renderable)
    return "".join(f"{line.rstrip()}\n" if not colour else f"{line}\n" for line in capture.get().splitlines())


def _headline(plan: Plan) -> Text:
    counts = ", ".join(
        (
            _count(len(plan.blocks), "attention block"),
            _count(len(plan.chains), "chain"),
            _count(len(plan.links), "connection"),
            f"{len(plan.skipped)} skipped",
        )
    )
    return Text.assemble((_name(plan.model or "model").plain, "bold"), f": {counts}\n")


def _block_table(plan: Plan, chains: Sequence[Chain], title: str) -> Table:
    """One row for each block; a block that hears several others has them under one another."""
    table = _table(title, "block", "dimension", "channels", "size", "gate", "predecessor", "match")
    table.columns[2].justify = "right"
    for chain in chains:
        heard: dict[str, list[Link]] = {}
        for link in chain.links:
            heard.setdefault(link.target, []).append(link)
        for name in chain.blocks:
            block, links = plan.block(name), heard.get(name, [])
            table.add_row(
                _name(name),
                block.dimension,
                str(block.channels),
                "x".join(map(str, block.size)) if block.size else "-",
                block.gate if block.fusion_kind == "mul" else f"{block.gate}, {block.fusion_kind}",
                _lines([_name(link.source) for link in links]),
                _lines([Text(_match(plan, block, link)) for link in links]),
            )
    return table


def _match(plan: Plan, target: AttentionBlock, link: Link) -> str:
    """What a link does to fit, in one word or two: ``fc2 96 to 144``."""
    source = plan.block(link.source)
    channel, spatial = link_matches(plan, link)
    parts = [f"{channel} {source.channels} to {target.channels}"] if channel else []
    if spatial:
        here, there = ("x".join(map(str, size)) if size else "?" for size in (source.size, target.size))
        parts.append(f"{spatial} {here} to {there}")
    if link.schema is not None:
        parts.append(f"({link.schema})")
    return " ".join(parts) or "-"


def _island_table(islands: Sequence[str]) -> Table:
    table = _table("islands: submodules that were traced on their own", "submodule")
    for path in islands:
        table.add_row(_name(path))
    return table


def _skipped_table(plan: Plan) -> Table:
    table = _table("skipped: seen and left alone", "name", "reason")
    for row in plan.skipped:
        table.add_row(_name(row.name), _name(row.reason))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _lines(texts: Sequence[Text]) -> Text:
    return Text("\n").join(texts) if texts else Text("-")


def _name(name: str) -> Text:
    return Text(printable(name))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
