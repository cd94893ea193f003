"""What a network makes of its connections, as data and as a table, with the call that drops what it does not hear."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text

from dcafy import plots
from dcafy.amounts import fixed, percent, points
from dcafy.analysis.student import student
from dcafy.display import Shown
from dcafy.tables import NONE, Cell, Column, Sheet
from dcafy.wording import counted, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = ("cut", "shuffled", "mean")
"""The ways in which what a connection hears is changed."""

ALL = ""
"""The name of all connections at once."""

NEGLIGIBLE = 1e-3
"""A rise of the loss that is none to speak of: the right class is a thousandth less likely."""


@dataclass(frozen=True)
class Effect:
    """What changing messages does: the change of the mean cross-entropy and of the top-1 accuracy (a fraction).

    ``loss_error`` and ``accuracy_error`` are standard errors, from the differences image by image, of which there are
    ``images``; ``None`` for a single image. A loss above 0 and an accuracy below 0 mean that the network did better as
    it is.
    """

    loss: float
    loss_error: float | None
    accuracy: float
    accuracy_error: float | None
    images: int

    @property
    def half(self) -> float | None:
        """Half of the 95% interval of the change of the loss (Student's t)."""
        return None if self.loss_error is None else student(self.images - 1) * self.loss_error

    @property
    def is_negligible(self) -> bool:
        """Whether the loss rises by less than a thousandth, with a confidence of 97.5%."""
        return self.half is not None and self.loss + self.half < NEGLIGIBLE

    @property
    def is_sure(self) -> bool:
        """Whether the loss changes by more than chance would have it change in 95 of 100 cases."""
        return self.half is not None and self.loss != 0 and abs(self.loss) > self.half


class _Cut:
    """What cutting messages changes, as numbers alone."""

    cut: Effect

    @property
    def loss_change(self) -> float:
        """Loss without the messages, minus the loss as it is; above 0 where they help."""
        return self.cut.loss

    @property
    def accuracy_change(self) -> float:
        """The same of the top-1 accuracy, a fraction; below 0 where they help."""
        return self.cut.accuracy


@dataclass(frozen=True)
class ConnectionUsage(_Cut):
    """One connection, as a data set shows it.

    ``contribution``     |β| / (|α| + |β|) (paper 4.5)
    ``message_share``    ‖β·match(T̃)‖ / (‖αG‖ + ‖β·match(T̃)‖), over all images
    ``varying``          the part of the message's energy that differs between images; the rest is a bias
    ``moved``            how far the block's T moves when the connection is cut (root mean square), in standard
                         deviations of T; ``None`` where T cannot be read or never differs
    ``cut``              without the message
    ``shuffled``         with the message of another image of the batch; ``None`` where no batch has two
    ``mean``             with the average message
    """

    name: str
    dimension: str
    alpha: float
    beta: float
    contribution: float
    message_share: float
    varying: float
    moved: float | None
    cut: Effect
    shuffled: Effect | None
    mean: Effect


@dataclass(frozen=True)
class StateUsage(_Cut):
    """One module that hears the state of the unit before it (``rla``, ``dia``), as a data set shows it.

    ``hears``      the unit whose state it hears
    ``varying``    the part of the state's energy that differs between images; the rest is a bias
    ``cut``        with zeros in the place of the state, as a unit that is run by itself has them
    ``shuffled``   with the state of another image of the batch; ``None`` where no batch has two
    ``mean``       with the average state
    """

    name: str
    hears: str
    varying: float
    cut: Effect
    shuffled: Effect | None
    mean: Effect


@dataclass(frozen=True)
class States(_Cut):
    """What is handed on from unit to unit: every module that hears it, and all of them changed at once."""

    units: tuple[StateUsage, ...]
    cut: Effect
    shuffled: Effect | None
    mean: Effect


@dataclass(frozen=True, repr=False)
class Usage(Shown, _Cut):
    """Every connection in the order of the data, and the network with all of them changed at once.

    ``loss`` (mean cross-entropy) and ``accuracy`` (a fraction) are those of the network as it is, on ``images`` images.
    ``alike``: the part of the images that were shown a message of their own class where messages were shuffled.
    ``unheard``: connections that can be taken out (:func:`dcafy.drop`), and ``without`` them what happens. ``unread``:
    why no T can be read, if that is so. ``states``: what is handed on from unit to unit (``rla``, ``dia``), if anything
    is; without connections what cutting them does is nothing.
    """

    images: int
    loss: float
    accuracy: float
    connections: tuple[ConnectionUsage, ...]
    cut: Effect
    shuffled: Effect | None
    mean: Effect
    alike: float = 0.0
    unheard: tuple[str, ...] = ()
    without: Effect | None = None
    unread: str = ""
    states: States | None = None

    def rows(self, all_: str) -> list[tuple[str, Effect, Effect | None, Effect]]:
        """(name, cut, shuffled, mean) of every connection, and of all at once under the name ``all_``; then of states.

        All states at once stand under ``all_`` with ``states`` behind it.
        """
        rows = [(row.name, row.cut, row.shuffled, row.mean) for row in self.connections]
        if rows or self.states is None:
            rows.append((all_, self.cut, self.shuffled, self.mean))
        if self.states is not None:
            rows += [(row.name, row.cut, row.shuffled, row.mean) for row in self.states.units]
            rows.append((f"{all_} states", self.states.cut, self.states.shuffled, self.states.mean))
        return rows

    @property
    def _rows(self) -> tuple[ConnectionUsage | StateUsage, ...]:
        return self.connections if self.states is None else (*self.connections, *self.states.units)

    def to_dict(self) -> dict[str, Any]:
        """The usage as JSON-ready data."""
        return dataclasses.asdict(self)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The change of the loss when each is cut, shuffled or averaged, with 95% intervals (matplotlib)."""
        rows = self._rows
        chosen = plots.axes(ax, height=1.2 + 0.3 * len(rows))
        series = {}
        for kind in KINDS:
            effects = [getattr(row, kind) for row in rows]
            if None not in effects:
                errors = [one.half or 0.0 for one in effects]
                series[f"if {kind}"] = [one.loss for one in effects], errors
        return plots.points(chosen, [row.name for row in rows], series, x="change of the loss")

    def _parts(self) -> Iterator[RenderableType]:
        yield from usage_tables(self)

    def _headline(self) -> str:
        unheard = f", nobody listens to {len(self.unheard)} of them" if self.unheard else ""
        heard: list[tuple[str, _Cut, str]] = []
        if self.connections or self.states is None:
            heard.append((f"{counted(len(self.connections), 'connection')}: without them", self, unheard))
        if self.states is not None:
            heard.append((f"a state in {counted(len(self.states.units), 'module')}: without it", self.states, ""))
        return f"on {counted(self.images, 'image')}, " + "; ".join(
            f"{what} the loss changes by {in_loss(one.cut)}, top1 by {in_points(one.cut)} points{more}"
            for what, one, more in heard
        )

    def _records(self) -> list[dict[str, Any]]:
        records = []
        for row in self._rows:
            plain = {item.name: getattr(row, item.name) for item in dataclasses.fields(row) if item.name not in KINDS}
            for kind in KINDS:
                effect = getattr(row, kind)
                told = {} if effect is None else dataclasses.asdict(effect)
                plain |= {f"{kind}_{name}": value for name, value in told.items()}
            records.append(plain)
        return records


# --- in a table ---------------------------------------------------------------------------------------

MIXED = 0.5
"""From this part of images on that hear their own class, messages were not shuffled well."""


def usage_tables(found: Usage) -> Iterator[RenderableType]:
    """The usage as rich renderables: a table, how to read it, and what can be dropped."""
    if found.connections or found.states is None:
        yield usage_sheet(found)
    if found.states is not None:
        yield states_sheet(found, found.states)
    yield Text(_reading(found))


def states_sheet(found: Usage, states: States) -> Sheet:
    """What changing the state does that each unit hears, and all of them at once."""
    rows: list[tuple[Cell, ...] | None] = []
    rows += [(row.name, row.hears or NONE, percent(row.varying), *_changes(row)) for row in states.units]
    rows += [None, ("all of them", "", "", *_changes(states))]
    return Sheet(_STATES, tuple(rows), f"the state that is handed on, {_on(found)}")


def usage_sheet(found: Usage) -> Sheet:
    """What changing the messages of each connection does, and of all at once."""
    rows: list[tuple[Cell, ...] | None] = []
    for row in found.connections:
        moved = NONE if row.moved is None else f"{fixed(row.moved, 2)} σ"
        rows.append((row.name, fixed(row.beta, sign=True), percent(row.varying), moved, *_changes(row)))
    rows += [None, ("all of them", "", "", "", *_changes(found))]
    numbers = {**{row.name: number for number, row in enumerate(found.connections, start=1)}, "all of them": "all"}
    return Sheet(_USAGE, tuple(rows), f"connections, {_on(found)}", numbers)


def _on(found: Usage) -> str:
    on = f"on {counted(found.images, 'image')} (loss {fixed(found.loss)}, top1 {percent(found.accuracy)})"
    return f"{on}: changes of the loss, and of top1 in points"


_IF = tuple(f"if {kind}" for kind in KINDS)

_STATES = (
    Column("module", "name"),
    Column("hears the state of", "name"),
    *(Column(title, "number") for title in ("varies", *_IF)),
)

_USAGE = (
    Column("receiving block", "name"),
    *(Column(title, "number") for title in ("β", "varies", "T moves", *_IF)),
)


def _changes(row: ConnectionUsage | Usage | StateUsage | States) -> tuple[Cell, ...]:
    effects = (row.cut, row.shuffled, row.mean)
    return tuple(NONE if effect is None else (in_loss(effect), in_points(effect)) for effect in effects)


def in_loss(effect: Effect | None) -> str:
    """A change of the loss with its standard error."""
    if effect is None:
        return NONE
    return fixed(effect.loss, sign=True) + ("" if effect.loss_error is None else f" ± {fixed(effect.loss_error)}")


def in_points(effect: Effect | None) -> str:
    """A change of the accuracy with its standard error, in points."""
    if effect is None:
        return NONE
    error = "" if effect.accuracy_error is None else f" ± {fixed(100 * effect.accuracy_error, 2)}"
    return points(effect.accuracy) + error


def _reading(found: Usage) -> str:
    lines = [
        "cut: no message; shuffled: another image's; mean: the average one; ± standard errors, image by image.",
        "varies: the part of a message that differs between images; T moves: if cut, in standard deviations of T.",
    ]
    if not found.connections and found.states is not None:
        lines = [
            "cut: no state, but zeros; shuffled: another image's; mean: the average one; ± standard errors, image by "
            "image. varies: the part of the state that differs between images."
        ]
    if found.unread:
        lines.append(f"The maps T cannot be read: {printable(found.unread)}")
    shuffled = (found.shuffled, None if found.states is None else found.states.shuffled)
    if any(shuffled) and found.alike > MIXED:
        lines.append(
            f"{percent(found.alike)} of the images heard one of their own class when messages were shuffled: batches "
            "that are sorted by class make content look worth less than it is. Mix them."
        )
    if found.without is not None:
        lines.append(
            f"Nobody listens to {counted(len(found.unheard), 'connection')}: without, the loss changes by "
            f"{in_loss(found.without)}, top1 by {in_points(found.without)} points.\n"
            f"    model = dcafy.drop(model, {list(map(printable, found.unheard))})"
        )
    return "\n".join(lines)
