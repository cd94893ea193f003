"""What a run has shown, in words and tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import RenderableType
from torch import nn

from dcafy.amounts import fixed, metric, operations, percent, points
from dcafy.analysis.listening import usage_tables
from dcafy.attention.inserted import handed_on
from dcafy.checkpoint.folder import MARKER
from dcafy.detection.resampling import RESAMPLES
from dcafy.emit.dca import connections, is_connected
from dcafy.images.about import About, known
from dcafy.runs.compare import Comparison, measured
from dcafy.runs.evaluating import Evaluation
from dcafy.runs.evidence import LOSSES, Difference
from dcafy.tables import NONE, Cell, Column, Sheet
from dcafy.training.history import History
from dcafy.training.telling import metrics_in_words
from dcafy.wording import counted, few, printable


def of_history(history: History, directory: Path) -> list[RenderableType]:
    """The last metrics, how the connections are used, and where the model is."""
    metrics = metrics_in_words(history.metrics)
    parts: list[RenderableType] = [f"validation after {counted(len(history.epochs), 'epoch')}: {metrics}"]
    if history.skipped:
        parts.append(f"{len(history.skipped)} images could not be read and were skipped:")
        parts += [f"  {printable(name)}" for name in history.skipped[:10]]
    if history.usage is not None:
        parts += usage_tables(history.usage)
    parts.append(_saved(directory))
    return parts


def _saved(directory: Path) -> str:
    """Where the model is, and how it is opened."""
    folder = printable(str(directory))
    if not (directory / MARKER).exists():
        return f"saved in {folder}: model.safetensors has the network's own state dict"
    # A network that no zoo builds by name is loaded into one that the user builds.
    named = json.loads((directory / MARKER).read_text(encoding="utf-8"))["model"] is not None
    return f"saved in {folder}: dcafy.load({folder!r}{'' if named else ', model=YOUR_NETWORK'}) gives the model"


def of_comparison(comparison: Comparison) -> list[RenderableType]:
    """All networks side by side, the paired differences with their intervals, and how the connections are used."""
    names = measured([row for side in comparison.arms.values() for row in side.metrics])
    rows: list[tuple[Cell, ...]] = []
    unit, costs = operations(*(side.gflops for side in comparison.arms.values()))
    for (arm, side), cost in zip(comparison.arms.items(), costs, strict=True):
        means = (metric(name, statistics.fmean(row[name] for row in side.metrics)) for name in names)
        rows.append((arm, *means, f"{side.parameters:,}", cost, fixed(side.step_seconds)))
    columns = (Column("network"), *(Column(name, "number") for name in (*names, "parameters", unit, "s/step")))
    parts: list[RenderableType] = [Sheet(columns, tuple(rows), f"seeds {', '.join(map(str, comparison.seeds))}")]
    for pair in comparison.pairs:
        for name, one in pair.differences.items():
            told = _told(name, one)
            parts.append(f"{name}, {pair.one} minus {pair.other}: {told}: {one.verdict}")
    if any(difference.images for pair in comparison.pairs for difference in pair.differences.values()):
        parts.append("95% intervals over seeds and validation images")
    parts += [part for usage in comparison.usage[:1] if usage is not None for part in usage_tables(usage)]
    return parts


def _told(metric: str, difference: Difference, over: str = "") -> str:
    """A difference and its interval: of a loss as it is, else in points."""
    write, unit = (_signed, "") if metric in LOSSES else (points, " points")
    if difference.low is None or difference.high is None:
        return f"{write(difference.mean)}{unit}"
    interval = f"{write(difference.low)} to {write(difference.high)}"
    return f"{write(difference.mean)}{unit}, 95% interval{over} {interval}"


def _signed(value: float) -> str:
    return fixed(value, sign=True)


def of_network(network: nn.Module) -> list[RenderableType]:
    """That a network is connected, with α and β, or hands a state on; what it was trained on, how good it is, what it
    tells apart.

    Nothing for a network where nothing is connected and that comes from no folder.
    """
    parts: list[RenderableType] = []
    parts += (f"{one}\n{one.what}" for one in handed_on(network))
    if is_connected(network):
        parts.append(connections(network).sheet("It is connected, with these α and β"))
    found = known(network)
    if found is not None:
        parts += _about_in_words(found)
    return parts


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
"""How many pairs of classes are told that are taken for one another."""


def of_evaluation(found: Evaluation, title: str) -> list[RenderableType]:
    """The metrics, class by class, and which classes are taken for which."""
    columns = ("AP",) if not found.confusion else ("images", "recall", "precision")
    classes = tuple(
        (row.name, *(_cell(getattr(row, column)) for column in columns)) for row in found.classes if row.images != 0
    )
    wrong = [
        (count, row, column)
        for row, counts in enumerate(found.confusion)
        for column, count in enumerate(counts)
        if count and row != column
    ]
    names = [row.name for row in found.classes]
    taken = [(names[row], names[column], str(n)) for n, row, column in sorted(wrong, key=lambda one: -one[0])[:_SHOWN]]
    head = (Column("class", "name"), *(Column(column, "number") for column in columns))
    parts: list[RenderableType] = [
        f"{title}: {metrics_in_words(found.metrics)} ({counted(int(found.metrics['images']), 'image')})\n",
        Sheet(head, classes, "classes"),
    ]
    if taken:
        head = (Column("class", "name"), Column("taken for", "name"), Column("images", "number"))
        more = f", the first {_SHOWN} of {len(wrong)}" if len(wrong) > _SHOWN else ""
        parts.append(Sheet(head, tuple(taken), f"most often taken for another{more}"))
    return parts


def of_difference(
    found: Evaluation, other: Evaluation, differences: Mapping[str, Difference], against: str
) -> list[RenderableType]:
    """The metrics of the other network, and each difference with its interval over the images."""
    lines = [f"{against}: {metrics_in_words(other.metrics)}"]
    over = f" over the images ({RESAMPLES:,} draws of them)" if found.seen else " over the images"
    for name, difference in differences.items():
        low, high = difference.low, difference.high
        nothing = low is not None and high is not None and low <= 0 <= high
        told = _told(name, difference, over)
        more = ": no difference that the images could show" if nothing else ""
        lines.append(f"{name}, MODEL minus ORIGINAL: {told}{more}")
    return ["\n".join(lines)]


def _cell(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:,}" if isinstance(value, int) else percent(value)
