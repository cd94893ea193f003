"""Options and fixtures that several test files use."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-golden",
        action="store_true",
        help="write what the tests see into tests/golden instead of comparing it; then read the difference",
    )


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """New networks have the same weights in every run, whatever ran before in this worker."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have exported how wide his terminal is."""
    monkeypatch.delenv("COLUMNS", raising=False)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dcafy_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run the ``dcafy`` command in this process: arguments -> exit code, stdout, stderr."""
    from dcafy.cli import main

    log = logging.getLogger("dcafy")
    before = log.handlers, log.propagate, log.level

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dcafy", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    yield run
    log.handlers, log.propagate = before[:2]
    log.setLevel(before[2])


_PADS_MORE = tuple(map(int, version("rich").split(".")[:2])) < (14, 3)
"""Whether rich puts one space more before the last column, as it did until then."""


def _in_words(text: str) -> str:
    return "\n".join(" ".join(line.replace("─", "").split()) for line in text.splitlines())


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with ``tests/golden/NAME``; ``pytest --rewrite-golden`` writes the file instead."""
    rewrite = request.config.getoption("--rewrite-golden")

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if rewrite:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        assert path.exists(), f"{path} is missing: make it with pytest --rewrite-golden"
        expected = path.read_text(encoding="utf-8")
        if _PADS_MORE:
            text, expected = _in_words(text), _in_words(expected)
        assert text == expected, "if that is meant: pytest --rewrite-golden"

    return compare
