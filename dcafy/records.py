"""Frozen records <-> JSON, checked by their annotations; format versions and the steps between them.

A record is a frozen dataclass. How a field is read follows from its annotation: a plain type, ``X | None``,
``Literal``, a tuple, a dictionary, another record. ``Annotated[X, check]`` adds a check of what was read as X, a
function of the value and of where it stands; ``Annotated[X, ReadBy(check)]`` leaves the reading to it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import reprlib
import sys
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from dcafy.wording import nearest, printable

Check = Callable[[Any, str], Any]
"""(a value from JSON, where it stands) -> the value, checked; raises :class:`Wrong` or :class:`Unknown`."""


@dataclass(frozen=True)
class ReadBy:
    """In an annotation: what reads the value, in the place of how one of that type is read."""

    check: Check


class Wrong(ValueError):
    """A value is not what belongs at its place."""

    def __init__(self, where: str, expected: str, value: object) -> None:
        super().__init__(f"{printable(where[:200]) or 'it'} should be {expected}, not {short(value)}")


class Unknown(ValueError):
    """An entry has a name that means nothing here; ``path`` says where it stands."""

    def __init__(self, where: str, name: str, known: list[str]) -> None:
        self.path = printable((f"{where}.{name}" if where else name)[:80])
        super().__init__(f"unknown entry {self.path}.{nearest(name, known)}".removesuffix("."))


def short(value: object) -> str:
    """A value out of a file as a message may show it, whatever its size and depth."""
    text = printable(str(value) if isinstance(value, BaseException) else _SHOWN.repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxdict = 4, 8
_SHOWN.maxlist = _SHOWN.maxtuple = _SHOWN.maxset = _SHOWN.maxfrozenset = 16
_SHOWN.maxstring = _SHOWN.maxlong = _SHOWN.maxother = 90


# --- text <-> JSON values -------------------------------------------------------------------------------


def parsed(text: str | bytes) -> Any:
    """The JSON value in ``text``; ``ValueError`` for anything else, and for what readers of JSON take differently."""
    try:
        return shallow(json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_constant))
    except RecursionError as error:
        raise ValueError("lists in lists without end") from error


def shallow(value: Any) -> Any:
    """The value from JSON; ``ValueError`` where lists and objects lie deeper in one another than is ever meant.

    Whoever copies, compares or shows such a value goes into each of them, and Python's stack ends at about a thousand.
    """
    level = [value]
    for _ in range(_DEEPEST):
        inside = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [item for items in inside for item in items if isinstance(item, dict | list)]
        if not level:
            return value
    raise ValueError("lists in lists without end")


_DEEPEST = 64
"""Lists and objects that may lie in one another; plans and requests have less than ten."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("it has the same entry twice")
    return data


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


WRITTEN: Mapping[str, Any] = types.MappingProxyType({"written": True})
"""The metadata of a field that has a default in Python, and has to be in the data all the same."""

LATER: Mapping[str, Any] = types.MappingProxyType({"later": True})
"""The metadata of a field that older data does not have; it is written only where it is not ``None``."""

# --- JSON values -> records -----------------------------------------------------------------------------


def read(kind: Any, value: Any, where: str = "", *, whole: bool = False) -> Any:
    """``value`` from JSON as a ``kind``: a record or any other annotation; raises :class:`Wrong` or :class:`Unknown`.

    ``where``: what messages call it. ``whole``: whether a record has to have every entry, also those with defaults.

    >>> @dataclass(frozen=True)
    ... class Part:
    ...     name: str
    ...     sizes: tuple[int, ...] = ()
    >>> read(Part, {"name": "stem", "sizes": [3, 16]})
    Part(name='stem', sizes=(3, 16))
    >>> read(Part, {"name": 3}, "part")
    Traceback (most recent call last):
        ...
    dcafy.records.Wrong: part.name should be text, not 3
    """
    return _reader(kind, whole)(value, where)


