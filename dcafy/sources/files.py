"""Files: what one is, told by its first bytes and never by its name, and what it holds."""

from __future__ import annotations

import io
import itertools
import logging
import pickle
import pickletools
import shlex
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from dcafy.errors import SourceError
from dcafy.sources.pickles import COMPUTED, PickleContents, lent_classes, load_pickled, read_pickle
from dcafy.wording import few, one_line, printable
from dcafy.zoos.factories import working_folder_importable

log = logging.getLogger(__name__)


_SAVE_AGAIN = "save model.state_dict() with torch.save or safetensors, and open that with --arch"


@dataclass(frozen=True)
class NamedFile:
    """A file to open, and what the user said about it.

    ``spec`` and ``arch`` are what the user wrote, for the messages; ``trust`` says that the file may run code.
    """

    path: Path
    spec: str
    arch: str | None
    trust: bool

    @property
    def accepting(self) -> str:
        """The command that accepts the risk of opening this pickle."""
        arch = f" --arch {shlex.quote(self.arch)}" if self.arch else ""
        return f"dcafy inspect {shlex.quote(self.spec)}{arch} --trust-pickle"

    def error(self, what: str) -> SourceError:
        """``SourceError`` that says something about this file."""
        return SourceError(f"{self.spec!r} {what}")


def read_object(path: Path, spec: str, arch: str | None, trust: bool) -> Any:
    """What the file holds: a network, a state dict, or whatever else was saved.

    ``SourceError`` says in one line why a file cannot be opened. No code of the file's choosing runs
    unless ``trust`` is set.
    """
    named = NamedFile(path, spec, arch, trust)
    if not path.is_file():
        raise named.error("is not a regular file.")
    try:
        with path.open("rb") as file:
            opener = _opener(named, file)
            file.seek(0)
            return opener(named, file)
    except OSError as error:
        raise named.error(f"could not be read ({one_line(error)}).") from error


def listing(folder: Path) -> str:
    """The model files in a folder, by name, for a message."""
    known = {".pt", ".pth", ".safetensors", ".bin", ".ckpt"}
    try:
        return ", ".join(sorted(repr(p.name) for p in folder.iterdir() if p.suffix.lower() in known)[:5])
    except OSError:
        return ""


# --- which kind of file -----------------------------------------------------------------------------

_STRANGERS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89HDF\r\n\x1a\n", "is an HDF5 file (Keras?), not a PyTorch model."),
    (0, b"\x1f\x8b", "is compressed with gzip: decompress it first (gunzip)."),
    (0, b"\xfd7zXZ\x00", "is compressed with xz: decompress it first (unxz)."),
    (0, b"7z\xbc\xaf\x27\x1c", "is a 7z archive: unpack it first."),
    (0, b"Rar!", "is a RAR archive: unpack it first."),
    (0, b"\x93NUMPY", "is a NumPy array, not a PyTorch model."),
    (0, b"GGUF", "is a GGUF file, not a PyTorch model."),
    (4, b"TFL3", "is a TensorFlow Lite model, not a PyTorch one."),
    (0, b"version https://git-lfs", "is a Git LFS pointer, not the file itself: fetch it with git lfs pull."),
    (0, b"<!DOCTYPE", "is a web page, not a model: the download went wrong."),
    (0, b"<!doctype", "is a web page, not a model: the download went wrong."),
    (0, b"<html", "is a web page, not a model: the download went wrong."),
)
"""Offset and bytes by which other kinds of files are known, and what to say about them."""

_LONGEST_HEADER = 100_000_000
"""Bytes that the header of a safetensors file may have, by that format's definition."""


def _opener(named: NamedFile, file: IO[bytes]) -> Callable[[NamedFile, IO[bytes]], Any]:
    """The function that opens this kind of file."""
    head = file.read(512)
    if not head:
        raise named.error("is an empty file.")
    for offset, magic, meaning in _STRANGERS:
        if head[offset : offset + len(magic)] == magic:
            raise named.error(meaning)
    if head.startswith(b"PK"):
        return _open_zip
    if head[257:262] == b"ustar":
        return _open_tar
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LONGEST_HEADER:
        return _open_safetensors
    if head.startswith(pickle.PROTO):
        return _open_legacy
    if named.path.suffix.lower() == ".onnx":
        raise named.error("is an ONNX model: dcafy needs the PyTorch network that it was exported from.")
    raise named.error(
        "is not a model file that dcafy knows: it starts neither like a safetensors file nor like one of torch.save."
    )


def _open_safetensors(named: NamedFile, file: IO[bytes]) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(named.path))
    except (SafetensorError, KeyError, ValueError) as error:
        raise named.error(f"is a truncated or damaged safetensors file ({one_line(error)}).") from error


_EXPORTED = f"is a .pt2 archive of torch.export, which holds a finished graph and no network to work on: {_SAVE_AGAIN}."

