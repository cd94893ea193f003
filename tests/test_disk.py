"""Files of others are read warily; what takes a file's place is whole, permitted as that was, and leaves no trace."""

from __future__ import annotations

import json
import os
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import SELinear, with_attention
from safetensors.torch import load_file, save_file
from trained import images, seeded

import dcafy
from dcafy.disk import content, regular, replace_file, replaced
from dcafy.errors import CheckpointError, DcafyError, SourceError, UsageError
from dcafy.report import read_epochs
from dcafy.runs.compare import compare
from dcafy.runs.request import Request, read_request
from dcafy.training.checkpoint import read_checkpoint
from dcafy.training.options import TrainingConfig
from dcafy.training.telling import JsonLines

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes and links")

ODD: dict[str, Callable[[Path], Any]] = {
    "a pipe": lambda path: os.mkfifo(path),
    "a folder": lambda path: path.mkdir(),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to("/nowhere"),
    "too large": lambda path: [path.touch(), os.truncate(path, 2**40)],  # takes no room on the disk
}


@pytest.fixture
def connected() -> torch.nn.Module:
    with seeded(0):
        return dcafy.convert(with_attention(SELinear), example_inputs=images(), verify=False)


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


# --- reading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_file_of_that_size_is_not_read(kind: str, tmp_path: Path) -> None:
    ODD[kind](tmp_path / "it")
    start = time.process_time()
    with pytest.raises(OSError, match=r"."):
        content(tmp_path / "it", 1000)
    assert time.process_time() - start < 1


