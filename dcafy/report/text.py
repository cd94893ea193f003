"""Findings in a terminal: answers, chains, attention values as sparklines, connections as bars."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from dcafy.amounts import fixed, percent
from dcafy.analysis.listening import usage_tables
from dcafy.analysis.values import common_axes
from dcafy.link.topology import ways
from dcafy.plan.tables import plan_tables
from dcafy.report.answer import answers
from dcafy.report.findings import Findings
from dcafy.tables import Cell, Column, Sheet
from dcafy.wording import printable
from dcafy.zoos.specs import RANDOM

LEVELS = " ▁▂▃▄▅▆▇█"
BINS, BAR = 20, 20


def print_findings(findings: Findings, console: Console) -> None:
    """Prints the answers, the chains, the attention values and the connections; names are never read as markup."""
    for row in findings.pictures.skipped:
        console.print(Text(printable(f"left out {row.name}: {row.reason}")))
    for side in findings.sides:
        if side.random:
            console.print(Text(f"{printable(side.title)}: {RANDOM}"))
    for each in answers(findings):
        console.print(Text(f"{each.question} {printable(each.short)}", "bold"))
        console.print(Text(printable("  " + " ".join(each.because))))
    console.print(*plan_tables(findings.plan), sep="")
    for one in findings.handed:
        console.print(Text(printable(f"{one}\n{one.what}")))
    if any(side.values for side in findings.sides):
        console.print(_values(findings))
    if findings.contributions:
        console.print(_connections(findings))
        for what in ways(findings.plan.links):
            console.print(Text(what))
    if findings.usage is not None:
        console.print(*usage_tables(findings.usage), sep="\n")


def sparkline(shares: Sequence[float], top: float) -> str:
    """One character for each share; the highest stands for ``top``, and what is not 0 is never blank.

    >>> sparkline([0.0, 0.001, 0.25, 0.5], 0.5)
    ' ▁▄█'
    """
    steps = len(LEVELS) - 1
    return "".join(LEVELS[min(max(round(share / top * steps), 1), steps) if share > 0 else 0] for share in shares)


def bar(share: float) -> str:
    """A share of 1 as a bar of 20 characters.

    >>> bar(0.25)
    '█████'
    """
    return "█" * round(share * BAR)


def _values(findings: Findings) -> Sheet:
    everything = tuple(block for side in findings.sides for block in side.values)
    low, high, top = common_axes(everything, BINS)
    sides = [(side.title, {block.name: block for block in side.values}) for side in findings.sides]
    rows: list[tuple[Cell, ...]] = []
    for name in dict.fromkeys(block.name for block in everything):
        for title, values in sides:
            if name in values:
                line = sparkline(values[name].histogram(low, high, BINS).shares, top)
                rows.append((name, title, line, fixed(values[name].spread, 3), percent(values[name].near_half)))
    columns = (
        Column("block", "name"),
        Column("network"),
        Column(f"{low:.3g} to {high:.3g}"),
        Column("spread", "number"),
        Column("near 0.5", "number"),
    )
    return Sheet(columns, tuple(rows), "attention values", _numbers([str(row[0]) for row in rows]))


def _connections(findings: Findings) -> Sheet:
    rows: list[tuple[Cell, ...]] = []
    for row in findings.contributions:
        share = findings.shares.get(row.name, 0.0)
        weights = (fixed(row.alpha), fixed(row.beta, sign=True))
        rows.append(
            (row.name, *weights, *(text for value in (row.ratio, share) for text in (percent(value), bar(value))))
        )
    columns = (
        Column("connection", "name"),
        *(Column(title, "number") for title in ("α", "β", "contribution")),
        Column(""),
        Column("message share", "number"),
        Column(""),
    )
    return Sheet(columns, tuple(rows), "connections", _numbers([row.name for row in findings.contributions]))


def _numbers(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(dict.fromkeys(names), start=1)}
