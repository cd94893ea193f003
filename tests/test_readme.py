"""The README is true: its Python and ``dcafy`` blocks run, and its commands and versions are the project's own.

All blocks run in the README's order in one folder, the Python ones in one namespace. A console block holds lines
``$ dcafy ...`` and what each prints on stdout, where ``...`` stands for anything. The two set-up commands are not
run: they are compared word for word, and ``.ci/run`` runs the second.
"""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import dcafy

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SETUP = (
    "pip install -e '.[examples]' && python examples/quickstart.py",
    "pip install -e '.[dev]' && pytest",
)
SHOWN = {"python", "console", "bash", "text"}
"""The languages of README blocks; each but ``text`` is checked by a test below."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the README it starts on."""

    language: str
    text: str
    line: int


def blocks(markdown: str) -> Iterator[Block]:
    """The fenced blocks of ``markdown``, in order."""
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", markdown, flags=re.MULTILINE | re.DOTALL):
        yield Block(found[1], found[2], markdown.count("\n", 0, found.start(2)) + 1)


@dataclass(frozen=True)
class Command:
    """A command line of a console block, and what the README shows of its stdout."""

    line: str
    printed: str


def commands(text: str) -> Iterator[Command]:
    """The commands of a console block."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        line, _, printed = part.partition("\n")
        yield Command(line, printed)


def same(shown: str, printed: str) -> bool:
    """Whether ``printed`` is what the README shows, with ``...`` for anything and any amount of blank space."""
    return doctest.OutputChecker().check_output(
        shown.strip(), printed.strip(), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )


README_BLOCKS = tuple(blocks(README.read_text(encoding="utf-8")))


def test_every_block_has_a_language_that_is_checked() -> None:
    assert {block.language for block in README_BLOCKS} <= SHOWN
    # A fence that the pattern above misses would hide its block from every test here.
    assert README.read_text(encoding="utf-8").count("```") == 2 * len(README_BLOCKS)


def run_blocks(languages: set[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's blocks of these languages, in its order, in one folder."""
    monkeypatch.chdir(folder)
    script = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", script)  # where pickle looks for the README's classes
    for block in README_BLOCKS:
        if block.language not in languages:
            continue
        if block.language == "python":
            # The empty lines before it give tracebacks the README's own line numbers.
            exec(compile("\n" * (block.line - 1) + block.text, README, "exec"), script.__dict__)
        elif block.language == "console":
            for command in commands(block.text):
                prints_what_is_shown(command, block.line)


def test_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_blocks({"python"}, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["connections.md"])
def test_python_blocks_of_the_docs_run(name: str) -> None:
    path = ROOT / "docs" / name
    python = [block for block in blocks(path.read_text(encoding="utf-8")) if block.language == "python"]
    assert python
    for block in python:
        exec(compile("\n" * (block.line - 1) + block.text, path, "exec"), {})


@pytest.mark.slow
def test_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them: each command, too, in a process of its own."""
    run_blocks(SHOWN, tmp_path, monkeypatch)


def prints_what_is_shown(command: Command, line: int) -> None:
    """Runs a console command of the README with this interpreter and compares its stdout."""
    ran = subprocess.run(
        ["bash", "-c", f'dcafy() {{ "$PYTHON" -m dcafy "$@"; }}\n{command.line}'],
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    context = f"README.md:{line}: $ {command.line}\nstdout:\n{ran.stdout}\nstderr:\n{ran.stderr}"
    assert same(command.printed, ran.stdout), context
    assert "Traceback" not in ran.stderr, context


def test_blocks_show_both_doors() -> None:
    assert sum(block.language == "python" for block in README_BLOCKS) >= 3
    shown = [command for block in README_BLOCKS if block.language == "console" for command in commands(block.text)]
    assert shown
    for command in shown:
        assert command.line.startswith("dcafy "), command.line
        assert command.printed.strip(), f"the README shows nothing of what $ {command.line} prints"


def test_setup_is_exactly_two_commands() -> None:
    bash = [line for block in README_BLOCKS if block.language == "bash" for line in block.text.splitlines() if line]
    assert bash == list(SETUP)


def test_continuous_integration_runs_the_readme_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    pattern = re.search(r'grep -E "(.*)" README\.md', script)
    assert pattern is not None
    found = subprocess.run(
        ["grep", "-E", pattern[1].replace("\\\\", "\\"), str(README)], capture_output=True, text=True, check=True
    )
    assert found.stdout.splitlines() == [SETUP[1]]
    assert 'step "$test_command"' in script


def test_two_tiers_leave_out_whole_zoos_only(pytestconfig: pytest.Config) -> None:
    """What the README's command leaves out is ``slow and not zoo``, which ``.ci/run`` runs next, and ``zoo``."""
    options = pytestconfig.getini("addopts")
    assert options[options.index("-m") + 1] == "not slow and not zoo"
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert script.count("pytest -m 'slow and not zoo'") == 1


def test_named_files_exist() -> None:
    text = README.read_text(encoding="utf-8")
    linked = re.findall(r"\]\(([^)#:]+)\)", text)
    run = [word for command in re.findall(r"`(?:pytest|bash|python) ([^`]+)`", text) for word in command.split()]
    named = linked + [word for word in run if "/" in word]
    assert len(named) >= 15
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_versions_agree() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", citation, flags=re.MULTILINE) == [dcafy.__version__]
    assert f"## {dcafy.__version__}" in changelog


def test_output_comparison_can_fail() -> None:
    assert same("a\n...\nd", "a\nb\nc\nd\n")
    assert same("│ a   │", "│ a │")
    assert not same("a\n...\nd", "a\nb\nc\n")
    assert not same("3", "4")
