"""What a run has logged: its curves, its connections over epochs, and its comparison."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcafy.analysis.listening import Usage
from dcafy.disk import content
from dcafy.errors import SourceError
from dcafy.records import read, shallow, within
from dcafy.runs.compare import Comparison
from dcafy.runs.compared import read_comparison
from dcafy.training.history import ConnectionState, read_states
from dcafy.training.telling import LOG
from dcafy.wording import quoted, refused

_LARGEST = 2**25
"""Bytes that a log may have; an epoch of a network with fifty connections takes some ten thousand."""


@dataclass(frozen=True)
class EpochLog:
    """A training, epoch by epoch.

    ``epochs``        by number
    ``contribution``  of each connection the contribution ratio after each of them
    ``curves``        name -> what was measured in each: the training loss, and metrics of the validation images
    ``usage``         what the network made of its connections in the end
    """

    epochs: tuple[int, ...]
    contribution: Mapping[str, tuple[float, ...]]
    curves: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    usage: Usage | None = None


@dataclass(frozen=True)
class RunLog:
    """What the folder of a run tells besides the network: its log, or its comparison and the log of each training.

    ``arms``: name of a network -> the logs of its trainings, seed by seed; empty where nothing was compared.
    """

    own: EpochLog | None = None
    comparison: Comparison | None = None
    arms: Mapping[str, tuple[EpochLog, ...]] = field(default_factory=dict)

    @property
    def usage(self) -> Usage | None:
        """What the network in the folder made of its connections."""
        if self.comparison is not None and self.comparison.usage:
            return self.comparison.usage[0]
        return None if self.own is None else self.own.usage

    @property
    def before(self) -> str:
        """The network that the one in the folder was compared with; empty where nothing was compared."""
        return "" if self.comparison is None or not self.comparison.pairs else self.comparison.pairs[0].other

    def place(self, arm: str) -> str:
        """Where in the folder the first training of a network lies."""
        return "" if self.comparison is None else os.path.join("seeds", f"{self.comparison.seeds[0]}-{arm}")


def read_run(folder: Path) -> RunLog:
    """What a folder has of a run; an empty log where it has nothing.

    Raises ``SourceError`` or ``CheckpointError`` for what is damaged.
    """
    comparison = read_comparison(folder)
    if comparison is None:
        return RunLog(read_epochs(folder))
    named = {
        arm: [read_epochs(folder / "seeds" / f"{seed}-{arm}") for seed in comparison.seeds] for arm in comparison.arms
    }
    arms = {arm: tuple(log for log in logs if log is not None) for arm, logs in named.items()}
    last = arms[list(arms)[-1]]
    return RunLog(last[0] if last else None, comparison, arms)


def read_epochs(folder: Path) -> EpochLog | None:
    """What a folder's log says; ``None`` where it has none, or no epoch in it yet.

    A run that was resumed may have logged an epoch twice: the last one counts. Raises ``SourceError`` for a log that
    is damaged; an incomplete last line is what a killed run leaves, and is not read.
    """
    path = folder / LOG
    if not os.path.lexists(path):
        return None
    rows: dict[int, tuple[dict[str, ConnectionState], dict[str, float]]] = {}
    usage = None
    try:
        lines = content(path, _LARGEST).split(b"\n")
        for line in filter(None, lines[:-1]):
            event = shallow(json.loads(line))
            if event["event"] == "epoch":
                states = read_states(event["connections"], "connections")
                rows[_EPOCH(event["epoch"], "epoch")] = states, _measured(event)
            elif event["event"] == "end" and event.get("usage") is not None:
                usage = read(Usage, event["usage"], "usage")
        ordered = [rows[epoch] for epoch in sorted(rows)]
        contribution = _series([{name: state.contribution for name, state in row.items()} for row, _ in ordered])
        if not all(0 <= share <= 1 for shares in contribution.values() for share in shares):
            raise ValueError("a contribution is no fraction")
        curves = _series([measured for _, measured in ordered])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(
            f"{quoted(str(path), 200)} is no log of dcafy finetune ({refused(error)[:120]}). Move it away to report "
            "without it."
        ) from error
    return EpochLog(tuple(sorted(rows)), contribution, curves, usage) if rows else None


_EPOCH = within(0, 10**9)

TRAINED = "training loss"
"""The name of the curve that is of the training images."""


def _measured(event: Any) -> dict[str, float]:
    """The numbers of an epoch that make a curve; logs of before may have none."""
    metrics = read(dict[str, float], event.get("metrics", {}), "metrics")
    loss = {TRAINED: read(float, event["loss"], "loss")} if "loss" in event else {}
    return {**loss, **{name: value for name, value in metrics.items() if name != "images"}}


def _series(rows: list[dict[str, float]]) -> dict[str, tuple[float, ...]]:
    """Name -> its value in each row."""
    return {name: tuple(float(row[name]) for row in rows) for name in (rows[0] if rows else ())}
