"""What the tests of runs share."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from two_processes import FACTORY_CODE

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(dcafy_command: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """Run ``dcafy finetune`` in a folder with a factory: arguments -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "finetune_factory.py").write_text(FACTORY_CODE)
    yield functools.partial(dcafy_command, "finetune")
    sys.modules.pop("finetune_factory", None)
