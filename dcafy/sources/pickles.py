"""Pickles from strangers, read by value: a machine that calls nothing which the file chooses.

A pickle is a program: it names things of Python's (its *globals*) and calls them. Here every name is looked up in a
table of what is :class:`Known`; what a call gives is made by this package's own code, from arguments that it has
checked. A name that is not in the table is noted and nothing comes of it. What a network is filled with is kept aside
(``built``) until the whole pickle is read.
"""

from __future__ import annotations

import _compat_pickle
import pickletools
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import IO, Any

from torch import nn


class Damaged(Exception):
    """The pickle is not one that ``torch.save`` writes, or not whole; the message says where it breaks."""


class Unsupported(Exception):
    """A known name is asked for something that is no plain data; the message says for what."""


class TooLarge(Exception):
    """Reading it would take more time or memory than a file of its size warrants; the message says what of it."""


@dataclass
class Allowance:
    """How much a file may still cost: ``steps`` of its pickles, and ``memory`` that they take, in bytes.

    Every instruction is a step, and whatever takes long or grows counts as more than one, so that neither time nor
    memory can be far from what is counted.
    """

    steps: float
    memory: float

    def spend(self, steps: float = 1, memory: float = 0) -> None:
        """Takes that away; ``TooLarge`` where there is no more."""
        self.steps -= steps
        self.memory -= memory
        if self.steps < 0:
            raise TooLarge("has a pickle of more steps than the weights of any network take")
        if self.memory < 0:
            raise TooLarge("would take far more memory than the file is large")


@dataclass(frozen=True)
class Known:
    """What a name of a pickle may be.

    ``value``  what it stands for where it is only mentioned
    ``make``   what a call with these arguments gives; ``None``: it must not be called
    ``fill``   puts the state that a pickle has for it into what ``make`` gave
    """

    value: Any
    make: Callable[..., Any] | None = None
    fill: Callable[[Any, Any], None] | None = None


