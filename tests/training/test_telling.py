"""What a run tells: bars on a terminal, plain lines elsewhere, JSON lines in files."""

from __future__ import annotations

import io
import json
import re
import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest
from rich.console import Console
from training_data import Stripes, connected

from dcafy.errors import CheckpointError
from dcafy.training import Listener, TrainingConfig, finetune
from dcafy.training.bars import Bars
from dcafy.training.notebook import NotebookBars
from dcafy.training.telling import JsonLines, Lines, Several

CONFIG = TrainingConfig(epochs=2, batch_size=8, usage_images=16, cpu=True)


class Closing(Listener):
    closed = 0

    def closes(self) -> None:
        self.closed += 1


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=160)


def test_bars_show_rate_loss_accuracy_and_what_is_left():
    console = terminal()
    finetune(connected(), Stripes(), Stripes(8), CONFIG, listener=Bars(console))
    shown = console.file.getvalue()
    for words in ("epochs", "steps", "12/12", "images/s", "loss", "accuracy", "epoch 2/2"):
        assert words in shown
    assert shown.endswith("\x1b[?25h")  # the cursor is back


def rows_of(bars: Bars, width: int = 80) -> list[str]:
    """What stands on the terminal now, without colours."""
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(bars.bars.get_renderable())
    return out.getvalue().splitlines()


def test_bars_do_not_jump_in_80_columns():
    """Whatever the numbers, there are as many rows, and each part of them stands in the same columns."""

    class Looking(Bars):
        seen: ClassVar[list[list[str]]] = []

        def _look(self):
            self.seen.append(rows_of(self))

        def begins(self, *told):
            super().begins(*told)
            self._look()

        def wants(self, step):
            return True

        def stepped(self, step, loss, means, lr):
            super().stepped(step, loss * 10**step, (1e5 if step % 2 else 1e-9, (1.0, 0.0)[step % 2]), lr / 7)
            self._look()

        def advanced(self, *told):
            super().advanced(*told)
            self._look()

        def epoch_ended(self, epoch):
            super().epoch_ended(epoch)
            self._look()

    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    finetune(connected(), Stripes(), Stripes(20), CONFIG, listener=Looking(console))
    seen = Looking.seen
    assert len(seen) > 20
    assert {len(rows) for rows in seen} == {4}
    assert max(len(row) for rows in seen for row in rows) <= 80
    for rows in seen:
        assert [row[:10].rstrip() for row in rows[:2]] == ["epochs", "steps"]
        assert rows[2][:10].rstrip() in ("validation", "usage")
        assert [len(row.rstrip()) for row in rows[:2]] == [80, 80]  # the time that is left ends the row
        assert [row.index("/") for row in rows[:2]] == [row.index("/") for row in seen[0][:2]]
    numbers = [rows[3] for rows in seen if "lr" in rows[3]]
    assert len({(row.index("accuracy"), row.index("lr"), row.index("images/s")) for row in numbers}) == 1
    said = {row[2][:10].rstrip() for row in seen}
    assert said == {"validation", "usage"}


def test_within_an_epoch_there_are_lines_where_there_is_no_terminal():
    out = io.StringIO()
    finetune(connected(), Stripes(), Stripes(8), CONFIG, listener=Lines(out))
    lines = out.getvalue().splitlines()
    assert re.fullmatch(
        r"epoch 1/2, step 1/6: loss \d\.\d{4}, accuracy \d+\.\d%, lr 0\.0005, \d+ images/s, .*s left", lines[0]
    )
    assert [line.partition(":")[0] for line in lines[1:]] == ["epoch 1/2", "epoch 2/2"]  # it went on too fast for more
    out = io.StringIO()
    finetune(connected(), Stripes(), Stripes(8), CONFIG, listener=Lines(out, every=0))
    steps = [line.partition(":")[0] for line in out.getvalue().splitlines() if "step" in line]
    assert steps == [f"epoch {epoch}/2, step {step}/6" for epoch in (1, 2) for step in range(1, 7)]


class Display:
    """IPython.display, as far as it is used: what is shown now, and how often."""

    shown: ClassVar[list[str]] = []

    @staticmethod
    def HTML(text: str) -> str:
        return text

    def display(self, page: str, *, display_id: bool) -> Display:
        assert display_id
        return self.update(page)

    def update(self, page: str) -> Display:
        self.shown.append(page)
        return self


def test_in_a_notebook_there_is_a_bar_unless_another_listener_is_given(monkeypatch):
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", Display())
    finetune(connected(), Stripes(), Stripes(8), CONFIG)
    last = Display.shown[-1]
    assert "2/2" in last
    assert "12/12" in last
    assert "epoch 2/2: loss" in last
    assert ">usage<" in last
    assert any(">validation<" in page for page in Display.shown)
    bars = NotebookBars()
    bars.skipped("<img src=x onerror=alert(1)>\x1b[31m")
    assert "<img" not in bars.as_html()
    Display.shown.clear()
    finetune(connected(), Stripes(), Stripes(8), CONFIG, listener=Listener())
    assert Display.shown == []
    shell.kernel = None  # IPython in a terminal
    finetune(connected(), Stripes(), Stripes(8), CONFIG)
    assert Display.shown == []


def test_a_run_that_breaks_off_gives_the_terminal_back():
    class Failing(Stripes):
        def __getitem__(self, index):
            if index == 9:
                raise RuntimeError("the disk is gone")
            return super().__getitem__(index)

    console, closing = terminal(), Closing()
    with pytest.raises(RuntimeError, match="the disk is gone"):
        finetune(connected(), Failing(), Stripes(8), CONFIG, listener=Several([Bars(console), closing]))
    assert closing.closed == 1
    assert "\x1b[?25l" in console.file.getvalue()
    assert console.file.getvalue().rindex("\x1b[?25h") > console.file.getvalue().rindex("\x1b[?25l")


def test_names_of_files_cannot_steer_the_terminal():
    out = io.StringIO()
    Lines(out).skipped("\x1b[31mred.png")
    assert out.getvalue() == "skipped, cannot be read: \\x1b[31mred.png\n"


def test_json_lines_say_all_of_it(tmp_path):
    log = tmp_path / "log.jsonl"
    history = finetune(connected(), Stripes(), Stripes(8), CONFIG, listener=JsonLines(log, steps=True))
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    events = [row["event"] for row in rows]
    assert events == ["begin", *["step"] * 6, "epoch", *["step"] * 6, "epoch", "end"]
    assert rows[0]["config"]["batch_size"] == 8
    assert rows[7]["metrics"] == dict(history.epochs[0].metrics)
    assert [row["name"] for row in rows[-1]["usage"]["connections"]] == list(history.epochs[0].connections)


def test_a_log_of_steps_holds_one_training_after_the_other(tmp_path):
    log = tmp_path / "log.jsonl"
    for title in ("seed 0, original", "seed 0, connected"):
        finetune(connected(), Stripes(), Stripes(8), CONFIG, listener=JsonLines(log, steps=True, title=title))
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["event"] for row in rows].count("begin") == 2
    assert [row["run"] for row in rows] == ["seed 0, original"] * 16 + ["seed 0, connected"] * 16


def test_a_log_that_cannot_be_written(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written"):
        finetune(connected(), Stripes(), Stripes(8), CONFIG, listener=JsonLines(tmp_path / "no/log.jsonl"))
