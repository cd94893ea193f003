"""A histogram as SVG written by hand: a page may have hundreds, and those of a plotting library are ten times as large
and take a thousand times as long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from dcafy.analysis.values import Histogram

WIDTH, HEIGHT = 250, 142
"""Units of the drawing, which on a page are about a pixel each."""

LEFT, RIGHT, TOP, BOTTOM = 38, 242, 8, 118
"""Where the axes are."""


def histogram_drawing(made: Sequence[tuple[Histogram, str, bool]], top: float, *, label: str) -> str:
    """Histograms over the same bins, each with its colour and whether it is filled or drawn; ``top``: the highest share
    that the axis has room for. ``label`` is the alternative text.
    """
    low, high = made[0][0].edges[0], made[0][0].edges[-1]
    wide, tall = (RIGHT - LEFT) / ((high - low) or 1), (BOTTOM - TOP) / (1.05 * top or 1)
    parts = []
    for value in ticks(low, high, 4):
        x = LEFT + (value - low) * wide
        parts.append(_line(f"M{x:.1f} {TOP}V{BOTTOM}") + _word(x, BOTTOM + 15, "middle", f"{value:.4g}"))
    for value in ticks(0, 1.05 * top, 3):
        y = BOTTOM - value * tall
        parts.append(_line(f"M{LEFT} {y:.1f}H{RIGHT}") + _word(LEFT - 5, y + 4, "end", f"{100 * value:.3g}%"))
    parts += [_steps(histogram, wide, tall, colour, filled) for histogram, colour, filled in made]
    parts.append(_line(f"M{LEFT} {TOP}V{BOTTOM}H{RIGHT}", "axis"))
    return (
        f'<svg class="histogram" role="img" aria-label="{escape(label)}" viewBox="0 0 {WIDTH} {HEIGHT}">'
        + "".join(parts)
        + "</svg>"
    )


def _steps(histogram: Histogram, wide: float, tall: float, colour: str, filled: bool) -> str:
    """The outline of the bars: up or down, then along to the next one that is as high as no neighbour."""
    low, path, height = histogram.edges[0], f"M{LEFT} {BOTTOM}", float(BOTTOM)
    for edge, share in zip(histogram.edges, (*histogram.shares, 0.0), strict=True):
        y = round(BOTTOM - share * tall, 1)
        if y != height:
            path += f"H{LEFT + (edge - low) * wide:.1f}V{y:g}"
            height = y
    ink = f'fill="{colour}" fill-opacity="0.7"' if filled else f'fill="none" stroke="{colour}" stroke-width="2"'
    return f'<path d="{path}" {ink}/>'


def _line(path: str, kind: str = "grid") -> str:
    return f'<path class="{kind}" d="{path}"/>'


def _word(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from ``low`` to ``high``, up to ``most`` steps between them.

    >>> ticks(0, 1, 4), ticks(0.493, 0.512, 4)
    ([0.0, 0.25, 0.5, 0.75, 1.0], [0.495, 0.5, 0.505, 0.51])
    """
    if not high > low:
        return [low]
    exact = (high - low) / most
    power = 10.0 ** math.floor(math.log10(exact))
    step = next(power * each for each in (1, 2, 2.5, 5, 10) if power * each >= exact * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]
