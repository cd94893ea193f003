"""The network as a picture: from the image to the class, stages as boxes, attention blocks on the trunk, connections
as arrows.

It comes in two directions. Downwards there is one row for each block, so that names stay readable from 3 blocks to 100
and on a phone; across it shows the network at a glance on a wide screen. Arrows of channel attention are on one side of
the trunk and those of spatial attention on the other. It is SVG written by hand: plotting libraries draw axes, and
cannot put a title on each arrow for a pointer to find.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal, get_args

from dcafy.display import Brief, natural_size
from dcafy.plan.blocks import AttentionBlock, Contents, Contribution, Link
from dcafy.plan.options import Dimension
from dcafy.plan.tables import link_matches
from dcafy.wording import printable

COLOURS: dict[str, str] = dict(zip(get_args(Dimension), ("#0072B2", "#D55E00", "#009E73"), strict=False))
"""Okabe and Ito's blue and vermilion, which colour-blind people tell apart; on white and on black alike."""

EFFECTS: dict[str, tuple[str, str]] = {
    "costs": ("#C2187A", "cutting it costs"),
    "chance": ("#8E8E93", "within chance"),
    "helps": ("#56B4E9", "better without"),
}
"""What cutting a connection does -> its colour and what the legend calls it."""

WIDTH, LARGEST = 440, 540
"""Units down a page, which on a phone are about a pixel each; and the pixels that it takes where there is room."""

ROW, HEAD, END = 24, 26, 30
"""Heights of a block, of a stage's title and of the image and the class, downwards."""

TRUNK, ASIDE = 62, 66
"""Downwards: where the trunk is, and the room that arrows to its right take."""

ACROSS, NEAREST, FARTHEST, GAP, TIP = 1080, 15, 72, 16, 74
"""Across: units in all where that is enough, between two blocks at least and at most, between boxes, and of an end."""

RADIUS = 7
LETTER = 7.1
"""Units that a letter takes, on average."""

THINNEST, THICKEST = 1.5, 9.0


@dataclass(frozen=True)
class Drawing(Brief):
    """``svg``: the drawing as one SVG element, which a notebook shows in its natural size."""

    svg: str

    __repr__ = Brief.__repr__

    def _repr_html_(self) -> str:
        return natural_size(self.svg)

    def _repr_svg_(self) -> str:
        return self.svg

    def __str__(self) -> str:
        return self.svg


@dataclass(frozen=True)
class Lane:
    """A stage: its title, the names of its blocks, and height, width and channels of its last feature map if known."""

    title: str
    blocks: tuple[str, ...]
    size: tuple[int, ...] = ()
    channels: int = 0

    @property
    def shape(self) -> tuple[str, ...]:
        """Size and channels in words, as far as they are known."""
        size = ("×".join(map(str, self.size)),) if self.size else ()
        return (*size, f"{self.channels} channels") if self.channels else size


@dataclass(frozen=True)
class Stroke:
    """How the arrow of a connection is drawn, where it was measured what cutting it does.

    ``effect``    what cutting it does, a name in ``EFFECTS``
    ``strength``  of the effect beside the largest one, 0 to 1
    ``width``     the part of the message that varies between images, 0 to 1
    ``told``      what a pointer is told besides
    """

    effect: Literal["costs", "chance", "helps"]
    strength: float
    width: float
    told: str


