"""Did connecting help? The same training of several forms of a network, seed by seed, and what can be said of it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcafy.analysis.complexity import complexity
from dcafy.analysis.listening import Usage
from dcafy.disk import replace_file
from dcafy.display import Brief
from dcafy.errors import CheckpointError, Interrupted
from dcafy.runs.evidence import LOSSES, Difference, crossed_difference, paired_difference
from dcafy.runs.recipes import PURPOSES
from dcafy.runs.request import Request
from dcafy.runs.run import Subject, finish, subject, train
from dcafy.runs.timing import step_times
from dcafy.sources import FileOptions
from dcafy.training.folder import alone_in
from dcafy.training.history import History
from dcafy.training.signals import stopped
from dcafy.training.telling import Listener
from dcafy.wording import printable

COMPARISON = "compare.json"
"""The name of the comparison in the folder of a run."""


@dataclass(frozen=True, repr=False)
class Contender(Brief):
    """One of the networks: its metrics for each seed, its size, and the median seconds of a training step."""

    metrics: tuple[dict[str, float], ...]
    parameters: int
    gflops: float
    step_seconds: float


@dataclass(frozen=True, repr=False)
class Pair(Brief):
    """Metric -> the paired difference ``one`` minus ``other``, both names of arms."""

    one: str
    other: str
    differences: dict[str, Difference]


@dataclass(frozen=True, repr=False)
class Comparison(Brief):
    """All arms by name, the pairs of them (the last one against the one before it is first), and usage by seed."""

    seeds: tuple[int, ...]
    arms: dict[str, Contender]
    pairs: tuple[Pair, ...]
    usage: tuple[Usage | None, ...]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON-ready data: arms by name; ``differences`` are those of the first pair."""
        pairs = [{**dataclasses.asdict(pair), "differences": _with_verdicts(pair)} for pair in self.pairs]
        return {
            "seeds": list(self.seeds),
            **{name: dataclasses.asdict(side) for name, side in self.arms.items()},
            "differences": pairs[0]["differences"] if pairs else {},
            "pairs": pairs,
            "usage": [None if usage is None else dataclasses.asdict(usage) for usage in self.usage],
        }


def _with_verdicts(pair: Pair) -> dict[str, dict[str, Any]]:
    return {
        name: {**dataclasses.asdict(difference), "verdict": difference.verdict}
        for name, difference in pair.differences.items()
    }


@dataclass(frozen=True)
class Turn:
    """Which training of a comparison it is: the ``number``-th, from 1, ``of`` all."""

    number: int
    of: int
    seed: int
    arm: str

    @property
    def folder(self) -> str:
        """The name of its folder in that of the comparison."""
        return f"{self.seed}-{self.arm}"

    @property
    def title(self) -> str:
        """The seed and the arm."""
        return f"seed {self.seed}, {self.arm}"

    def __str__(self) -> str:
        return f"run {self.number} of {self.of} ({self.title})"


def compare(
    request: Request,
    directory: Path,
    *,
    file: FileOptions | None = None,
    listener_for: Callable[[Turn], tuple[Listener, ...]] = lambda turn: (),
    is_main: bool = True,
) -> Comparison:
    """Trains every arm ``request.seeds`` times; writes ``compare.json`` and the last arm's first model.

    Under one seed all have the same classifier, order of images and augmentation, and the same number of steps. A
    comparison that was stopped goes on where it was.
    """
    with alone_in(directory) if is_main else nullcontext():
        return _compared(request, directory, file, listener_for, is_main)


