"""Hostile inputs, a fixed sample of them; and the page that says what is trusted names every option there is."""

from __future__ import annotations

import collections
import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from dcafy.cli import app
from dcafy.errors import UsageError
from dcafy.images.options import DataOptions
from dcafy.sources import FileOptions

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ROOT / "benchmarks" / "faults.py"


linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux, which tells peaks of memory"
)


@linux
@pytest.mark.slow
def test_hostile_inputs_end_in_a_result_or_in_a_line() -> None:
    """Each package's tests open the worst of them by name, quickly."""
    command = [sys.executable, "-W", "ignore", str(FAULTS), "--seed", "7", "--inputs", "400"]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    totals = json.loads(run.stdout.splitlines()[-1])
    assert totals["inputs"] == totals["accepted"] + totals["refused"] == 400
    assert len(totals["parts"]) == 9
    assert min(totals["parts"].values()) >= 25
    assert totals["refused"] > 200
    assert not any(totals["findings"].values())


@pytest.fixture(scope="module")
def faults() -> Any:
    """The script, under a name that no test module has."""
    spec = importlib.util.spec_from_file_location("faults_script", FAULTS)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


ELSEWHERE = Path("/var/tmp/dcafy-elsewhere")


def _through_a_link() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "link").symlink_to(ELSEWHERE)
        (Path(folder) / "link").write_bytes(b"x")


def _refused(text: str) -> None:
    error = UsageError("")
    error.args = (text,)  # past what keeps messages short
    raise error


FOUND: dict[str, tuple[str, Callable[[], Any]]] = {
    "traceback": ("traceback", lambda: {}["x"]),
    "crash": ("crash", lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "message": ("refused", lambda: _refused("x" * 2000)),
    "program": ("accepted", lambda: subprocess.run(["true"])),
    "file": ("traceback", lambda: ELSEWHERE.touch()),
    "link": ("traceback", lambda: _through_a_link()),
    "slow": ("slow", lambda: any(time.process_time() < 0 for _ in itertools.repeat(0))),
    "hang": ("hang", lambda: time.sleep(100)),
    "memory": ("accepted", lambda: (b"x" * 1100 * 2**20).count(b"y")),
}
"""What is found -> how it ends, and what does that."""


def test_a_process_that_reads_is_no_program(faults: Any, tmp_path: Path) -> None:
    """``workers: 1`` in a file of options asks for one; a fork of an input's own is found."""

    def read() -> None:
        loader = torch.utils.data.DataLoader([1, 2, 3], num_workers=1)
        assert len(list(loader)) == 3

    def fork() -> None:
        if not (child := os.fork()):
            os._exit(0)
        os.waitpid(child, 0)

    reads, forks = faults.opened([(read, tmp_path), (fork, tmp_path)])
    assert (reads.end, reads.findings) == ("accepted", {})
    assert list(forks.findings) == ["program"]


_LONG = {"slow", "hang", "memory"}


@linux
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in _LONG)) for kind in FOUND])
def test_every_kind_of_finding_is_found(
    kind: str, faults: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the inputs before it and behind it are none the worse."""
    if kind == "hang":
        monkeypatch.setattr(faults, "PATIENCE", 3.0)
    if kind == "slow":
        monkeypatch.setattr(faults, "SECONDS", 0.5)
    end, act = FOUND[kind]
    before, it, after = faults.opened([(one, tmp_path) for one in (lambda: None, act, lambda: _refused("no"))])
    made = ELSEWHERE.exists()
    ELSEWHERE.unlink(missing_ok=True)
    assert not made, "it is found before it is done"
    assert (it.end, list(it.findings)) == (end, ["file" if kind == "link" else kind])
    assert (before.end, before.findings) == ("accepted", {})
    assert (after.end, after.said, after.findings) == ("refused", "no", {})


# --- SECURITY.md ----------------------------------------------------------------------------------------


def options() -> dict[str, set[str]]:
    """Long option -> the commands that have it."""
    found: dict[str, set[str]] = collections.defaultdict(set)
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for parameter in command.params:
            for option in parameter.opts:
                if option.startswith("--"):
                    found[option].add(name)
    return found


def test_every_option_is_in_one_of_the_lists_of_the_security_page() -> None:
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    told = page[page.index("## What the options accept") : page.index("In Python `trust_pickle`")]
    rows = [line.split("|")[1] for line in told.splitlines() if line.startswith("| `--")]
    plain = told[told.index("All others are") :]
    named = collections.Counter(re.findall(r"`(--[a-z-]+)`", " ".join(rows) + plain))
    assert named.keys() == options().keys()
    assert set(named.values()) == {1}, "an option stands in two lists"


def test_what_lowers_a_guard_is_off_by_default_and_named_in_python_too() -> None:
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if line.startswith("In Python ")]
    fields = {**vars(FileOptions()), **vars(DataOptions())}
    for name in re.findall(r"`(\w+)`", line):
        assert fields[name] is False
        assert f"`--{name.replace('_', '-')}`" in page


def test_what_an_input_is_made_of_is_not_written_through_links(faults: Any, tmp_path: Path) -> None:
    """Two parts of an input may have one name, and the first of them be a link to somewhere else."""
    sys.path.insert(0, str(FAULTS.parent))
    try:
        put = importlib.import_module("hostile").put
    finally:
        sys.path.remove(str(FAULTS.parent))
    (tmp_path / "elsewhere").write_text("theirs")
    (tmp_path / "a.png").symlink_to(tmp_path / "elsewhere")
    put(tmp_path / "a.png", b"ours")
    assert (tmp_path / "elsewhere").read_text() == "theirs"
    assert (tmp_path / "a.png").read_bytes() == b"ours"
