"""What a run has measured, epoch by epoch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from torch import Tensor

from dcafy import records
from dcafy.analysis.listening import Usage
from dcafy.records import ReadBy, read


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


@dataclass(frozen=True)
class Epoch:
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


@dataclass(frozen=True)
class History:
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
