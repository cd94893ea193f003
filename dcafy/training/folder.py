"""The folder of a run: one training at a time has it, and a killed one leaves it free."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from dcafy.errors import CheckpointError, UsageError
from dcafy.wording import quoted, refused, warn

LOCK = ".training"
"""The name of the file that is locked; it goes when the training does."""


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Inside it nobody else trains in ``directory``, which is made where there is none; it may be entered again.

    ``UsageError`` says at once that somebody else does, in another process or thread, and nothing is touched;
    ``CheckpointError`` that the folder cannot be written to.
    """
    me = os.getpid(), threading.get_ident()
    try:
        key = os.path.realpath(directory)
    except (OSError, ValueError):  # a NUL: the system says below that it is no path
        key = str(directory)
    with _REGISTER:
        holder = _HOLDERS.get(key)
        if holder is not None and holder[0] == me[0] and holder != me:
            raise _taken(directory)
        again = holder == me
        if not again:
            made, handle = _locked(directory)
            _HOLDERS[key] = me
    try:
        yield
    finally:
        if not again:
            with _REGISTER:
                del _HOLDERS[key]
                _give_up(directory, handle, made)


_REGISTER = threading.Lock()
_HOLDERS: dict[str, tuple[int, int]] = {}
"""Folder -> the process and thread that have it: the system's locks are those of a process."""


def _taken(directory: Path) -> UsageError:
    return UsageError(
        f"Another process trains in {quoted(str(directory), 200)}. Wait until it has ended, stop it, or name another "
        "folder."
    )


def _locked(directory: Path) -> tuple[list[Path], int | None]:
    """The folders that were made, and the open file that is locked; ``None`` where the file system has no locks."""
    missing = [folder for folder in (directory, *directory.parents) if not os.path.lexists(folder)]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | _CAREFUL, 0o666)
            try:
                if not stat.S_ISREG(os.fstat(handle).st_mode):
                    raise OSError(errno.EINVAL, f"its {LOCK} is no regular file")
                if not _lock(handle):
                    raise _taken(directory)
                if os.path.exists(directory / LOCK) and os.path.samestat(os.fstat(handle), os.stat(directory / LOCK)):
                    return missing, handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)  # another training has ended in between, and its file is gone
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        number = getattr(error, "errno", None)
        if number in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            warn(f"{quoted(str(directory), 200)} cannot be locked: {refused(error)}. Let nobody else train in it.")
            return missing, None
        raise CheckpointError(
            f"{quoted(str(directory), 200)} cannot be a folder for a run: {refused(error)}. Name another one."
        ) from error


_CAREFUL = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


def _lock(handle: int) -> bool:
    """Locks the file for this process, unless another has: not for those that it forks, which may outlive it."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def _give_up(directory: Path, handle: int | None, made: list[Path]) -> None:
    with contextlib.suppress(OSError):
        os.unlink(directory / LOCK)
    if handle is not None:
        os.close(handle)
    for folder in made:  # which stay where anything is in them
        with contextlib.suppress(OSError):
            folder.rmdir()
