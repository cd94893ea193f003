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
from dcafy.runs.compare import LOSSES, Comparison, Pair
from dcafy.runs.evidence import Difference
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
    parts.append(_saved(directory))
    return unfolded(parts)


def _saved(directory: Path) -> str:
    """Where the model is, and how it is opened."""
    folder = printable(str(directory))
    if not (directory / MARKER).exists():
        return f"saved in {folder}: model.safetensors has the network's own state dict"
    # A network that no zoo builds by name is loaded into one that the user builds.
    named = json.loads((directory / MARKER).read_text(encoding="utf-8"))["model"] is not None
    return f"saved in {folder}: dcafy.load({folder!r}{'' if named else ', model=YOUR_NETWORK'}) gives the model"


def of_comparison(comparison: Comparison) -> str:
    """All networks side by side, the paired differences with their intervals, and how the connections are used."""
    table = Table(title=f"Seeds {', '.join(map(str, comparison.seeds))}", title_justify="left")
    table.add_column("network")
    some = next(iter(comparison.arms.values()))
    measured = [name for name in some.metrics[0] if name != "images"]
    for column in (*measured, "parameters", "GFLOPs", "s/step"):
        table.add_column(column, justify="right")
    for arm, side in comparison.arms.items():
        means = {metric: statistics.fmean(row[metric] for row in side.metrics) for metric in measured}
        table.add_row(
            arm,
            *(f"{mean:.4f}" if metric in LOSSES else f"{mean:.2%}" for metric, mean in means.items()),
            f"{side.parameters:,}",
            f"{side.gflops:.3f}",
            f"{side.step_seconds:.4f}",
        )
    parts: list[RenderableType] = [table]
    for pair in comparison.pairs:
        parts += [_told(pair, metric, difference) for metric, difference in pair.differences.items()]
    if any(difference.images for pair in comparison.pairs for difference in pair.differences.values()):
        parts.append("95% intervals over seeds and validation images")
    parts += [part for usage in comparison.usage[:1] if usage is not None for part in usage_tables(usage)]
    return unfolded(parts)


def _told(pair: Pair, metric: str, difference: Difference) -> str:
    """A difference in one line, in points or as a loss."""
    scale, digits, unit = (1, 4, "") if metric in LOSSES else (100, 2, " points")
    mean, low, high = (
        None if value is None else f"{scale * value:+.{digits}f}"
        for value in (difference.mean, difference.low, difference.high)
    )
    interval = "" if low is None else f", 95% interval {low} to {high}"
    return f"{metric}, {pair.one} minus {pair.other}: {mean}{unit}{interval}: {difference.verdict}"
