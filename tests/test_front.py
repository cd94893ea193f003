"""What ``import dcafy`` offers, and what ``python -m dcafy`` imports."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import dcafy
from dcafy import errors


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_caught_from_the_front(name):
    assert getattr(dcafy, name) is getattr(errors, name)
    assert name in dcafy.__all__
    assert issubclass(getattr(dcafy, name), dcafy.DcafyError)


def test_a_message_is_one_printable_line_of_bounded_length():
    told = str(dcafy.SourceError("a\nb\x1b[31m\u202e" + 100_000 * "x" + " the end"))
    assert told.startswith("a b\\x1b[31m\\u202exxx")
    assert told.endswith("xxx the end")
    assert len(told) <= 2000
    assert told.isprintable()


def test_the_module_imports_nothing_from_the_working_folder_by_accident(tmp_path):
    """``python -m`` puts that folder on the path, and anything may lie in it."""
    for name in ("typing", "dataclasses", "json", "logging", "typer", "rich", "torch", "torchvision", "timm", "numpy"):
        (tmp_path / f"{name}.py").write_text("open('imported', 'w')\n")
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(dcafy.__file__))}
    for arguments in (["--help"], ["inspect", "nothing.pt"]):
        command = [sys.executable, "-m", "dcafy", *arguments]
        subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True)
    assert not (tmp_path / "imported").exists()
