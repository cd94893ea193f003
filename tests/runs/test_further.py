"""A run that has ended is trained further; a run takes the place of another one, or does not."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_data import Stripes, connected
from two_processes import DIGITS, FACTORY

from dcafy.errors import CheckpointError
from dcafy.runs.place import in_place_of_another, put_back, was_broken_off
from dcafy.training import TrainingConfig, finetune
from dcafy.training.optimization import part_of_rate

Run = Callable[..., tuple[int, str, str]]
QUICK = (*DIGITS[:-2], "--usage-images", "0", "--batch-size", "256", "--val-fraction", "0.6")


def epochs(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == "epoch"]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_trained_further(command: Run, tmp_path: Path) -> None:
    """With the rates of a run of so many epochs from there on, and the weights, moments and numbers that it had."""
    assert command(FACTORY, *QUICK, "--epochs", 1, "--schedule", "cosine", "-o", "run")[0] == 0
    first = epochs(tmp_path / "run")
    code, _, err = command(FACTORY, "-o", "run", "--resume", "--epochs", 3)  # the network is code, so it is named
    assert code == 0, err
    told = " ".join(err.split())
    assert "weights: as far as the run has come" in told
    assert "epochs 2 to 3, with the rates that a run of 3 epochs has there: of the base 0.00038" in told
    after = epochs(tmp_path / "run")
    assert after[:1] == first
    assert [row["epoch"] for row in after] == [1, 2, 3]
    part = part_of_rate(TrainingConfig(epochs=3), steps=2)
    assert [row["lr"] for row in after[1:]] == pytest.approx([5e-4 * part(step) for step in (3, 5)], rel=1e-6)
    assert json.loads((tmp_path / "run/finetune.json").read_text())["training"]["epochs"] == 3
    before = content(tmp_path / "run")
    code, _, err = command(FACTORY, "-o", "run", "--resume", "--epochs", 2)
    assert code == 2
    assert "has 3 epochs. --epochs says how many there are in all" in err
    code, _, err = command("run", "--epochs", 4)  # the folder alone, and the code that it names has to be said
    assert (code, "is built by code: finetune_factory:network" in err) == (2, True)
    assert content(tmp_path / "run") == before


@pytest.mark.parametrize("schedule", ["constant", "step"])
def test_where_the_rates_do_not_hang_on_the_end_it_is_as_if_asked_for_at_first(schedule: str, tmp_path: Path) -> None:
    def train(model: torch.nn.Module, epochs: int, **where: Any) -> torch.nn.Module:
        options = TrainingConfig(epochs=epochs, batch_size=8, usage_images=0, cpu=True, schedule=schedule, ema=0.5)
        finetune(model, Stripes(), Stripes(8), options, **where)
        return model

    whole = train(connected(), 3)
    train(connected(), 1, directory=tmp_path)
    again = train(connected(), 3, directory=tmp_path, resume=True)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())
    with pytest.raises(CheckpointError, match="configuration differ"):
        train(connected(), 2, directory=tmp_path, resume=True)


@pytest.mark.slow
def test_a_folder_alone_says_which_run(command: Run, tmp_path: Path) -> None:
    """Of a zoo's network nothing else has to be named; a comparison is trained further in all of its arms."""
    pytest.importorskip("timm")
    zoo = ("timm:test_resnet", "--attention", "se", *QUICK)
    assert command(*zoo, "--epochs", 1, "--compare", "-o", "run")[0] == 0
    code, _, err = command("run")
    assert code == 2
    assert "Train it further with --epochs" in " ".join(err.split())
    code, _, err = command("run", "--epochs", 2)
    assert code == 0, err
    for arm in ("original", "connected"):
        assert [row["epoch"] for row in epochs(tmp_path / f"run/seeds/0-{arm}")] == [1, 2]
    assert "run 2 of 2 (seed 0, connected): " in err
    # Of a run that has not ended it is no more epochs that are wanted.
    (tmp_path / "run/seeds/0-original/checkpoint.safetensors").unlink()
    code, _, err = command("run", "--epochs", 3)
    assert code == 2
    assert "has not ended: 0 of 2 epochs are done" in err


def test_what_is_there_is_replaced_where_it_is_said(command: Run, tmp_path: Path) -> None:
    options = (FACTORY, *QUICK, "--epochs", 1)
    assert command(*options, "-o", "run", "--keep", "both")[0] == 0
    before = content(tmp_path / "run")
    code, _, err = command(*options, "-o", "run")
    assert code == 2
    assert "add --overwrite to replace it" in err
    # Whatever goes wrong before the new run has come to its first checkpoint, the old one is as it was.
    for wrong in (("--data", "digitz"), ("--lr", "1e30", "--optimizer", "sgd"), ("--resume",)):
        code, _, err = command(*options, *wrong, "-o", "run", "--overwrite")
        assert code in (2, 6), err
        assert content(tmp_path / "run") == before
    assert command("run", *QUICK, "-o", "run", "--overwrite")[0] == 2  # it needs what it would replace
    assert command("run/best", *QUICK, "-o", "run", "--overwrite")[0] == 2
    code, _, err = command(*options, "--seed", 1, "-o", "run", "--overwrite")
    assert code == 0, err
    after = content(tmp_path / "run")
    assert not any(name.startswith((".replaced", "best")) for name in after)
    assert after["model.safetensors"] != before["model.safetensors"]
    assert json.loads(after["finetune.json"])["training"]["seed"] == 1


