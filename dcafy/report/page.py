"""Findings -> one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from PIL import Image
from torch import Tensor

from dcafy.analysis.listening import KINDS, Effect, in_loss, in_points
from dcafy.analysis.values import AttentionValues, common_axes
from dcafy.plan.blocks import hearing
from dcafy.plan.drawing import draw
from dcafy.report.downloads import Download, download
from dcafy.report.figures import SIDES, epoch_plot, histogram_plot, share_plot
from dcafy.report.findings import MOST_CAMS, Findings
from dcafy.report.thumbnails import data_uri, overlaid, small
from dcafy.wording import counted, needing, printable
from dcafy.zoos.specs import RANDOM


@dataclass(frozen=True)
class Plot:
    """A figure of the page: ``svg``, what it is of, lines of text under it, and its data."""

    title: str
    svg: str
    notes: tuple[str, ...] = ()
    data: Download | None = None


@dataclass(frozen=True)
class Thumbnail:
    """A picture of the page, what stands above it, and its alternative text."""

    uri: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Seen:
    """One image, and where the networks look: ``rows`` of (network, its thumbnails)."""

    name: str
    picture: Thumbnail
    rows: tuple[tuple[str, tuple[Thumbnail, ...]], ...]
    data: Download

    @property
    def columns(self) -> int:
        """How many pictures stand side by side."""
        return 1 + max(len(thumbnails) for _, thumbnails in self.rows)


def page(findings: Findings) -> str:
    """The report as HTML; every text in it is escaped, whoever wrote it."""
    with needing("The report", "report"):
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    parts = {name: _part(name) for name in ("page.html.j2", "page.css", "page.js")}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(percent=_percent, drawn=Markup, printable=printable, counted=counted)
    environment.filters.update(loss=in_loss, points=in_points)
    drawing = draw(findings.plan, lanes=findings.lanes, contributions=findings.contributions, shares=findings.shares)
    context: dict[str, Any] = {
        "style": Markup(parts["page.css"]),
        "script": Markup(parts["page.js"]),
        "script_hash": base64.b64encode(hashlib.sha256(parts["page.js"].encode()).digest()).decode(),
        "found": findings,
        "random_weights": RANDOM,
        "chains": Plot("Chains", drawing.svg, data=_chain_data(findings)),
        "histograms": tuple(_histograms(findings)),
        "seen": tuple(_cams(findings)),
        "maps": tuple(_spatial_maps(findings)),
        "shares": tuple(_shares(findings)),
        "connection_data": _connection_data(findings),
        "usage_data": _usage_data(findings),
        "colours": dict(zip((side.title for side in findings.sides), SIDES, strict=False)),
    }
    return environment.from_string(parts["page.html.j2"]).render(context)


def _part(name: str) -> str:
    return resources.files("dcafy.report").joinpath(name).read_text(encoding="utf-8")


def _percent(value: float, digits: int = 1) -> str:
    return f"{value * 100:.{digits}f} %"


def _chain_data(findings: Findings) -> Download:
    lane = {name: lane.title for lane in findings.lanes for name in lane.blocks}
    heard = hearing(findings.plan.links)
    rows = [
        (b.name, lane.get(b.name, ""), b.dimension, b.channels, "x".join(map(str, b.size or ())), b.gate,
         " ".join(link.source for link in heard.get(b.name, ())))
        for b in findings.plan.blocks
    ]  # fmt: skip
    return download("chains", ("block", "stage", "dimension", "channels", "size", "gate", "hears"), rows)


# -- attention values ------------------------------------------------------------------------------------


def _histograms(findings: Findings) -> Iterator[Plot]:
    """One small plot for each block; those that a gate bounds have one set of axes, the others another."""
    for bounded in (True, False):
        sides = [{block.name: block for block in side.values if block.bounded is bounded} for side in findings.sides]
        names = list(dict.fromkeys(name for side in sides for name in side))
        if not names:
            continue
        axes = common_axes(tuple(block for side in sides for block in side.values()))
        for name in names:
            yield _histogram(findings, name, [side.get(name) for side in sides], axes)


def _histogram(
    findings: Findings, name: str, blocks: list[AttentionValues | None], axes: tuple[float, float, float]
) -> Plot:
    titled = [(side.title, block) for side, block in zip(findings.sides, blocks, strict=True) if block is not None]
    notes = tuple(
        f"{title}: spread {block.spread:.3f}, {_percent(block.near_half)} near 0.5" for title, block in titled
    )
    shown = printable(name)
    made = [(title, block.histogram(axes[0], axes[1], bins=40)) for title, block in titled]
    rows = [
        (made[0][1].edges[i], made[0][1].edges[i + 1], *(histogram.shares[i] for _, histogram in made))
        for i in range(40)
    ]
    label = f"Histogram of the attention values of {shown}. {'; '.join(notes)}."
    svg = histogram_plot(blocks, *axes, label=label)
    columns = ("from", "to", *(f"share of {title}" for title, _ in made))
    return Plot(shown, svg, notes, download(f"attention-values-{name}", columns, rows))


# -- where it looks --------------------------------------------------------------------------------------


def _cams(findings: Findings) -> Iterator[Seen]:
    looking = [(side, side.cams) for side in findings.sides if side.cams is not None]
    for i, name in enumerate(findings.pictures.names[:MOST_CAMS] if looking else ()):
        picture = findings.pictures.shown[i]
        rows = []
        data: list[tuple[tuple[object, ...], Tensor]] = []
        for side, cams in looking:
            target = int(cams.targets[i])
            thumbnails = []
            for stage in cams.stages:
                alt = f"{side.title}, {printable(stage.name)}: where it looks for {side.named(target)} in {name}"
                uri = data_uri(overlaid(picture, stage.maps[i]))
                thumbnails.append(Thumbnail(uri, alt, printable(stage.name)))
                data.append(((side.title, stage.name, target), stage.maps[i]))
            rows.append((f"{side.title}, {side.named(target)}", tuple(thumbnails)))
        file = _map_data(f"grad-cam-{i + 1}-{name}", ("network", "stage", "class"), data)
        yield Seen(name, _whole(picture, name), tuple(rows), file)


def _whole(picture: Image.Image, name: str) -> Thumbnail:
    return Thumbnail(data_uri(small(picture)), name, "the image")


def _map_data(name: str, kind: Sequence[str], maps: Sequence[tuple[tuple[object, ...], Tensor]]) -> Download:
    """Maps as CSV: one line for each row of each map, after what it is a map of."""
    widest = max(map_.shape[1] for _, map_ in maps)
    columns = (*kind, "row", *(f"column {x}" for x in range(widest)))
    rows = (
        (*what, y, *(f"{value:.3g}" for value in row)) for what, map_ in maps for y, row in enumerate(map_.tolist())
    )
    return download(name, columns, rows)


def _spatial_maps(findings: Findings) -> Iterator[Seen]:
    """The attention maps of spatial blocks, of each stage's last one."""
    last = []
    for lane in findings.lanes:
        spatial = [name for name in lane.blocks if findings.plan.block(name).size is not None]
        last += spatial[-1:]
    known = [(side, {block.name: block for block in side.values}) for side in findings.sides]
    chosen = [name for name in last if any(name in values for _, values in known)]
    for i, name in enumerate(findings.pictures.names[:MOST_CAMS] if chosen else ()):
        picture = findings.pictures.shown[i]
        rows = []
        data: list[tuple[tuple[object, ...], Tensor]] = []
        for side, values in known:
            drawn = []
            for block in (values[name] for name in chosen if name in values):
                map_ = _as_map(block.values[i])
                high = 1.0 if block.bounded else float(block.values.max())
                alt = f"{side.title}: attention map of {printable(block.name)} on {name}"
                uri = data_uri(overlaid(picture, map_, high=high))
                drawn.append(Thumbnail(uri, alt, printable(block.name)))
                data.append(((side.title, block.name), map_))
            if drawn:
                rows.append((side.title, tuple(drawn)))
        file = _map_data(f"attention-maps-{i + 1}-{name}", ("network", "block"), data)
        yield Seen(name, _whole(picture, name), tuple(rows), file)