def draw(
    plan: Contents,
    *,
    lanes: Sequence[Lane] | None = None,
    contributions: Sequence[Contribution] = (),
    shares: Mapping[str, float] | None = None,
    strokes: Mapping[str, Stroke] | None = None,
    across: bool = False,
    ends: tuple[str, str] = ("image", "class"),
    to_blocks: Mapping[str, str] | None = None,
    to_connections: Mapping[str, str] | None = None,
) -> Drawing:
    """The plan as SVG: stages, blocks, and an arrow for each connection; hovering tells what each is.

    ``lanes``: the stages; blocks are grouped by their names where absent. ``contributions``: of the connected model,
    for α, β and parameters. ``shares``: the message share of each connection, which is the width of its arrow
    (:func:`dcafy.analysis.usage.message_shares`). ``strokes``: how each connection is drawn, by name, where it was
    measured what cutting it does. ``across``: from left to right, not downwards. ``ends``: what stands at the image
    and at the class. ``addresses``: where a click on a block leads, by its name, and on an arrow, by that of its
    connection.

    >>> import dcafy, dcafy.analysis, torchvision
    >>> drawing = dcafy.analysis.draw(dcafy.inspect(torchvision.models.mobilenet_v3_small()))
    >>> drawing.svg.count('class="arc"')
    8
    """
    what = _What(plan, tuple(lanes_by_name(plan) if lanes is None else lanes), ends, shares or {}, strokes or {})
    for row in contributions:
        what.made.setdefault((row.source, row.target), []).append(row)
    return Drawing(_Sheet(what, (_across if across else _down)(what), to_blocks or {}, to_connections or {}).svg())