_ARCHIVES: tuple[tuple[str, str], ...] = (
    (
        "constants.pkl",
        f"is a TorchScript archive, which holds a compiled program and no Python network to work on: {_SAVE_AGAIN}.",
    ),
    ("archive_format", _EXPORTED),
    ("serialized_exported_program.json", _EXPORTED),
    (".data/extern_modules", f"is a torch.package archive, which brings its own code: {_SAVE_AGAIN}."),
)
"""A record by which an archive is known, and what to say about it."""


def _open_zip(named: NamedFile, file: IO[bytes]) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            records = {name.partition("/")[2] or name for name in archive.namelist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise named.error(f"is truncated or damaged ({one_line(error)}): copy or download it again.") from error
    for record, meaning in _ARCHIVES:
        if record in records:
            raise named.error(meaning)
    if "data.pkl" not in records:
        raise named.error("is a zip archive that torch.save did not write.")
    if named.trust:
        return _trusted(named)
    try:
        # torch's own reader and not zipfile's: what is judged must be the very bytes that will be loaded.
        pickled = torch._C.PyTorchFileReader(str(named.path)).get_record("data.pkl")
    except RuntimeError as error:
        raise named.error(f"is truncated or damaged ({one_line(error)}): copy or download it again.") from error
    contents = _read(named, io.BytesIO(pickled), pickles=1)
    return _guarded(named, file, contents)


_PICKLES_IN_A_LEGACY_FILE = 5
"""Magic number, protocol, system, the object, the keys of its storages; raw numbers follow."""


def _open_legacy(named: NamedFile, file: IO[bytes]) -> Any:
    """A file as torch.save wrote them before PyTorch 1.6: pickles one after the other."""
    try:
        first = [argument for _, argument, _ in itertools.islice(pickletools.genops(file), 4)]
    except (ValueError, LookupError) as error:
        raise named.error(f"is truncated or damaged ({one_line(error)}).") from error
    if torch.serialization.MAGIC_NUMBER not in first:
        raise named.error("is a Python pickle that torch.save did not write: " + _SAVE_AGAIN + ".")
    if named.trust:
        return _trusted(named)
    file.seek(0)
    contents = _read(named, file, pickles=_PICKLES_IN_A_LEGACY_FILE)
    classes, wanted = lent_classes(contents)
    # There, a network's classes came wrapped together with their source code, which torch only unwraps unsafely.
    if classes and set(wanted) <= {COMPUTED}:
        raise named.error(
            "is a whole network in the format from before PyTorch 1.6, which can only be opened by running what it "
            f"says. Instead {_SAVE_AGAIN}; or, if you trust where it comes from, accept the risk: {named.accepting}"
        )
    return _guarded(named, file, contents)


def _open_tar(named: NamedFile, file: IO[bytes]) -> Any:
    if named.trust:
        return _trusted(named)
    raise named.error(
        "is a tar archive. If torch.save wrote it (before PyTorch 0.1.10), it can only be opened by running what it "
        f"says; if you trust where it comes from, accept the risk: {named.accepting}"
    )


# --- opening pickles --------------------------------------------------------------------------------


def _read(named: NamedFile, stream: IO[bytes], pickles: int) -> PickleContents:
    try:
        parts = [read_pickle(stream) for _ in range(pickles)]
    except (ValueError, LookupError, UnicodeError, TypeError) as error:
        raise named.error(f"is truncated or damaged ({one_line(error)}).") from error
    return PickleContents(
        frozenset().union(*(part.names for part in parts)),
        frozenset().union(*(part.calls for part in parts)),
        max(part.protocol for part in parts),
    )


def _guarded(named: NamedFile, file: IO[bytes], contents: PickleContents) -> Any:
    """What the file holds, opened without running code of its choosing; ``SourceError`` where that cannot be."""
    classes, wanted = lent_classes(contents)
    if wanted:
        asked = few([printable(name) for name in wanted], 12)
        raise named.error(
            f"is a pickle that wants {asked}. Opening it would run code that the file chooses; dcafy opens "
            "only tensors and the network classes of torch.nn, torchvision and timm. Better, "
            f"{_SAVE_AGAIN}. If you trust where the file comes from, accept the risk: {named.accepting}"
        )
    file.seek(0)
    try:
        return load_pickled(file, classes.items())
    except Exception as error:
        other = f" It is written in pickle protocol {contents.protocol}, torch.save's own is 2."
        hint = other if contents.protocol > 2 else ""
        raise named.error(
            f"could not be opened without running code, it may be damaged ({type(error).__name__}: "
            f"{_first_sentence(error)}).{hint} If you trust where it comes from, accept the risk: {named.accepting}"
        ) from error


def _trusted(named: NamedFile) -> Any:
    log.warning("opening %s with --trust-pickle: this runs code that the file chooses", named.spec)
    try:
        with working_folder_importable(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(named.path, map_location="cpu", weights_only=False)
    except (Exception, SystemExit) as error:
        raise named.error(
            f"could not be unpickled ({type(error).__name__}: {one_line(error)}). Its classes must be importable: "
            "run from the folder that holds their code."
        ) from error


def _first_sentence(error: BaseException) -> str:
    """torch's reason, without its advice to switch the safe reader off."""
    reason = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2]
    return printable(reason.partition(" Please use")[0].partition(". ")[0][:200])
