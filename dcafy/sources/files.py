"""Files: what one is, told by its first bytes and never by its name, and what it holds."""

from __future__ import annotations

import logging
import pickle
import shlex
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from dcafy.errors import SourceError
from dcafy.sources.archives import Archive, allowance, read_legacy, read_zip, records_of
from dcafy.sources.insides import Odd, fill
from dcafy.sources.options import FileOptions
from dcafy.sources.pickles import Damaged, TooLarge
from dcafy.wording import few, short
from dcafy.zoos.factories import working_folder_importable

log = logging.getLogger(__name__)


_SAVE_AGAIN = "save model.state_dict() with torch.save or safetensors, and open that with --arch"


@dataclass(frozen=True)
class NamedFile:
    """A file to open, and what the user said about it.

    ``spec`` is what the user wrote, for the messages; ``options`` how he wants it opened.
    """

    path: Path
    spec: str
    options: FileOptions

    @property
    def accepting(self) -> str:
        """The command that accepts the risk of opening this pickle."""
        given = {"--arch": self.options.arch, "--prefix": self.options.prefix}
        also = "".join(f" {option} {shlex.quote(value)}" for option, value in given.items() if value)
        return f"dcafy inspect {shlex.quote(self.spec)}{also} --trust-pickle"

    def error(self, what: str) -> SourceError:
        """``SourceError`` that says something about this file."""
        return SourceError(f"{short(repr(self.spec), 200)} {what}")


def read_object(path: Path, spec: str, options: FileOptions) -> Any:
    """What the file holds: a network, a state dict, or whatever else was saved.

    ``SourceError`` says in one line why a file cannot be opened. No code of the file's choosing runs
    unless ``options.trust_pickle`` is set.
    """
    named = NamedFile(path, spec, options)
    if not path.is_file():
        raise named.error("is not a regular file.")
    try:
        with path.open("rb") as file:
            opener = _opener(named, file)
            file.seek(0)
            return opener(named, file)
    except Damaged as error:
        raise named.error(f"is truncated or damaged ({short(str(error))}): copy or download it again.") from error
    except TooLarge as error:
        raise named.error(
            f"{error}: dcafy reads no further. If you know that it is meant to be like that, add --any-size."
        ) from error
    except Odd as error:
        raise named.error(
            f"holds a network with odd insides: {error}. Save it anew, or better: {_SAVE_AGAIN}."
        ) from error
    except OSError as error:
        raise named.error(f"could not be read ({short(str(error))}).") from error


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

_USUAL_HEADER = 5_000_000
"""Bytes that it has for the weights of a network, 50,000 tensors and more."""


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

    if int.from_bytes(file.read(8), "little") > _USUAL_HEADER and not named.options.any_size:
        raise TooLarge("has a header of more tensors than any network has")
    try:
        return load_file(str(named.path))
    except (MemoryError, RuntimeError) as error:  # a file that may not be mapped, or more than there is memory for
        raise named.error(f"could not be read into memory ({short(str(error))}).") from error
    except SafetensorError as error:
        raise named.error(f"is a truncated or damaged safetensors file ({short(str(error))}).") from error
    except (LookupError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise named.error(
            "is a truncated or damaged safetensors file (with a tensor of a shape or type that PyTorch does not have)."
        ) from error


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
    records = records_of(file)
    for record, meaning in _ARCHIVES:
        if record in records:
            raise named.error(meaning)
    if "data.pkl" not in records:
        raise named.error("is a zip archive that torch.save did not write.")
    if named.options.trust_pickle:
        return _trusted(named)
    return _content(named, read_zip(file, records, allowance(file, named.options.any_size)))


def _open_legacy(named: NamedFile, file: IO[bytes]) -> Any:
    """A file as torch.save wrote them before PyTorch 1.6: pickles one after the other."""
    opened = read_legacy(file, allowance(file, named.options.any_size))
    if opened is None:
        raise named.error("is a Python pickle that torch.save did not write: " + _SAVE_AGAIN + ".")
    return _trusted(named) if named.options.trust_pickle else _content(named, opened)


def _open_tar(named: NamedFile, file: IO[bytes]) -> Any:
    if named.options.trust_pickle:
        return _trusted(named)
    raise named.error(
        "is a tar archive. If torch.save wrote it (before PyTorch 0.1.10), it can only be opened by running what it "
        f"says; if you trust where it comes from, accept the risk: {named.accepting}"
    )


# --- what was opened --------------------------------------------------------------------------------


def _content(named: NamedFile, opened: Archive) -> Any:
    """What the file holds; ``SourceError`` where it asks for more than data and known network classes."""
    if opened.wanted:
        asked = few([short(name) for name in opened.wanted], 12)
        raise named.error(
            f"is a pickle that wants {asked}. Opening it would run code that the file chooses; dcafy opens "
            "only tensors, plain data and the network classes of torch.nn, torchvision and timm. Better, "
            f"{_SAVE_AGAIN}. If you trust where the file comes from, accept the risk: {named.accepting}"
        )
    fill(opened.built)
    return opened.content


def _trusted(named: NamedFile) -> Any:
    log.warning("opening %s with --trust-pickle: this runs code that the file chooses", short(named.spec))
    try:
        with working_folder_importable(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(named.path, map_location="cpu", weights_only=False)
    except (Exception, SystemExit) as error:
        if isinstance(error, AttributeError) and "__main__" in str(error):
            raise named.error(
                f"was saved by a script whose classes stand in the script itself (__main__: {short(str(error), 200)}), "
                f"where no other program finds them. There, {_SAVE_AGAIN} script.py:Network, a class or a function "
                "that builds the network."
            ) from error
        raise named.error(
            f"could not be unpickled ({type(error).__name__}: {short(str(error), 400)}). Its classes must be "
            "importable: run from the folder that holds their code."
        ) from error