def test_names_that_are_none() -> None:
    for name in ("a\0b", "a" * 5000):
        with pytest.raises(OSError, match=r"."):
            regular(name)


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("finetune.json", read_request),
        ("log.jsonl", read_epochs),
        ("checkpoint.safetensors", lambda folder: read_checkpoint(folder / "checkpoint.safetensors")),
        ("dcafy.json", dcafy.load),
    ],
)
def test_nor_are_those_of_a_run(name: str, read: Callable[[Path], Any], kind: str, tmp_path: Path) -> None:
    ODD[kind](tmp_path / name)
    with pytest.raises(SourceError) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_of_the_largest_size_is_read(tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(b"x" * 10)
    assert content(tmp_path / "it", 10) == b"x" * 10
    with pytest.raises(OSError, match="more than 9 bytes"):
        content(tmp_path / "it", 9)


# --- links ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_save_takes_nothing_out_of_another_folder(what: str, connected: torch.nn.Module, tmp_path: Path) -> None:
    strangers, mine = tmp_path / "stranger", tmp_path / "mine"
    dcafy.save(connected, strangers)
    mine.mkdir()
    (mine / "model.safetensors").write_text("the user's own weights")
    sha256 = json.loads((strangers / "dcafy.json").read_text())["weights"]["sha256"]
    staging = strangers / f".dcafy-{sha256[:32]}"
    if what == "folder":
        staging.symlink_to(mine)
    else:
        staging.mkdir()
        (staging / "model.safetensors").symlink_to(mine / "model.safetensors")
    dcafy.load(strangers, with_attention(SELinear))  # and it is not read from there
    dcafy.save(connected, strangers)
    assert (mine / "model.safetensors").read_text() == "the user's own weights"
    assert sorted(os.listdir(strangers)) == ["README.md", "dcafy.json", "model.safetensors"]
    dcafy.load(strangers, with_attention(SELinear))


def test_a_log_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "log.jsonl").symlink_to(tmp_path / "mine")
    log = JsonLines(tmp_path / "log.jsonl")
    log.begins(TrainingConfig(), 8, 0, ())
    log.skipped("a.png")
    assert (tmp_path / "mine").read_text() == "mine"
    events = [json.loads(line)["event"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert events == ["begin", "skipped"]


@pytest.mark.parametrize("link", ["seeds", "seeds/0-original"])
def test_a_comparison_stays_in_its_folder(link: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    (tmp_path / "mine").mkdir()
    place = tmp_path / "run" / link
    place.parent.mkdir(parents=True)
    place.symlink_to(tmp_path / "mine")
    with pytest.raises(CheckpointError, match="is a link"):
        compare(Request("torchvision:mobilenet_v3_small", "digits", seeds=1), tmp_path / "run")
    assert not list((tmp_path / "mine").iterdir())


# --- permissions ----------------------------------------------------------------------------------------


def test_permissions_survive(connected: torch.nn.Module, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    dcafy.save(connected, saved, base=False)
    for path in saved.iterdir():
        path.chmod(0o640)
    dcafy.save(connected, saved, base=False)
    assert set(modes(saved).values()) == {0o640}
    dcafy.save(connected, saved)  # another file, which takes the place of the first
    assert modes(saved) == {"README.md": 0o640, "dcafy.json": 0o640, "model.safetensors": 0o640}
    for mode in (0o600, 0o444):
        (saved / "model.safetensors").chmod(mode)
        dcafy.save(connected, saved)
        assert modes(saved) == {"README.md": 0o640, "dcafy.json": 0o640, "model.safetensors": mode}


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o440])
def test_permissions_of_single_files_survive(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "it"
    path.touch()
    for write in (
        lambda: replace_file(path, lambda beside: save_file({"x": torch.zeros(2)}, beside)),
        lambda: _page(path),
    ):
        path.chmod(mode)
        write()
        assert modes(tmp_path)["it"] == mode


def _page(path: Path) -> None:
    with replaced(path) as write:
        write("a page")


def test_new_files_are_as_the_user_wants(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        replace_file(tmp_path / "tensors", lambda beside: save_file({"x": torch.zeros(2)}, beside))
        _page(tmp_path / "page")
    finally:
        os.umask(before)
    assert modes(tmp_path) == {"tensors": 0o640, "page": 0o640}


# --- what a killed run leaves ---------------------------------------------------------------------------


def killed_while_it_writes(path: Path) -> None:
    child = os.fork()
    if not child:

        def write(beside: Path) -> None:
            beside.with_name(".tmpXyz123").write_text("safetensors begins so")
            os.kill(os.getpid(), signal.SIGKILL)

        replace_file(path, write)
    os.waitpid(child, 0)


def test_a_killed_run_leaves_nothing_for_long(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    (tmp_path / ".checkpoint.safetensors.0123abcd").write_text("as dcafy 0.1 left it")
    (tmp_path / ".checkpoint.safetensors.notes").write_text("the user's own")
    replace_file(path, lambda beside: save_file({"x": torch.zeros(2)}, beside))
    killed_while_it_writes(path)
    assert load_file(path)["x"].tolist() == [0, 0]
    assert len(os.listdir(tmp_path)) == 3
    replace_file(path, lambda beside: save_file({"x": torch.ones(2)}, beside))
    assert sorted(os.listdir(tmp_path)) == [".checkpoint.safetensors.notes", "checkpoint.safetensors"]
    assert load_file(path)["x"].tolist() == [1, 1]


def test_what_another_still_writes_stays(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    with replaced(path) as first:
        with replaced(path) as second:
            second("second")
        first("first")
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["page.html"]


def test_a_link_among_what_was_left_is_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "it").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".it.0123abcd").symlink_to(tmp_path / "mine")
    replace_file(tmp_path / "run" / "it", lambda beside: beside.write_text("new"))
    assert os.listdir(tmp_path / "run") == ["it"]
    assert (tmp_path / "mine" / "it").read_text() == "mine"


# --- what cannot be written -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "x/" * 3000])
def test_paths_that_are_none_are_told_in_a_line(name: str, connected: torch.nn.Module, tmp_path: Path) -> None:
    for act in (
        lambda: dcafy.save(connected, tmp_path / name),
        lambda: dcafy.load(tmp_path / name),
        lambda: read_request(tmp_path / name),
        lambda: replace_file(tmp_path / name, lambda beside: beside.write_text("")),
        lambda: _page(tmp_path / name),
    ):
        with pytest.raises(DcafyError) as caught:
            act()
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 600


def test_a_page_takes_no_devices_place(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="it is no regular file"):
        _page(tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
