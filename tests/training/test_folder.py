"""Two trainings in one folder: the second says so at once, and touches nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from training_data import Stripes, connected

from dcafy.errors import CheckpointError, UsageError
from dcafy.training import TrainingConfig, finetune
from dcafy.training.folder import LOCK, alone_in

CONFIG = TrainingConfig(epochs=1, batch_size=8, usage_images=0, cpu=True)
Run = Callable[..., tuple[int, str, str]]


def train(directory: Path, **options: Any) -> None:
    finetune(connected(), Stripes(), Stripes(20), CONFIG, directory=directory, **options)


@contextlib.contextmanager
def another(directory: Path) -> Iterator[int]:
    """Inside it another process, whose number this is, trains in the folder; then it is killed."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        with alone_in(directory):
            os.write(theirs, b".")
            time.sleep(60)
        os._exit(0)
    try:
        assert os.read(ours, 1) == b"."
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ours)
        os.close(theirs)


def everything(directory: Path) -> list[tuple[Any, ...]]:
    found = [directory, *directory.rglob("*")]
    return [(path, path.stat().st_mtime_ns, path.stat().st_ino, path.is_file() and path.read_bytes()) for path in found]


@pytest.mark.parametrize("resume", [False, True])
def test_the_second_training_touches_nothing(resume: bool, tmp_path: Path) -> None:
    train(tmp_path)
    with another(tmp_path):
        before, start = everything(tmp_path), time.perf_counter()
        with pytest.raises(UsageError, match="Another process trains in"):
            train(tmp_path, resume=resume)
        assert time.perf_counter() - start < 5
        assert everything(tmp_path) == before
    train(tmp_path, resume=resume)  # the other was killed
    assert not (tmp_path / LOCK).exists()


def test_the_second_command_touches_nothing(dcafy_command: Run, tmp_path: Path) -> None:
    output = tmp_path / "run"
    told = ["finetune", "torchvision:mobilenet_v3_small", "--data", "digits", "-o", str(output)]
    with another(output):
        (output / "finetune.json").write_text("{}")
        for more in ([], ["--resume"], ["--compare"]):
            before = everything(tmp_path)
            code, _, said = dcafy_command(*told, *more, "--json-log", str(tmp_path / "log"))
            assert code == 2
            assert "Another process trains in" in said
            assert everything(tmp_path) == before


def test_two_threads_do_not_share_a_folder_either(tmp_path: Path) -> None:
    said: list[str] = []

    def second() -> None:
        with pytest.raises(UsageError) as caught:
            train(tmp_path)
        said.append(str(caught.value))

    with alone_in(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        train(tmp_path)  # of the thread that has it
        assert (tmp_path / LOCK).exists()
    assert "Another" in said[0]
    assert not (tmp_path / LOCK).exists()


def test_a_forked_child_does_not_have_what_its_parent_has(tmp_path: Path) -> None:
    with alone_in(tmp_path):
        if not (child := os.fork()):
            try:
                with alone_in(tmp_path):
                    os._exit(1)
            except UsageError:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_one_training_after_the_other_gets_the_folder(tmp_path: Path) -> None:
    """Many that begin and end at once: never two at a time, whenever the file of the lock comes and goes."""
    mark, children = tmp_path / "mark", []
    for _ in range(6):
        if not (child := os.fork()):
            turns, end = 0, time.perf_counter() + 20
            while turns < 15 and time.perf_counter() < end:
                with contextlib.suppress(UsageError), alone_in(tmp_path):
                    handle = os.open(mark, os.O_CREAT | os.O_EXCL)  # fails where another is inside
                    os.close(handle)
                    os.unlink(mark)
                    turns += 1
            os._exit(0 if turns == 15 else 1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 6


def test_nothing_is_left_where_nothing_was(tmp_path: Path) -> None:
    with alone_in(tmp_path / "new" / "run"):
        assert (tmp_path / "new" / "run").is_dir()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "file in its place"])
def test_a_strangers_folder_is_no_trap(kind: str, tmp_path: Path) -> None:
    directory, victim = tmp_path / "run", tmp_path / "victim"
    victim.write_text("whole")
    if kind == "file in its place":
        directory.write_text("")
    else:
        directory.mkdir()
        place = directory / LOCK
        {"link": lambda: place.symlink_to(victim), "pipe": lambda: os.mkfifo(place), "folder": place.mkdir}[kind]()
    with pytest.raises(CheckpointError):
        train(directory)
    assert victim.read_text() == "whole"


def test_a_folder_without_a_run_is_not_touched(
    tmp_path: Path, dcafy_command: Callable[..., tuple[int, str, str]]
) -> None:
    """Not even by the lock: it may be anybody's."""
    (tmp_path / "mine").write_text("mine")
    before = tmp_path.stat().st_mtime_ns
    code, _, err = dcafy_command("finetune", tmp_path, "--resume")
    assert (code, "There is no run in" in err) == (2, True)
    assert tmp_path.stat().st_mtime_ns == before
