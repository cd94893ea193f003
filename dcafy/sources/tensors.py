"""Tensors in a file of ``torch.save``: memory that is read, and views of it that are checked."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dcafy.sources.pickles import Allowance, Damaged, TooLarge, Unread

Load = Callable[[str, int], torch.UntypedStorage]
"""Key of a storage in the file and its size in bytes -> the storage."""


@dataclass(frozen=True)
class StorageKind:
    """What a pickle calls a storage: by the type of its elements."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Storage:
    """Memory, and the type of its elements; no ``memory`` where none was saved."""

    memory: torch.UntypedStorage | None
    dtype: torch.dtype


_KINDS = {
    **{"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Bool": "bool"},
    **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Untyped": "uint8"},
    **{"ComplexDouble": "complex128", "ComplexFloat": "complex64"},
    **{kind: kind.lower() for kind in ("QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4")},
}
"""What pickles call storages -> the type of their elements; an untyped one counts bytes."""

_SLACK = 64 * 2**20
"""Bytes that views may show beyond four times what the file holds: a tensor that repeats a small one is no fault."""

_OTHERS = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_qtensor": "a quantized tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor without data (of the meta device)",
    "_rebuild_wrapper_subclass": "a tensor of a class of its own",
    "_rebuild_device_tensor_from_numpy": "a tensor of another device",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
}
"""What torch calls to rebuild tensors that no network here consists of: they stay :class:`Unread`."""


class Tensors:
    """The tensors of one file, whose memory ``load`` reads from it.

    ``kinds``: what a pickle may call a storage. ``swapped``: whether numbers are written in another byte order.
    """

    kinds: Mapping[str, StorageKind] = {
        f"{name}Storage": StorageKind(getattr(torch, dtype)) for name, dtype in _KINDS.items()
    }

    def __init__(self, load: Load, allowance: Allowance, *, swapped: bool) -> None:
        self._load, self._allowance, self._swapped = load, allowance, swapped
        self._memory: dict[str, torch.UntypedStorage] = {}
        self._shown = self._held = 0

    def persistent(self, given: Any) -> Any:
        """What a persistent id stands for: a storage; or a class, where old files bring its source along."""
        if type(given) is tuple and given[:1] == ("module",) and len(given) == 4:
            return given[1]
        if type(given) is not tuple or given[:1] != ("storage",) or len(given) not in (5, 6) or given[5:] not in _WHOLE:
            raise Damaged("a reference that is no storage")
        _, kind, key, location, elements = given[:5]
        if type(kind) is not StorageKind or type(key) is not str or type(elements) is not int or elements < 0:
            raise Damaged("a storage that is none")
        if location == "meta":
            return Storage(None, kind.dtype)
        size = elements * kind.dtype.itemsize
        memory = self._memory.get(key)
        if memory is None:
            memory = self._memory[key] = self._load(key, size)
            self._held += size
            if self._swapped and size and kind.dtype.itemsize > 1:
                memory.byteswap(kind.dtype)  # type: ignore[no-untyped-call]
        if memory.nbytes() != size:
            raise Damaged("a storage of two sizes")
        return Storage(memory, kind.dtype)

    def rebuilding(self) -> Mapping[str, Callable[..., Any]]:
        """What pickles call, in ``torch._utils``, to make tensors -> how they are made here."""

        def plain(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Any:
            return self._view(storage, offset, size, stride, getattr(storage, "dtype", None))

        def asking(storage: Any, offset: Any, size: Any, stride: Any, wants: Any, hooks: Any, *_: Any) -> Any:
            return _asking(plain(storage, offset, size, stride), wants)

        def typed(
            storage: Any, offset: Any, size: Any, stride: Any, wants: Any, hooks: Any, dtype: Any, *_: Any
        ) -> Any:
            return _asking(self._view(storage, offset, size, stride, dtype), wants)

        def parameter(tensor: Any, wants: Any, hooks: Any, state: Any = None) -> Any:
            if isinstance(tensor, Unread):
                return tensor
            if type(tensor) is not Tensor:
                raise Damaged("a parameter that is no tensor")
            return with_attributes(nn.Parameter(tensor, bool(wants)), state)

        return {
            "_rebuild_tensor": plain,
            "_rebuild_tensor_v2": asking,
            "_rebuild_tensor_v3": typed,
            "_rebuild_parameter": parameter,
            "_rebuild_parameter_with_state": parameter,
            **{name: functools.partial(_unread, what) for name, what in _OTHERS.items()},
        }

    def _view(self, storage: Any, offset: Any, size: Any, stride: Any, dtype: Any) -> Any:
        """A tensor that shows so much of the storage, after it is clear that all of it lies inside."""
        if isinstance(storage, Unread):
            return storage
        if type(storage) is not Storage or not isinstance(dtype, torch.dtype) or dtype.itemsize < 1:
            raise Damaged("a tensor without a storage")
        if storage.memory is None:
            return Unread("a tensor without data (of the meta device)")
        whole = all(type(numbers) in (tuple, list, torch.Size) for numbers in (size, stride)) and len(size) == len(
            stride
        )
        if not whole or len(size) > 64 or any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
            raise Damaged("a tensor of a shape that is none")
        elements = 1
        for length in size:
            elements *= length
        reach = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) + 1
        if max((offset, *size, *stride)) >= 2**62 or (elements and reach * dtype.itemsize > storage.memory.nbytes()):
            raise Damaged("a tensor that is larger than its storage")
        self._shown += elements * dtype.itemsize
        if self._shown > 4 * self._held + _SLACK and self._allowance.memory < float("inf"):
            raise TooLarge("has tensors that show the same few numbers over and over")
        self._allowance.spend(20, 1000)
        return torch.empty(0, dtype=dtype).set_(storage.memory, offset, tuple(size), tuple(stride))


def _unread(what: str, *_: Any) -> Unread:
    return Unread(what)


_WHOLE = ((), (None,))
"""What follows the size in a reference: nothing; files from before PyTorch 0.4 had storages inside storages."""


def _asking(tensor: Any, wants: Any) -> Any:
    """The tensor, with a gradient wanted where it may have one."""
    if isinstance(tensor, Tensor) and wants is True and (tensor.is_floating_point() or tensor.is_complex()):
        tensor.requires_grad_()
    return tensor


def with_attributes(made: Any, state: Any) -> Any:
    """The tensor with the attributes that a pickle has for it, which hide nothing of torch's."""
    plain = state[0] if type(state) is tuple and len(state) == 2 else state
    if isinstance(made, Tensor) and plain:
        if type(plain) is not dict or any(type(key) is not str or hasattr(made, key) for key in plain):
            raise Damaged("attributes of a tensor that hide its own")
        vars(made).update(plain)
    return made


def filled(memory: torch.UntypedStorage, read_into: Callable[[memoryview], int]) -> None:
    """Fills the memory, a piece at a time; ``Damaged`` where there is less."""
    size = memory.nbytes()
    if not size:
        return
    content: Any = torch.empty(0, dtype=torch.uint8).set_(memory).numpy()
    view = memoryview(content)
    for start in itertools.count(0, _PIECE):
        if start >= size:
            return
        piece = view[start : start + _PIECE]
        if read_into(piece) != len(piece):
            raise Damaged("it ends in the middle of a tensor")


_PIECE = 2**24


def empty(size: int) -> torch.UntypedStorage:
    """Memory of so many bytes; ``OSError`` where there is not so much."""
    try:
        return torch.empty(size, dtype=torch.uint8).untyped_storage()
    except (RuntimeError, MemoryError) as error:
        raise OSError(f"there is no memory for a tensor of {size / 1e9:,.1f} GB") from error
