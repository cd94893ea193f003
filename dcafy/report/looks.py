"""Where networks look: images under Grad-CAM and attention maps, of one network, the other, and their difference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from dcafy.amounts import percent
from dcafy.report.downloads import Download, download
from dcafy.report.findings import Findings, Side
from dcafy.report.room import Room
from dcafy.report.thumbnails import SIDES, data_uri, differing, overlaid, sized
from dcafy.wording import printable

ON, OFF, DIFFERENCE = "on", "off", "difference"
"""What is switched between: the network, the other one, and how their maps differ."""


@dataclass(frozen=True)
class Thumbnail:
    """A picture of the page, what stands above it, and its alternative text."""

    uri: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Row:
    """The maps of one network, or their difference: ``kind`` as the switch has it, what stands above it, pictures."""

    kind: str
    title: str
    thumbnails: tuple[Thumbnail, ...]


@dataclass(frozen=True)
class Seen:
    """One image, what the networks see in it (``said``), and where they look.

    ``mark``: ``changed`` or ``wrong``, where the networks see different things or the network is wrong. ``data`` is
    absent where the page would become too large.
    """

    name: str
    picture: Thumbnail
    said: tuple[str, ...]
    mark: str
    rows: tuple[Row, ...]
    data: Download | None


@dataclass(frozen=True)
class Looks:
    """All images with their Grad-CAM maps, and with their spatial attention maps; ``left_out`` of the images for which
    there is no room.
    """

    cams: tuple[Seen, ...]
    maps: tuple[Seen, ...]
    left_out: int = 0

    @property
    def characters(self) -> int:
        """What all pictures together take of a page."""
        shown = (*self.cams, *self.maps)
        pictures = (thumbnail for seen in shown for row in seen.rows for thumbnail in row.thumbnails)
        return sum(len(picture.uri) for picture in (*pictures, *(seen.picture for seen in shown)))

    @property
    def kinds(self) -> tuple[str, ...]:
        """What can be switched between."""
        return tuple(dict.fromkeys(row.kind for seen in (*self.cams, *self.maps) for row in seen.rows))


def looks(findings: Findings, room: Room) -> Looks:
    """The images that are shown, as large as a page can have them; fewer where the smallest are too many."""
    for side in SIDES:
        found = Looks(tuple(_cams(findings, side, room.maps)), tuple(_spatial_maps(findings, side, room.maps)))
        if found.characters <= room.pictures:
            break
    while found.characters > room.pictures and max(len(found.cams), len(found.maps)) > 1:
        most = max(len(found.cams), len(found.maps)) - 1
        found = Looks(found.cams[:most], found.maps[:most], found.left_out + 1)
    return found


# -- Grad-CAM --------------------------------------------------------------------------------------------


def _cams(findings: Findings, size: int, room: int) -> Iterator[Seen]:
    looking = [(side, side.cams) for side in findings.sides if side.cams is not None]
    for place, i in enumerate(findings.chosen if looking else ()):
        name, picture = findings.pictures.names[i], findings.pictures.shown[i]
        rows, data, stages = [], [], []
        for side, cams in looking:
            target = int(cams.targets[place])
            maps = [(printable(stage.name), stage.maps[place]) for stage in cams.stages]
            alt = f"{side.title}, ", f": where it looks for {side.named(target)} in {name}"
            title = f"{printable(side.title)}, {printable(side.named(target))}"
            rows.append(Row(_kind(findings, side), title, _drawn(picture, maps, alt, size)))
            stages.append([(shown, map_ / map_.max().clamp_min(1e-12)) for shown, map_ in maps])
            data += [((side.title, stage.name, target), stage.maps[place]) for stage in cams.stages]
        rows += _difference(picture, stages, [side.title for side, _ in looking], name, size)
        file = _map_data(f"grad-cam-{place + 1}-{name}", ("network", "stage", "class"), data)
        room -= len(file.href)
        yield Seen(name, _whole(picture, name, size), _said(findings, i), _mark(findings, i), _ordered(rows),
                   file if room >= 0 else None)  # fmt: skip


def _drawn(
    picture: Image.Image, maps: Sequence[tuple[str, Tensor]], alt: tuple[str, str], size: int, high: float | None = None
) -> tuple[Thumbnail, ...]:
    """A picture for each of (name, map); ``alt``: what stands before and after the name in its alternative text."""
    return tuple(
        Thumbnail(data_uri(overlaid(picture, map_, high=high, side=size)), name.join(alt), _captioned(name, map_))
        for name, map_ in maps
    )


def _captioned(name: str, map_: Tensor) -> str:
    """What stands above a map: where it is from, and its size."""
    return f"{name}, {'×'.join(map(str, map_.shape))}"


def _kind(findings: Findings, side: Side) -> str:
    return ON if side is findings.connected else OFF


def _ordered(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The network itself first: it is what is shown before anything is switched."""
    return tuple(sorted(rows, key=lambda row: (ON, OFF, DIFFERENCE).index(row.kind)))


