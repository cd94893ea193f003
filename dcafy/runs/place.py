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
from dcafy.checkpoint.folder import BEING_SET_ASIDE, MARKER, OF_A_RUN, SET_ASIDE
from dcafy.errors import CheckpointError, UsageError
from dcafy.runs.request import REQUEST
from dcafy.training.checkpoint import CHECKPOINT
from dcafy.wording import printable, quoted, refused

_OF_A_MODEL = frozenset({MARKER, *FILES.values()})
"""What :func:`dcafy.save` writes into a folder, and may be taken out of it; of a run, what a run keeps besides."""


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
    for leftover in _set_aside_in(directory):
        with contextlib.suppress(OSError):  # it is in nobody's way
            if leftover.is_symlink() or not leftover.is_dir():
                leftover.unlink()
            else:
                shutil.rmtree(leftover)


def was_broken_off(directory: Path) -> bool:
    """Whether what was in the folder was set aside for a run that was killed before it had begun."""
    return _to_put_back(directory) is not None


def put_back(directory: Path) -> None:
    """Gives the folder back what was set aside for a run that was killed before it had begun."""
    aside = _to_put_back(directory)
    if aside is not None:
        try:
            _put_back(directory, aside)
        except OSError as error:
            raise CheckpointError(
                f"What was in {quoted(str(directory), 200)} lies in {printable(aside.name)} there and cannot be put "
                f"back: {refused(error)}."
            ) from error


def _to_put_back(directory: Path) -> Path | None:
    """The folder whose content belongs back: it was on its way there, or lies there and no new run has begun.

    Where somebody has saved into the folder since, it stays where it is.
    """
    begun = os.path.lexists(directory / REQUEST)
    for aside in _set_aside_in(directory):
        if aside.is_symlink() or not aside.is_dir() or (begun and aside.name.startswith(SET_ASIDE)):
            continue
        own = _moved(aside)
        if own and not any(os.path.lexists(directory / path.name) for path in own):
            return aside
    return None


def _set_aside_in(directory: Path) -> list[Path]:
    return [path for way in (BEING_SET_ASIDE, SET_ASIDE) for path in sorted(directory.glob(f"{way}*"))]


def _set_aside(directory: Path) -> Path | None:
    """The folder inside ``directory`` in which its content is now; ``None`` where there was none.

    It has its name from when all is in it: killed before that, what was moved belongs back.
    """
    own = _own(directory)
    if not own:
        return None
    token = secrets.token_hex(4)
    moving, aside = directory / f"{BEING_SET_ASIDE}{token}", directory / f"{SET_ASIDE}{token}"
    try:
        moving.mkdir()
        for path in own:
            os.rename(path, moving / path.name)
        os.rename(moving, aside)
    except OSError as error:
        _put_back(directory, moving)
        raise CheckpointError(
            f"The run in {quoted(str(directory), 200)} cannot be replaced: {refused(error)}. Name another folder."
        ) from error
    return aside


def _own(directory: Path) -> list[Path]:
    """What dcafy has written into the folder, what a save that was killed has left for later included."""
    names = [entry.name for entry in directory.iterdir()] if directory.is_dir() else []
    found = _ours_among(names, directory).union(name for name in names if name.startswith(".dcafy-"))
    return [directory / name for name in sorted(found, key=lambda name: name == REQUEST)]  # which says whose they are


def _moved(aside: Path) -> list[Path]:
    """What was set aside, of a run whose request is not among it as well."""
    names = [entry.name for entry in aside.iterdir()] if aside.is_dir() else []
    return [aside / name for name in names if name in _OF_A_MODEL | OF_A_RUN | {CARD} or name.startswith(".dcafy-")]


def _put_back(directory: Path, aside: Path) -> None:
    if aside.name.startswith(SET_ASIDE):
        moving = aside.with_name(BEING_SET_ASIDE + aside.name.removeprefix(SET_ASIDE))
        os.rename(aside, moving)  # killed on the way, the rest belongs back as well
        aside = moving
    for path in _moved(aside):
        os.rename(path, directory / path.name)
    with contextlib.suppress(OSError):
        aside.rmdir()


def _has_a_checkpoint(directory: Path) -> bool:
    return any(True for pattern in (CHECKPOINT, f"seeds/*/{CHECKPOINT}") for _ in directory.glob(pattern))
