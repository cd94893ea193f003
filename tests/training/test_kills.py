"""SIGKILL in a training, at any moment: gone on with, it ends with the very bits of one that nothing stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training_data import Stripes, connected

from dcafy.training import TrainingConfig, finetune
from dcafy.training.checkpoint import CHECKPOINT
from dcafy.training.history import Epoch
from dcafy.training.telling import LOG, JsonLines

ROOT = Path(__file__).resolve().parents[2]
CONFIG = TrainingConfig(
    epochs=2, batch_size=8, seed=3, usage_images=0, cpu=True, checkpoint_steps=1, precision="bf16", ema=0.9, mixup=0.2
)


def killing_at(number: int) -> Callable[..., None]:
    """``os.replace`` that ends the process at its n-th call: before it at an even number, after it at an odd one."""
    real, left = os.replace, [number // 2]

    def replace(*args: object, **kwargs: object) -> None:
        left[0] -= 1
        if left[0] < 0 and number % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*args, **kwargs)  # type: ignore[arg-type]
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return replace


def attempt(directory: Path, kill_at: int) -> int:
    """The exit code of a process that goes on with the training in the folder, and is killed at that moment."""
    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # the pool of threads stayed with the parent
        os.replace = killing_at(kill_at)  # type: ignore[assignment]
        log = JsonLines(directory / LOG)
        finetune(connected(), Stripes(), Stripes(20), CONFIG, directory=directory, resume=True, listener=log)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs SIGKILL")
def test_a_killed_training_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    unbroken, resumed = connected(), connected()
    whole = finetune(unbroken, Stripes(), Stripes(20), CONFIG)
    codes = [attempt(tmp_path, number) for number in (0, 3, 6, 5, 4)]
    assert codes == [-signal.SIGKILL] * len(codes)
    assert (tmp_path / CHECKPOINT).exists()
    log = JsonLines(tmp_path / LOG)
    history = finetune(resumed, Stripes(), Stripes(20), CONFIG, directory=tmp_path, resume=True, listener=log)
    ends = unbroken.state_dict(), resumed.state_dict()
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert untimed(history.epochs) == untimed(whole.epochs)
    rows = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert untimed([Epoch.from_dict(row) for row in rows if row["event"] == "epoch"]) == untimed(whole.epochs)
    assert sorted(os.listdir(tmp_path)) == sorted([CHECKPOINT, LOG])


def untimed(epochs: object) -> list[Epoch]:
    return [dataclasses.replace(epoch, seconds=0.0) for epoch in epochs]  # type: ignore[attr-defined]


WAYS = ("plain", "bf16", "average, mixed", "accumulated", "frozen at first", "workers", "clipped", "compare", "save",
        "convert", "export")  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs SIGKILL")
@pytest.mark.parametrize("way", WAYS)
def test_kills_at_random_moments(way: str, tmp_path: Path) -> None:
    """``benchmarks/kills.py`` does it a hundred times."""
    program = [sys.executable, str(ROOT / "benchmarks" / "kills.py"), "--kills", "4", "--seed", "1", "--ways", way]
    place = {"TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(program, capture_output=True, text=True, check=False, env={**os.environ, **place})
    assert done.returncode == 0, done.stdout + done.stderr
    totals = json.loads(done.stdout.splitlines()[-1])
    assert totals["differences"] == 0
    assert sum(number for name, number in totals.items() if name.startswith("kills in")) == 4
