"""What a run tells while it goes on: who is told, plain lines, and JSON lines in files."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from torch import nn

from dcafy.amounts import fixed, metric, percent
from dcafy.disk import replace_file
from dcafy.errors import CheckpointError
from dcafy.training.history import Epoch, History
from dcafy.training.options import TrainingConfig
from dcafy.wording import printable

LOG = "log.jsonl"
"""The name of the log in the folder of a run."""


class Listener:
    """What may be done at each event of a run; here nothing. Pass one of your own to ``finetune(listener=...)``.

    Only the main process tells. What a method raises ends the training, which keeps its last checkpoint.

    >>> class Worst(Listener):
    ...     loss = 0.0
    ...     def epoch_ended(self, epoch):
    ...         self.loss = max(self.loss, epoch.metrics["loss"])
    """

    def begins(self, config: TrainingConfig, steps: int, done: int, epochs: Sequence[Epoch]) -> None:
        """A run of ``steps`` steps begins, or goes on after ``done`` of them."""

    def resumed(self, epoch: int, step: int) -> None:
        """A checkpoint was found."""

    def wants(self, step: int) -> bool:
        """Whether it wants to be told of this step, which takes waiting for the device."""
        return False

    def stepped(self, step: int, loss: float, means: tuple[float, float | None], lr: float) -> None:
        """A step is done: its loss, the epoch's loss and accuracy so far, the base's learning rate."""

    def advanced(self, what: str, done: int, of: int) -> None:
        """``what`` (``validation``, or ``usage`` of the connections) is done with so much ``of`` all."""

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
    advanced, epoch_ended = _each("advanced"), _each("epoch_ended")
    skipped, ends, closes = _each("skipped"), _each("ends"), _each("closes")

    def wants(self, step: int) -> bool:
        return any(listener.wants(step) for listener in self.listeners)

    def stepped(self, step: int, loss: float, means: tuple[float, float | None], lr: float) -> None:
        for listener in self.listeners:
            if listener.wants(step):
                listener.stepped(step, loss, means, lr)


def _inside(event: str) -> Any:
    """The method of :class:`Inside` that tells of this event."""

    def tell(self: Inside, *told: Any) -> Any:
        with self.context():
            return getattr(self.listener, event)(*told)

    return tell


class Inside(Listener):
    """Tells another one inside a context, such as one that keeps the training's random numbers."""

    def __init__(self, listener: Listener, context: Callable[[], AbstractContextManager[None]]) -> None:
        self.listener, self.context = listener, context

    begins, resumed, measured, wants = _inside("begins"), _inside("resumed"), _inside("measured"), _inside("wants")
    advanced, stepped, epoch_ended = _inside("advanced"), _inside("stepped"), _inside("epoch_ended")
    skipped, ends, closes = _inside("skipped"), _inside("ends"), _inside("closes")


def metrics_in_words(metrics: Mapping[str, float]) -> str:
    """What was measured: the loss, and accuracies or precisions in percent."""
    return ", ".join(f"{name} {metric(name, value)}" for name, value in metrics.items() if name != "images")


def in_words(epoch: Epoch, of: int) -> str:
    """An epoch in one line."""
    trained = "" if epoch.accuracy is None else f", accuracy {percent(epoch.accuracy)}"
    return f"epoch {epoch.epoch}/{of}: loss {fixed(epoch.loss)}{trained}; validation {metrics_in_words(epoch.metrics)}"


class Pace:
    """How fast a run goes, and when it will have ended: by the steps since it began, or went on."""

    def __init__(self, config: TrainingConfig, steps: int, done: int) -> None:
        self.batch, self.steps, self.first = config.batch_size * config.accumulate, steps, done
        self.since = time.monotonic()

    def images_per_second(self, step: int) -> float:
        """Images of training a second."""
        return (step - self.first) * self.batch / max(time.monotonic() - self.since, 1e-9)

    def seconds_left(self, step: int) -> float:
        """Seconds until the last step, if all goes on as it has."""
        return (time.monotonic() - self.since) / max(step - self.first, 1) * (self.steps - step)


def lasting(seconds: float) -> str:
    """How long that is, in the two largest units.

    >>> lasting(0.42), lasting(83), lasting(7500)
    ('0.4 s', '1 min 23 s', '2 h 5 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Lines(Listener):
    """One plain line for each epoch; within them one after the first step, then one ``every`` so many seconds."""

    def __init__(self, out: IO[str] | None = None, title: str = "", *, every: float = 10.0) -> None:
        self.out, self.title, self.every = out or sys.stderr, f"{title}: " if title else "", every
        self.epochs = self.steps = 0
        self.told = -math.inf
        self.found: tuple[int, int] | None = None

    def _say(self, text: str) -> None:
        print(f"{self.title}{printable(text)}", file=self.out, flush=True)

    def begins(self, config: TrainingConfig, steps: int, done: int, epochs: Sequence[Epoch]) -> None:
        self.epochs, self.steps, self.pace = config.epochs, steps, Pace(config, steps, done)
        if self.found is not None and self.found[0] >= config.epochs:
            self._say(f"finished already: all {config.epochs} epochs are done, and the model is saved again")
        elif self.found is not None:
            self._say(f"going on in epoch {self.found[0] + 1}, after step {self.found[1]}")

    def resumed(self, epoch: int, step: int) -> None:
        self.found = epoch, step

    def wants(self, step: int) -> bool:
        return time.monotonic() - self.told >= self.every

    def stepped(self, step: int, loss: float, means: tuple[float, float | None], lr: float) -> None:
        self.told = time.monotonic()
        each = self.steps // self.epochs
        epoch = (step - 1) // each
        self._say(
            f"epoch {epoch + 1}/{self.epochs}, step {step - epoch * each}/{each}: {so_far(means)}, lr {lr:.2g}, "
            f"{self.pace.images_per_second(step):.0f} images/s, {lasting(self.pace.seconds_left(step))} left"
        )

    def epoch_ended(self, epoch: Epoch) -> None:
        self._say(in_words(epoch, self.epochs))

    def skipped(self, name: str) -> None:
        self._say(f"skipped, cannot be read: {name}")


def so_far(means: tuple[float, float | None]) -> str:
    """Loss and accuracy of an epoch as far as it has come."""
    return f"loss {fixed(means[0])}" + ("" if means[1] is None else f", accuracy {percent(means[1])}")


class Watched(Sequence[Any]):
    """Batches that tell how far :func:`dcafy.usage` has come with them: it goes through them twice and more.

    The first time each is run as it is; then also with what every one of ``listeners`` hears, and all of them, changed
    in three ways.
    """

    def __init__(self, batches: Sequence[Any], listeners: int, listener: Listener) -> None:
        self.batches, self.listener = batches, listener
        self.later = 3 * (listeners + 1) + 1
        self.done, self.of = 0, len(batches) * (1 + self.later)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        return self.batches[index]

    def __iter__(self) -> Iterator[Any]:
        runs = self.later if self.done else 1
        for batch in self.batches:
            yield batch
            self.done = min(self.done + runs, self.of)
            self.listener.advanced("usage", self.done, self.of)


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
