"""A package's front: its public names, each imported when it is first used (PEP 562)."""

from __future__ import annotations

import importlib
import sys

TYPE_CHECKING = False  # see the package's own file
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


def front(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` of a package; ``homes``: public name -> the module where it lives, by its
    name in the package, or by its whole name.

    So importing the package costs nothing, and reading a name from it no more than what that name needs.
    """

    def getattr_(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = homes[name] if homes[name].startswith("dcafy.") else f"{package}.{homes[name]}"
        import random

        drawn = random.getstate()
        try:
            value = getattr(importlib.import_module(home), name)
        finally:
            random.setstate(drawn)  # importing rich draws
        setattr(sys.modules[package], name, value)
        return value

    return getattr_, lambda: sorted(sys.modules[package].__all__)
