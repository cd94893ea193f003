"""The plots of a page: histograms of attention values, what connections contribute, and the curves of a training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dcafy.amounts import percent
from dcafy.analysis.values import AttentionValues, common_axes
from dcafy.plan.blocks import Contribution
from dcafy.report.downloads import Download, download
from dcafy.report.epochs import EpochLog, RunLog
from dcafy.report.figures import SIDES, curve_plot, epoch_plot, share_plot
from dcafy.report.findings import Findings
from dcafy.report.histogram import histogram_drawing
from dcafy.report.room import Room, spread
from dcafy.wording import counted, printable


@dataclass(frozen=True)
class Plot:
    """A figure of the page: ``svg``, what it is of, lines of text under it, its data, and its address in the page."""

    title: str
    svg: str
    notes: tuple[str, ...] = ()
    data: Download | None = None
    id: str = ""


# -- attention values ------------------------------------------------------------------------------------

NARROW = 0.2
"""Values that lie in less than this part of the common axis have an axis of their own."""


def histograms(findings: Findings, room: Room) -> Iterator[Plot]:
    """One small plot for each block, as far as there is room; those that a gate bounds have one set of axes, the others
    another.
    """
    shown = set(
        spread(list(dict.fromkeys(block.name for side in findings.sides for block in side.values)), room.histograms)
    )
    ids = block_ids(findings)
    for bounded in (True, False):
        sides = [{block.name: block for block in side.values if block.bounded is bounded} for side in findings.sides]
        names = list(dict.fromkeys(name for side in sides for name in side))
        if not names:
            continue
        axes = common_axes(tuple(block for side in sides for block in side.values()))
        for name in names:
            if name in shown:
                yield _histogram(findings, name, ids[name], [side.get(name) for side in sides], axes)


def _zoomed(blocks: Sequence[AttentionValues], axes: tuple[float, float, float]) -> tuple[float, float, float]:
    """The axes for these values: the common ones, or closer ones where the values fill next to nothing of them."""
    low, high = min(float(block.values.min()) for block in blocks), max(float(block.values.max()) for block in blocks)
    whole = axes[1] - axes[0]
    if high - low >= NARROW * whole:
        return axes
    room = max(0.1 * (high - low), 1e-3 * whole)
    step = 10 ** math.floor(math.log10(high - low + 2 * room)) / 2  # so that the ends are round numbers
    ends = math.floor((low - room) / step) * step, math.ceil((high + room) / step) * step
    low, high = max(ends[0], axes[0]), min(ends[1], axes[1])
    return low, high, max(max(block.histogram(low, high).shares) for block in blocks)


def _histogram(
    findings: Findings, name: str, id_: str, blocks: list[AttentionValues | None], axes: tuple[float, float, float]
) -> Plot:
    titled = [(side.title, block) for side, block in zip(findings.sides, blocks, strict=True) if block is not None]
    notes = [f"{title}: spread {block.spread:.3f}, {percent(block.near_half)} near 0.5" for title, block in titled]
    shown = printable(name)
    own = _zoomed([block for _, block in titled], axes)
    if own != axes:
        notes.insert(0, f"zoomed: the axis is {own[0]:.4g} to {own[1]:.4g}")
    made = [(title, block.histogram(own[0], own[1], bins=40)) for title, block in titled]
    rows = [
        (made[0][1].edges[i], made[0][1].edges[i + 1], *(histogram.shares[i] for _, histogram in made))
        for i in range(40)
    ]
    label = f"Histogram of the attention values of {shown}. {'; '.join(notes)}."
    painted = zip(blocks, SIDES, (True, False), strict=False)
    drawn = ((block, colour, filled) for block, colour, filled in painted if block is not None)
    bars = [(block.histogram(own[0], own[1]), colour, filled) for block, colour, filled in drawn]
    svg = histogram_drawing(bars, own[2], label=label)
    columns = ("from", "to", *(f"share of {title}" for title, _ in made))
    file = download(f"attention-values-{name}", columns, rows)
    return Plot(shown, svg, tuple(notes), file, id_)


def block_ids(findings: Findings) -> dict[str, str]:
    """Block -> where in the page its histogram is: a number, never its name, which may be anything."""
    names = [block.name for block in findings.plan.blocks]
    names += [block.name for side in findings.sides for block in side.values]
    return {name: f"block-{place}" for place, name in enumerate(dict.fromkeys(names), 1)}


# -- connections -----------------------------------------------------------------------------------------


def shares(findings: Findings, shown: Sequence[tuple[int, Contribution]], room: Room) -> Iterator[Plot]:
    """What each connection contributes and says, in the order of the data, and over epochs; the plots have those that
    are ``shown``.
    """
    rows = findings.contributions
    ratios = {row.name: row.ratio for row in rows}
    for named, by_name in (("contribution ratio", ratios), ("message share", findings.shares)):
        series: dict[str, list[tuple[int, float]]] = {}
        for place, row in shown:
            series.setdefault(row.dimension, []).append((place, by_name.get(row.name, 0.0)))
        if series:
            label = f"The {named} of {len(rows)} connections, in the order of the data."
            data = [(place, row.name, row.dimension, by_name.get(row.name, 0.0)) for place, row in enumerate(rows, 1)]
            file = download(named, ("place", "connection", "dimension", named), data, room.data)
            yield Plot(named.capitalize(), share_plot(series, label=label, named=named), (), file)
    log = findings.run.own
    if log is not None and log.contribution:
        named = "contribution ratio"
        lines = dict(itertools.islice(log.contribution.items(), room.connections))
        title = f"{named.capitalize()} over epochs"
        label = f"The {named} of {len(lines)} connections over {len(log.epochs)} epochs."
        table: Iterable[tuple[object, ...]] = zip(log.epochs, *lines.values(), strict=True)
        file = download(title, ("epoch", *lines), table, room.data)
        notes = ["One line for each connection, from the first, blue, to the last, green."]
        if len(lines) < len(log.contribution):
            notes.append(f"The first {len(lines):,} of {len(log.contribution):,}.")
        yield Plot(title, epoch_plot(log.epochs, lines, label=label, named=named), tuple(notes), file)


# -- training --------------------------------------------------------------------------------------------


def curves(run: RunLog, room: Room) -> Iterator[Plot]:
    """What was measured in each epoch: of the run's own training, or of all trainings of a comparison."""
    arms: Mapping[str, Sequence[EpochLog]] = run.arms or ({} if run.own is None else {"": (run.own,)})
    for named in dict.fromkeys(name for logs in arms.values() for log in logs for name in log.curves):
        if named == "top5":  # says next to nothing of ten classes, and top1 stands for it
            continue
        lines = {
            printable(arm): [(log.epochs, log.curves[named]) for log in logs if named in log.curves]
            for arm, logs in arms.items()
        }
        is_loss = "loss" in named
        shown = {"loss": "validation loss", "top1": "validation accuracy"}.get(named, named)
        trainings = counted(sum(map(len, lines.values())), "training")
        title = f"{shown[0].upper()}{shown[1:]}"
        label = f"{title} over the epochs of {trainings}."
        svg = curve_plot(lines, label=label, named=shown, fraction=not is_loss)
        rows = [
            (arm, number, epoch, value)
            for arm, logs in lines.items()
            for number, (epochs, values) in enumerate(logs, 1)
            for epoch, value in zip(epochs, values, strict=True)
        ]
        file = download(f"{shown}-over-epochs", ("network", "training", "epoch", shown), rows, room.data)
        yield Plot(printable(title), svg, (), file)
