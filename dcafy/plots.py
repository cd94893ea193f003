"""Plots of results, with matplotlib, which is imported when something is drawn.

Each draws on axes that are given, or else on new ones of pyplot, and returns them, as pandas does: a notebook shows
them, a script saves them or calls ``pyplot.show()``. Names are shown as they are, and never read as formulas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dcafy.text import short
from dcafy.wording import needing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INKS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours, which colour-blind people tell apart."""

Series = Sequence[float]


def axes(ax: Axes | None = None, *, width: float = 6.4, height: float = 3.6) -> Axes:
    """``ax``, or new axes of so many inches; ``UsageError`` where matplotlib is not installed."""
    return ax if ax is not None else grid(1, 1, width=width, height=height)[0]


def grid(rows: int, columns: int, *, width: float, height: float) -> list[Axes]:
    """New axes in rows and columns, each of so many inches."""
    with needing("A plot", "notebook"):
        from matplotlib import pyplot
    _, made = pyplot.subplots(
        rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False
    )
    return list(made.flat)


def named(name: str, most: int = 40) -> str:
    """A name as a label, in which matplotlib finds no formula."""
    return short(name, most).replace("$", r"\$")


def lines(ax: Axes, across: Sequence[int], series: Mapping[str, Series], *, x: str, y: str) -> Axes:
    """One line for each series over whole numbers."""
    for number, (name, heights) in enumerate(series.items()):
        mark = "." if len(across) < 30 else None
        ax.plot(across, heights, color=INKS[number % len(INKS)], label=named(name), marker=mark, lw=1.4)
    ax.locator_params(axis="x", integer=True)
    ax.set(xlabel=x, ylabel=y)
    if 1 < len(series) <= len(INKS):
        ax.legend(frameon=False)
    return _plain(ax)


def points(ax: Axes, names: Sequence[str], series: Mapping[str, tuple[Series, Series | None]], *, x: str) -> Axes:
    """A row for each name, the first on top, and in it a point for each series, with its error where it has one."""
    for number, (title, (values, errors)) in enumerate(series.items()):
        shift = 0.22 * (number - (len(series) - 1) / 2)
        places = [place + shift for place in range(len(names))]
        ax.errorbar(values, places, xerr=errors, fmt="osD^"[number % 4], color=INKS[number % len(INKS)], label=title,
                    ms=4, lw=1, capsize=2)  # fmt: skip
    ax.axvline(0, color="0.6", lw=0.8, zorder=0)
    ax.set_yticks(range(len(names)), [named(name) for name in names], fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel=x)
    if len(series) > 1:
        ax.legend(frameon=False, fontsize=8)
    return _plain(ax)


def histogram(ax: Axes, shares: Series, edges: Series, *, title: str) -> Axes:
    """Shares of the values in bins."""
    ax.stairs(shares, edges, fill=True, color=INKS[0], alpha=0.8)
    ax.set_title(named(title, 48), fontsize=8)
    return _plain(ax)


def picture(ax: Axes, values: Any, *, title: str = "", heat: Any = None) -> Axes:
    """An image, ``[H, W]`` or ``[H, W, 3]``, with a heat map over it where there is one; heat is shown from 0 on."""
    ax.imshow(values, cmap="inferno", vmin=0)
    if heat is not None:
        high, wide = values.shape[:2]
        ax.imshow(
            heat,
            cmap="inferno",
            alpha=0.55,
            vmin=0,
            interpolation="bilinear",
            extent=(-0.5, wide - 0.5, high - 0.5, -0.5),
        )
    ax.set_title(named(title), fontsize=8)
    ax.set_axis_off()
    return ax


def _plain(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    return ax