class Unread:
    """In the place of something that was not made; ``what`` it is, in words."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __repr__(self) -> str:
        return f"<{self.what}>"


COMPUTED = "something that it computes"
"""Stands for a callable that has no name because the pickle makes it."""

_MARK = object()
_CONTAINERS = (list, deque)
_MAPPINGS = (dict, OrderedDict, Counter, defaultdict)
_KEYS = (str, int, float, bool, bytes, type(None))
_ONE_HASH = 2**61 - 1
"""Whole numbers below it have hashes of their own; above, a million of them can be made to share one."""


class Reader:
    """A pickle machine. ``known``: a full name -> what it may be, ``None`` for what it may not.

    ``storage``: a persistent id of torch.save's -> what it stands for.

    ``wanted``  the names that were asked for and not given
    ``built``   networks and what they are to be filled with, in the order of the pickle
    """

    def __init__(
        self, known: Callable[[str], Known | None], storage: Callable[[Any], Any], allowance: Allowance
    ) -> None:
        self._known, self._storage, self._allowance = known, storage, allowance
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._kinds: dict[int, tuple[str, Known]] = {}
        self.wanted: set[str] = set()
        self.built: list[tuple[nn.Module, Any]] = []

    def read(self, stream: IO[bytes]) -> Any:
        """What the next pickle in the stream holds; ``Damaged`` or ``TooLarge`` where it cannot be read."""
        self._stack, self._memo = [], {}
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                self._allowance.spend()
                if opcode.name == "STOP":
                    return self.pop()
                step = _STEPS.get(opcode.name)
                if step is None:
                    raise Damaged(f"torch.save writes no {opcode.name}")
                step(self, argument)
        except KeyError as error:
            raise Damaged(f"what it refers to is not there: {error}") from error
        except MemoryError as error:  # a count of bytes that nobody has
            raise Damaged("it says that it holds more than there is") from error
        except (ValueError, TypeError, LookupError, OverflowError, AttributeError, RuntimeError) as error:
            raise Damaged(str(error) or type(error).__name__) from error
        raise Damaged("it ends too early")

    # -- the stack ---------------------------------------------------------------------------------------

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise Damaged("a mark lies where a value should")
        return value

    def drop(self) -> None:
        self._stack.pop()

    def top(self) -> Any:
        if self._stack[-1] is _MARK:
            raise Damaged("a mark lies where a value should")
        return self._stack[-1]

    def to_mark(self) -> list[Any]:
        stack = self._stack
        place = len(stack) - 1
        while stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise Damaged("there is no mark")
        items = stack[place + 1 :]
        del stack[place:]
        return items

    def drop_marked(self) -> None:
        self.to_mark()

    def remember(self, place: int) -> None:
        self._memo[place] = self.top()

    def recall(self, place: int) -> None:
        self.push(self._memo[place])

    def remember_next(self) -> None:
        self.remember(len(self._memo))

    # -- names and calls ---------------------------------------------------------------------------------

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            self.wanted.add(COMPUTED)
            self.push(Unread(COMPUTED))
            return
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        full = f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"
        self._allowance.spend(10)
        found = self._known(full)
        if found is None:
            self.wanted.add(full)
            self.push(Unread(full))
            return
        self._kinds[id(found.value)] = full, found
        self.push(found.value)

    def call(self, what: Any, arguments: Any) -> None:
        """Puts on the stack what is made where ``what`` is called."""
        self._allowance.spend(10, 64)
        if isinstance(what, Unread):
            self.push(what)
            return
        name, kind = self._kinds.get(id(what), (COMPUTED, None))
        if kind is None or kind.make is None:
            self.wanted.add(f"{name} (called with arguments)" if kind else name)
            self.push(Unread(name))
            return
        if not isinstance(arguments, tuple):
            raise Damaged("arguments that are no tuple")
        self._allowance.spend(*_cost(arguments))
        unread = next((item for item in arguments if isinstance(item, Unread)), None)
        if unread is not None:  # what it is made of was asked for in vain
            self.push(unread)
            return
        try:
            self.push(kind.make(*arguments))
        except Unsupported as error:
            self.wanted.add(str(error))
            self.push(Unread(str(error)))

    def new(self, cls: Any, arguments: Any) -> None:
        """Puts an empty instance on the stack; a network class is never called, only a hull of it is made."""
        if isinstance(cls, type) and issubclass(cls, nn.Module) and arguments == () and id(cls) in self._kinds:
            self._allowance.spend(10, 1000)
            self.push(nn.Module.__new__(cls))
        else:
            self.call(cls, arguments)

    def fill(self, state: Any) -> None:
        """Puts ``state`` into what lies on the stack."""
        instance = self.top()
        if isinstance(instance, Unread):
            return
        if isinstance(instance, nn.Module):
            self.built.append((instance, state))
            return
        fills = (kind.fill for _, kind in self._kinds.values() if kind.fill and isinstance(instance, kind.value))
        fill = next(fills, None)
        if fill is None:
            name, _ = self._kinds.get(id(instance), (COMPUTED, None))
            self.wanted.add(f"{name} (changed)")
        else:
            parts = state if isinstance(state, tuple) else (state,)
            self._allowance.spend(*_cost(parts))
            if any(isinstance(part, Unread) for part in parts):
                return
            try:
                fill(instance, state)
            except Unsupported as error:
                self.wanted.add(str(error))

    # -- containers --------------------------------------------------------------------------------------

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) in _CONTAINERS:
            target.extend(items)
        elif not isinstance(target, Unread):
            raise Damaged(f"items for a {type(target).__name__}")

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Unread):
            return
        if type(target) not in _MAPPINGS or len(items) % 2:
            raise Damaged(f"entries for a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._key(key)
            dict.__setitem__(target, key, value) if type(target) is not OrderedDict else target.__setitem__(key, value)

    def add(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not set:
            raise Damaged(f"elements for a {type(target).__name__}")
        for item in items:
            self._key(item)
            target.add(item)

    def frozen(self, items: list[Any]) -> None:
        for item in items:
            self._key(item)
        self.push(frozenset(items))

    def _key(self, key: Any) -> None:
        """Spends for a key of a dict, so that no pickle can make looking keys up slow, or the hash too deep."""
        if type(key) is int and abs(key) >= _ONE_HASH:
            raise Damaged("a whole number of twenty digits as a key")
        if type(key) not in _KEYS:
            self._allowance.spend(200)
            _check_depth(key)

    def persistent(self, given: Any) -> None:
        self._allowance.spend(20, 256)
        self.push(self._storage(given))


def _check_depth(key: Any) -> None:
    """Nothing; ``Damaged`` where tuples lie in tuples deeper than any key has them: their hash is taken recursively."""
    level = [key]
    for _ in range(4):
        level = [item for outer in level if type(outer) in (tuple, frozenset) for item in outer]
    if level:
        raise Damaged("a key that is nested too deep")


def _cost(arguments: Iterable[Any]) -> tuple[float, float]:
    """(steps, bytes) of making something of these arguments."""
    items = copied = 0
    for argument in arguments:
        if isinstance(argument, str | bytes | bytearray):
            copied += len(argument) * 2
        elif isinstance(argument, Mapping | list | tuple | set | frozenset | deque):
            items += len(argument)
    return items + copied / 256, copied + items * 100


def _text_call(reader: Reader, argument: str, new: bool = False) -> None:
    items = reader.to_mark()
    module, _, name = argument.partition(" ")
    reader.name(module, name)
    reader.new(reader.pop(), tuple(items))


def _object(reader: Reader) -> None:
    what, *arguments = reader.to_mark()
    reader.new(what, tuple(arguments))


def _new_with_names(reader: Reader) -> None:
    named, arguments, cls = reader.pop(), reader.pop(), reader.pop()
    if named:
        raise Damaged("arguments by name")
    reader.new(cls, arguments)


def _swapped(step: Callable[[Reader, Any, Any], None]) -> Callable[[Reader, Any], None]:
    """The step on the two topmost values, the lower one first."""

    def taken(reader: Reader, argument: Any) -> None:
        above = reader.pop()
        step(reader, reader.pop(), above)

    return taken


def _tuple(length: int) -> Callable[[Reader, Any], None]:
    def taken(reader: Reader, argument: Any) -> None:
        items = [reader.pop() for _ in range(length)]
        reader.push(tuple(reversed(items)))

    return taken


def _pairs(reader: Reader) -> None:
    items = reader.to_mark()
    reader.push({})
    reader.set_items(items)


def _set_item(reader: Reader) -> None:
    value, key = reader.pop(), reader.pop()
    reader.set_items([key, value])


_STEPS: dict[str, Callable[[Reader, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda reader, argument: None),
    # values
    **dict.fromkeys(
        (
            *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
            *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
            *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        ),
        lambda reader, argument: reader.push(argument),
    ),
    "NONE": lambda reader, argument: reader.push(None),
    "NEWTRUE": lambda reader, argument: reader.push(True),
    "NEWFALSE": lambda reader, argument: reader.push(False),
    # containers
    "EMPTY_LIST": lambda reader, argument: reader.push([]),
    "EMPTY_TUPLE": lambda reader, argument: reader.push(()),
    "EMPTY_DICT": lambda reader, argument: reader.push({}),
    "EMPTY_SET": lambda reader, argument: reader.push(set()),
    "LIST": lambda reader, argument: reader.push(reader.to_mark()),
    "TUPLE": lambda reader, argument: reader.push(tuple(reader.to_mark())),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "DICT": lambda reader, argument: _pairs(reader),
    "FROZENSET": lambda reader, argument: reader.frozen(reader.to_mark()),
    "APPEND": lambda reader, argument: reader.append([reader.pop()]),
    "APPENDS": lambda reader, argument: reader.append(reader.to_mark()),
    "SETITEM": lambda reader, argument: _set_item(reader),
    "SETITEMS": lambda reader, argument: reader.set_items(reader.to_mark()),
    "ADDITEMS": lambda reader, argument: reader.add(reader.to_mark()),
    # the stack and the memo
    "MARK": lambda reader, argument: reader.push(_MARK),
    "POP": lambda reader, argument: reader.drop(),
    "POP_MARK": lambda reader, argument: reader.drop_marked(),
    "DUP": lambda reader, argument: reader.push(reader.top()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda reader, place: reader.remember(int(place))),
    "MEMOIZE": lambda reader, argument: reader.remember_next(),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda reader, place: reader.recall(int(place))),
    # names and calls
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), lambda reader, code: reader.name("copyreg", f"extension {code}")),
    "GLOBAL": lambda reader, argument: reader.name(*argument.split(" ", 1)),
    "STACK_GLOBAL": _swapped(Reader.name),
    "REDUCE": _swapped(Reader.call),
    "NEWOBJ": _swapped(Reader.new),
    "NEWOBJ_EX": lambda reader, argument: _new_with_names(reader),
    "INST": _text_call,
    "OBJ": lambda reader, argument: _object(reader),
    "BUILD": lambda reader, argument: reader.fill(reader.pop()),
    "BINPERSID": lambda reader, argument: reader.persistent(reader.pop()),
}
"""What each instruction does. Those that need more than the file itself (buffers) are not among them."""
