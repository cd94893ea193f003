"""How a plan is shown: chains, what was skipped, and the nodes of every block.

Names come from other people's networks and files. They are put into ``rich.text.Text``, never into
markup, and what is not printable in them is escaped.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from dcafy.plan.blocks import AttentionBlock, Chain, Contents, Link, hearing
from dcafy.plan.options import Linking
from dcafy.wording import counted, printable

WIDTH = 120
"""Columns of a plan as plain text."""


def link_matches(plan: Contents, link: Link) -> tuple[str | None, str | None]:
    """How convert will match channels and sizes on this link; ``None`` where they are equal already.

    Maps that have a size are broadcast over channels, not matched.
    """
    source, target, options = plan.block(link.source), plan.block(link.target), Linking().overridden(link)
    channels = target.size is None and source.channels != target.channels
    sizes = target.size is not None and source.size != target.size
    return options["channel_match"] if channels else None, options["spatial_match"] if sizes else None


def plan_tables(plan: Contents) -> Iterator[RenderableType]:
    """The plan as rich renderables: a headline, the chains, the islands and what was skipped."""
    yield _headline(plan)
    connected = [chain for chain in plan.chains if chain.links]
    alone = [chain for chain in plan.chains if not chain.links]
    for number, chain in enumerate(connected, start=1):
        title = f"chain {number}: {counted(len(chain.blocks), 'block')}, {counted(len(chain.links), 'connection')}"
        yield _titled(title, _block_table(plan, [chain]))
    if alone:
        yield _titled("on their own: no connection leads to or from these blocks", _block_table(plan, alone))
    if plan.islands:
        yield _titled("islands: submodules that were traced on their own", _rows(("submodule",), zip(plan.islands)))
    if plan.skipped:
        rows = ((row.name, row.reason) for row in plan.skipped)
        yield _titled("skipped: seen and left alone", _rows(("name", "reason"), rows))
    if plan.costs:
        yield _titled("what each topology would add, with convert's defaults", _cost_table(plan))


def node_table(plan: Contents) -> RenderableType:
    """Every node of every block with its role, in the order data meets the blocks.

    The names are those of the graph in which everything was entered; they inform and do not address.
    """
    table = plain_table("block", "role", "node")
    for block in plan.blocks:
        roles = {"extraction": block.extraction, "transformation": block.transformation, "fusion": block.fusion}
        for role, nodes in roles.items():
            for node in nodes:
                table.add_row(_name(block.name), role, _name(node))
        table.add_section()
    return _titled("nodes", table)


def as_text(plan: Contents, *, nodes: bool = False) -> str:
    """The plan as plain text of at most 120 columns, without colour."""
    return plain([*plan_tables(plan), *([node_table(plan)] if nodes else [])], WIDTH)


def written(plan: Contents, *, nodes: bool = False, terminal: bool = False) -> str:
    """The plan as the command line prints it.

    On a terminal that is its width and its colours; in a file or a pipe every name stays on one line,
    so that ``grep`` finds it.
    """
    tables = [*plan_tables(plan), *([node_table(plan)] if nodes else [])]
    if not terminal:
        return unfolded(tables)
    console = Console(highlight=False)
    with console.capture() as capture:
        console.print(*tables, sep="")
    return capture.get()


def unfolded(renderables: Sequence[RenderableType]) -> str:
    """What rich prints where every name has room on one line."""
    return plain(renderables, max(WIDTH, *map(_natural_width, renderables)))


def plain(renderables: Iterable[RenderableType], width: int) -> str:
    """What rich prints into a file of so many columns: no colour, no markup, no blanks at the ends of lines."""
    console = Console(
        file=io.StringIO(),
        width=width,
        color_system=None,
        force_terminal=False,
        highlight=False,
        legacy_windows=False,
        markup=False,
    )
    with console.capture() as capture:
        for renderable in renderables:
            console.print(renderable)
    return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())


def _natural_width(renderable: RenderableType) -> int:
    """Columns that it takes if nothing is to be folded."""
    console = Console(width=10_000, color_system=None, force_terminal=False, legacy_windows=False)
    return Measurement.get(console, console.options, renderable).maximum


def _headline(plan: Contents) -> Text:
    counts = ", ".join(
        (
            counted(len(plan.blocks), "attention block"),
            counted(len(plan.chains), "chain"),
            counted(len(plan.links), "connection"),
            f"{len(plan.skipped)} skipped",
        )
    )
    return Text.assemble((_name(plan.model or "model").plain, "bold"), f": {counts}\n")


def _block_table(plan: Contents, chains: Sequence[Chain]) -> Table:
    """One row for each block; a block that hears several others has them under one another."""
    table = plain_table("block", "dimension", "channels", "size", "gate", "predecessor", "match")
    table.columns[2].justify = "right"
    for chain in chains:
        heard = hearing(chain.links)
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


def _cost_table(plan: Contents) -> Table:
    table = plain_table("topology", "connections", "parameters")
    for column in table.columns[1:]:
        column.justify = "right"
    for cost in plan.costs:
        table.add_row(_name(cost.topology), str(cost.connections), f"{cost.parameters:,}")
    return table


def _match(plan: Contents, target: AttentionBlock, link: Link) -> str:
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


def _rows(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = plain_table(*columns)
    for row in rows:
        table.add_row(*map(_name, row))
    return table


def plain_table(*columns: str) -> Table:
    """A table of these columns whose cells fold where they are too long."""
    table = Table(box=box.SIMPLE)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _titled(title: str, table: Table) -> Group:
    # A table's own title is wrapped at the width of the table.
    return Group(Text(title, "bold"), table)


def _lines(texts: Sequence[Text]) -> Text:
    return Text("\n").join(texts) if texts else Text("-")


def _name(name: str) -> Text:
    return Text(printable(name))
