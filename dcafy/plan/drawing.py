"""The network as a drawing: stages as lanes, attention blocks as nodes, connections as arcs.

Data flows downwards, one row for each block, so that names stay readable from 3 blocks to 100 and on a phone; channel
attention has one column of nodes and spatial attention another. It is SVG written by hand: plotting libraries draw
axes, and cannot put a title on each arc for a pointer to find.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import get_args

from dcafy.display import Brief, natural_size
from dcafy.plan.blocks import AttentionBlock, Contents, Contribution, Link
from dcafy.plan.options import Dimension
from dcafy.plan.tables import link_matches
from dcafy.wording import printable

COLOURS: dict[str, str] = dict(zip(get_args(Dimension), ("#0072B2", "#D55E00", "#009E73"), strict=False))
"""Okabe and Ito's blue and vermilion, which colour-blind people tell apart; on white and on black alike."""

WIDTH, LARGEST = 440, 540
"""Units across, which on a phone are about a pixel each; and the pixels that the drawing takes where there is room."""

ROW, HEAD, LEGEND = 24, 26, 54
FIRST, COLUMN = 62, 66
"""Where the first column of nodes is, and how far the next one is from it."""

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
    """A stage: its title, and the names of its blocks."""

    title: str
    blocks: tuple[str, ...]


def draw(
    plan: Contents,
    *,
    lanes: Sequence[Lane] | None = None,
    contributions: Sequence[Contribution] = (),
    shares: Mapping[str, float] | None = None,
) -> Drawing:
    """The plan as SVG: lanes, blocks, and an arc for each connection; hovering tells what each is.

    ``lanes``: the stages; blocks are grouped by their names where absent. ``contributions``: of the connected model,
    for α, β and parameters. ``shares``: the message share of each connection, which is the width of its arc
    (:func:`dcafy.analysis.usage.message_shares`).

    >>> import dcafy, dcafy.analysis, torchvision
    >>> drawing = dcafy.analysis.draw(dcafy.inspect(torchvision.models.mobilenet_v3_small()))
    >>> drawing.svg.count('class="arc"')
    8
    """
    return Drawing(_Sheet(plan, lanes_by_name(plan) if lanes is None else lanes, contributions, shares or {}).svg())


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


