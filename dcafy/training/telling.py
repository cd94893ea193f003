"""What a run tells while it goes on: bars on a terminal, plain lines elsewhere, JSON lines in files."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import nn

from dcafy.amounts import fixed, percent
from dcafy.disk import replace_file
from dcafy.errors import CheckpointError
from dcafy.training.history import Epoch, History
from dcafy.training.options import TrainingConfig
from dcafy.wording import printable

LOG = "log.jsonl"
"""The name of the log in the folder of a run."""


class Listener:
    """What may be done at each event of a run; here nothing."""

    def begins(self, config: TrainingConfig, steps: int, done: int, epochs: Sequence[Epoch]) -> None:
        """A run of ``steps`` steps begins, or goes on after ``done`` of them."""

    def resumed(self, epoch: int, step: int) -> None:
        """A checkpoint was found."""

    def wants(self, step: int) -> bool:
        """Whether it wants to be told of this step, which takes waiting for the device."""
        return False

    def stepped(self, step: int, loss: float, means: tuple[float, float | None], lr: float) -> None:
        """A step is done: its loss, the epoch's loss and accuracy so far, the base's learning rate."""

    def measured(self, model: nn.Module, epoch: Epoch) -> None:
        """An epoch is done, and ``model`` is what was measured in it; it is not saved yet."""

    def epoch_ended(self, epoch: Epoch) -> None:
        """An epoch is done and saved."""

    def skipped(self, name: str) -> None:
        """An image could not be read."""

    def ends(self, history: History) -> None:
        """The run is done."""

    def closes(self) -> None:
        """Nothing more will happen, whether the run is done or was broken off."""


Silent = Listener


def _each(event: str) -> Any:
    """The method of :class:`Several` that tells each of them of this event."""

    def tell(self: Several, *told: Any) -> None:
        for listener in self.listeners:
            getattr(listener, event)(*told)

    return tell


class Several(Listener):
    """Tells every one of them."""

    def __init__(self, listeners: Iterable[Listener]) -> None:
        self.listeners = tuple(listeners)

    begins, resumed, measured = _each("begins"), _each("resumed"), _each("measured")
    epoch_ended = _each("epoch_ended")
    skipped, ends, closes = _each("skipped"), _each("ends"), _each("closes")

    def wants(self, step: int) -> bool:
        return any(listener.wants(step) for listener in self.listeners)

    def stepped(self, step: int, loss: float, means: tuple[float, float | None], lr: float) -> None:
        for listener in self.listeners:
            if listener.wants(step):
                listener.stepped(step, loss, means, lr)


def metrics_in_words(metrics: Mapping[str, float]) -> str:
    """What was measured: the loss, and accuracies or precisions in percent."""
    return ", ".join(
        f"{name} {fixed(value)}" if name == "loss" else f"{name} {percent(value)}"
        for name, value in metrics.items()
        if name != "images"
    )


def in_words(epoch: Epoch, of: int) -> str:
    """An epoch in one line."""
    trained = "" if epoch.accuracy is None else f", accuracy {percent(epoch.accuracy)}"
    return f"epoch {epoch.epoch}/{of}: loss {fixed(epoch.loss)}{trained}; validation {metrics_in_words(epoch.metrics)}"


class Lines(Listener):
    """One plain line for each epoch."""

    def __init__(self, out: IO[str] | None = None, title: str = "") -> None:
        self.out, self.title = out or sys.stderr, f"{title}: " if title else ""
        self.epochs = 0
        self.found: tuple[int, int] | None = None

    def _say(self, text: str) -> None:
        print(f"{self.title}{printable(text)}", file=self.out, flush=True)

    def begins(self, config: TrainingConfig, steps: int, done: int, epochs: Sequence[Epoch]) -> None:
        self.epochs = config.epochs
        if self.found is not None and self.found[0] >= config.epochs:
            self._say(f"finished already: all {config.epochs} epochs are done, and the model is saved again")
        elif self.found is not None:
            self._say(f"going on in epoch {self.found[0] + 1}, after step {self.found[1]}")

    def resumed(self, epoch: int, step: int) -> None:
        self.found = epoch, step

    def epoch_ended(self, epoch: Epoch) -> None:
        self._say(in_words(epoch, self.epochs))

    def skipped(self, name: str) -> None:
        self._say(f"skipped, cannot be read: {name}")


class Bars(Lines):
    """A bar for the epochs and one for the steps, with rate, loss, accuracy and the time that is left."""

    def __init__(self, console: Console, title: str = "") -> None:
        super().__init__(title=title)
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self.told = 0.0

    def _say(self, text: str) -> None:
        self.bars.console.print(f"{self.title}{printable(text)}", markup=False, highlight=False)

    def begins(self, config: TrainingConfig, steps: int, done: int, epochs: Sequence[Epoch]) -> None:
        super().begins(config, steps, done, epochs)
        self.batch = config.batch_size * config.accumulate
        self.first, self.since = done, time.monotonic()
        self.epoch_bar: TaskID = self.bars.add_task("epochs", total=config.epochs, completed=len(epochs), said="")
        self.step_bar: TaskID = self.bars.add_task("steps", total=steps, completed=done, said="")
        self.bars.start()

    def wants(self, step: int) -> bool:
        return time.monotonic() - self.told > 0.2

    def stepped(self, step: int, loss: float, means: tuple[float, float | None], lr: float) -> None:
        self.told = time.monotonic()
        rate = (step - self.first) * self.batch / max(self.told - self.since, 1e-9)
        accuracy = "" if means[1] is None else f" accuracy {percent(means[1])}"
        said = f"{rate:.0f} images/s, loss {means[0]:.4f}{accuracy}, lr {lr:.2g}"
        self.bars.update(self.step_bar, completed=step, said=said)

    def epoch_ended(self, epoch: Epoch) -> None:
        super().epoch_ended(epoch)
        self.bars.update(self.epoch_bar, completed=epoch.epoch)
        self.bars.update(self.step_bar, completed=epoch.steps)

    def closes(self) -> None:
        self.bars.stop()


class JsonLines(Listener):
    """One JSON object a line: ``begin``, ``epoch``, ``skipped``, ``end``, and with ``steps`` also ``step``.

    The log of a run holds what led to where it stands. One with ``steps`` holds all that happened, one training
    after the other, each row with the ``title`` of its training where it has one.
    """

    def __init__(self, path: Path, *, steps: bool = False, title: str = "") -> None:
        self.path, self.steps, self.title = path, steps, title

    def require_writable(self) -> None:
        """Nothing where the log can be written; ``CheckpointError`` says why it cannot."""
        self._write()

    def _lines(self, *rows: dict[str, Any]) -> str:
        own = {"run": self.title} if self.title else {}
        return "".join(json.dumps({**row, **own}) + "\n" for row in rows)

    def _write(self, *rows: dict[str, Any]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._lines(*rows))
        except OSError as error:
            raise CheckpointError(f"{printable(str(self.path))!r} cannot be written: {error.strerror}.") from error

    def begins(self, config: TrainingConfig, steps: int, done: int, epochs: Sequence[Epoch]) -> None:
        row = {"event": "begin", "config": dataclasses.asdict(config), "steps": steps, "done": done}
        if self.steps:
            self._write(row)
        else:
            # What a killed run had written after its last checkpoint happens again. A new file: the old one may be a
            # link, in a folder that somebody else made.
            text = self._lines(row, *(epoch.to_dict() for epoch in epochs))
            if not self.path.parent.is_dir():
                self._write()  # which says why it cannot
            replace_file(self.path, lambda beside: beside.write_text(text, encoding="utf-8"))

    def wants(self, step: int) -> bool:
        return self.steps

    def stepped(self, step: int, loss: float, means: tuple[float, float | None], lr: float) -> None:
        self._write({"event": "step", "step": step, "loss": loss, "lr": lr})

    def epoch_ended(self, epoch: Epoch) -> None:
        self._write(epoch.to_dict())

    def skipped(self, name: str) -> None:
        self._write({"event": "skipped", "image": name})

    def ends(self, history: History) -> None:
        found = None if history.usage is None else dataclasses.asdict(history.usage)
        self._write({"event": "end", "usage": found, "skipped": list(history.skipped)})


def for_stderr(title: str = "") -> Lines:
    """Bars where stderr is a terminal, else plain lines."""
    console = Console(stderr=True)
    return Bars(console, title) if console.is_terminal else Lines(title=title)
