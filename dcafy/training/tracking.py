"""Experiment trackers, as Hugging Face Accelerate drives them: TensorBoard, Weights & Biases and others."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dcafy.errors import CheckpointError, UsageError
from dcafy.training.history import Epoch
from dcafy.training.options import TrainingConfig
from dcafy.training.telling import Listener
from dcafy.wording import needing, one_line, quoted, warn

TRACKED = "tracked"
"""The folder in that of a run where trackers keep their files."""


def _comet(directory: Path, run: str, done: int) -> dict[str, Any]:
    config = importlib.import_module("comet_ml").ExperimentConfig
    return {"experiment_config": config(name=run, offline_directory=str(directory))}


_OPTIONS: Mapping[str, Callable[[Path, str, int], dict[str, Any]]] = {
    # What a killed run has tracked behind its last checkpoint happens again.
    "tensorboard": lambda directory, run, done: (
        {"logging_dir": str(directory), **({"purge_step": done + 1} if done else {})}
    ),
    "wandb": lambda directory, run, done: {"name": run, "dir": str(directory)},
    "mlflow": lambda directory, run, done: {"logging_dir": str(directory), "run_name": run},
    "comet_ml": _comet,
    "aim": lambda directory, run, done: {"logging_dir": str(directory), "experiment": "dcafy"},
    "clearml": lambda directory, run, done: {"task_name": run},
    "dvclive": lambda directory, run, done: {"dir": str(directory / "dvclive" / run), "resume": bool(done)},
    "swanlab": lambda directory, run, done: {"experiment_name": run, "logdir": str(directory)},
    "trackio": lambda directory, run, done: {"name": run},
}
"""What a tracker is told besides its project: (the folder for files, the name of the run, steps done) -> options."""

_POINTS = 1000
"""Steps of a run that are tracked, evenly: each waits for the device."""


def require_trackers(names: Sequence[str]) -> None:
    """Nothing where Accelerate here knows these trackers and they are installed; else ``UsageError``."""
    with needing("--track", "train", "Hugging Face Accelerate"):
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UsageError(
                f"--track {name} is unknown to the Accelerate that is installed: pip install -U accelerate"
            )
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"--track {name} needs {name}, which is not installed: pip install {name}")


class Tracked(Listener):
    """Loss and rate of steps, and what an epoch has measured, α and β included, in each of these trackers.

    ``directory``: where those that write files do so; ``title``: which of several trainings it is; ``facts``: what the
    run was asked for, besides the configuration of the training.
    """

    def __init__(self, names: Sequence[str], directory: Path, title: str, facts: Mapping[str, Any]) -> None:
        self.names, self.directory, self.title, self.facts = names, directory, title, facts
        self.trackers: dict[str, Any] = {}
        self.every = 1

    def begins(self, config: TrainingConfig, steps: int, done: int, epochs: Sequence[Epoch]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        if self.directory.is_symlink():
            raise CheckpointError(
                f"{quoted(str(self.directory), 200)} is a link, and a run writes into its own folder. Remove it."
            )
        self.every = max(steps // _POINTS, 1)
        for name in self.names:
            with self._unless_refused(name):
                self.directory.mkdir(parents=True, exist_ok=True)
                tracker = LOGGER_TYPE_TO_CLASS[name](
                    self._whose(name), **_OPTIONS[name](self.directory, self._run, done)
                )
                if hasattr(tracker, "start"):  # which Accelerate did not always tell apart from making one
                    tracker.start()
                if not done:
                    tracker.store_init_configuration({**self.facts, **dataclasses.asdict(config)})
                self.trackers[name] = tracker

    @contextlib.contextmanager
    def _unless_refused(self, name: str) -> Iterator[None]:
        """Inside it whatever a tracker, or its server, does not like becomes an error of the user's."""
        try:
            yield
        except Exception as error:
            raise UsageError(f"--track {name} cannot begin: {one_line(error)} Leave it out, or mend that.") from error

    def _whose(self, name: str) -> str:
        """TensorBoard has a folder for each training, aim names for them, and others a project of several."""
        return {"tensorboard": self.title, "aim": self._run}.get(name, "dcafy")

    @property
    def _run(self) -> str:
        """What a training is called beside others."""
        return f"{self.directory.parent.name} {self.title}".strip()

    def wants(self, step: int) -> bool:
        return bool(self.trackers) and (step % self.every == 0 or step == 1)

    def stepped(self, step: int, loss: float, means: tuple[float, float | None], lr: float) -> None:
        self._log({"train/step_loss": loss, "train/lr": lr}, step)

    def epoch_ended(self, epoch: Epoch) -> None:
        values = {"epoch": float(epoch.epoch), "train/loss": epoch.loss, "train/seconds": epoch.seconds}
        if epoch.accuracy is not None:
            values["train/accuracy"] = epoch.accuracy
        values |= {f"validation/{name}": value for name, value in epoch.metrics.items()}
        for name, state in epoch.connections.items():
            values |= {f"{part}/{name}": value for part, value in dataclasses.asdict(state).items()}
        self._log(values, epoch.steps)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        for name in list(self.trackers):
            self._unless_lost(name, lambda tracker: tracker.log(dict(values), step=step))

    def closes(self) -> None:
        for name in list(self.trackers):
            self._unless_lost(name, lambda tracker: tracker.finish())
        self.trackers.clear()

    def _unless_lost(self, name: str, told: Callable[[Any], None]) -> None:
        """Tells a tracker; one that fails is told nothing more, and the training goes on."""
        try:
            told(self.trackers[name])
        except Exception as error:  # a server that is gone, a disk that is full
            del self.trackers[name]
            warn(f"--track {name} has failed: {one_line(error)} The training goes on without it.")