def _as_map(values: Tensor) -> Tensor:
    """One image's spatial attention as ``[h, w]``: the mean over whatever else there is."""
    while values.ndim > 2:
        values = values.mean(0)
    return values


# -- connections -----------------------------------------------------------------------------------------


def _shares(findings: Findings) -> Iterator[Plot]:
    rows = findings.contributions
    ratios = {row.name: row.ratio for row in rows}
    for named, by_name in (("contribution ratio", ratios), ("message share", findings.shares)):
        data = [(place, row.name, row.dimension, by_name.get(row.name, 0.0)) for place, row in enumerate(rows, 1)]
        series: dict[str, list[tuple[int, float]]] = {}
        for place, _, dimension, value in data:
            series.setdefault(dimension, []).append((place, value))
        if series:
            label = f"The {named} of {len(rows)} connections, in the order of the data."
            file = download(named, ("place", "connection", "dimension", named), data)
            yield Plot(named.capitalize(), share_plot(series, label=label, named=named), (), file)
    log = findings.epochs
    if log is not None:
        named, lines = "contribution ratio", log.contribution
        title = f"{named.capitalize()} over epochs"
        label = f"The {named} of {len(lines)} connections over {len(log.epochs)} epochs."
        table: Iterable[tuple[object, ...]] = zip(log.epochs, *lines.values(), strict=True)
        file = download(title, ("epoch", *lines), table)
        notes = ("One line for each connection, the first dark, the last bright.",)
        yield Plot(title, epoch_plot(log.epochs, lines, label=label, named=named), notes, file)


def _connection_data(findings: Findings) -> Download:
    rows = [
        (*dataclasses.astuple(row)[:-1], findings.shares.get(row.name, 0.0), row.parameters)
        for row in findings.contributions
    ]
    columns = ("connection", "source", "target", "dimension", "alpha", "beta", "contribution", "message share")
    return download("connections", (*columns, "parameters"), rows)


def _usage_data(findings: Findings) -> Download | None:
    if findings.usage is None:
        return None
    measures = ("loss change", "loss error", "accuracy change", "accuracy error")
    columns = ("connection", *(f"{kind} {measure}" for kind in KINDS for measure in measures))
    rows = [(name, *(value for effect in effects for value in _cells(effect))) for name, *effects in
            findings.usage.rows("all")]  # fmt: skip
    return download("changed-connections", columns, rows)


def _cells(effect: Effect | None) -> tuple[object, ...]:
    return ("",) * 4 if effect is None else tuple("" if v is None else v for v in dataclasses.astuple(effect))
