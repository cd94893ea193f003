"""Did connecting help? The same training with and without connections, seed by seed, and what can be said of it."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dcafy.analysis.complexity import complexity
from dcafy.analysis.listening import Usage
from dcafy.disk import replace_file
from dcafy.errors import CheckpointError, Interrupted
from dcafy.runs.recipes import PURPOSES
from dcafy.runs.request import Request
from dcafy.runs.run import Subject, finish, subject, train
from dcafy.runs.timing import step_times
from dcafy.sources import FileOptions
from dcafy.training.signals import stopped
from dcafy.training.telling import Listener
from dcafy.wording import printable

COMPARISON = "compare.json"
"""The name of the comparison in the folder of a run."""

SIDES = ("original", "connected")

_T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""The 97.5% points of Student's t distribution with 1 to 30 degrees of freedom."""


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences; ``low`` and ``high`` bound its 95% interval, ``None`` with a single pair."""

    mean: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        """``better`` or ``worse`` only where the interval excludes zero."""
        if self.low is None or self.high is None:
            return "one seed says nothing about chance: run more with --seeds"
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no difference that the seeds could show"


def paired_difference(one: Sequence[float], other: Sequence[float]) -> Difference:
    """Mean and 95% interval (Student's t) of ``one`` minus ``other``, pair by pair.

    >>> paired_difference([0.5, 0.75], [0.25, 0.5])
    Difference(mean=0.25, low=0.25, high=0.25)
    """
    differences = [a - b for a, b in zip(one, other, strict=True)]
    mean = statistics.fmean(differences)
    freedom = len(differences) - 1
    if freedom < 1:
        return Difference(mean, None, None)
    t = _T_975[freedom - 1] if freedom <= len(_T_975) else 1.96 + 2.4 / freedom
    half = t * statistics.stdev(differences) / math.sqrt(len(differences))
    return Difference(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Contender:
    """One of the two networks: its metrics for each seed, its size, and the median seconds of a training step."""

    metrics: tuple[dict[str, float], ...]
    parameters: int
    gflops: float
    step_seconds: float


@dataclass(frozen=True)
class Comparison:
    """Both sides, the paired differences (connected minus original), and how the connections are used, by seed."""

    seeds: tuple[int, ...]
    original: Contender
    connected: Contender
    differences: dict[str, Difference]
    usage: tuple[Usage | None, ...]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON-ready data."""
        data = dataclasses.asdict(self)
        for name, difference in self.differences.items():
            data["differences"][name]["verdict"] = difference.verdict
        return data


def compare(
    request: Request,
    directory: Path,
    *,
    file: FileOptions | None = None,
    listener_for: Callable[[str], tuple[Listener, ...]] = lambda title: (),
    is_main: bool = True,
) -> Comparison:
    """Trains original and connected network ``request.seeds`` times each; writes ``compare.json`` and the first model.

    Under one seed both have the same classifier, order of images and augmentation, and the same number of steps. A
    comparison that was stopped goes on where it was. With inserted attention the original has it too, unconnected.
    """
    seeds = tuple(range(request.training.seed, request.training.seed + request.seeds))
    metrics: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    used: list[Usage | None] = []
    first: dict[str, Subject] = {}
    for seed in seeds:
        for side in SIDES:
            on = subject(request, seed=seed, connect=side == "connected", file=file)
            place = _own_folder(directory, f"{seed}-{side}")
            listeners = listener_for(f"seed {seed}, {side}")
            try:
                history = train(request, on, place, seed=seed, resume=True, listeners=listeners)
            except Interrupted as error:  # it is the comparison that can be gone on with
                raise stopped(error.signal, directory) from error
            metrics[side].append(dict(history.metrics))
            first.setdefault(side, on)
            if side == "connected":
                used.append(history.usage)
            if is_main:
                finish(on, place)
    sides = _sides(request, first, metrics)
    names = [name for name in metrics["original"][0] if name not in ("loss", "images")]
    differences = {
        name: paired_difference([row[name] for row in metrics["connected"]], [row[name] for row in metrics["original"]])
        for name in names
    }
    comparison = Comparison(seeds, sides["original"], sides["connected"], differences, tuple(used))
    if is_main:
        text = json.dumps(comparison.to_dict(), indent=2) + "\n"
        replace_file(directory / COMPARISON, lambda beside: beside.write_text(text, encoding="utf-8"))
        finish(first["connected"], directory)
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


def _sides(
    request: Request, first: dict[str, Subject], metrics: dict[str, list[dict[str, float]]]
) -> dict[str, Contender]:
    purpose = PURPOSES[request.task]
    task = purpose.task(request.training)
    models = {side: on.network for side, on in first.items()}
    from accelerate.utils import send_to_device

    device = next(models["original"].parameters()).device
    batch = purpose.batch(first["original"].ready, task, max(request.training.batch_size, 2))
    images, labels = send_to_device(batch.inputs, device), send_to_device(batch.labels, device)

    def loss(model: nn.Module, inputs: Any, labels: Any) -> Tensor:
        return task.loss(model, batch._replace(inputs=inputs, labels=labels))[0]

    times = step_times(models, images, labels, loss=loss)
    sides = {}
    for side, model in models.items():
        size = complexity(model, images)
        sides[side] = Contender(tuple(metrics[side]), size.parameters, size.gflops, statistics.median(times[side]))
    return sides
