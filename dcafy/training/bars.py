"""Bars on a terminal: a layout that no number moves, in 80 columns."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from dcafy.amounts import fixed, percent
from dcafy.training.history import Epoch
from dcafy.training.options import TrainingConfig
from dcafy.training.telling import Lines
from dcafy.wording import printable


class _Count(ProgressColumn):
    """``7/12``, as wide as the largest total of a run; empty where nothing is counted yet."""

    def __init__(self, width: int) -> None:
        super().__init__(Column(width=width, no_wrap=True, justify="right"))

    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:.0f}/{task.total:.0f}" if task.fields["counted"] else "")


class _Rows(Progress):
    """A row for the epochs, one for the steps, one for validation and usage, and a line of numbers below."""

    said = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.said, no_wrap=True, overflow="ellipsis")


class Bars(Lines):
    """A bar for the epochs, one for the steps, and one for validation and usage; below them loss, accuracy and rate."""

    def __init__(self, console: Console, title: str = "") -> None:
        super().__init__(title=title, every=0.2)
        self.console = console
        self.bars: _Rows | None = None

    def _say(self, text: str) -> None:
        console = self.console if self.bars is None else self.bars.console
        console.print(f"{self.title}{printable(text)}", markup=False, highlight=False)

    def begins(self, config: TrainingConfig, steps: int, done: int, epochs: Sequence[Epoch]) -> None:
        super().begins(config, steps, done, epochs)
        self.bars = _Rows(
            TextColumn("{task.description}", table_column=Column(width=10, no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=8)),
            _Count(max(2 * len(str(steps)) + 1, 11)),
            TimeRemainingColumn(table_column=Column(width=9, no_wrap=True, justify="right")),
            console=self.console,
            expand=True,
        )
        self.epoch_bar = self.bars.add_task("epochs", total=config.epochs, completed=len(epochs), counted=True)
        self.step_bar = self.bars.add_task("steps", total=steps, completed=done, counted=True)
        self.other_bar = self.bars.add_task("validation", total=1, counted=False)  # its place is kept from the start
        self.bars.start()

    def stepped(self, step: int, loss: float, means: tuple[float, float | None], lr: float) -> None:
        assert self.bars is not None
        self.told = time.monotonic()
        accuracy = "" if means[1] is None else f"accuracy {percent(means[1]):>6}, "
        rate = f"{self.pace.images_per_second(step):6.0f} images/s"
        shown = f"{fixed(means[0]):>8}" if means[0] < 1000 else f"{means[0]:8.2g}"
        self.bars.said = f"{'':11}loss {shown}, {accuracy}lr {lr:7.1e}, {rate}"
        self.bars.update(self.step_bar, completed=step)

    def advanced(self, what: str, done: int, of: int) -> None:
        assert self.bars is not None
        if done == 1 or self.bars.tasks[self.other_bar].description != what:
            self.bars.reset(self.other_bar, total=of, completed=done, description=what, counted=True)
        else:
            self.bars.update(self.other_bar, completed=done, total=of)

    def epoch_ended(self, epoch: Epoch) -> None:
        assert self.bars is not None
        super().epoch_ended(epoch)
        self.bars.update(self.epoch_bar, completed=epoch.epoch)
        self.bars.update(self.step_bar, completed=epoch.steps)

    def closes(self) -> None:
        if self.bars is not None:
            self.bars.stop()


def for_stderr(title: str = "") -> Lines:
    """Bars where stderr is a terminal, else plain lines."""
    console = Console(stderr=True)
    return Bars(console, title) if console.is_terminal else Lines(title=title)
