"""State dict <-> file: every tensor once, contiguous, in its own dtype; and what tells two of them apart."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dcafy.attention.inserted import inserted
from dcafy.checkpoint.description import Facts
from dcafy.errors import CheckpointError, InputError
from dcafy.wording import printable

_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    )
}
"""What a safetensors file can hold."""


def is_connection(key: str) -> bool:
    """Whether a key of a state dict belongs to a connection and not to the base."""
    return "dca" in key.split(".")


def new_keys(model: nn.Module) -> Callable[[str], bool]:
    """What tells keys of connections, and of attention that was put in, from those of the base."""
    put_in = {id(module) for _, module in inserted(model)}
    paths = (path for path, module in model.named_modules(remove_duplicate=False) if id(module) in put_in)
    roots = tuple(f"{path}." for path in paths)
    return lambda key: is_connection(key) or key.startswith(roots)


def dtype_named(name: str) -> torch.dtype:
    """The dtype of that name; ``KeyError`` where a folder holds none such."""
    return _DTYPES[name]


@dataclass(frozen=True)
class Packed:
    """A state dict made ready for a file.

    ``tensors``   key -> tensor, on the CPU, contiguous, each once
    ``tied``      key -> the key in ``tensors`` that holds the same tensor
    ``layouts``   key -> memory format, where a tensor was not laid out contiguously
    ``facts``     every key of the state dict, also those that are not kept
    """

    tensors: dict[str, Tensor]
    tied: dict[str, str]
    layouts: dict[str, str]
    facts: dict[str, Facts]


def pack(model: nn.Module, kept: Callable[[str], bool]) -> Packed:
    """The state dict of ``model``; of the keys that are not ``kept`` only the facts.

    Raises ``InputError`` for what no safetensors file can hold.
    """
    packed = Packed({}, {}, {}, {})
    first: dict[object, str] = {}
    known: dict[object, Facts] = {}
    # Parameters before buffers: what shares memory with a parameter is that parameter again.
    state = sorted(model.state_dict(keep_vars=True).items(), key=lambda item: not isinstance(item[1], nn.Parameter))
    for key, value in state:
        tensor = _storable(key, value)
        place = _place(tensor) or id(value)
        layout = _layout(tensor)
        if layout:
            packed.layouts[key] = layout
        plain = tensor.cpu().contiguous()
        packed.facts[key] = known[place] = known.get(place) or facts(plain)
        if not kept(key):
            continue
        if place in first:
            packed.tied[key] = first[place]
            continue
        first[place] = key
        packed.tensors[key] = plain
    return dataclasses.replace(packed, tensors=apart(packed.tensors))


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each alone in its memory: safetensors refuses two in one, and a view would take all of it along."""
    seen: set[int] = set()
    result = {}
    for name, value in tensors.items():
        memory = value.untyped_storage()
        shared = memory.data_ptr() in seen or memory.nbytes() != value.nbytes
        seen.add(memory.data_ptr())
        result[name] = value.clone() if shared else value
    return result


def _storable(key: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise InputError(
            f"{key} in the state dict is of type {kind}, and dcafy.save stores tensors only. Let get_extra_state "
            "of that module return a tensor, or leave it out of the state dict."
        )
    tensor = value.detach()
    if tensor.is_meta:
        raise InputError(f"{key} is on the meta device and has no data. Load the weights before saving.")
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized:
        kind = type(value).__name__ if type(tensor) is not Tensor else str(tensor.layout).removeprefix("torch.")
        raise InputError(f"{key} is a {kind} tensor, which safetensors cannot hold. Make it a plain dense one first.")
    if _name(tensor.dtype) not in _DTYPES:
        raise InputError(f"{key} has the dtype {_name(tensor.dtype)}, which safetensors cannot hold.")
    return tensor


def _place(tensor: Tensor) -> object:
    """Equal for two tensors that are the same memory seen the same way; ``None`` for one without elements."""
    if tensor.numel() == 0:
        return None
    return tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride()


def _layout(tensor: Tensor) -> str | None:
    """The strides of a dense tensor that is not contiguous (channels_last, transposed), as text.

    Kernels are chosen by strides, and sum in another order. is_contiguous() says yes to 1x1 kernels of both formats.
    """
    contiguous = tensor.stride() == torch.empty(tensor.shape, device="meta").stride()
    return None if contiguous or not _is_dense(tensor.shape, tensor.stride()) else "x".join(map(str, tensor.stride()))


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether these strides put each element in a place of its own and leave no gaps."""
    if len(shape) != len(strides):
        return False
    filled = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        if stride != filled:
            return False
        filled *= size
    return filled > 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- telling tensors apart ------------------------------------------------------------------------------


def facts(tensor: Tensor) -> Facts:
    """Dtype, shape and content of a tensor."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return Facts(_name(tensor.dtype), tuple(tensor.shape), hashlib.sha256(content.data).hexdigest())


def fingerprint(tensors: Mapping[str, Facts]) -> str:
    """The SHA-256 of a list of tensors: one line for each, key and facts, sorted by key."""
    lines = (f"{key} {tensors[key]}\n" for key in sorted(tensors))
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


# --- putting tensors back -------------------------------------------------------------------------------


def put(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    dtypes: Mapping[str, str],
    tied: Mapping[str, str],
    layouts: Mapping[str, str],
) -> None:
    """Gives every tensor of ``model`` its dtype and layout, ties what was tied, and fills in ``tensors``.

    ``dtypes`` has every key of the state dict, ``tensors`` those that come with values. Shapes have been
    compared. ``model`` is written to. Raises ``CheckpointError`` where the tensors cannot be its own.
    """
    _separate(model, [*tensors, *tied], tied)
    for key, name in dtypes.items():
        slot = _slot(model, key)
        if slot is not None:
            stored = key in tensors or key in tied
            _reform(slot, key, dtype_named(name), layouts.get(key), keep=not stored)
    for key, original in tied.items():
        _tie(_slot(model, key), _slot(model, original))
    state = {**model.state_dict(), **tensors, **{key: tensors[original] for key, original in tied.items()}}
    try:
        model.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"The tensors could not be put into the network: {error}") from error


