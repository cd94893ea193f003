"""How messages write names, counts, reasons, the nearest right word, and what is not installed."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from dcafy.errors import UsageError
from dcafy.text import printable as printable
from dcafy.text import short as short


def quoted(name: str, most: int = 60) -> str:
    """``name`` in quotes, as :func:`short` has it.

    >>> quoted("a b")
    "'a b'"
    """
    return f"'{short(name, most)}'"


def shown(value: object, most: int = 100) -> str:
    """The ``repr`` of a value as :func:`short` has it.

    >>> shown([1, "a"])
    "[1, 'a']"
    """
    try:
        return short(repr(value), most)
    except Exception:  # a number of thousands of digits, or what the user's class makes of it
        return f"a {type(value).__name__} that cannot be shown"


def counted(number: int, noun: str) -> str:
    """``1 block``, ``2 blocks``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def nearest(name: str, known: tuple[str, ...] | list[str]) -> str:
    """`` Did you mean 'x'?`` for the known name most like ``name``, in whatever case; empty where none is.

    >>> nearest("adamv", ("adamw", "sgd")), nearest("SE", ("se", "ge"))
    (" Did you mean 'adamw'?", " Did you mean 'se'?")
    """
    cases = {word.lower(): word for word in reversed(known)}
    found = difflib.get_close_matches(name, known, n=1) or difflib.get_close_matches(name.lower(), list(cases), n=1)
    return f" Did you mean {cases.get(found[0].lower(), found[0])!r}?" if found else ""


def warn(message: str) -> None:
    """Warns the user, at the line of his own code that called into the package."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and Path(frame.f_code.co_filename).is_relative_to(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


_PACKAGE = Path(__file__).parent


def few(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@contextlib.contextmanager
def needing(what: str, extra: str, libraries: str = "") -> Iterator[None]:
    """Inside it a library that is not installed becomes a ``UsageError``: ``what`` needs it, and ``extra`` brings it.

    ``libraries``: what messages call it; by default the name of the module that is missing.
    """
    try:
        yield
    except ImportError as error:
        if not libraries and not isinstance(error, ModuleNotFoundError):
            raise
        needed = libraries or f"{error.name}, which is not installed"
        raise UsageError(f"{what} needs {needed}: pip install 'dcafy[{extra}]'{'.' if libraries else ''}") from error


EXTRAS = {
    "train": ("accelerate",),
    "detection": ("accelerate", "torchmetrics", "pycocotools"),
    "report": ("matplotlib", "jinja2", "markupsafe", "captum"),
}
"""What whole commands need -> the modules that the extra brings."""


def require_extra(what: str, extra: str) -> None:
    """Nothing where all that ``extra`` brings is installed, which is not imported; else ``UsageError`` at once."""
    missing = [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UsageError(f"{what} needs {', '.join(missing)}, which {verb} not installed: pip install 'dcafy[{extra}]'")


def one_line(error: BaseException) -> str:
    """An error's message, short and on one line."""
    text = " ".join(str(error).split())
    return (text[:400] + " ..." if len(text) > 400 else text) or "no message"


def refused(error: Exception) -> str:
    """Why a file could not be read or written, in the words of the system or of a library."""
    return printable((error.strerror if isinstance(error, OSError) else None) or one_line(error)[:200])


def reason_of(error: BaseException) -> str:
    """One line: what went wrong, and in which line of the user's code."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_machinery(f.filename)]
    text = textwrap.shorten(str(error), 160, placeholder=" ...")
    where = f" ({PurePath(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""
    if type(error).__name__ == "TraceError":  # in dcafy's own words
        return f"{text}{where}"
    if any(word in str(error) for word in _OF_RECORDING):  # which the user's code would never meet
        return f"dcafy cannot follow it without data{where}"
    return f"{type(error).__name__}: {text or 'no message'}{where}"


_OF_RECORDING = ("meta tensor", "device meta", "Proxy", "proxy", "argument of type")
"""What errors speak of that come from recording a forward, and not from the forward."""


def _is_machinery(filename: str) -> bool:
    path = filename.replace("\\", "/")
    return any(part in path for part in _MACHINERY) or path.startswith("<")


_MACHINERY = ("/torch/", "/dcafy/trace/", "/dcafy/graph/", "/dcafy/threads.py", "/dcafy/draws.py")
