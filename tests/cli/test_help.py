"""Help stands in panels and fits, its examples are real, a shell completes, and quiet is quiet."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from typing import Any

import pytest
import typer

from dcafy.cli import app
from dcafy.cli.help import COMMANDS, TOPICS

COMMAND: Any = typer.main.get_command(app)
NAMES = tuple(COMMAND.commands)


def options_of(name: str) -> list[Any]:
    return [one for one in COMMAND.commands[name].params if one.param_type_name == "option"]


@pytest.mark.parametrize("width", [60, 80, 140])
@pytest.mark.parametrize("name", NAMES)
def test_help_fits_in_panels_and_breaks_no_option(name, width, dcafy_command, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, err = dcafy_command(name, "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= width
    for option in options_of(name):
        for declared in option.opts:
            assert declared in out.replace(",", " ").split(), declared
    panels = [line.split("─")[1].strip() for line in out.splitlines() if line.startswith("─ ")]
    assert panels[0] in ("Arguments", "Data")
    usage = out.partition("\n\n")[0]
    assert not re.search(r"[{}]|\[\[|\]\]|\.{4}", usage), usage
    assert not re.search(r"\S  \[(default|required)", out)
    assert set(panels) <= {"Arguments", *TOPICS, "Options", "Example"}
    # One command after the other, each as a user would copy it.
    example = out[out.rindex("─\n") + 2 :].replace("\\\n", " ").strip()
    for line in example.splitlines():
        words = shlex.split(line)
        assert words[:2] == ["dcafy", name]
        COMMAND.commands[name].make_context(name, words[2:])


def test_the_commands_stand_in_panels_by_what_they_are_for(dcafy_command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = dcafy_command("--help")
    assert max(map(len, out.splitlines())) <= 80
    assert {name for names in COMMANDS.values() for name in names} == set(NAMES)
    assert all(f"─ {topic} ─" in out for topic in COMMANDS)
    assert "..." not in out.split("Exit codes")[0].replace("[ARGS]...", "")
    assert "--install-completion" in out


def test_topics_are_those_of_options_that_there_are():
    known = {option.name for name in NAMES for option in options_of(name)}
    assert [name for names in TOPICS.values() for name in names if name not in known] == []
    named = [name for names in TOPICS.values() for name in names]
    assert len(named) == len(set(named))


@pytest.mark.parametrize(
    ("typed", "completed"),
    [("dcafy fi", ["finetune"]), ("dcafy finetune --topology t", ["tree"]), ("dcafy convert --over", ["--overwrite"])],
)
def test_a_shell_completes_commands_options_and_values(typed, completed):
    ran = subprocess.run(
        [sys.executable, "-m", "dcafy"],
        env={**os.environ, "_DCAFY_COMPLETE": "complete_bash", "COMP_WORDS": typed,
             "COMP_CWORD": str(len(typed.split()) - 1)},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert ran.stdout.split() == completed


@pytest.mark.parametrize("before", [True, False])
def test_quiet_leaves_the_results(before, dcafy_command, tmp_path):
    arguments = ["convert", "torchvision:mobilenet_v3_small", "--no-verify", "-o"]
    code, told, err = dcafy_command(*arguments, tmp_path / "loud")
    assert "8 connections with" in err
    quietly = ["--quiet", *arguments, tmp_path / "a"] if before else [*arguments, tmp_path / "b", "-q"]
    code, out, err = dcafy_command(*quietly)
    assert code == 0
    assert "8 connections with" not in err
    assert out.split(",")[0] == told.split(",")[0]
    code, _, err = dcafy_command(*quietly)  # an error is told, and the next command is as loud as ever
    assert "There is a model" in err
    assert code == 2
    assert "new parameters" in dcafy_command(*arguments, tmp_path / "again")[2]


class Terminal(io.StringIO):
    """What a command writes, as if a person looked at it."""

    def isatty(self) -> bool:
        return True


def test_words_of_messages_stay_whole_in_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    spec = "torchvision:mobilenet_v3_smell"
    seen = {}
    for kind in (io.StringIO, Terminal):
        monkeypatch.setattr(sys, "stderr", kind())
        with pytest.raises(SystemExit):
            app(["inspect", spec], prog_name="dcafy")
        seen[kind] = sys.stderr.getvalue()
    assert max(map(len, seen[Terminal].splitlines())) <= 60
    assert seen[Terminal].split() == seen[io.StringIO].split()
    assert len(seen[io.StringIO].splitlines()) == 1
