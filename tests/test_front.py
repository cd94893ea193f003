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


def test_the_first_use_draws_no_random_numbers() -> None:
    """Importing rich draws from Python's own: a run under one seed would depend on whether dcafy was used before."""
    program = """
import random, sys
import numpy as np, torch
import dcafy
from torchvision.ops import SqueezeExcitation as SE
from torch import nn

def states():
    return repr((random.getstate(), np.random.get_state(), torch.get_rng_state()))

model = nn.Sequential(nn.Conv2d(3, 8, 3), SE(8, 4), nn.Conv2d(8, 8, 3), SE(8, 4)).eval()
x, before = torch.zeros(1, 3, 16, 16), states()
plan = dcafy.inspect(model, example_inputs=x)
repr(plan), str(plan), dcafy.convert(model, example_inputs=x), dcafy.summary, dcafy.load
assert "rich.style" in sys.modules
sys.exit(states() != before)
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=False).returncode == 0