class _Sheet:
    """One drawing, as it is laid out."""

    def __init__(
        self,
        plan: Contents,
        lanes: Sequence[Lane],
        contributions: Sequence[Contribution],
        shares: Mapping[str, float],
    ) -> None:
        self.plan = plan
        self.lanes = [lane for lane in lanes if lane.blocks]
        self.shares = shares
        self.made: dict[tuple[str, str], list[Contribution]] = {}
        for row in contributions:
            self.made.setdefault((row.source, row.target), []).append(row)
        self.height = 0
        self.at: dict[str, int] = {}
        for lane in self.lanes:
            self.height += HEAD
            for name in lane.blocks:
                self.at[name] = self.height + ROW // 2
                self.height += ROW
        dimensions = dict.fromkeys(block.dimension for block in plan.blocks)
        self.column = {dimension: FIRST + COLUMN * i for i, dimension in enumerate(sorted(dimensions))}
        self.text_at = max(self.column.values(), default=FIRST) + 18
        self.connected = {name for link in plan.links for name in (link.source, link.target)}

    def svg(self) -> str:
        counts = (
            f"{len(self.plan.blocks)} attention blocks in {len(self.lanes)} stages, {len(self.plan.links)} connections"
        )
        label = escape(f"{printable(self.plan.model or 'model')}: {counts}")
        # Long arcs enclose short ones and are drawn first, so that a pointer finds the short ones, too.
        arcs = sorted((link for link in self.plan.links if self._length(link)), key=self._length, reverse=True)
        parts = [*self._bands(), *map(self._arc, arcs), *map(self._node, self.plan.blocks), self._legend()]
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="chains" role="img" aria-label="{label}" '
            f'viewBox="0 0 {WIDTH} {self.height + LEGEND}" style="max-width:{LARGEST}px;width:100%;height:auto" '
            f'font-family="system-ui, sans-serif" font-size="13" fill="currentColor">\n' + "\n".join(parts) + "\n</svg>"
        )

    def _bands(self) -> list[str]:
        drawn = []
        top = 0
        for i, lane in enumerate(self.lanes):
            height = HEAD + ROW * len(lane.blocks)
            title = escape(_short(printable(lane.title), 50))
            drawn.append(
                f'<g class="lane"><rect x="0" y="{top}" width="{WIDTH}" height="{height}" '
                f'fill-opacity="{0.08 if i % 2 else 0.03}"/>'
                f'<text x="{WIDTH - 10}" y="{top + 17}" text-anchor="end" font-weight="600">{title}</text></g>'
            )
            top += height
        return drawn

    def _node(self, block: AttentionBlock) -> str:
        if block.name not in self.at:
            return ""
        x, y, colour = self.column[block.dimension], self.at[block.name], COLOURS[block.dimension]
        size = "×".join(map(str, block.size)) if block.size else ""
        sizes = f"{block.channels} channels" + (f", {size}" if size else "")
        fill = colour if block.name in self.connected else "none"
        tip = (
            f"{printable(block.name)}\n{block.dimension} attention, {sizes}\n"
            f"gate {block.gate}, fused by {_FUSED[block.fusion_kind]}"
        )
        shape = f" · {block.channels}" + (f" · {size}" if size else "")
        text = _short(printable(block.name), int((WIDTH - self.text_at) / LETTER) - len(shape)) + shape
        return _group(
            "block",
            tip if block.name in self.connected else f"{tip}\nnot connected",
            f'<circle cx="{x}" cy="{y}" r="7" fill="{fill}" stroke="{colour}" stroke-width="2"/>'
            f'<text x="{self.text_at}" y="{y + 4}">{escape(text)}</text>',
        )

    def _length(self, link: Link) -> int:
        """How far an arc reaches; 0 where one of its blocks is in no lane."""
        return self.at[link.target] - self.at[link.source] if {link.source, link.target} <= self.at.keys() else 0

    def _arc(self, link: Link) -> str:
        dimension = self.plan.block(link.target).dimension
        x, top, bottom = self.column[dimension], self.at[link.source], self.at[link.target]
        bulge = min(24 + 0.16 * (bottom - top), (x - 8 if x == FIRST else COLUMN))
        made = self.made.get((link.source, link.target), [])
        share = max((self.shares.get(row.name, 0.0) for row in made), default=0.0)
        width = THINNEST + (THICKEST - THINNEST) * share
        path = f"M{x} {top}C{x - bulge:.0f} {top} {x - bulge:.0f} {bottom} {x} {bottom}"
        return _group(
            "arc",
            self._arc_tip(link, made),
            # A finger or a pointer need not hit a thin line: all that the arc encloses is the arc.
            f'<path d="{path}" fill="none" stroke="none" stroke-width="12" pointer-events="all"/>'
            f'<path class="line" d="{path}" fill="none" stroke="{COLOURS[dimension]}" stroke-width="{width:.2f}" '
            f'stroke-opacity="0.75"/>' + self._marks(link, x - 0.75 * bulge, (top + bottom) / 2),
        )

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
            share = f", message share {self.shares[row.name]:.1%}" if row.name in self.shares else ""
            lines.append(f"{name}α {row.alpha:.4g}, β {row.beta:.4g}, contribution {row.ratio:.1%}{share}")
            lines.append(f"{row.parameters:,} parameters")
        return "\n".join(lines)

    def _legend(self) -> str:
        y = self.height + 18
        parts = []
        for i, dimension in enumerate(self.column):
            parts.append(f'<circle cx="{16 + 84 * i}" cy="{y}" r="6" fill="{COLOURS[dimension]}"/>')
            parts.append(f'<text x="{27 + 84 * i}" y="{y + 4}">{dimension}</text>')
        if self.shares:
            parts.append(f'<text x="{27 + 84 * len(self.column)}" y="{y + 4}">width: message share</text>')
        for mark, text, x in ((_square, "channels matched", 16), (_diamond, "sizes matched", 166)):
            parts.append(mark(x, y + 20, "currentColor"))
            parts.append(f'<text x="{x + 11}" y="{y + 24}">{text}</text>')
        return '<g class="legend">' + "".join(parts) + "</g>"


_FUSED = {"mul": "multiplication", "add": "addition"}


def _square(x: float, y: float, colour: str) -> str:
    return f'<rect class="match channel" x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" fill="{colour}"/>'


def _diamond(x: float, y: float, colour: str) -> str:
    points = f"{x:.1f},{y - 7:.1f} {x + 7:.1f},{y:.1f} {x:.1f},{y + 7:.1f} {x - 7:.1f},{y:.1f}"
    return f'<polygon class="match spatial" points="{points}" fill="{colour}"/>'


def _group(kind: str, tip: str, body: str) -> str:
    """Something that can be pointed at; the report's page shows ``data-tip``, everything else the title."""
    told = escape(tip).replace("\n", "&#10;")  # XML reads a bare line end in an attribute as a blank
    return f'<g class="{kind}" tabindex="0" data-tip="{told}"><title>{told}</title>{body}</g>'


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