@functools.cache
def _reader(kind: Any, whole: bool) -> Check:
    """How a value of this annotation is read."""
    if kind in _PLAIN:
        return _plain(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return functools.partial(_record, kind, whole)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated and isinstance(arguments[1], ReadBy):
        return arguments[1].check
    if origin is Annotated:
        return _checked(_reader(arguments[0], whole), arguments[1:])
    if origin is Literal:
        return one_of(arguments)
    if origin in (Union, types.UnionType) and arguments[-1] is type(None) and len(arguments) == 2:
        of = _reader(arguments[0], whole)
        return lambda value, where: None if value is None else of(value, where)
    if origin is tuple and arguments[1:] == (...,):
        return functools.partial(_tuple, _reader(arguments[0], whole))
    if origin in (dict, Mapping) and arguments[0] is str:
        return functools.partial(entries, _reader(arguments[1], whole))
    raise TypeError(f"no way to read a {kind} from JSON")


_PLAIN: dict[Any, tuple[tuple[type, ...], str]] = {
    str: ((str,), "text"),
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    Any: ((object,), "anything"),
}
"""Annotation -> the types that JSON gives for it, and what messages call it."""


def _plain(kind: Any) -> Check:
    types_, expected = _PLAIN[kind]

    def reader(value: Any, where: str) -> Any:
        if not isinstance(value, types_) or (isinstance(value, bool) and kind not in (bool, Any)):
            raise Wrong(where, expected, value)
        if kind is float and isinstance(value, int) and abs(value) > sys.float_info.max:
            raise Wrong(where, f"{expected} of less than 309 digits", value)
        return value

    return reader


def _record(kind: type[Any], whole: bool, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise Wrong(where, "an object", value)
    hints, fields = (
        get_type_hints(kind, include_extras=True),
        {item.name: item for item in dataclasses.fields(kind) if item.init},
    )
    for name in value:
        if name not in fields:
            raise Unknown(where, name, list(fields))
    for name, item in fields.items():
        has_default = not item.default is item.default_factory is dataclasses.MISSING
        needed = whole or item.metadata == WRITTEN or not has_default
        if needed and name not in value:
            raise Wrong(where, f"an object with {name!r}", list(value))
    prefix = f"{where}." if where else ""
    return kind(**{name: _reader(hints[name], whole)(item, prefix + name) for name, item in value.items()})


def _tuple(of: Check, value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise Wrong(where, "a list", value)
    return tuple(of(item, f"{where}[{i}]") for i, item in enumerate(value))


def entries(of: Check, value: Any, where: str) -> dict[str, Any]:
    """The object ``value`` with each of its entries read by ``of``."""
    if not isinstance(value, dict):
        raise Wrong(where, "an object", value)
    return {key: of(item, f"{where}.{key}") for key, item in value.items()}


def _checked(of: Check, checks: tuple[Check, ...]) -> Check:
    return lambda value, where: functools.reduce(lambda read, check: check(read, where), checks, of(value, where))


def within(least: int, most: int) -> Check:
    """The check that a whole number is one of ``least`` to ``most``."""

    def check(value: Any, where: str) -> Any:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise Wrong(where, f"a whole number from {least} to {most}", value)
        return value

    return check


def matching(pattern: str, expected: str) -> Check:
    """The check that all of a text matches ``pattern``; ``expected`` is what messages call that."""

    def check(value: Any, where: str) -> Any:
        if not isinstance(value, str) or re.fullmatch(pattern, value) is None:
            raise Wrong(where, expected, value)
        return value

    return check


def one_of(choices: Collection[Any]) -> Check:
    """The check that a value is among ``choices``, as they are at the time."""

    def check(value: Any, where: str) -> Any:
        if not isinstance(value, str) or value not in choices:
            raise Wrong(where, f"one of {', '.join(choices)}", value)
        return value

    return check


# --- records -> JSON values -----------------------------------------------------------------------------


def written(value: Any, ways: Mapping[type[Any], Callable[[Any], Any]] | None = None) -> Any:
    """``value`` as JSON would give it back: records as objects, tuples as lists.

    ``ways``: how values of some classes are written instead.
    """
    way = (ways or {}).get(type(value))
    if way is not None:
        return way(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {item.name: (getattr(value, item.name), item.metadata == LATER) for item in dataclasses.fields(value)}
        return {name: written(entry, ways) for name, (entry, later) in fields.items() if not (later and entry is None)}
    if isinstance(value, Mapping):
        return {key: written(item, ways) for key, item in value.items()}
    return [written(item, ways) for item in value] if isinstance(value, list | tuple) else value


# --- versions -------------------------------------------------------------------------------------------


class OtherVersion(ValueError):
    """A document has a version that is not read here; ``version`` is what it says."""

    def __init__(self, version: Any) -> None:
        super().__init__(f"version {short(version)}")
        self.version = version


@dataclass(frozen=True)
class Format:
    """One kind of document: which version is written, and how older ones are brought up to it.

    ``key``      the entry in which a document says its version
    ``version``  the version that is written
    ``steps``    version -> what makes a document of it one of the next; of ``version`` itself, what completes a
                 document that was written before it had all its entries
    """

    key: str
    version: int
    steps: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = field(default_factory=dict)

    def stamped(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The document with its version in front."""
        return {self.key: self.version, **data}

    def opened(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The document as this version has it, without the entry for the version; raises :class:`OtherVersion`."""
        found = data.get(self.key)
        oldest = min(self.steps, default=self.version)
        if not isinstance(found, int) or isinstance(found, bool) or not oldest <= found <= self.version:
            raise OtherVersion(found)
        rest = {name: value for name, value in data.items() if name != self.key}
        for version in range(found, self.version + 1):
            step = self.steps.get(version)
            rest = rest if step is None else step(rest)
        return rest
