"""The report's curves, as SVG that stands in the page itself.

matplotlib and not plotly: a page that is opened from disk, printed and sent needs no script of several megabytes, and
SVG with text as text takes the page's font, its size and, in dark mode, its colour.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dcafy.plan.drawing import COLOURS
from dcafy.wording import needing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes

SIDES = ("#E69F00", "#009E73")
"""Okabe and Ito's orange for the other network and green for the connected one; one is filled, one is drawn."""

ARMS = ("#E69F00", "#56B4E9", "#CC79A7")
"""Theirs for networks that were trained besides the connected one."""

MARKERS = dict(zip(COLOURS, "oDs", strict=False))

_INK = "#010203"
"""Stands for the page's own text colour, which matplotlib cannot know: light or dark mode chooses it."""

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dcafy",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
}

_serial = itertools.count(1)


@contextmanager
def _axes(width: float, height: float, label: str) -> Iterator[tuple[Axes, list[str]]]:
    """Axes to draw on, and a list that holds the SVG afterwards; ``label`` is the alternative text."""
    with needing("The report", "report"):
        import matplotlib
        from matplotlib.figure import Figure
    drawn: list[str] = []
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure.add_subplot(), drawn
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    drawn.append(_inline(file.getvalue(), label))


def _inline(svg: str, label: str) -> str:
    """A matplotlib SVG file as an element of a page that has others of its kind."""
    from html import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    own = f"f{next(_serial)}-"
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: f' id="{own}{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{own}", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(_INK, "currentColor", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _percent(value: float, _: float) -> str:
    return f"{value * 100:.3g}%"


def share_plot(series: Mapping[str, Sequence[tuple[int, float]]], *, label: str, named: str) -> str:
    """One value for each connection, in the order of the data: a series for each dimension; ``named``: the y axis."""
    with _axes(4.4, 2.3, label) as (axes, drawn):
        for dimension, points in series.items():
            places, heights = zip(*points, strict=True)
            mark = MARKERS[dimension]
            axes.plot(places, heights, color=COLOURS[dimension], label=dimension, marker=mark, ms=4.5, lw=1.2)
        _label(axes, "connection, in the order of the data", named)
        axes.legend(ncols=2)
    return drawn[0]


def epoch_plot(epochs: Sequence[int], series: Mapping[str, Sequence[float]], *, label: str, named: str) -> str:
    """One line for each connection over epochs, from blue (first) to green (last)."""
    with _axes(4.4, 2.3, label) as (axes, drawn):
        import matplotlib

        colours: Callable[[float], Any] = matplotlib.colormaps["viridis"]
        for number, heights in enumerate(series.values()):
            colour = colours(0.3 + 0.5 * number / max(len(series) - 1, 1))  # neither end is lost on its paper
            points = _thinned(epochs), _thinned(heights)
            axes.plot(*points, color=colour, lw=1.4, marker="." if len(epochs) < 30 else None)
        _label(axes, "epoch", named)
    return drawn[0]


_HIGHEST = 1e30
"""From here on a value is no height: a training that diverged leaves a gap."""


def _thinned(values: Sequence[float], most: int = 300) -> Sequence[float]:
    """Up to so many of the values, evenly spread and the last one among them: a line needs no more points."""
    step = -(-len(values) // most)
    return values[::-1][:: max(step, 1)][::-1]


def curve_plot(
    arms: Mapping[str, Sequence[tuple[Sequence[int], Sequence[float]]]], *, label: str, named: str, fraction: bool
) -> str:
    """One measure over epochs: a line for each training of each network; ``fraction``: as an accuracy is one."""
    with _axes(4.4, 2.3, label) as (axes, drawn):
        others = itertools.islice(itertools.cycle(ARMS), len(arms) - 1)
        for (title, trainings), colour in zip(arms.items(), (*others, SIDES[1]), strict=True):
            for number, (epochs, values) in enumerate(trainings):
                mark = "." if len(epochs) < 30 else None
                shown = title if number == 0 else None
                heights = [value if abs(value) < _HIGHEST else math.nan for value in _thinned(values)]
                axes.plot(_thinned(epochs), heights, color=colour, lw=1.4, marker=mark, label=shown, alpha=0.85)
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.set_ylabel(named)
        if fraction:
            axes.yaxis.set_major_formatter(_percent)
        if len(arms) > 1:
            axes.legend(ncols=2)
    return drawn[0]


def _label(axes: Axes, across: str, up: str) -> None:
    """Axes of shares over whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_ylim(bottom=0, top=max(axes.get_ylim()[1], 0.01))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.yaxis.set_major_formatter(_percent)


@functools.cache
def heat_colours(name: str = "inferno") -> Any:
    """256 colours ``[256, 3]`` of 0 to 255, which colour-blind eyes tell apart: a colour map of matplotlib's.

    ``inferno`` goes from nothing to much, ``RdBu_r`` from less (blue) to more (red).
    """
    with needing("The report", "report"):
        import matplotlib
    import numpy as np

    return (matplotlib.colormaps[name](np.arange(256))[:, :3] * 255).round()