def lanes_by_name(plan: Contents) -> tuple[Lane, ...]:
    """The blocks by the container they lie in, one component below what all names share; else all in one lane."""
    paths = [block.name.split(".") for block in plan.blocks]
    shared = 0
    while paths and all(len(path) > shared + 1 and path[: shared + 1] == paths[0][: shared + 1] for path in paths):
        shared += 1
    groups: dict[str, list[str]] = {}
    for block, path in zip(plan.blocks, paths, strict=True):
        groups.setdefault(".".join(path[: shared + 1]), []).append(block.name)
    if len(groups) > max(8, len(paths) // 2):
        return (Lane(".".join(paths[0][:shared]) or plan.model or "model", tuple(b.name for b in plan.blocks)),)
    return tuple(Lane(title, tuple(names)) for title, names in groups.items())


# --- what is drawn, and where -------------------------------------------------------------------------


@dataclass(frozen=True)
class _What:
    """What is drawn, in whichever direction."""

    plan: Contents
    lanes: tuple[Lane, ...]
    ends: tuple[str, str]
    shares: Mapping[str, float]
    strokes: Mapping[str, Stroke]
    made: dict[tuple[str, str], list[Contribution]] = field(default_factory=dict)

    @property
    def sides(self) -> dict[str, int]:
        """Dimension -> the side of the trunk on which its arrows are."""
        found = sorted({block.dimension for block in self.plan.blocks})
        return {dimension: -1 if i == 0 else 1 for i, dimension in enumerate(found)}


Place = tuple[float, float]


@dataclass(frozen=True)
class _Box:
    """A rounded rectangle with lines of text, the first of them bold; ``anchor``: where these stand."""

    kind: str
    x: float
    y: float
    width: float
    height: float
    lines: tuple[str, ...]
    at: Place
    anchor: Literal["start", "middle", "end"] = "middle"
    shade: float = 0.06


@dataclass(frozen=True)
class _Layout:
    """Where everything is.

    ``aside``   the direction in which arrows leave the trunk on the side that has the sign -1
    ``labels``  where the name of a block stands; empty where there is no room for names
    ``most``    how far an arrow may be from the trunk, on either side
    """

    width: float
    height: float
    shown: str
    blocks: Mapping[str, Place]
    boxes: tuple[_Box, ...]
    trunk: tuple[Place, Place]
    aside: Place
    most: float
    labels: Mapping[str, Place] = field(default_factory=dict)


def _down(what: _What) -> _Layout:
    y: float = END
    text_at = TRUNK + (ASIDE if len(what.sides) > 1 else 18)
    blocks: dict[str, Place] = {}
    boxes = [_end(what.ends[0], TRUNK, 0)]
    for i, lane in enumerate(what.lanes):
        height = HEAD + ROW * len(lane.blocks)
        words = " · ".join((_short(printable(lane.title), 30), *lane.shape))
        shade = 0.1 if i % 2 else 0.05
        boxes.append(_Box("lane", 0, y, WIDTH, height, (words,), (WIDTH - 10, y + 17), "end", shade))
        for row, name in enumerate(lane.blocks):
            blocks[name] = (TRUNK, y + HEAD + ROW * row + ROW / 2)
        y += height
    boxes.append(_end(what.ends[1], TRUNK, y + 4))
    labels = {name: (text_at, at + 4) for name, (_, at) in blocks.items()}
    y += END
    shown = f"max-width:{LARGEST}px;width:100%;height:auto"
    return _Layout(WIDTH, y, shown, blocks, tuple(boxes), ((TRUNK, 20), (TRUNK, y - 22)), (1, 0), TRUNK - 8, labels)


def _end(text: str, x: float, y: float) -> _Box:
    shown = _short(printable(text), 44)
    width = max(LETTER * len(shown) + 20, 70)
    left = max(x - width / 2, 0)
    return _Box("end", left, y, width, END - 6, (shown,), (left + width / 2, y + 16), shade=0.16)


def _across(what: _What) -> _Layout:
    count = sum(len(lane.blocks) for lane in what.lanes)
    room = ACROSS - 2 * TIP - GAP * (len(what.lanes) + 1) - 20 * len(what.lanes)
    step = min(max(room / max(count, 1), NEAREST), FARTHEST)
    arcs, tallest = _reach(what, step), 2 * max([26.0, *(_half(lane) for lane in what.lanes)])
    trunk = max(arcs[-1], tallest / 2) + 12
    below = trunk + max(arcs[1], tallest / 2) + 16
    x: float = TIP
    blocks: dict[str, Place] = {}
    boxes = [_tip(what.ends[0], 0, trunk)]
    for lane in what.lanes:
        lines = (lane.title, *lane.shape)
        width = max(step * len(lane.blocks) + 20, 6.6 * max(map(len, lane.shape), default=8) + 4, 60)
        words = (_short(printable(lines[0]), max(int(width / 6.8), 7)), *lines[1:])
        x += GAP
        boxes.append(_Box("lane", x, trunk - _half(lane), width, 2 * _half(lane), words, (x + width / 2, below)))
        first = x + width / 2 - step * (len(lane.blocks) - 1) / 2
        for place, name in enumerate(lane.blocks):
            blocks[name] = (first + step * place, trunk)
        x += width
    x += GAP
    boxes.append(_tip(what.ends[1], x, trunk))
    x += TIP
    shown = f"max-width:{x:.0f}px;min-width:{0.72 * x:.0f}px;width:100%;height:auto"
    most = max(arcs.values(), default=0.0) / 0.75
    ends = ((TIP - 4, trunk), (x - TIP + 4, trunk))
    return _Layout(x, below + 36, shown, blocks, tuple(boxes), ends, (0, 1), most)


def _tip(text: str, x: float, trunk: float) -> _Box:
    """The image or the class, across: a word, and below what there is to be said of it."""
    lines = tuple(_short(line, 11) for line in printable(text).split(" ", 1))
    return _Box("end", x, trunk - 26, TIP, 52, lines, (x + TIP / 2, trunk + (4 if len(lines) == 1 else -3)), shade=0.16)


def _half(lane: Lane) -> float:
    """Half the height of a stage's box, across: maps get smaller from stage to stage."""
    return 14 + 6.5 * math.log2(min(max(*lane.size, 2), 512)) if lane.size else 34.0


def _reach(what: _What, step: float) -> dict[int, float]:
    """Side -> how far the arrows on it reach from the trunk, across."""
    order = {name: i for i, name in enumerate(name for lane in what.lanes for name in lane.blocks)}
    reach = {-1: 0.0, 1: 0.0}
    for link in what.plan.links:
        if {link.source, link.target} <= order.keys():
            side = what.sides[what.plan.block(link.target).dimension]
            far = step * (order[link.target] - order[link.source]) + GAP
            reach[side] = max(reach[side], RADIUS + 0.75 * _bulge(far) + 10)
    return reach


def _bulge(length: float, most: float = 150.0) -> float:
    return min(24 + 0.16 * length, most)


# --- drawing it ---------------------------------------------------------------------------------------


class _Sheet:
    """One drawing."""

    def __init__(
        self, what: _What, layout: _Layout, to_blocks: Mapping[str, str], to_connections: Mapping[str, str]
    ) -> None:
        self.what, self.layout, self.to_blocks, self.to_connections = what, layout, to_blocks, to_connections
        self.plan = what.plan
        self.connected = {name for link in self.plan.links for name in (link.source, link.target)}

    def svg(self) -> str:
        counts = (
            f"{len(self.plan.blocks)} attention blocks in {len(self.what.lanes)} stages, "
            f"{len(self.plan.links)} connections"
        )
        label = escape(f"{printable(self.plan.model or 'model')}: {counts}")
        # Long arcs enclose short ones and are drawn first, so that a pointer finds the short ones, too.
        arcs = sorted(filter(self._is_placed, self.plan.links), key=self._length, reverse=True)
        parts = [self._trunk(), *map(self._box, self.layout.boxes), *map(self._arc, arcs)]
        legend, height = self._legend()
        parts += [*map(self._node, self.plan.blocks), legend]
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="chains" role="img" aria-label="{label}" '
            f'viewBox="0 0 {self.layout.width:g} {self.layout.height + height:g}" style="{self.layout.shown}" '
            f'font-family="system-ui, sans-serif" font-size="13" fill="currentColor">\n' + "\n".join(parts) + "\n</svg>"
        )

    def _trunk(self) -> str:
        (x, y), (to_x, to_y) = self.layout.trunk
        head = _head((to_x, to_y), (math.copysign(1, to_x - x), 0) if to_x > x else (0, 1), 5, "currentColor")
        return (
            f'<g class="trunk" opacity="0.45"><path d="M{x:g} {y:g}L{to_x:g} {to_y:g}" stroke="currentColor" '
            f'stroke-width="2"/>{head}</g>'
        )

    def _box(self, box: _Box) -> str:
        x, y = box.at
        lines = "".join(
            f'<tspan x="{x:g}" y="{y + 14 * i:g}"{_BOLD if i == 0 else ""}>{escape(printable(line))}</tspan>'
            for i, line in enumerate(box.lines)
        )
        return (
            f'<g class="{box.kind}"><rect x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{box.height:g}" '
            f'rx="5" fill-opacity="{box.shade}"/><text text-anchor="{box.anchor}" font-size="12">{lines}</text></g>'
        )

    def _node(self, block: AttentionBlock) -> str:
        if block.name not in self.layout.blocks:
            return ""
        (x, y), colour = self.layout.blocks[block.name], COLOURS[block.dimension]
        size = "×".join(map(str, block.size)) if block.size else ""
        sizes = f"{block.channels} channels" + (f", {size}" if size else "")
        fill = colour if block.name in self.connected else "none"
        tip = (
            f"{printable(block.name)}\n{block.dimension} attention, {sizes}\n"
            f"gate {block.gate}, fused by {_FUSED[block.fusion_kind]}"
        )
        body = f'<circle cx="{x:g}" cy="{y:g}" r="{RADIUS}" fill="{fill}" stroke="{colour}" stroke-width="2"/>'
        if block.name in self.layout.labels:
            text_x, text_y = self.layout.labels[block.name]
            shape = f" · {block.channels}" + (f" · {size}" if size else "")
            text = _short(printable(block.name), int((WIDTH - text_x) / LETTER) - len(shape)) + shape
            body += f'<text x="{text_x:g}" y="{text_y:g}">{escape(text)}</text>'
        tip += "" if block.name in self.connected else "\nnot connected"
        return _group("block", tip, body, self.to_blocks.get(block.name, ""))

    def _is_placed(self, link: Link) -> bool:
        """Whether both blocks of a link are in a lane."""
        return {link.source, link.target} <= self.layout.blocks.keys()

    def _length(self, link: Link) -> float:
        return math.dist(self.layout.blocks[link.source], self.layout.blocks[link.target])

    def _arc(self, link: Link) -> str:
        dimension = self.plan.block(link.target).dimension
        side = self.what.sides[dimension]
        away = self.layout.aside[0] * side, self.layout.aside[1] * side
        made = self.what.made.get((link.source, link.target), [])
        width, colour, opacity, dashed = self._stroke(made, dimension)
        bulge = _bulge(self._length(link), self.layout.most if side < 0 else min(self.layout.most, ASIDE))
        # A block that hears itself has an arrow that leaves before its middle and comes back behind it.
        apart = 5 if link.source == link.target else 0
        start = _moved(self.layout.blocks[link.source], away, RADIUS, -apart)
        end = _moved(self.layout.blocks[link.target], away, RADIUS + 5 + width / 2, apart)
        out, back = _moved(start, away, bulge, -2 * apart), _moved(end, away, bulge - 5, 2 * apart)
        path = "M{:.1f} {:.1f}C{:.1f} {:.1f} {:.1f} {:.1f} {:.1f} {:.1f}".format(*start, *out, *back, *end)
        middle = _moved(((start[0] + end[0]) / 2, (start[1] + end[1]) / 2), away, 0.75 * bulge, 0)
        address = next((self.to_connections[row.name] for row in made if row.name in self.to_connections), "")
        return _group(
            "arc",
            self._arc_tip(link, made),
            # A finger or a pointer need not hit a thin line: all that the arc encloses is the arc.
            f'<path d="{path}" fill="none" stroke="none" stroke-width="12" pointer-events="all"/>'
            f'<path class="line" d="{path}" fill="none" stroke="{colour}" stroke-width="{width:.2f}" '
            f'stroke-opacity="{opacity:.2f}"{dashed}/>'
            + _head(_moved(end, away, -5 - width / 2, 0), (-away[0], -away[1]), 4.5 + width / 2, colour)
            + self._marks(link, *middle),
            address,
        )

    def _stroke(self, made: Sequence[Contribution], dimension: str) -> tuple[float, str, float, str]:
        """Width, colour, opacity and dashes of an arrow."""
        known = [self.what.strokes[row.name] for row in made if row.name in self.what.strokes]
        if not known:
            share = max((self.what.shares.get(row.name, 0.0) for row in made), default=0.0)
            return THINNEST + (THICKEST - THINNEST) * share, COLOURS[dimension], 0.75, ""
        most = max(known, key=lambda stroke: stroke.strength)
        width = THINNEST + (THICKEST - THINNEST) * max(stroke.width for stroke in known)
        opacity = 0.7 if most.effect == "chance" else 0.4 + 0.6 * most.strength
        dashed = ' stroke-dasharray="5 3"' if most.effect == "chance" else ""
        return width, EFFECTS[most.effect][0], opacity, dashed

    def _marks(self, link: Link, x: float, y: float) -> str:
        """A square where channels are matched, a diamond where sizes are."""
        channel, spatial = link_matches(self.plan, link)
        colour = COLOURS[self.plan.block(link.target).dimension]
        return (_square(x, y, colour) if channel else "") + (_diamond(x, y, colour) if spatial else "")

    def _arc_tip(self, link: Link, made: Sequence[Contribution]) -> str:
        source, target = self.plan.block(link.source), self.plan.block(link.target)
        channel, spatial = link_matches(self.plan, link)
        lines = [f"{printable(link.source)} → {printable(link.target)}"]
        lines.append(_change(f"{source.channels}", f"{target.channels}", channel, "channels"))
        if source.size and target.size:
            lines.append(_change(_size(source), _size(target), spatial, "positions"))
        for row in made:
            name = f"{row.name[len(link.target) :].partition('<-')[0]} " if len(made) > 1 else ""
            share = f", message share {self.what.shares[row.name]:.1%}" if row.name in self.what.shares else ""
            lines.append(f"{name}α {row.alpha:.4g}, β {row.beta:.4g}, contribution {row.ratio:.1%}{share}")
            lines.append(f"{row.parameters:,} parameters")
            lines += [self.what.strokes[row.name].told] if row.name in self.what.strokes else []
        return "\n".join(lines)

    def _legend(self) -> tuple[str, float]:
        """The legend, and its height: rows of marks and words, as many to a row as there is room for."""
        entries = [
            (f'<circle cx="0" cy="0" r="6" fill="{COLOURS[dimension]}"/>', f"{dimension} attention")
            for dimension in self.what.sides
        ]
        if self.what.strokes:
            lines = {name: ' stroke-dasharray="5 3"' if name == "chance" else "" for name in EFFECTS}
            entries += [
                (f'<path d="M-7 0H7" stroke="{colour}" stroke-width="4"{lines[name]}/>', words)
                for name, (colour, words) in EFFECTS.items()
                if any(stroke.effect == name for stroke in self.what.strokes.values())
            ]
            entries.append((_WIDE, "width: what varies between images"))
        elif self.what.shares:
            entries.append((_WIDE, "width: message share"))
        marks = [link_matches(self.plan, link) for link in self.plan.links]
        if any(channel for channel, _ in marks):
            entries.append((_square(0, 0, "currentColor"), "channels matched"))
        if any(spatial for _, spatial in marks):
            entries.append((_diamond(0, 0, "currentColor"), "sizes matched"))
        x, y = 16.0, self.layout.height + 18
        parts = []
        for mark, words in entries:
            length = 30 + 6.6 * len(words)
            if x > 16 and x + length > self.layout.width:
                x, y = 16.0, y + 20
            parts.append(
                f'<g transform="translate({x:g} {y:g})">{mark}<text x="12" y="4" font-size="12">{words}</text></g>'
            )
            x += length
        return '<g class="legend">' + "".join(parts) + "</g>", y - self.layout.height + 14


