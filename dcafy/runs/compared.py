"""A comparison, read from the file that a run wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dcafy.analysis.listening import Usage
from dcafy.disk import content
from dcafy.errors import CheckpointError
from dcafy.records import entries, one_of, read, shallow
from dcafy.runs.compare import COMPARISON, Comparison, Contender, Pair
from dcafy.runs.evidence import Difference
from dcafy.runs.options import ARMS
from dcafy.wording import quoted, refused

_LARGEST = 2**24
"""Bytes that a comparison may have; one of fifty connections and ten seeds takes some hundred thousand."""


def read_comparison(directory: Path) -> Comparison | None:
    """What ``dcafy finetune --compare`` wrote into ``directory``; ``None`` where it wrote nothing there.

    Raises ``CheckpointError`` where the file is damaged.
    """
    path = directory / COMPARISON
    if not os.path.lexists(path):
        return None
    try:
        return comparison_of(shallow(json.loads(content(path, _LARGEST))))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{quoted(str(path), 200)} is no comparison of dcafy finetune ({refused(error)[:120]}). Move it away to go "
            "on without it."
        ) from error


def comparison_of(data: Any) -> Comparison:
    """The comparison that ``to_dict`` described; ``ValueError``, ``KeyError`` or ``TypeError`` for anything else."""
    pairs = tuple(_pair(pair) for pair in data["pairs"])
    arms = {
        _arm(name, ""): Contender(
            metrics=_metrics(side["metrics"]), **{key: read(kind, side[key], key) for key, kind in _SIZES}
        )
        for name, side in data.items()
        if name not in _OTHERS
    }
    if not arms or not data["seeds"] or any(len(side.metrics) != len(data["seeds"]) for side in arms.values()):
        raise ValueError("it does not have every network's metrics for every seed")
    if len({frozenset(row) for side in arms.values() for row in side.metrics}) > 1:
        raise ValueError("it measures different things of different networks")
    if any(end not in arms for pair in pairs for end in (pair.one, pair.other)):
        raise ValueError("it compares a network that it does not name")
    return Comparison(
        read(tuple[int, ...], data["seeds"], "seeds"),
        arms,
        pairs,
        read(tuple[Usage | None, ...], data["usage"], "usage"),
    )


_SIZES: tuple[tuple[str, type], ...] = (("parameters", int), ("gflops", float), ("step_seconds", float))
_arm = one_of(ARMS)
"""Names of networks are those of folders in the run's: one that leads elsewhere is none."""

_OTHERS = ("seeds", "differences", "pairs", "usage")
"""The entries of a comparison that are no network."""


def _pair(data: Any) -> Pair:
    one, other = (read(str, data[end], end) for end in ("one", "other"))
    return Pair(one, other, entries(_difference, data["differences"], "differences"))


def _metrics(data: Any) -> tuple[dict[str, float], ...]:
    found: tuple[dict[str, float], ...] = read(tuple[dict[str, float], ...], data, "metrics")
    return found


def _difference(data: Any, where: str) -> Difference:
    """A difference without its verdict, which follows from it."""
    named = {name: value for name, value in data.items() if name != "verdict"}
    found: Difference = read(Difference, named, where)
    return found
