"""What the names in a pickle may stand for: data that trainers keep beside the weights, each made by value."""

from __future__ import annotations

import argparse
import datetime
import enum
import pathlib
import re
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dcafy.sources.classes import network_class
from dcafy.sources.pickles import Damaged, Known, Unsupported
from dcafy.sources.tensors import Tensors, with_attributes


class Name:
    """In a table: something that a pickle calls by this name and that stands for no value."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}>"


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise Damaged(what)


# --- Python's own -----------------------------------------------------------------------------------


def _encoded(text: str, encoding: str = "utf-8") -> bytes:
    """Bytes as Python 2's protocol writes them."""
    _need(isinstance(text, str) and encoding in ("latin1", "latin-1", "utf-8"), "bytes that are no text in latin1")
    return text.encode(encoding, "surrogatepass" if encoding == "utf-8" else "strict")


def _bytes(kind: type[Any]) -> Callable[..., Any]:
    def make(given: Any = b"", encoding: str = "latin-1") -> Any:
        return kind(_encoded(given, encoding) if isinstance(given, str) else _checked(given, bytes))

    return make


def _checked(value: Any, *kinds: type[Any]) -> Any:
    _need(type(value) in kinds, f"a {type(value).__name__} where a {kinds[0].__name__} should be")
    return value


def _of_items(kind: Callable[..., Any]) -> Callable[..., Any]:
    """What makes a ``kind`` of plain items."""

    def make(items: Any = ()) -> Any:
        return kind(_hashable(_checked(items, list, tuple, set, frozenset)))

    return make


_PLAIN_KEYS = (str, int, float, bool, bytes, type(None))


def _hashable(items: Iterable[Any]) -> Iterable[Any]:
    for item in items:
        _need(type(item) in _PLAIN_KEYS and not (type(item) is int and abs(item) > 2**60), "elements that are no data")
    return items


def _entries(kind: type[Any]) -> Callable[..., Any]:
    """What makes a mapping of a dict, or of pairs as Python 2 writes them."""

    def make(given: Any = ()) -> Any:
        if type(given) is not dict:
            pairs = [_checked(pair, list, tuple) for pair in _checked(given, list, tuple)]
            _need(all(len(pair) == 2 for pair in pairs), "entries that are no pairs")
            _hashable(pair[0] for pair in pairs)
            given = {}
            for key, value in pairs:
                _hashable([key])
                given[key] = value
        return kind(given)

    return make


def _default_dict(factory: Any = None, given: Any = ()) -> Any:
    if factory is not None and not any(factory is kind for kind in _FACTORIES):
        raise Unsupported("a defaultdict of something that it chooses")
    return defaultdict(factory, _entries(dict)(given))


def _deque(items: Any = (), most: Any = None) -> Any:
    return deque(_checked(items, list, tuple), _checked(most, int, type(None)))


def _slice(*ends: Any) -> slice:
    return slice(*(_checked(end, int, type(None)) for end in ends))


def _empty(kind: type[Any]) -> Callable[..., Any]:
    def make() -> Any:
        return kind()

    return make


def _attributes(instance: Any, state: Any) -> None:
    _need(type(state) is dict and all(type(key) is str for key in state), "attributes that are no dict")
    vars(instance).update(state)


def _ignored(instance: Any, state: Any) -> None:
    """For attributes that say nothing about the data, such as the versions in a state dict's metadata."""


def _path(kind: type[pathlib.PurePath]) -> Callable[..., pathlib.PurePath]:
    def make(*parts: Any) -> pathlib.PurePath:
        return kind(*(_checked(part, str) for part in parts))

    return make


def _numbers(kind: Callable[..., Any], *kinds: type[Any]) -> Callable[..., Any]:
    def make(*numbers: Any) -> Any:
        return kind(*(_checked(number, *kinds) for number in numbers))

    return make


# --- dates ------------------------------------------------------------------------------------------


def _date(given: Any) -> datetime.date:
    year, rest, month, day = _checked(given, bytes)
    return datetime.date(year * 256 + rest, month, day)


def _clock(given: list[int], zone: Any) -> dict[str, Any]:
    """Hour to microsecond of six bytes; the first bit of the first one marks the second of two equal hours."""
    hour, minute, second, high, middle, low = given
    _need(zone is None or type(zone) is datetime.timezone, "a time zone that is none of datetime's")
    micro = (high * 256 + middle) * 256 + low
    return {"hour": hour, "minute": minute, "second": second, "microsecond": micro, "tzinfo": zone}