_Slot = tuple[dict[str, Tensor | None], str]
"""The dict that holds a parameter or a buffer, and the name it has there."""


def _slot(model: nn.Module, key: str) -> _Slot | None:
    """Where a key of the state dict lives; ``None`` for what a module keeps elsewhere (extra state)."""
    path, _, name = key.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    for holder in (module._parameters, module._buffers):
        if holder.get(name) is not None:
            return cast("dict[str, Tensor | None]", holder), name
    return None


def _reform(slot: _Slot, key: str, dtype: torch.dtype, layout: str | None, *, keep: bool) -> None:
    """Gives one tensor its dtype and strides; its values only where they are to be kept."""
    holder, name = slot
    old = holder[name]
    assert old is not None
    if _kind(old.dtype) != _kind(dtype):
        raise CheckpointError(
            f"{printable(key)} holds {_name(dtype)} in the folder and {_name(old.dtype)} in the network: the folder "
            "belongs to another network."
        )
    device = torch.device("cpu") if old.is_meta else old.device
    strides = torch.empty(old.shape, device="meta").stride() if layout is None else tuple(map(int, layout.split("x")))
    if layout is not None and not _is_dense(old.shape, strides):
        raise CheckpointError(f"{printable(key)} cannot be laid out with the strides {layout}.")
    if old.dtype == dtype and old.stride() == strides and not old.is_meta:
        return
    new = torch.empty_strided(old.shape, strides, dtype=dtype, device=device)
    if keep:
        new.copy_(old.detach())
    _replace(holder, name, new)


def _kind(dtype: torch.dtype) -> str:
    # Casting a module casts what is complex too.
    return "inexact" if dtype.is_floating_point or dtype.is_complex else _name(dtype)


def _replace(holder: dict[str, Tensor | None], name: str, new: Tensor) -> None:
    """The new data under that name: in the same parameter where it can be, so that what is tied stays tied."""
    old = holder[name]
    if isinstance(old, nn.Parameter):
        if old.is_meta:
            holder[name] = nn.Parameter(new, requires_grad=old.requires_grad)
        else:
            old.data = new
    else:
        holder[name] = new


def _separate(model: nn.Module, keys: Iterable[str], tied: Mapping[str, str]) -> None:
    """A tensor of its own for every key that the folder has, also where the network ties them."""
    owners: set[int] = set()
    slots: dict[tuple[int, str], str] = {}
    for key in keys:
        slot = _slot(model, key)
        if slot is None:
            continue
        holder, name = slot
        twin = slots.setdefault((id(holder), name), key)
        if twin != key:  # a module that is registered under two names
            if tied.get(twin, twin) != tied.get(key, key):
                raise CheckpointError(
                    f"{printable(twin)} and {printable(key)} are one tensor in the network and two in the folder: "
                    "the folder belongs to another network."
                )
            continue
        value = holder[name]
        assert value is not None
        if id(value) in owners:
            copied = value.detach().clone()
            holder[name] = nn.Parameter(copied, value.requires_grad) if isinstance(value, nn.Parameter) else copied
        owners.add(id(holder[name]))


def _tie(slot: _Slot | None, original: _Slot | None) -> None:
    if slot is None or original is None:
        return
    (holder, name), (first, its_name) = slot, original
    value, same = holder[name], first[its_name]
    assert value is not None
    assert same is not None
    if isinstance(value, nn.Parameter) == isinstance(same, nn.Parameter):
        holder[name] = same
    else:  # one is a buffer that shares the other's memory, and stays one
        holder[name] = nn.Parameter(same, value.requires_grad) if isinstance(value, nn.Parameter) else same.detach()
