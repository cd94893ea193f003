"""Files: what takes another's place is there whole or not at all, and what somebody else wrote is read warily."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from dcafy.errors import CheckpointError, UsageError
from dcafy.wording import quoted, refused

# --- reading --------------------------------------------------------------------------------------------


def regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """The regular file at ``path``, opened to be read; ``OSError`` for anything else, which is not even opened.

    Reading a pipe waits for ever, and opening a device can do anything. A link is followed to what it names.
    """
    try:
        _require_regular(os.stat(path))
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        handle = os.open(path, flags)
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, "it is no name of a file") from error
    try:
        _require_regular(os.fstat(handle))  # whatever it was a moment ago
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _require_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")


def content(path: str | os.PathLike[str], most: int) -> bytes:
    """All of the regular file at ``path``; ``OSError`` where it has more than ``most`` bytes, or is none."""
    with regular(path) as file:
        read = file.read(most + 1)
    if len(read) > most:
        raise OSError(errno.EFBIG, f"it is too large: more than {most:,} bytes")
    return read


# --- writing --------------------------------------------------------------------------------------------


_GO_ON = "Make room or name another folder, then go on with --resume."


def replace_file(path: Path, write: Any, *, then: str = _GO_ON) -> None:
    """``path`` with what ``write(beside)`` writes, all at once; ``CheckpointError`` where the disk refuses.

    ``then``: what the message says to do next.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _staged(path) as beside:
            write(beside)
    except (OSError, SafetensorError, ValueError) as error:  # ValueError: a NUL in the path
        raise CheckpointError(
            f"{quoted(str(path), 200)} could not be written: {refused(error)}. What was there before is whole. {then}"
        ) from error


@contextlib.contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """Where to write what takes the place of ``path`` at the end, with its permissions."""
    with _beside(path) as folder:
        staged = folder / path.name
        with permitted_as(path, staged):
            yield staged
            flush(staged)
        os.replace(staged, path)
        flush(path.parent)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A folder for its owner alone beside ``path``, which is gone afterwards, as are those of runs that were killed.

    A folder, since safetensors itself first writes under a name of its own.
    """
    prefix = f".{path.name[:100]}."
    made = path.with_name(prefix + secrets.token_hex(4))
    made.mkdir(mode=0o700)
    try:
        with _locked(made):
            for entry in os.listdir(path.parent):
                suffix = entry.removeprefix(prefix)
                if entry != made.name and len(suffix) == 8 and not set(suffix) - set("0123456789abcdef"):
                    _remove_unused(path.parent / entry)
            yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _remove_unused(leftover: Path) -> None:
    """Removes what a run left as it was killed; what another is still writing stays."""
    with contextlib.suppress(OSError, RecursionError):
        if not stat.S_ISDIR(leftover.lstat().st_mode):
            leftover.unlink()
            return
        with _locked(leftover) as mine:
            if mine:
                shutil.rmtree(leftover)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether the folder is this one's alone while it is inside; the lock ends with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield True
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        except OSError:  # a file system without locks
            yield True
        else:
            yield True
    finally:
        os.close(handle)


@contextlib.contextmanager
def permitted_as(old: Path, new: Path) -> Iterator[None]:
    """Inside it the file ``new`` is written; then it has the owner, group and permissions of the file ``old``.

    Where there is no such file (a link is none), it has those that new files have in that place.
    """
    found = _file_at(old)
    mode = 0o666 if found is None else stat.S_IMODE(found.st_mode) & 0o777
    handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode | 0o600)
    fresh = os.fstat(handle)
    os.close(handle)
    yield
    if found is not None and hasattr(os, "chown") and (found.st_uid, found.st_gid) != (fresh.st_uid, fresh.st_gid):
        with contextlib.suppress(OSError):  # only root may give files away
            os.chown(new, found.st_uid, found.st_gid)
    new.chmod(stat.S_IMODE(fresh.st_mode) if found is None else mode)  # safetensors makes files for their owner alone


def is_file_itself(path: Path) -> bool:
    """Whether there is a regular file at ``path``, and not a link to one."""
    return _file_at(path) is not None


def _file_at(path: Path) -> os.stat_result | None:
    with contextlib.suppress(OSError, ValueError):
        found = path.lstat()
        return found if stat.S_ISREG(found.st_mode) else None
    return None


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

    A place beside it is made at once, so that an unwritable output is told before anything is computed;
    ``UsageError`` says why it is.
    """
    if os.path.isdir(path):
        raise UsageError(f"-o {quoted(str(path), 200)} is a folder. Name a file in it, such as report.html.")
    with contextlib.ExitStack() as stack:
        with _unless_refused(path):
            if os.path.lexists(path):
                _require_regular(os.stat(path))  # root could put a file in the place of /dev/null
            beside = stack.enter_context(_beside(path)) / path.name

        def write(text: str) -> None:
            with _unless_refused(path):
                with permitted_as(path, beside):
                    beside.write_text(text, encoding="utf-8")
                os.replace(beside, path)

        yield write


@contextlib.contextmanager
def _unless_refused(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise UsageError(
            f"-o {quoted(str(path), 200)} cannot be written: {refused(error)}. Name a file in a folder that is there "
            "and that you may write to."
        ) from error