def test_nothing_of_the_users_own_is_replaced(command: Run, tmp_path: Path) -> None:
    options = (FACTORY, *QUICK, "--epochs", 1, "--overwrite")
    for name, files in {
        "notes": ["letter.txt"],
        "best": ["best/mine.txt"],
        "model": ["dcafy.json", "seeds/1.txt"],
    }.items():
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text("dear")
        before = content(tmp_path / name)
        code, _, err = command(*options, "-o", name)
        assert code == 4
        assert "holds other things" in err
        assert content(tmp_path / name) == before


def test_what_a_kill_leaves_is_cleared_by_the_next_run(command: Run, tmp_path: Path) -> None:
    """Killed once the new run had begun, the old one is let go when the new one, gone on with, has ended."""
    options = (FACTORY, *QUICK, "--epochs", 1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.txt").write_text("dear")
    assert command(*options, "-o", "run")[0] == 0
    (tmp_path / "run" / "checkpoint.safetensors").unlink()
    aside = tmp_path / "run" / ".replaced-0a1b2c3d"
    aside.mkdir(parents=True)
    (aside / "model.safetensors").write_bytes(b"old")
    (tmp_path / "run" / ".replaced-link").symlink_to(elsewhere)
    assert command(FACTORY, *QUICK, "--epochs", 1, "-o", "run", "--resume")[0] == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")) == []
    assert (elsewhere / "mine.txt").exists()


class Killed(BaseException):
    """What a kill is to the process that it ends: nothing is done after it."""


def _killed_at(call: int, act: Callable[[], None]) -> bool:
    """Whether it was killed at its n-th change of a name; else it has ended. No process: a fork takes a while."""
    left = [call]

    def deadly(real: Callable[..., None]) -> Callable[..., None]:
        def changes(*args: Any, **options: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            real(*args, **options)

        return changes

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "mkdir", "rmdir", "unlink"):
            patch.setattr(os, name, deadly(getattr(os, name)))
        try:
            act()
        except Killed:
            return True
    return False


def _old(place: Path, *, is_run: bool) -> dict[str, bytes]:
    """A folder with a run, or a model alone, whose files say old."""
    shutil.rmtree(place, ignore_errors=True)
    files = ["dcafy.json", "model.safetensors", "README.md"]
    files += ["finetune.json", "log.jsonl", "checkpoint.safetensors", "best/dcafy.json"] if is_run else []
    for file in files:
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).write_text("old")
    (place / "README.md").unlink()  # one that dcafy has not signed is the user's
    return content(place)


@pytest.mark.parametrize("is_run", [True, False])
def test_killed_at_any_moment_of_replacing_a_run_the_old_one_or_the_new_one_is_there(
    tmp_path: Path, is_run: bool
) -> None:
    """Killed while it is set aside, while it is put back, and while what a kill has left is put back."""
    place = tmp_path / "run"

    def replaced(*, fails: bool) -> None:
        with contextlib.suppress(ZeroDivisionError), in_place_of_another(place):
            (place / "finetune.json").write_text("new")
            (place / "log.jsonl").write_text("new")
            if fails:
                raise ZeroDivisionError

    for fails in (False, True):
        states = set()
        for call in itertools.count():
            old = _old(place, is_run=is_run)
            killed = _killed_at(call, lambda fails=fails: replaced(fails=fails))  # type: ignore[misc]
            begun = (place / "finetune.json").exists() and (place / "finetune.json").read_text() == "new"
            assert begun or was_broken_off(place) or content(place) == old, (call, sorted(content(place)))
            for again in range(call + 1 if not begun else 0):  # tidying up is killed, too
                if not _killed_at(again, lambda: put_back(place)):
                    break
            put_back(place)
            states.add(begun)
            assert begun or content(place) == old, (call, sorted(content(place)))
            if not killed:
                assert begun != fails
                break
        assert states == {True, False}


def test_what_a_killed_replacement_has_left_is_told_and_put_back(
    command: Run, dcafy_command: Run, tmp_path: Path
) -> None:
    assert command(FACTORY, *QUICK, "--epochs", 1, "-o", "run")[0] == 0
    run, before = tmp_path / "run", content(tmp_path / "run")
    aside = run / ".replacing-0a1b2c3d"
    aside.mkdir()
    for name in ("checkpoint.safetensors", "dcafy.json", "model.safetensors"):
        (run / name).rename(aside / name)
    code, _, err = dcafy_command("inspect", run)
    assert (code, "set aside for a run that was broken off: dcafy finetune" in " ".join(err.split())) == (4, True)
    code, _, err = dcafy_command("convert", FACTORY, "-o", run, "--overwrite")
    assert (code, "Or name another folder" in " ".join(err.split())) == (2, True)
    code, _, err = command(FACTORY, "-o", "run", "--resume")
    assert "run is as it was: the run that was to replace it had not begun" in " ".join(err.split())
    assert code == 0, err
    after = content(run)
    assert {name for name in before if after.get(name) != before[name]} <= {"log.jsonl"}
    assert not aside.exists()
