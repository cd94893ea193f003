"""The files on the disk, replaced all at once.

A save that is killed at any moment leaves a folder that loads: as it was before, or as it is after. Two
files cannot be replaced in one step, so everything is written into a folder of its own inside first;
moving the new ``dcafy.json`` into place is the step that counts. It names the tensors by their
fingerprint, under which :meth:`Folder.read` finds them also where the last move did not happen::

    out/dcafy.json               old   old   NEW   NEW
    out/model.safetensors        old   old   old   NEW
    out/README.md                old   old    -    NEW
    out/.dcafy-<fingerprint>/          NEW   NEW
                                         |     |
                               what counts   what tidies up
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dcafy.checkpoint.card import CARD, is_ours
from dcafy.checkpoint.description import FILES, Description, described, read
from dcafy.checkpoint.tensors import facts, fingerprint
from dcafy.disk import content, flush, is_file_itself, permitted_as
from dcafy.errors import CheckpointError
from dcafy.wording import printable, quoted, refused

_STAGED = ".dcafy-"
"""How the names of folders begin that hold what is being saved."""

OF_A_RUN = frozenset(
    {"best", "checkpoint.safetensors", "compare.json", "finetune.json", "log.jsonl", "seeds", "tracked"}
)
"""What ``dcafy finetune`` keeps in a folder beside the model."""

BEING_SET_ASIDE, SET_ASIDE = ".replacing-", ".replaced-"
"""How the names of folders begin that hold what a new run replaces, while it is moved there and from then on."""

_LARGEST = 2**24
"""Bytes that ``dcafy.json`` may have; a thousand attention blocks take about one million."""


def set_aside_in(path: Path) -> str:
    """A sentence on what was set aside in the folder for a run that was broken off; empty where nothing was."""
    with contextlib.suppress(OSError, ValueError):
        if any(any(place.iterdir()) for way in (BEING_SET_ASIDE, SET_ASIDE) for place in path.glob(f"{way}*")):
            folder = printable(str(path))
            return (
                f" What was in it was set aside for a run that was broken off: dcafy finetune {folder} --resume puts "
                "it back, or goes on with that run where it has begun."
            )
    return ""


class Folder:
    """A folder that :func:`dcafy.save` wrote, or is going to write."""

    def __init__(self, path: str | os.PathLike[str], named: str | None = None) -> None:
        self.path = Path(path)
        self.named = str(path) if named is None else named
        self.marker = self.path / MARKER

    def __str__(self) -> str:
        return quoted(self.named, 200)

    # -- writing -----------------------------------------------------------------------------------------

    def require_replaceable(self) -> None:
        """Nothing where a model may be saved here; ``CheckpointError`` where that would mix with other things."""
        if os.path.exists(self.path) and not os.path.isdir(self.path):
            raise CheckpointError(f"{self} is a file. Name a folder to save into.")
        with self._unless_refused("read"):
            names = sorted(entry.name for entry in self.path.iterdir()) if os.path.exists(self.path) else []
        others = [name for name in names if not name.startswith(".") and name not in OF_A_RUN]
        if others and MARKER not in others:
            shown = ", ".join(map(printable, others[:3])) + (", ..." if len(others) > 3 else "")
            raise CheckpointError(
                f"{self} holds other things ({shown}) and no {MARKER}. Name a new or empty folder, such as "
                f"{printable(str(self.path / 'connected'))!r}."
            )

    def replace(self, description: Description, tensors: dict[str, Tensor], card: str) -> None:
        """Makes this the content of the folder; whatever goes wrong, a model that was in it is still whole.

        ``card``: takes the place of a card that dcafy wrote. No card ever tells of another model than the one beside
        it: the old one goes before the new model counts.
        """
        self.require_replaceable()
        with self._unless_refused("written"):
            self.path.mkdir(parents=True, exist_ok=True)
            with self._alone():
                self._tidy_up()
                try:
                    staged = self._stage(description, tensors, card)
                    if is_ours(self.path / CARD):
                        (self.path / CARD).unlink(missing_ok=True)
                    os.replace(staged / MARKER, self.marker)
                    flush(self.path)
                finally:
                    self._tidy_up()

    def _stage(self, description: Description, tensors: dict[str, Tensor], card: str) -> Path:
        """The folder with the new files, safely on the disk; it has its name from when it is complete."""
        unfinished = self.path / f"{_STAGED}new-{secrets.token_hex(8)}"
        unfinished.mkdir()
        marker, file = unfinished / MARKER, unfinished / description.weights.file
        old = self.path / file.name
        shown = unfinished / CARD
        for path, text in ((marker, described(description)), (shown, card)):
            with permitted_as(self.marker, path):
                path.write_text(text, encoding="utf-8")
        with permitted_as(old if is_file_itself(old) else self.marker, file):
            save_file(tensors, file, metadata={"format": "pt"})
        for path in (marker, file, shown, unfinished):
            flush(path)
        staged = self._staging(description.weights.sha256)
        os.replace(unfinished, staged)
        flush(self.path)
        return staged

    def _staging(self, sha256: str) -> Path:
        return self.path / f"{_STAGED}{sha256[:32]}"

    def _staged(self, sha256: str, file: str) -> Path | None:
        """The tensors that a killed save left to be moved into place; a link would take them out of another folder."""
        folder = self._staging(sha256)
        return folder / file if not folder.is_symlink() and is_file_itself(folder / file) else None

    def _tidy_up(self) -> None:
        """Moves tensors that count into their place, and removes what does not count."""
        current = self._current()
        if current is not None:
            sha256, file = current
            staged = self._staged(sha256, file)
            if staged is not None:
                os.replace(staged, self.path / file)
            card = self._staged(sha256, CARD)
            if card is not None and is_ours(self.path / CARD):
                os.replace(card, self.path / CARD)
            for other in set(FILES.values()) - {file}:
                (self.path / other).unlink(missing_ok=True)
        for leftover in self.path.glob(f"{_STAGED}*"):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        flush(self.path)

    def _current(self) -> tuple[str, str] | None:
        """(fingerprint, file) of the tensors that the present ``dcafy.json`` names; ``None`` where it is no good."""
        try:
            weights = read(self._text(), str(self.marker)).weights
        except CheckpointError:
            return None
        return weights.sha256, weights.file

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside it no other process saves into this folder (as all ranks of a training run may try to)."""
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    # -- reading -----------------------------------------------------------------------------------------

    def read(self) -> tuple[Description, dict[str, Tensor]]:
        """What the folder says and holds; ``CheckpointError`` where it is damaged or was not written by dcafy."""
        while True:
            stamp, text = self._stamp(), self._text()
            description = read(text, os.path.join(self.named, MARKER))
            try:
                return description, self._tensors(description)
            except CheckpointError:
                # Others may have saved between the two reads, and the last of them the very model that was here.
                if self._stamp() == stamp:
                    raise

    def _shown(self, path: Path) -> str:
        """What messages call a file in the folder."""
        return quoted(os.path.join(self.named, path.name), 200)

    def _stamp(self) -> tuple[int, int] | None:
        """What every save changes: which file the marker is."""
        with contextlib.suppress(OSError, ValueError):
            found = self.marker.stat()
            return found.st_ino, found.st_mtime_ns
        return None

    def _text(self) -> bytes:
        if not os.path.isdir(self.path):
            what = "is not a folder" if os.path.exists(self.path) else "does not exist"
            raise CheckpointError(f"{self} {what}. Name a folder that dcafy.save wrote.")
        if not os.path.lexists(self.marker):
            hint = set_aside_in(self.path)
            raise CheckpointError(f"{self} has no {MARKER}: dcafy.save did not write it, or did not finish.{hint}")
        try:
            return content(self.marker, _LARGEST)
        except OSError as error:
            raise CheckpointError(f"{self._shown(self.marker)} could not be read: {refused(error)}.") from error

    def _tensors(self, description: Description) -> dict[str, Tensor]:
        weights = description.weights
        for path in (self._staged(weights.sha256, weights.file), self.path / weights.file):
            if path is not None and os.path.isfile(path):
                with contextlib.suppress(FileNotFoundError):  # moved into its place just now
                    return self._tensors_in(path, weights.sha256)
        hint = set_aside_in(self.path) or " Copy the folder again."
        raise CheckpointError(f"{self} has no {weights.file}, which its {MARKER} names.{hint}")

    def _tensors_in(self, path: Path, sha256: str) -> dict[str, Tensor]:
        try:
            tensors = load_file(path)
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{self._shown(path)} is damaged or truncated ({refused(error)}). Copy the folder again."
            ) from error
        if fingerprint({key: facts(value) for key, value in tensors.items()}) != sha256:
            raise CheckpointError(
                f"{self._shown(path)} holds other tensors than {MARKER} describes: one of the two was damaged or "
                "replaced. Copy the folder again, or save the model again."
            )
        return tensors

    @contextlib.contextmanager
    def _unless_refused(self, verb: str) -> Iterator[None]:
        """Inside it what the file system refuses becomes a ``CheckpointError``."""
        try:
            yield
        except (OSError, SafetensorError, ValueError, RecursionError) as error:  # a NUL in the path; a deep folder
            raise CheckpointError(f"{self} could not be {verb}: {refused(error)}.") from error


MARKER = "dcafy.json"
"""The file that makes a folder one of ``dcafy.save``'s."""
