"""The README is true: its Python and ``dcafy`` blocks run, and its commands and versions are the project's own.

How a page's blocks run is told in ``pages.py``. The two set-up commands are not run: they are compared word for word,
and ``.ci/run`` runs the second. The pages of the documentation have ``test_docs.py``.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pages
import pytest
from pages import README, ROOT, commands, same

import dcafy

SETUP = (
    "pip install -e '.[examples]' && python examples/quickstart.py",
    "pip install -e '.[dev]' && pytest",
)
SHOWN = {"python", "console", "bash"}
"""The languages of README blocks; each is checked by a test below."""

TEXT = README.read_text(encoding="utf-8")
README_BLOCKS = tuple(pages.blocks(TEXT))


def test_every_block_has_a_language_that_is_checked() -> None:
    assert {block.language for block in README_BLOCKS} <= SHOWN
    # A fence that the pattern misses would hide its block from every test here.
    assert TEXT.count("```") == 2 * len(README_BLOCKS)


def test_it_is_a_front_door() -> None:
    """What a reader needs first is on the first screen, and the rest in the documentation."""
    assert TEXT.count("\n") <= 160
    first = TEXT.partition("## Set-up")[0]
    assert "](docs/connection.svg)" in first
    assert all(word in first for word in ("For whom", "What it costs", "What it gains"))
    assert first.count("<!-- evidence -->") <= 1
    assert "http" not in "".join(re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXT)), (
        "a picture that asks a host for something"
    )


def test_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages.run(README, README_BLOCKS, {"python"}, tmp_path, monkeypatch)


@pytest.mark.slow
def test_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands: each in a process of its own."""
    pages.run(README, README_BLOCKS, {"console"}, tmp_path, monkeypatch)


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
    linked = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXT)
    run = [word for command in re.findall(r"`(?:pytest|bash|python) ([^`]+)`", TEXT) for word in command.split()]
    named = linked + [word for word in run if "/" in word]
    assert len(named) >= 15
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_badges_say_what_the_project_says() -> None:
    module = pages.module("make_badges")
    for name, says in module.badges().items():
        assert (ROOT / "docs" / "badges" / f"{name}.svg").read_text(encoding="utf-8") == module.drawn(*says)
        assert f"](docs/badges/{name}.svg)" in TEXT


def test_nobody_is_told_to_install_from_a_checkout_but_here() -> None:
    """Everywhere else it is ``pip install 'dcafy[...]'``: who has installed a wheel has no checkout."""
    telling = [*(ROOT / "dcafy").rglob("*.py"), *(ROOT / "examples").glob("*.py"), *pages.PROSE]
    found = {
        (path.relative_to(ROOT).as_posix(), line.strip())
        for path in telling
        for line in path.read_text(encoding="utf-8").splitlines()
        if "pip install -e" in line
    }
    assert found == {("README.md", line) for line in SETUP}


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
