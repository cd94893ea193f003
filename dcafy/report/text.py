"""Findings in a terminal: chains, attention values as sparklines, connections as bars."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dcafy.analysis.listening import usage_tables
from dcafy.analysis.values import common_axes
from dcafy.plan.tables import plain_table, plan_tables
from dcafy.report.findings import Findings
from dcafy.wording import printable
from dcafy.zoos.specs import RANDOM

LEVELS = " ▁▂▃▄▅▆▇█"
BINS, BAR = 20, 20


def print_findings(findings: Findings, console: Console) -> None:
    """Prints the chains, the attention values and the connections; names are never read as markup."""
    for row in findings.pictures.skipped:
        console.print(Text(f"left out {row.name}: {row.reason}"))
    for side in findings.sides:
        if side.random:
            console.print(Text(f"{printable(side.title)}: {RANDOM}"))
    console.print(*plan_tables(findings.plan), sep="")
    if any(side.values for side in findings.sides):
        console.print(Text("attention values", "bold"), _values(findings), sep="\n")
    if findings.contributions:
        console.print(Text("connections", "bold"), _connections(findings), sep="\n")
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


def _values(findings: Findings) -> Table:
    everything = tuple(block for side in findings.sides for block in side.values)
    low, high, top = common_axes(everything, BINS)
    table = plain_table("block", "network", f"{low:.3g} to {high:.3g}", "spread", "near 0.5")
    sides = [(side.title, {block.name: block for block in side.values}) for side in findings.sides]
    for name in dict.fromkeys(block.name for block in everything):
        for title, values in sides:
            if name in values:
                line = sparkline(values[name].histogram(low, high, BINS).shares, top)
                numbers = (f"{values[name].spread:.3f}", f"{values[name].near_half:.1%}")
                table.add_row(*map(Text, (printable(name), printable(title), line, *numbers)))
    return table


def _connections(findings: Findings) -> Table:
    table = plain_table("connection", "α", "β", "contribution", "", "message share", "")
    for row in findings.contributions:
        share = findings.shares.get(row.name, 0.0)
        weights, shares = (f"{row.alpha:.4f}", f"{row.beta:+.4f}"), (row.ratio, share)
        bars = (text for value in shares for text in (f"{value:.1%}", bar(value)))
        table.add_row(*map(Text, (printable(row.name), *weights, *bars)))
    return table
