"""A progress bar on stderr, where that is a terminal and nobody asked for quiet."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from dcafy.cli.help import is_quiet


@contextlib.contextmanager
def bar(what: str, total: int, *, shown: bool = True) -> Iterator[Callable[[], None]]:
    """Inside it every call of what it yields is one step of ``total``."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(
        console=console, transient=True, disable=not (shown and console.is_terminal) or is_quiet()
    ) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)
