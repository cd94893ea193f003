"""Pages of Markdown and what they promise: blocks that run, links that lead somewhere, commands that there are.

A page's Python and console blocks run in its order, in one folder, the Python ones in one namespace; blocks in HTML
comments run too, and prepare what a reader has. A console block holds lines ``$ dcafy ...`` and what each prints on
stdout, where ``...`` stands for anything.
"""

from __future__ import annotations

import doctest
import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = tuple(path for path in sorted((ROOT / "docs").rglob("*.md")) if not path.is_relative_to(ROOT / "docs" / "made"))
NOTEBOOKS = tuple(sorted((ROOT / "docs" / "tutorials").glob("*.ipynb")))
PROSE = (README, *PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")))


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the page it starts on."""

    language: str
    text: str
    line: int


def blocks(markdown: str) -> Iterator[Block]:
    """The fenced blocks of ``markdown``, in order."""
    for found in re.finditer(r"^```(\{?[\w-]*\}?)[^\n]*\n(.*?)^```$", markdown, flags=re.MULTILINE | re.DOTALL):
        yield Block(found[1], found[2], markdown.count("\n", 0, found.start(2)) + 1)


def prose(markdown: str) -> str:
    """``markdown`` without its fenced blocks, in as many lines."""
    text = markdown
    for block in blocks(markdown):
        text = text.replace(block.text, "\n" * block.text.count("\n"))
    return text


@dataclass(frozen=True)
class Command:
    """A command line of a console block, and what the page shows of its stdout."""

    line: str
    printed: str


def commands(text: str) -> Iterator[Command]:
    """The commands of a console block."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        line, _, printed = part.partition("\n")
        yield Command(line, printed)


def same(shown: str, printed: str) -> bool:
    """Whether ``printed`` is what a page shows, with ``...`` for anything and any amount of blank space."""
    return doctest.OutputChecker().check_output(
        shown.strip(), printed.strip(), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )


def run(path: Path, found: Sequence[Block], languages: set[str], folder: Path, patch: pytest.MonkeyPatch) -> None:
    """The blocks of these languages, in order, in one folder."""
    patch.chdir(folder)
    script = types.ModuleType("__main__")
    patch.setitem(sys.modules, "__main__", script)  # where pickle looks for a page's classes
    for block in found:
        if block.language not in languages:
            continue
        if block.language == "python":
            # The empty lines before it give tracebacks the page's own line numbers.
            exec(compile("\n" * (block.line - 1) + block.text, path, "exec"), script.__dict__)
        elif block.language == "console":
            for command in commands(block.text):
                prints_what_is_shown(command, f"{path.name}:{block.line}")


def prints_what_is_shown(command: Command, where: str) -> None:
    """Runs a console command with this interpreter and compares its stdout."""
    ran = subprocess.run(
        ["bash", "-c", f'dcafy() {{ "$PYTHON" -m dcafy "$@"; }}\n{command.line}'],
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    context = f"{where}: $ {command.line}\nstdout:\n{ran.stdout}\nstderr:\n{ran.stderr}"
    assert same(command.printed, ran.stdout), context
    assert "Traceback" not in ran.stderr, context


def module(name: str) -> types.ModuleType:
    """A program of ``docs``, as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # where dataclasses look for a module's names
    spec.loader.exec_module(found)
    return found


def needs(markdown: str) -> list[str]:
    """The packages that a page is about, and that dcafy itself does without: ``<!-- needs: lightning -->``."""
    found = re.search(r"^<!-- needs: (.*) -->$", markdown, flags=re.MULTILINE)
    return [] if found is None else found[1].split(", ")


def cells(notebook: Path, **parameters: object) -> str:
    """The code of a notebook, with other values in its cell of parameters."""
    code = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            code.append("".join(cell["source"]))
            if "parameters" in cell["metadata"].get("tags", ()):
                code += [f"{name} = {value!r}" for name, value in parameters.items()]
    return "\n".join(code) + "\n"


# -- links ---------------------------------------------------------------------------------------------------------

_LINK = re.compile(r"(?<!`)\[[^\[\]]*\]\(([^)\s]+)\)")


def anchor(heading: str) -> str:
    """The anchor that a heading has, where such pages are shown."""
    text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = path.read_text(encoding="utf-8")
    included = "".join(part for part in re.findall(r"\{include\} (\S+)", text))
    found = {anchor(heading) for heading in re.findall(r"^#+ (.*)$", prose(text), flags=re.MULTILINE)}
    return found | ({"*"} if included else set())


def dead_links(path: Path) -> list[str]:
    """Links of a page to files, and to headings in them, that are not there."""
    dead = []
    for target in _LINK.findall(prose(path.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, heading = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        if not found.exists() or (heading and found.suffix == ".md" and not {heading, "*"} & anchors(found)):
            dead.append(target)
    return dead
