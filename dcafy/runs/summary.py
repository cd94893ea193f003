"""What a run has shown, in words and tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table
from torch import nn

from dcafy.analysis.listening import usage_tables
from dcafy.checkpoint.folder import MARKER
from dcafy.detection.resampling import RESAMPLES
from dcafy.emit.dca import connections, is_connected
from dcafy.images.about import About, known
from dcafy.plan.tables import WIDTH, plain, unfolded
from dcafy.runs.compare import LOSSES, Comparison, Pair
from dcafy.runs.evaluating import Evaluation
from dcafy.runs.evidence import Difference
from dcafy.training.history import History
from dcafy.training.telling import metrics_in_words
from dcafy.wording import counted, few, printable


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


def of_network(network: nn.Module) -> str:
    """That a network is connected, with α and β; what it was trained on, how good it is, what it tells apart.

    Empty for a network that is not connected and comes from no folder.
    """
    parts: list[RenderableType] = []
    if is_connected(network):
        table = Table(title="It is connected, with these α and β", title_justify="left")
        table.add_column("receiving block", overflow="fold")
        for column in ("α", "β", "contribution"):
            table.add_column(column, justify="right")
        for name, one in connections(network).items():
            table.add_row(
                printable(name), f"{one.alpha.item():.4f}", f"{one.beta.item():+.4f}", f"{one.contribution():.4f}"
            )
        parts.append(table)
    found = known(network)
    if found is not None:
        parts += _about_in_words(found)
    return plain(parts, WIDTH) if parts else ""


def _about_in_words(found: About) -> list[str]:
    lines = []
    if found.trained is not None:
        trained = found.trained
        how_good = metrics_in_words(trained.metrics)
        lines.append(f"trained for {counted(trained.epochs, 'epoch')} on {printable(trained.data)}: {how_good}")
    else:
        lines.append("not trained by dcafy")
    if found.classes:
        named = few([printable(name) for name in found.classes], 8)
        lines.append(f"{found.task}, {len(found.classes)} classes: {named}")
    how = found.preparation
    if how is not None:
        sizes = [
            " x ".join(map(str, sides)) if isinstance(sides, tuple) else str(sides) for sides in (how.size, how.resize)
        ]
        lines.append(
            f"images: {sizes[0]} pixels in {counted(how.channels, 'channel')}, resized to {sizes[1]} ({how.crop}, "
            f"{how.interpolation}), mean {_numbers(how.mean)}, deviation {_numbers(how.std)}"
        )
    return lines


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


_SHOWN = 20
"""Classes up to which their confusions are shown as a table."""


def of_evaluation(found: Evaluation, title: str) -> str:
    """The metrics, class by class, and which classes are taken for which."""
    parts: list[RenderableType] = [f"{title}: {metrics_in_words(found.metrics)} ({found.metrics['images']:.0f} images)"]
    columns = ("AP",) if not found.confusion else ("images", "recall", "precision")
    table = Table(title="Classes", title_justify="left")
    table.add_column("class", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    for row in found.classes:
        if row.images != 0:
            table.add_row(printable(row.name), *(_cell(getattr(row, column)) for column in columns))
    parts.append(table)
    wrong = [
        (count, row, column)
        for row, counts in enumerate(found.confusion)
        for column, count in enumerate(counts)
        if count and row != column
    ]
    if wrong:
        taken = sorted(wrong, key=lambda one: -one[0])[:_SHOWN]
        names = [printable(row.name) for row in found.classes]
        parts.append("Most often taken for another:")
        parts += [f"  {names[row]} for {names[column]}: {count}" for count, row, column in taken]
    return plain(parts, WIDTH).rstrip("\n")


def of_difference(found: Evaluation, other: Evaluation, differences: Mapping[str, Difference], against: str) -> str:
    """The metrics of the other network, and each difference with its interval over the images."""
    lines = [f"{against}: {metrics_in_words(other.metrics)}"]
    over = f"the images ({RESAMPLES:,} draws of them)" if found.seen else "the images"
    for name, difference in differences.items():
        scale, unit = (1, "") if name == "loss" else (100, " points")
        line = f"{name}, MODEL minus ORIGINAL: {scale * difference.mean:+.4g}{unit}"
        if difference.low is not None and difference.high is not None:
            line += f", 95% interval over {over} {scale * difference.low:+.4g} to {scale * difference.high:+.4g}"
            line += "" if difference.low > 0 or difference.high < 0 else ": no difference that the images could show"
        lines.append(line)
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2%}"