def _datetime(given: Any, zone: Any = None) -> datetime.datetime:
    year, rest, month, day, *clock = _checked(given, bytes)
    return datetime.datetime(year * 256 + rest, month % 128, day, **_clock(clock, zone), fold=month // 128)


def _time(given: Any, zone: Any = None) -> datetime.time:
    hour, *clock = _checked(given, bytes)
    return datetime.time(**_clock([hour % 128, *clock], zone), fold=hour // 128)


def _timezone(offset: Any, name: Any = None) -> datetime.timezone:
    named = () if name is None else (_checked(name, str),)
    return datetime.timezone(_checked(offset, datetime.timedelta), *named)


# --- numpy ------------------------------------------------------------------------------------------

_CODE = re.compile(r"[|<>=]?([biufc]\d{1,2}|[SUV]\d{1,6}|b)")
"""The element types of numpy that are plain data: numbers, and text and bytes of fixed length."""


def _dtype(code: Any, align: Any = False, copy: Any = True) -> np.dtype[Any]:
    _need(isinstance(code, str) and len(code) < 10, "a numpy type without a name")
    if _CODE.fullmatch(code) is None:
        raise Unsupported("numpy objects" if "O" in code else f"numpy's type {code}")
    made: np.dtype[Any] = np.dtype(code, copy=True)  # a copy, since what follows sets its byte order
    return made


def _byte_order(dtype: np.dtype[Any], state: Any) -> None:
    version, order, *rest = _checked(state, tuple)
    _need(type(version) is int and order in ("<", ">", "|", "="), "a numpy type that is none")
    if rest[:3] != [None] * 3:
        raise Unsupported("numpy's types of several fields")
    if order == ">" and dtype.kind in "iufc":
        dtype.__setstate__((3, ">", None, None, None, -1, -1, 0))  # type: ignore[attr-defined]
    else:
        _need(order != ">", "numpy text in another byte order")


def _scalar(dtype: Any, given: Any) -> Any:
    _need(isinstance(dtype, np.dtype), "a numpy number without a type")
    return np.frombuffer(_sized(given, dtype, ()), dtype)[0]


def _sized(given: Any, dtype: Any, shape: Any) -> bytes:
    """The content of an array, of the length that its shape and type say."""
    _need(isinstance(dtype, np.dtype) and dtype.kind in "biufcSUV" and dtype.itemsize > 0, "no plain numpy type")
    _need(isinstance(given, bytes | bytearray), "an array whose content is no bytes")
    elements = 1
    for size in _checked(shape, tuple):
        _need(type(size) is int and size >= 0, "a shape that is none")
        elements *= size
    _need(len(shape) <= 32 and elements * dtype.itemsize == len(given), "a numpy array of another length")
    return bytes(given)


def _empty_array(kind: Any, shape: Any = (0,), code: Any = b"b") -> np.ndarray[Any, Any]:
    _need(kind is np.ndarray, "an array of a class that it chooses")
    made: np.ndarray[Any, Any] = np.ndarray((0,), "b")
    return made


def _fill_array(array: np.ndarray[Any, Any], state: Any) -> None:
    _, shape, dtype, fortran, given = _checked(state, tuple)
    known: Any = (1, shape, dtype, bool(fortran), _sized(given, dtype, shape))
    array.__setstate__(known)


def _from_buffer(given: Any, dtype: Any, shape: Any, order: Any = "C") -> np.ndarray[Any, Any]:
    _need(order in ("C", "F"), "an order that is none")
    content = np.frombuffer(_sized(given, dtype, shape), dtype)
    made: np.ndarray[Any, Any] = content.reshape(shape, order=order).copy("K")
    return made


# --- torch ------------------------------------------------------------------------------------------


def _size(given: Any = ()) -> torch.Size:
    return torch.Size([_checked(size, int) for size in _checked(given, tuple, list)])


def _device(kind: Any, *index: Any) -> torch.device:
    try:
        return torch.device(_checked(kind, str), *(_checked(number, int) for number in index))
    except RuntimeError as error:
        raise Damaged("a device that there is not") from error


def _layout(name: Any) -> torch.layout:
    found = getattr(torch, str(name).removeprefix("torch."), None) if isinstance(name, str) else None
    made: torch.layout = _checked(found, torch.layout)
    return made


_CONSTANTS = (torch.dtype, torch.memory_format, torch.qscheme, torch.layout)


def _enumeration(full: str) -> type[enum.Enum] | None:
    """An enumeration of torch or torchvision, of a module that is loaded already."""
    home, _, name = full.rpartition(".")
    found = vars(sys.modules.get(home, types.ModuleType("none"))).get(name)
    ours = isinstance(found, enum.EnumMeta) and found.__module__.split(".")[0] in ("torch", "torchvision")
    return found if ours and home.split(".")[0] in ("torch", "torchvision") else None


def _member(kind: type[enum.Enum]) -> Callable[..., enum.Enum]:
    def make(value: Any) -> enum.Enum:
        # Looked up, not called: an enumeration may have code for values that it does not know.
        found = next((one for one in kind if type(one.value) is type(value) and one.value == value), None)
        if found is None:
            raise Damaged(f"{kind.__name__} has no such value")
        return found

    return make


_FACTORIES = (list, dict, int, float, str, set, tuple, bool)

_TABLE: dict[str, Known] = {
    "_codecs.encode": Known(Name("encode"), _encoded),
    "builtins.bytes": Known(bytes, _bytes(bytes)),
    "builtins.bytearray": Known(bytearray, _bytes(bytearray)),
    "builtins.set": Known(set, _of_items(set)),
    "builtins.frozenset": Known(frozenset, _of_items(frozenset)),
    "builtins.list": Known(list, lambda items=(): list(_checked(items, list, tuple))),
    "builtins.tuple": Known(tuple, lambda items=(): tuple(_checked(items, list, tuple))),
    "builtins.dict": Known(dict, _entries(dict)),
    "builtins.complex": Known(complex, _numbers(complex, float, int)),
    "builtins.range": Known(range, _numbers(range, int)),
    "builtins.slice": Known(slice, _slice),
    **{f"builtins.{kind.__name__}": Known(kind) for kind in (int, float, str, bool)},
    "collections.OrderedDict": Known(OrderedDict, _entries(OrderedDict), _ignored),
    "collections.Counter": Known(Counter, _entries(Counter)),
    "collections.defaultdict": Known(defaultdict, _default_dict),
    "collections.deque": Known(deque, _deque),
    "argparse.Namespace": Known(argparse.Namespace, _empty(argparse.Namespace), _attributes),
    "types.SimpleNamespace": Known(types.SimpleNamespace, _empty(types.SimpleNamespace), _attributes),
    **{
        f"{home}.{name}": Known(kind, _path(kind))
        for home in ("pathlib", "pathlib._local")
        for name, kind in {
            **dict.fromkeys(("Path", "PosixPath", "PurePath", "PurePosixPath"), pathlib.PurePosixPath),
            **dict.fromkeys(("WindowsPath", "PureWindowsPath"), pathlib.PureWindowsPath),
        }.items()
    },
    "datetime.datetime": Known(datetime.datetime, _datetime),
    "datetime.date": Known(datetime.date, _date),
    "datetime.time": Known(datetime.time, _time),
    "datetime.timedelta": Known(datetime.timedelta, _numbers(datetime.timedelta, int)),
    "datetime.timezone": Known(datetime.timezone, _timezone),
    "numpy.dtype": Known(np.dtype, _dtype, _byte_order),
    "numpy.ndarray": Known(np.ndarray, None, _fill_array),
    **{f"numpy.{core}.multiarray.scalar": Known(Name("scalar"), _scalar) for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": Known(Name("array"), _empty_array) for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": Known(Name("buffer"), _from_buffer) for core in ("core", "_core")},
    "torch.Size": Known(torch.Size, _size),
    "torch.device": Known(torch.device, _device),
    "torch.serialization._get_layout": Known(Name("layout"), _layout),
}
"""Every name that stands for data, and what is made where it is called. Nothing else is."""


def known_to(tensors: Tensors) -> Callable[[str], Known | None]:
    """What a name in the pickle may be, for a file with these tensors."""
    rebuilt: Mapping[str, Known] = {
        f"torch._utils.{name}": Known(Name(name), make) for name, make in tensors.rebuilding().items()
    }

    def known(full: str) -> Known | None:
        found = _TABLE.get(full) or rebuilt.get(full)
        if found is not None:
            return found
        home, _, name = full.rpartition(".")
        if full == "torch._tensor._rebuild_from_type_v2":
            return Known(_OF_A_TYPE, _of_a_type(rebuilt))
        if home in ("torch", "torch.storage") and name in tensors.kinds:
            return Known(tensors.kinds[name])
        if home == "torch" and isinstance(constant := vars(torch).get(name), _CONSTANTS):
            return Known(constant)
        if full in ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter"):
            return Known(nn.Parameter if name == "Parameter" else Tensor)
        enumeration = _enumeration(full)
        if enumeration is not None:
            return Known(enumeration, _member(enumeration))
        network = network_class(full)
        return None if network is None else Known(network)

    return known


_OF_A_TYPE = Name("_rebuild_from_type_v2")


def _of_a_type(rebuilt: Mapping[str, Known]) -> Callable[..., Any]:
    """What makes a tensor with attributes: of torch's own classes, and with attributes that hide nothing of theirs."""
    makers = {id(kind.value): kind.make for kind in rebuilt.values()}

    def make(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
        make = makers.get(id(function))
        _need(make is not None and kind in (Tensor, nn.Parameter), "a tensor of a class of its own")
        assert make is not None
        return with_attributes(make(*_checked(arguments, tuple)), state)

    return make
