"""A message is one short line, whatever names, paths and values of the user's are in it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_data import SIZE, connected, network

import dcafy
from dcafy import errors
from dcafy.report import make_report
from dcafy.training import TrainingConfig, finetune

Run = Callable[..., tuple[int, str, str]]

HOSTILE = {
    "with NUL": "a\0b",
    "long": "x" * 5000 + "\n\x1b[31m",
    "deep": "/".join(["x" * 200] * 30),
    "long name": "x" * 300,
    "surrogate": "a\ud800b",
    "line break": "a\nb",
    "escape": "a\x1b[31m\u202eb",
    "empty": "",
    "device": "/dev/null/x",
}


def is_line(message: str) -> bool:
    return message.isprintable() and 20 < len(message) <= 1300


DATA = [(torch.rand(3, SIZE, SIZE), number % 4) for number in range(4)]
CONFIG = TrainingConfig(epochs=1, batch_size=4, usage_images=0, cpu=True)

DOORS: dict[str, Callable[[str], Any]] = {
    "save": lambda path: dcafy.save(connected(), path),
    "load": dcafy.load,
    "load into": lambda path: dcafy.load(path, model=network()),
    "finetune": lambda path: finetune(network(), DATA, DATA, CONFIG, directory=path),
    "report of": lambda path: make_report(connected(), Path(path)),
    "report to": lambda path: make_report(connected(), torch.rand(1, 3, SIZE, SIZE), Path(path)),
    "report on": lambda path: make_report(connected(), torch.rand(1, 3, SIZE, SIZE), data=path),
}


NAMES = [name if n < 2 else pytest.param(name, marks=pytest.mark.slow) for n, name in enumerate(HOSTILE)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("door", DOORS)
def test_paths(door: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        DOORS[door](HOSTILE[name])
    except dcafy.DcafyError as error:
        message = str(error)
    else:
        message = f"{name}: that is a path like others where it is new"
        assert name in ("line break", "escape", "empty", "surrogate", "long name"), name
    assert is_line(message)


COMMANDS: dict[str, Callable[[str], list[str]]] = {
    "inspect": lambda text: ["inspect", text],
    "report": lambda text: ["report", "torchvision:mobilenet_v3_small", "--images", text, "-o", "r.html"],
    "data": lambda text: ["finetune", "torchvision:mobilenet_v3_small", "--data", f"imagefolder:{text}", "-o", "run"],
    "run": lambda text: ["finetune", text, "--resume"],
    "size": lambda text: ["inspect", "torchvision:mobilenet_v3_small", "--input-size", text],
    "schema": lambda text: ["convert", "torchvision:mobilenet_v3_small", "-o", "out", "--schema", text],
    "set": lambda text: ["inspect", "torchvision:mobilenet_v3_small", "--set", text],
    "option": lambda text: ["inspect", f"--{text}x"],
    "number": lambda text: ["finetune", "x", "--data", "digits", "-o", "run", "--lr", text],
    "log": lambda text: ["finetune", "torchvision:mobilenet_v3_small", "--data", "x", "-o", "r", "--json-log", text],
}


@pytest.mark.parametrize("name", NAMES[1:])  # no command line has a NUL
@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str, name: str, dcafy_command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, told = dcafy_command(*COMMANDS[command](HOSTILE[name]))
    assert code in (2, 4)
    *_, last = told.splitlines()
    assert is_line(last)
    assert "Traceback" not in told
    assert len(told) < 4000


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (["--input-size", "9" * 4400 + "x1x1"], "channels x height x width"),
        (["--input-size", "3x99999x99999"], "larger"),
        (["--input-size", "3x999999999x999999999"], "larger"),
        (["--input-size", "３x８x８"], "channels x height x width"),
        (["--set", "num_classes=" + "[" * 100 + "]" * 100], "num_classes"),
        (["--set", "num_classes=" + '{"a":' * 5000], "num_classes"),
        (["--set", "num_classes=" + "[" * 100_000], "num_classes"),
        (["--set", "a" * 5000], "key=value"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_sizes_and_settings(option: list[str], says: str, dcafy_command: Run) -> None:
    code, _, told = dcafy_command("inspect", "torchvision:mobilenet_v3_small", *option)
    assert code == 2
    assert says in told
    assert is_line(told.strip())


@pytest.mark.parametrize(
    "options", [{"reduction": 10**5000}, {"schema": "s" * 10**5}, {"reduction": "9\n" * 10**5}], ids=list
)
def test_options_in_python(options: dict[str, Any]) -> None:
    with pytest.raises(dcafy.DcafyError) as caught:
        dcafy.convert(network(), **options)
    assert is_line(str(caught.value))


@pytest.mark.parametrize("name", sorted({*errors.__all__} - {"Interrupted"}))
def test_errors_of_any_kind(name: str) -> None:
    kind = getattr(errors, name)
    error = kind("a\x1b[31m name\u202e " + "x" * 100_000 + " and what to do.")
    assert is_line(str(error))
    assert str(error).endswith("and what to do.")
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(twin) is kind
        assert str(twin) == str(error)
    lines = str(kind("one\n  two"))
    assert lines == ("one\n  two" if kind is errors.NoAttentionError else "one two")


class Named(nn.Module):
    pass


Named.__name__ = "N" * 100_000 + "\nX"


def test_names_of_classes() -> None:
    with pytest.raises(dcafy.DcafyError) as caught:
        dcafy.inspect(Named())
    assert is_line(str(caught.value))
