"""Bars in a notebook: one output that is written anew."""

from __future__ import annotations

import html
import importlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from dcafy.training.history import Epoch
from dcafy.training.options import TrainingConfig
from dcafy.training.telling import Lines, Listener, Silent, so_far
from dcafy.wording import printable

_SHOWN = 20
"""Lines that are shown, of the last epochs."""


def usual_listener() -> Listener:
    """What a training tells where nobody says: a bar in a notebook, else nothing."""
    # Who runs in a notebook has IPython already.
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return Silent() if getattr(shell, "kernel", None) is None else NotebookBars()


class NotebookBars(Lines):
    """A bar for the epochs, one for the steps, one for validation and usage, and a line for each epoch."""

    def __init__(self) -> None:
        super().__init__(every=0.5)
        self.lines: list[str] = []
        self.rows: dict[str, tuple[int, int]] = {}
        self.now = ""
        self.handle: Any = None

    def _say(self, text: str) -> None:
        self.lines.append(printable(text))
        self._show()

    def begins(self, config: TrainingConfig, steps: int, done: int, epochs: Sequence[Epoch]) -> None:
        self.rows = {"epochs": (len(epochs), config.epochs), "steps": (done, steps), "validation": (0, 0)}
        super().begins(config, steps, done, epochs)
        self._show()

    def stepped(self, step: int, loss: float, means: tuple[float, float | None], lr: float) -> None:
        self.told = time.monotonic()
        self.now = f"{so_far(means)}, lr {lr:.1e}, {self.pace.images_per_second(step):.0f} images/s"
        self.rows["steps"] = step, self.steps
        self._show()

    def advanced(self, what: str, done: int, of: int) -> None:
        shown, last = list(self.rows)[-1], time.monotonic()
        if shown != what:
            del self.rows[shown]
        self.rows[what] = done, of
        if done == of or last - self.told >= self.every:
            self.told = last
            self._show()

    def epoch_ended(self, epoch: Epoch) -> None:
        self.rows |= {"epochs": (epoch.epoch, self.epochs), "steps": (epoch.steps, self.steps)}
        super().epoch_ended(epoch)

    def _show(self) -> None:
        display: Any = importlib.import_module("IPython.display")
        page = display.HTML(self.as_html())
        if self.handle is None:
            self.handle = display.display(page, display_id=True)
        else:
            self.handle.update(page)

    def as_html(self) -> str:
        """What is shown."""
        cell = "<td style='text-align:{}'>{}</td>".format
        rows = "".join(
            f"<tr>{cell('left', name)}{cell('left', f'<progress value={done} max={max(of, 1)}></progress>')}"
            f"{cell('right', f'{done}/{of}' if of else '')}</tr>"
            for name, (done, of) in self.rows.items()
        )
        told = html.escape("\n".join([*self.lines[-_SHOWN:], self.now]))
        return f"<table>{rows}</table><pre>{told}</pre>"
