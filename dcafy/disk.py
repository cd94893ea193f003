"""A file that is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dcafy.errors import CheckpointError, UsageError
from dcafy.wording import printable


def replace_file(path: Path, write: Any) -> None:
    """``path`` with what ``write(beside)`` writes, all at once; ``CheckpointError`` where the disk refuses."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(beside)
            umask = os.umask(0)
            os.umask(umask)
            beside.chmod(0o666 & ~umask)  # safetensors makes files for their owner alone
            flush(beside)
            os.replace(beside, path)
            flush(path.parent)
            for killed in path.parent.glob(f".{path.name}.{8 * '[0-9a-f]'}"):  # what a run wrote as it was killed
                killed.unlink(missing_ok=True)
        finally:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{printable(str(path))!r} could not be written: {printable(reason)}. What was there before is whole. Make "
            "room or name another folder, then go on with --resume."
        ) from error


def flush(path: Path) -> None:
    """What was written is on the disk (a folder: its list of names)."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no such thing for folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Callable[[str], None]]:
    """What writes the text that takes the place of ``path``; unless it is called, ``path`` stays as it was.

    A file beside it is opened at once, so that an unwritable output is told before anything is computed;
    ``UsageError`` says why it is.
    """
    if path.is_dir():
        raise UsageError(f"-o {printable(str(path))!r} is a folder. Name a file in it, such as report.html.")
    beside = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}")
    with _unless_refused(path):
        file = beside.open("w", encoding="utf-8")

    def write(text: str) -> None:
        with _unless_refused(path):
            with file:
                file.write(text)
            os.replace(beside, path)

    try:
        yield write
    finally:
        file.close()
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def _unless_refused(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"-o {printable(str(path))!r} cannot be written: {error.strerror or error}. Name a file in a folder "
            "that is there and that you may write to."
        ) from error