_BOLD = ' font-weight="600"'
_FUSED = {"mul": "multiplication", "add": "addition"}
_WIDE = '<path d="M-7 3L7 -1V7Z" opacity="0.6"/>'


def _moved(place: Place, away: Place, far: float, along: float) -> Place:
    """``place`` moved ``far`` away from the trunk and ``along`` it, the way that data flows."""
    return place[0] + away[0] * far + abs(away[1]) * along, place[1] + away[1] * far + abs(away[0]) * along


def _head(point: Place, towards: Place, size: float, colour: str) -> str:
    """The head of an arrow whose point is at ``point``."""
    (x, y), (dx, dy) = point, towards
    left, right = ((x - size * (dx * 1.4 + turn * dy), y - size * (dy * 1.4 + turn * dx)) for turn in (0.8, -0.8))
    path = "M{:.1f} {:.1f}L{:.1f} {:.1f}L{:.1f} {:.1f}Z".format(x, y, *left, *right)
    return f'<path class="head" d="{path}" fill="{colour}"/>'


def _square(x: float, y: float, colour: str) -> str:
    return f'<rect class="match channel" x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" fill="{colour}"/>'


def _diamond(x: float, y: float, colour: str) -> str:
    points = f"{x:.1f},{y - 7:.1f} {x + 7:.1f},{y:.1f} {x:.1f},{y + 7:.1f} {x - 7:.1f},{y:.1f}"
    return f'<polygon class="match spatial" points="{points}" fill="{colour}"/>'


def _group(kind: str, tip: str, body: str, address: str = "") -> str:
    """Something that can be pointed at; the report's page shows ``data-tip``, everything else the title."""
    told = escape(tip).replace("\n", "&#10;")  # XML reads a bare line end in an attribute as a blank
    tag, reached = ("a", f'href="{escape(address)}"') if address else ("g", 'tabindex="0"')
    return f'<{tag} class="{kind}" {reached} data-tip="{told}"><title>{told}</title>{body}</{tag}>'


def _change(before: str, after: str, match: str | None, what: str) -> str:
    """How the source's extent becomes the target's: ``64 to 128 channels, matched by fc2``."""
    changed = f"{before} to {after}" if before != after else after
    return f"{changed} {what}" + (f", matched by {match}" if match else "")


def _size(block: AttentionBlock) -> str:
    return "×".join(map(str, block.size)) if block.size else "?"


def _short(text: str, most: int) -> str:
    """``text`` with its middle left out where it is longer than ``most``."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"
