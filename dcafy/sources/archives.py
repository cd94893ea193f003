"""What ``torch.save`` writes: a zip archive; before PyTorch 1.6, pickles one after the other and raw numbers."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import nn

from dcafy.sources.pickles import Allowance, Damaged, Reader
from dcafy.sources.tensors import Tensors, empty, filled
from dcafy.sources.values import known_to

_STEPS = 1_000_000
"""Instructions that pickles may have: some sixty for a tensor, so 15,000 tensors."""

_MEMORY = 64 * 2**20
"""Bytes that opening a file may take beyond four times its size."""


@dataclass(frozen=True)
class Archive:
    """What a file holds.

    ``wanted``  names that it asked for and was not given: what it holds is then not whole
    ``built``   the networks in it, each with what it is to be filled with
    """

    content: Any
    wanted: tuple[str, ...]
    built: tuple[tuple[nn.Module, Any], ...]


def allowance(file: IO[bytes], any_size: bool) -> Allowance:
    """What opening this file may cost."""
    size = os.fstat(file.fileno()).st_size
    return Allowance(float("inf"), float("inf")) if any_size else Allowance(_STEPS, 4 * size + _MEMORY)


# --- zip archives -----------------------------------------------------------------------------------

_UNREADABLE = (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, RuntimeError, OverflowError, zlib.error)


def records_of(file: IO[bytes]) -> dict[str, zipfile.ZipInfo]:
    """The records of a zip archive, by their names without the folder that all lie in; ``Damaged`` where it is not."""
    try:
        with zipfile.ZipFile(file) as archive:
            return {info.filename.partition("/")[2] or info.filename: info for info in archive.infolist()}
    except (*_UNREADABLE, LookupError, OSError) as error:
        raise Damaged(str(error) or type(error).__name__) from error


def read_zip(file: IO[bytes], records: Mapping[str, zipfile.ZipInfo], allowed: Allowance) -> Archive:
    """What the archive holds; ``Damaged`` or ``TooLarge`` where it cannot be read."""
    with zipfile.ZipFile(file) as archive:

        @contextlib.contextmanager
        def record(name: str, size: int | None = None) -> Iterator[IO[bytes]]:
            info = records.get(name)
            if info is None or size not in (None, info.file_size):
                raise Damaged(f"its record {name} is not there, or is of another size")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise Damaged("it is compressed in a way that torch.save does not write")
            allowed.spend(100, info.file_size)
            try:
                with archive.open(info) as stream:
                    yield stream
            except _UNREADABLE as error:
                raise Damaged(str(error) or type(error).__name__) from error

        def storage(key: str, size: int) -> torch.UntypedStorage:
            with record(f"data/{key}", size) as stream:
                memory = empty(size)
                filled(memory, stream.readinto)  # type: ignore[attr-defined]
            return memory

        def read(name: str) -> io.BytesIO:
            with record(name) as stream:
                return io.BytesIO(stream.read())

        swapped = "byteorder" in records and read("byteorder").getvalue() != sys.byteorder.encode()
        tensors = Tensors(storage, allowed, swapped=swapped)
        reader = Reader(known_to(tensors), tensors.persistent, allowed)
        content = reader.read(read("data.pkl"))
        return Archive(content, tuple(sorted(reader.wanted)), tuple(reader.built))


# --- from before PyTorch 1.6 ------------------------------------------------------------------------


def read_legacy(file: IO[bytes], allowed: Allowance) -> Archive | None:
    """What the file holds, ``None`` where it is a pickle of something else; ``Damaged``, ``TooLarge``."""
    pending: dict[str, torch.UntypedStorage] = {}

    def storage(key: str, size: int) -> torch.UntypedStorage:
        if size > os.fstat(file.fileno()).st_size:
            raise Damaged("it ends in the middle of a tensor")
        allowed.spend(100, size)
        pending[key] = empty(size)
        return pending[key]

    tensors = Tensors(storage, allowed, swapped=False)
    reader = Reader(known_to(tensors), tensors.persistent, allowed)
    if reader.read(file) != torch.serialization.MAGIC_NUMBER:
        return None
    reader.read(file)  # the version of the protocol
    system = reader.read(file)
    little = system.get("little_endian", True) if isinstance(system, dict) else None
    if little is not (sys.byteorder == "little"):
        raise Damaged("it was written on a machine with another byte order")
    content = reader.read(file)
    keys = reader.read(file)
    if not reader.wanted:
        if not isinstance(keys, list) or any(type(key) is not str for key in keys) or sorted(keys) != sorted(pending):
            raise Damaged("its list of tensors is another one")
        for key in keys:
            file.read(8)  # their number
            filled(pending[key], file.readinto)  # type: ignore[attr-defined]
    return Archive(content, tuple(sorted(reader.wanted)), tuple(reader.built))