def _compared(
    request: Request,
    directory: Path,
    file: FileOptions | None,
    listener_for: Callable[[Turn], tuple[Listener, ...]],
    is_main: bool,
) -> Comparison:
    seeds = tuple(range(request.training.seed, request.training.seed + request.seeds))
    arms = request.arms or ("original", "connected")
    histories: dict[str, list[History]] = {arm: [] for arm in arms}
    first: dict[str, Subject] = {}
    for number, (seed, arm) in enumerate(itertools.product(seeds, arms), start=1):
        turn = Turn(number, len(seeds) * len(arms), seed, arm)
        on = subject(request, seed=seed, arm=arm, file=file)
        place, listeners = _own_folder(directory, turn.folder), listener_for(turn)
        try:
            history = train(request, on, place, seed=seed, resume=True, listeners=listeners)
        except Interrupted as error:  # it is the comparison that can be gone on with
            raise stopped(error.signal, directory) from error
        histories[arm].append(history)
        first.setdefault(arm, on)
        if is_main:
            finish(on, place)
    metrics = {arm: [dict(history.metrics) for history in runs] for arm, runs in histories.items()}
    ordered = sorted(
        itertools.combinations(arms, 2), key=lambda pair: -arms.index(pair[0]) - len(arms) * arms.index(pair[1])
    )
    pairs = tuple(_pair(one, other, histories) for other, one in ordered)
    used = tuple(history.usage for history in histories[arms[-1]])
    comparison = Comparison(seeds, _sides(request, first, metrics), pairs, used)
    if is_main:
        text = json.dumps(comparison.to_dict(), indent=2) + "\n"
        replace_file(directory / COMPARISON, lambda beside: beside.write_text(text, encoding="utf-8"))
        finish(first[arms[-1]], directory)
    return comparison


def _own_folder(directory: Path, name: str) -> Path:
    """Where one training of a comparison is kept; ``CheckpointError`` where a link leads it out of the run's folder."""
    place = directory / "seeds" / name
    for part in (place.parent, place):
        if part.is_symlink():
            raise CheckpointError(
                f"{printable(str(part))!r} is a link, and a run writes into its own folder. Remove it."
            )
    place.mkdir(parents=True, exist_ok=True)
    return place


def _pair(one: str, other: str, histories: Mapping[str, Sequence[History]]) -> Pair:
    """What tells two arms apart, by metric: over seeds and images where images are measured one by one."""
    ours, theirs = histories[one], histories[other]
    by_image = [_common(pair) for pair in zip(ours, theirs, strict=True)]
    found = {}
    for name in measured([history.metrics for history in (*ours, *theirs)]):
        lower = name in LOSSES
        if all(name in rows for rows in by_image):
            values = [torch.stack([rows[name][side] for rows in by_image]) for side in (0, 1)]
            found[name] = crossed_difference(*values, unit=None if lower else 1.0, lower_is_better=lower)
        else:
            columns = ([history.metrics[name] for history in runs] for runs in (ours, theirs))
            images = int(min(history.metrics.get("images", 0) for history in (*ours, *theirs)))
            found[name] = paired_difference(*columns, of=0 if lower else images, lower_is_better=lower)
    return Pair(one, other, found)


def measured(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """The metrics that all of these have, in their order; a run of an earlier version may have more."""
    return [name for name in rows[0] if name != "images" and all(name in row for row in rows)]


def _common(pair: tuple[History, History]) -> dict[str, Tensor]:
    """Metric -> what both make of each image, ``[2, images]``; they have read the same ones, in the same order."""
    one, other = (history.by_image for history in pair)
    if not one or not other or not torch.equal(one["index"], other["index"]):
        return {}
    return {name: torch.stack([one[name], other[name]]) for name in one if name != "index"}


def _sides(
    request: Request, first: dict[str, Subject], metrics: dict[str, list[dict[str, float]]]
) -> dict[str, Contender]:
    purpose = PURPOSES[request.task]
    task = purpose.task(request.training)
    models = {arm: on.network for arm, on in first.items()}
    from accelerate.utils import send_to_device

    some = next(iter(first.values()))
    device = next(some.network.parameters()).device
    batch = purpose.batch(some.ready, task, max(request.training.batch_size, 2))
    images, labels = send_to_device(batch.inputs, device), send_to_device(batch.labels, device)

    def loss(model: nn.Module, inputs: Any, labels: Any) -> Tensor:
        return task.loss(model, batch._replace(inputs=inputs, labels=labels))[0]

    times = step_times(models, images, labels, loss=loss)
    sides = {}
    for arm, model in models.items():
        size = complexity(model, images)
        sides[arm] = Contender(tuple(metrics[arm]), size.parameters, size.gflops, statistics.median(times[arm]))
    return sides
