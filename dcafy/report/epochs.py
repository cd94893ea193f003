"""The log of a fine-tuning, as far as it is about connections."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from dcafy.disk import content
from dcafy.errors import SourceError
from dcafy.records import read, shallow
from dcafy.training.history import ConnectionState, read_states
from dcafy.training.telling import LOG
from dcafy.wording import quoted, refused

_LARGEST = 2**25
"""Bytes that a log may have; an epoch of a network with fifty connections takes some ten thousand."""


@dataclass(frozen=True)
class EpochLog:
    """``epochs`` by number; of each connection the contribution ratio after each of them."""

    epochs: tuple[int, ...]
    contribution: dict[str, tuple[float, ...]]


def read_epochs(folder: Path) -> EpochLog | None:
    """What a folder's log says; ``None`` where it has none, or no epoch in it yet.

    A run that was resumed may have logged an epoch twice: the last one counts. Raises ``SourceError`` for a log that
    is damaged; an incomplete last line is what a killed run leaves, and is not read.
    """
    path = folder / LOG
    if not os.path.lexists(path):
        return None
    rows: dict[int, dict[str, ConnectionState]] = {}
    try:
        lines = content(path, _LARGEST).split(b"\n")
        for line in filter(None, lines[:-1]):
            event = shallow(json.loads(line))
            if event["event"] == "epoch":
                rows[read(int, event["epoch"], "epoch")] = read_states(event["connections"], "connections")
        contribution = _series(rows, "contribution")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SourceError(
            f"{quoted(str(path), 200)} is no log of dcafy finetune ({refused(error)[:120]}). Move it away to report "
            "without it."
        ) from error
    return EpochLog(tuple(sorted(rows)), contribution) if rows else None


def _series(rows: dict[int, dict[str, ConnectionState]], key: str) -> dict[str, tuple[float, ...]]:
    ordered = [rows[epoch] for epoch in sorted(rows)]
    series = {
        name: tuple(float(getattr(row[name], key)) for row in ordered) for name in (ordered[0] if ordered else ())
    }
    if not all(math.isfinite(share) for shares in series.values() for share in shares):
        raise ValueError(f"a {key} is infinite")
    return series
