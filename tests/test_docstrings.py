"""The examples in the docstrings are true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import dcafy

MODULES = sorted(
    info.name for info in pkgutil.walk_packages(dcafy.__path__, "dcafy.") if not info.name.endswith("__main__")
)


def test_all_modules_are_looked_at() -> None:
    assert {"dcafy.conversion", "dcafy.trace.fold", "dcafy.attention.se"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