def _difference(
    picture: Image.Image, stages: Sequence[list[tuple[str, Tensor]]], titles: Sequence[str], name: str, size: int
) -> list[Row]:
    """How the maps of two networks differ, where they are of equal sizes stage by stage."""
    if len(stages) != 2 or [map_.shape for _, map_ in stages[0]] != [map_.shape for _, map_ in stages[1]]:
        return []
    minus = f"{printable(titles[1])} minus {printable(titles[0])}"
    drawn = tuple(
        Thumbnail(
            data_uri(differing(picture, after - before, side=size)),
            f"{minus}, {shown}: the difference in {name}",
            _captioned(shown, after),
        )
        for (_, before), (shown, after) in zip(*stages, strict=True)
    )
    return [Row(DIFFERENCE, minus, drawn)]


def _said(findings: Findings, image: int) -> tuple[str, ...]:
    """What the image is, and what each network sees in it."""
    truth = _truth(findings, image)
    said = [] if truth is None else [f"truth: {findings.connected.named(truth)}"]
    for side in reversed(findings.sides):
        if side.predictions:
            seen = side.predictions[image]
            right = "" if truth is None else ", right" if seen.number == truth else ", wrong"
            said.append(f"{side.title}: {side.named(seen.number)}, {percent(seen.probability)}{right}")
    return tuple(map(printable, said))


def _truth(findings: Findings, image: int) -> int | None:
    return findings.pictures.truth[image] if findings.pictures.truth else None


def _mark(findings: Findings, image: int) -> str:
    seen = [side.predictions[image].number for side in findings.sides if side.predictions]
    truth = _truth(findings, image)
    return "changed" if len(set(seen)) > 1 else "wrong" if seen and truth is not None and seen[-1] != truth else ""


def _whole(picture: Image.Image, name: str, size: int) -> Thumbnail:
    return Thumbnail(data_uri(sized(picture, size)), name, "the image")


def _map_data(name: str, kind: Sequence[str], maps: Sequence[tuple[tuple[object, ...], Tensor]]) -> Download:
    """Maps as CSV: one line for each row of each map, after what it is a map of."""
    widest = max(map_.shape[1] for _, map_ in maps)
    columns = (*kind, "row", *(f"column {x}" for x in range(widest)))
    rows = (
        (*what, y, *(f"{value:.3g}" for value in row)) for what, map_ in maps for y, row in enumerate(map_.tolist())
    )
    return download(name, columns, rows)


# -- spatial attention -----------------------------------------------------------------------------------


def _spatial_maps(findings: Findings, size: int, room: int) -> Iterator[Seen]:
    """The attention maps of spatial blocks, of each stage's last one."""
    last = []
    for lane in findings.lanes:
        spatial = [name for name in lane.blocks if findings.plan.block(name).size is not None]
        last += spatial[-1:]
    known = [(side, {block.name: block for block in side.values}) for side in findings.sides]
    chosen = [name for name in last if any(name in values for _, values in known)]
    for place, i in enumerate(findings.chosen if chosen else ()):
        name, picture = findings.pictures.names[i], findings.pictures.shown[i]
        rows, stages, titles = [], [], []
        data: list[tuple[tuple[object, ...], Tensor]] = []
        for side, values in known:
            blocks = [values[block] for block in chosen if block in values]
            if not blocks:
                continue
            drawn: list[Thumbnail] = []
            for block in blocks:
                map_, high = _as_map(block.values[i]), 1.0 if block.bounded else float(block.values.max())
                alt = f"{side.title}: attention map of ", f" on {name}"
                drawn += _drawn(picture, [(printable(block.name), map_)], alt, size, high)
                data.append(((side.title, block.name), map_))
            rows.append(Row(_kind(findings, side), printable(side.title), tuple(drawn)))
            stages.append([(printable(block.name), _as_map(block.values[i]).float()) for block in blocks])
            titles.append(side.title)
        rows += _difference(picture, stages, titles, name, size)
        file = _map_data(f"attention-maps-{place + 1}-{name}", ("network", "block"), data)
        room -= len(file.href)
        yield Seen(name, _whole(picture, name, size), (), "", _ordered(rows), file if room >= 0 else None)


def _as_map(values: Tensor) -> Tensor:
    """One image's spatial attention as ``[h, w]``: the mean over whatever else there is."""
    while values.ndim > 2:
        values = values.mean(0)
    return values
