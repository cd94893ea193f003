"""Why something failed, in one line, and in which line of the user's code."""

from __future__ import annotations

import textwrap
import traceback
from pathlib import PurePath

__all__ = ["one_line"]


def one_line(error: BaseException) -> str:
    """One line: what went wrong, and in which line of the user's code."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_machinery(f.filename)]
    text = textwrap.shorten(str(error), 160, placeholder=" ...")
    where = f" ({PurePath(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""
    return f"{type(error).__name__}: {text or 'no message'}{where}"


def _is_machinery(filename: str) -> bool:
    path = filename.replace("\\", "/")
    return any(part in path for part in ("/torch/", "/dcafy/trace/")) or path.startswith("<")
