"""The examples in the docstrings are true."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

import dcafy

ROOT = Path(dcafy.__file__).parent
PROMPT = re.compile(r"^\s*>>> ", re.MULTILINE)


def module_name(path: Path) -> str:
    return ".".join(("dcafy", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_name(path): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}
WITH_EXAMPLES = [name for name, text in MODULES.items() if PROMPT.search(text)]
"""Those in whose source a prompt stands; the others have nothing to run."""


def test_all_modules_are_looked_at() -> None:
    assert {"dcafy", "dcafy.conversion", "dcafy.trace.fold", "dcafy.attention.se", "dcafy.cli.app"} <= MODULES.keys()
    assert {"dcafy.conversion", "dcafy.attention.se"} <= set(WITH_EXAMPLES)
    for name in MODULES.keys() - {"dcafy.__main__"}:
        importlib.import_module(name)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_docstring_examples(name: str) -> None:
    ran = doctest.testmod(importlib.import_module(name))
    assert ran.attempted > 0, "no docstring of its own holds the prompt in its source"
    assert ran.failed == 0
