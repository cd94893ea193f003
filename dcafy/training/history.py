"""What a run has measured, epoch by epoch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dcafy.analysis.usage import Usage
from dcafy.records import read


@dataclass(frozen=True)
class ConnectionState:
    """One connection after an epoch; see :class:`dcafy.analysis.usage.ConnectionUsage`."""

    alpha: float
    beta: float
    contribution: float
    message_share: float


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
    connections: Mapping[str, ConnectionState]
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
    """All epochs; what cutting each connection costs in the end; every image that could not be read, by name."""

    epochs: tuple[Epoch, ...]
    usage: Usage | None = None
    skipped: tuple[str, ...] = ()

    @property
    def metrics(self) -> Mapping[str, float]:
        """What was measured last on the validation images; empty where nothing was."""
        return self.epochs[-1].metrics if self.epochs else {}
