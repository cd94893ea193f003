"""What a run has measured, epoch by epoch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import RenderableType
from torch import Tensor

from dcafy import plots, records
from dcafy.amounts import fixed, metric, percent
from dcafy.analysis.listening import Usage
from dcafy.display import Brief, Shown
from dcafy.records import ReadBy, read
from dcafy.tables import NONE, Cell, Column, Sheet
from dcafy.wording import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class ConnectionState:
    """One connection after an epoch; see :class:`dcafy.analysis.listening.ConnectionUsage`."""

    alpha: float
    beta: float
    contribution: float


def read_states(data: Any, where: str) -> dict[str, ConnectionState]:
    """The connections of an epoch, from JSON; runs that were written before have the message share besides."""
    rows = records.entries(lambda row, _: _without_share(row), data, where)
    states: dict[str, ConnectionState] = read(dict[str, ConnectionState], rows, where, whole=True)
    return states


def _without_share(row: Any) -> Any:
    return {name: value for name, value in row.items() if name != "message_share"} if isinstance(row, dict) else row


@dataclass(frozen=True, repr=False)
class Epoch(Brief):
    """One epoch, counted from 1: ``loss`` is the mean over its images, ``metrics`` are of the validation images.

    Accuracies are fractions; ``seconds`` are those of training alone; ``skipped`` images could not be read.
    """

    epoch: int
    steps: int
    lr: float
    loss: float
    accuracy: float | None
    metrics: Mapping[str, float]
    connections: Annotated[Mapping[str, ConnectionState], ReadBy(read_states)]
    seconds: float
    skipped: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The epoch as JSON-ready data."""
        return {"event": "epoch", **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Epoch:
        """The epoch that ``to_dict`` described."""
        epoch: Epoch = read(cls, {name: value for name, value in data.items() if name != "event"}, whole=True)
        return epoch


@dataclass(frozen=True, repr=False)
class History(Shown):
    """All epochs; what the network makes of each connection in the end; every image that could not be read, by name.

    ``by_image``: what was measured last, image by image, where it is (see :class:`dcafy.training.tasks.Meter`).
    """

    epochs: tuple[Epoch, ...]
    usage: Usage | None = None
    skipped: tuple[str, ...] = ()
    by_image: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def metrics(self) -> Mapping[str, float]:
        """What was measured last on the validation images; empty where nothing was."""
        return self.epochs[-1].metrics if self.epochs else {}

    def to_dict(self) -> dict[str, Any]:
        """The history as JSON-ready data."""
        usage = None if self.usage is None else self.usage.to_dict()
        return {"epochs": [one.to_dict() for one in self.epochs], "usage": usage, "skipped": list(self.skipped)}

    def plot(self) -> list[Axes]:
        """The losses, the other metrics and the contributions of the connections over the epochs (matplotlib)."""
        across = [one.epoch for one in self.epochs]
        losses = {"training": [one.loss for one in self.epochs], **self._series(lambda name: name == "loss")}
        metrics = self._series(lambda name: name not in ("loss", "images"))
        own = dict.fromkeys(name for one in self.epochs for name in one.connections)
        shares = {
            name: [one.connections[name].contribution if name in one.connections else math.nan for one in self.epochs]
            for name in own
        }
        drawn = [(losses, "loss"), (metrics, next(iter(metrics), "")), (shares, "|β| / (|α| + |β|)")]
        drawn = [(series, y) for series, y in drawn if series]
        made = plots.grid(1, len(drawn), width=4.2, height=3.2)
        return [plots.lines(ax, across, series, x="epoch", y=y) for ax, (series, y) in zip(made, drawn, strict=True)]

    def _series(self, wanted: Callable[[str], bool]) -> dict[str, list[float]]:
        names = [name for name in self.metrics if wanted(name)]
        return {f"validation {name}": [one.metrics.get(name, math.nan) for one in self.epochs] for name in names}

    def _records(self) -> list[dict[str, Any]]:
        return [
            {"epoch": one.epoch, "steps": one.steps, "lr": one.lr, "loss": one.loss, "accuracy": one.accuracy,
             **{f"validation_{name}": value for name, value in one.metrics.items()}, "seconds": one.seconds}
            for one in self.epochs
        ]  # fmt: skip

    def _headline(self) -> str:
        told = ", ".join(f"{name} {metric(name, value)}" for name, value in self.metrics.items() if name != "images")
        return f"{counted(len(self.epochs), 'epoch')}; validation: {told or 'none'}"

    def _parts(self) -> Iterator[RenderableType]:
        names = [name for name in self.metrics if name != "images"]
        rows: list[tuple[Cell, ...]] = []
        for one in self.epochs:
            measured = (metric(name, one.metrics[name]) if name in one.metrics else NONE for name in names)
            trained = NONE if one.accuracy is None else percent(one.accuracy)
            rows.append((str(one.epoch), fixed(one.loss), trained, *measured, f"{one.lr:.2g}", fixed(one.seconds, 1)))
        titles = ("loss", "accuracy", *(f"validation {name}" for name in names), "lr", "seconds")
        columns = (Column("epoch", "number"), *(Column(title, "number") for title in titles))
        yield Sheet(columns, tuple(rows), "epochs")
        if self.usage is not None:
            yield from self.usage._parts()
