"""Where a run is kept: a folder of its own, or that of another one, whose place it takes once it has ended well."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from dcafy.checkpoint.card import CARD, is_ours
from dcafy.checkpoint.description import FILES
from dcafy.checkpoint.folder import MARKER, OF_A_RUN
from dcafy.errors import CheckpointError, UsageError
from dcafy.runs.request import REQUEST
from dcafy.training.checkpoint import CHECKPOINT
from dcafy.wording import printable, quoted, refused

_OF_A_MODEL = frozenset({MARKER, *FILES.values()})
"""What :func:`dcafy.save` writes into a folder, and may be taken out of it; of a run, what a run keeps besides."""

_ASIDE = ".replaced-"
"""How the names of folders begin in which the run lies that another one replaces."""


def require_place(directory: Path, *, overwrite: bool = False, uses: Iterable[str | None] = ()) -> None:
    """Nothing where a run may begin; ``UsageError`` or ``CheckpointError`` says why it may not.

    A folder that is new or empty will do; with ``overwrite`` also one that has a run or a model in it and nothing
    else. ``uses``: what the run reads (a model, a backbone): it may not lie in the folder that is replaced.
    """
    shown = quoted(str(directory), 200)
    try:
        names = sorted(entry.name for entry in directory.iterdir()) if os.path.exists(directory) else []
    except OSError as error:
        raise CheckpointError(f"{shown} cannot be a folder for a run: {error.strerror}.") from error
    names = [name for name in names if not name.startswith(".")]
    others = sorted(set(names) - _ours_among(names, directory))
    if others:
        raise CheckpointError(
            f"{shown} holds other things ({printable(', '.join(others[:3]))}). Name a new or empty folder."
        )
    if not names:
        return
    if not overwrite:
        if REQUEST not in names:
            raise UsageError(
                f"There is a model in {shown} already. Name another folder, or add --overwrite to replace it."
            )
        raise UsageError(
            f"There is a run in {shown} already. Go on with it: dcafy finetune {printable(str(directory))} --resume. "
            "Train it further: --epochs MORE in the place of --resume. Or name another folder, or add --overwrite to "
            "replace it."
        )
    for path in uses:
        if path is not None and os.path.exists(path) and _lies_in(path, directory):
            raise UsageError(
                f"{quoted(path, 200)} lies in {shown}, which --overwrite replaces, and the run needs it until it has "
                "ended. Name another folder."
            )


def _ours_among(names: Iterable[str], directory: Path) -> set[str]:
    """Those of the names in a folder that are of a model or a run, which only its request makes one.

    A card that somebody has written on is his.
    """
    found = set(names)
    card = {CARD} if is_ours(directory / CARD) else set()
    return found & (_OF_A_MODEL | card | (OF_A_RUN if REQUEST in found else frozenset()))


def _lies_in(path: str, directory: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory))


@contextlib.contextmanager
def in_place_of_another(directory: Path) -> Iterator[None]:
    """Inside it the folder is free for a new run. What was there is gone once that has ended well.

    It is back at once where the new run ends before it has saved where it stands; where it was broken off later, it
    lies in a hidden folder inside until the new one, which can be gone on with, has ended.
    """
    aside = _set_aside(directory)
    try:
        yield
    except BaseException:
        if aside is not None and not _has_a_checkpoint(directory):
            for path in _own(directory):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            _put_back(directory, aside)
        raise
    let_go(directory)


def let_go(directory: Path) -> None:
    """Removes what was set aside for the run in this folder."""
    for leftover in directory.glob(f"{_ASIDE}*"):
        with contextlib.suppress(OSError):  # it is in nobody's way
            if leftover.is_symlink() or not leftover.is_dir():
                leftover.unlink()
            else:
                shutil.rmtree(leftover)


def _set_aside(directory: Path) -> Path | None:
    """The folder inside ``directory`` in which its content is now; ``None`` where there was none."""
    own = _own(directory)
    if not own:
        return None
    aside = directory / f"{_ASIDE}{secrets.token_hex(4)}"
    try:
        aside.mkdir()
        for path in own:
            os.rename(path, aside / path.name)
    except OSError as error:
        _put_back(directory, aside)
        raise CheckpointError(
            f"The run in {quoted(str(directory), 200)} cannot be replaced: {refused(error)}. Name another folder."
        ) from error
    return aside


def _own(directory: Path) -> list[Path]:
    """What dcafy has written into the folder, what a save that was killed has left for later included."""
    names = [entry.name for entry in directory.iterdir()] if directory.is_dir() else []
    found = _ours_among(names, directory).union(name for name in names if name.startswith(".dcafy-"))
    return [directory / name for name in sorted(found, key=lambda name: name == REQUEST)]  # which says whose they are


def _put_back(directory: Path, aside: Path) -> None:
    for path in list(aside.iterdir()) if aside.is_dir() else ():
        os.rename(path, directory / path.name)
    with contextlib.suppress(OSError):
        aside.rmdir()


def _has_a_checkpoint(directory: Path) -> bool:
    return any(True for pattern in (CHECKPOINT, f"seeds/*/{CHECKPOINT}") for _ in directory.glob(pattern))
