"""What a run tells: bars on a terminal, plain lines elsewhere, JSON lines in files."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from training_data import Stripes, connected

from dcafy.errors import CheckpointError
from dcafy.training import TrainingConfig, finetune
from dcafy.training.bars import Bars
from dcafy.training.telling import JsonLines, Lines, Listener, Several

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
