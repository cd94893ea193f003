"""What a run has shown, in words and tables."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table

from dcafy.analysis.listening import usage_tables
from dcafy.checkpoint.folder import MARKER
from dcafy.plan.tables import unfolded
from dcafy.runs.compare import Comparison
from dcafy.training.history import History
from dcafy.training.telling import metrics_in_words
from dcafy.wording import printable


def of_history(history: History, directory: Path) -> str:
    """The last metrics, how the connections are used, and where the model is."""
    metrics = metrics_in_words(history.metrics)
    parts: list[RenderableType] = [f"validation after {len(history.epochs)} epochs: {metrics}"]
    if history.skipped:
        parts.append(f"{len(history.skipped)} images could not be read and were skipped:")
        parts += [f"  {printable(name)}" for name in history.skipped[:10]]
    if history.usage is not None:
        parts += usage_tables(history.usage)
    # A network that no zoo builds by name is loaded into one that the user builds.
    named = json.loads((directory / MARKER).read_text(encoding="utf-8"))["model"] is not None
    folder = printable(str(directory))
    parts.append(f"saved in {folder}: dcafy.load({folder!r}{'' if named else ', model=YOUR_NETWORK'}) gives the model")
    return unfolded(parts)


def of_comparison(comparison: Comparison) -> str:
    """Both networks side by side, the paired differences with their intervals, and how the connections are used."""
    sides = {"original": comparison.original, "connected": comparison.connected}
    table = Table(title=f"Seeds {', '.join(map(str, comparison.seeds))}", title_justify="left")
    table.add_column("network")
    measured = tuple(comparison.differences)
    for column in (*measured, "parameters", "GFLOPs", "s/step"):
        table.add_column(column, justify="right")
    for name, side in sides.items():
        means = [statistics.fmean(row[metric] for row in side.metrics) for metric in measured]
        table.add_row(
            name,
            *(f"{mean:.2%}" for mean in means),
            f"{side.parameters:,}",
            f"{side.gflops:.3f}",
            f"{side.step_seconds:.4f}",
        )
    parts: list[RenderableType] = [table]
    for name, difference in comparison.differences.items():
        interval = (
            ""
            if difference.low is None or difference.high is None
            else f", 95% interval {100 * difference.low:+.2f} to {100 * difference.high:+.2f}"
        )
        parts.append(
            f"{name}, connected minus original: {100 * difference.mean:+.2f} points{interval}: {difference.verdict}"
        )
    parts += [part for usage in comparison.usage[:1] if usage is not None for part in usage_tables(usage)]
    return unfolded(parts)
