"""A file that is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from dcafy.errors import UsageError
from dcafy.plan.tables import printable

__all__ = ["replaced"]


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Callable[[str], None]]:
    """What writes the text that takes the place of ``path``; unless it is called, ``path`` stays as it was.

    A file beside it is opened at once, so that an unwritable output is told before anything is computed;
    ``UsageError`` says why it is.
    """
    if path.is_dir():
        raise UsageError(f"-o {printable(str(path))!r} is a folder. Name a file in it, such as report.html.")
    beside = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}")
    try:
        file = beside.open("w", encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from error

    def write(text: str) -> None:
        try:
            with file:
                file.write(text)
            os.replace(beside, path)
        except OSError as error:
            raise _unwritable(path, error) from error

    try:
        yield write
    finally:
        file.close()
        beside.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> UsageError:
    return UsageError(
        f"-o {printable(str(path))!r} cannot be written: {error.strerror or error}. Name a file in a folder "
        "that is there and that you may write to."
    )
