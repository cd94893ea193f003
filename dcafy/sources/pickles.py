"""Pickles from strangers: what they ask for is read without running them, and only then are they opened.

A pickle is a program: it names things of Python's (its *globals*) and calls them. ``torch.load`` with
``weights_only=True`` lets it name little more than tensors. A whole network also names its classes;
those of torch.nn, torchvision and timm are lent to it for the one load. It may make empty instances of
them and fill these in, which is all that a saved network does; it may not call them, because a
constructor runs code on arguments that the file chooses.
"""

from __future__ import annotations

import _compat_pickle
import contextlib
import importlib
import pickletools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

import torch
from torch import nn

PACKAGES = ("torch.nn", "torchvision", "timm")
"""Where a network's classes may come from."""


@dataclass(frozen=True)
class PickleContents:
    """What a pickle would do, told by reading it.

    ``names``     every global it names, as ``module.name``
    ``calls``     the globals that it calls, with arguments or as a function
    ``protocol``  the pickle protocol it is written in
    """

    names: frozenset[str]
    calls: frozenset[str]
    protocol: int


class _Global(str):
    """On the stack: a global, by its full name."""


class _Text(str):
    """On the stack: a piece of text, which may become part of a global's name."""


_OTHER, _MARK, _EMPTY = object(), object(), object()
"""On the stack: anything else, a mark, the empty tuple."""

COMPUTED = "something that it computes"
"""Stands for a callable that has no name because the pickle makes it."""


class _Reader:
    """A pickle machine that keeps track of globals and forgets everything else."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.names: set[str] = set()
        self.calls: set[str] = set()
        self.protocol = 0

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        special = _STEPS.get(opcode.name)
        if special is not None:
            special(self, argument)
        else:
            self.stack_effect(opcode, argument)

    def stack_effect(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """What the instruction takes from the stack and puts on it, by pickletools' own table."""
        takes = opcode.stack_before
        if pickletools.markobject in takes:
            self.to_mark()
            takes = takes[: takes.index(pickletools.markobject)]
        for _ in takes:
            self.stack.pop()
        for kind in opcode.stack_after:
            if kind is pickletools.pyunicode:
                self.stack.append(_Text(argument))
            else:
                self.stack.append(_MARK if kind is pickletools.markobject else _OTHER)

    def to_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.stack.pop()) is not _MARK:
            items.insert(0, item)
        return items

    def push_global(self, module: str, name: str) -> None:
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        self.stack.append(_Global(f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"))
        self.names.add(self.stack[-1])

    def under(self, arguments: int) -> Any:
        """What lies under so many arguments, taken from the stack with them."""
        del self.stack[-arguments:]
        return self.stack.pop()

    def call(self, what: Any) -> None:
        """Notes that it is called; what comes of that lies on the stack."""
        self.calls.add(str(what) if isinstance(what, _Global) else COMPUTED)
        self.stack.append(_OTHER)


def _global(reader: _Reader, argument: str) -> None:
    module, _, name = argument.partition(" ")
    reader.push_global(module, name)


def _stack_global(reader: _Reader, argument: None) -> None:
    name, module = reader.stack.pop(), reader.stack.pop()
    if isinstance(name, _Text) and isinstance(module, _Text):
        reader.push_global(module, name)
    else:
        reader.names.add(COMPUTED)
        reader.stack.append(_OTHER)


def _new(reader: _Reader, argument: None) -> None:
    arguments, cls = reader.stack.pop(), reader.stack.pop()
    if arguments is _EMPTY and isinstance(cls, _Global):
        reader.stack.append(_OTHER)
    else:
        reader.call(cls)


def _instance(reader: _Reader, argument: str) -> None:
    reader.to_mark()
    _global(reader, argument)
    reader.call(reader.stack.pop())


def _protocol(reader: _Reader, argument: int) -> None:
    reader.protocol = argument


def _put(reader: _Reader, argument: int | str) -> None:
    reader.memo[int(argument)] = reader.stack[-1]


_STEPS: dict[str, Callable[[_Reader, Any], None]] = {
    "PROTO": _protocol,
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), lambda reader, code: reader.push_global("copyreg", f"extension {code}")),
    "REDUCE": lambda reader, argument: reader.call(reader.under(1)),
    "NEWOBJ": _new,
    "NEWOBJ_EX": lambda reader, argument: reader.call(reader.under(2)),
    "INST": _instance,
    "OBJ": lambda reader, argument: reader.call(reader.to_mark()[0]),
    "EMPTY_TUPLE": lambda reader, argument: reader.stack.append(_EMPTY),
    "DUP": lambda reader, argument: reader.stack.append(reader.stack[-1]),
    "POP": lambda reader, argument: cast("None", reader.stack.pop()),
    "POP_MARK": lambda reader, argument: cast("None", reader.to_mark()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _put),
    "MEMOIZE": lambda reader, argument: _put(reader, len(reader.memo)),
    **dict.fromkeys(
        ("GET", "BINGET", "LONG_BINGET"), lambda reader, place: reader.stack.append(reader.memo[int(place)])
    ),
}
"""The instructions that move globals about; all others are known well enough by their stack effect."""


def read_pickle(stream: IO[bytes]) -> PickleContents:
    """What the next pickle in the stream names and calls; nothing of it is run.

    ``ValueError`` or ``LookupError`` where it is not a pickle, or a damaged one.
    """
    reader = _Reader()
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            reader.step(opcode, argument)
    except MemoryError as error:  # a count of bytes that nobody has
        raise ValueError("it says that it holds more than there is") from error
    return PickleContents(frozenset(reader.names), frozenset(reader.calls), reader.protocol)


# --- what may be lent to a pickle -------------------------------------------------------------------

_PLAIN = frozenset(
    {
        "_codecs.encode",
        "builtins.bytearray",
        "builtins.complex",
        "builtins.set",
        "collections.Counter",
        "collections.OrderedDict",
        "torch.Size",
        "torch.device",
        "torch.nn.parameter.Parameter",
        "torch.serialization._get_layout",
        "torch._tensor._rebuild_from_type_v2",
    }
)


def _belongs_to_tensors(name: str) -> bool:
    """Whether ``weights_only`` itself knows this global; torch has the last word when it loads."""
    module, _, last = name.rpartition(".")
    return (
        name in _PLAIN
        or (module == "torch._utils" and last.startswith("_rebuild_"))
        or (
            module.split(".")[0] == "torch"
            and last.endswith(("Storage", "Tensor"))
            and not module.startswith("torch.nn")
        )
        or (module == "torch" and isinstance(getattr(torch, last, None), torch.dtype | torch.qscheme))
    )


def lent_classes(contents: PickleContents) -> tuple[dict[str, type[nn.Module]], tuple[str, ...]]:
    """The network classes that the pickle names, and what else it wants and must not have."""
    classes: dict[str, type[nn.Module]] = {}
    wanted = [name for name in contents.calls if name == COMPUTED]
    for name in contents.names:
        if _belongs_to_tensors(name):
            continue
        found = _module_class(name)
        if found is None:
            wanted.append(name)
        elif name in contents.calls:
            wanted.append(f"{name} (called with arguments)")
        else:
            classes[name] = found
    return classes, tuple(sorted(wanted))


def _module_class(name: str) -> type[nn.Module] | None:
    """The ``nn.Module`` class of that full name, if torch.nn, torchvision or timm has it.

    No module outside these packages is imported because a pickle names it.
    """
    module_name, _, class_name = name.rpartition(".")
    within = any(f"{module_name}.".startswith(f"{package}.") for package in PACKAGES)
    if not within or not all(part.isidentifier() for part in name.split(".")) or "__main__" in name:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError:
        return None
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        return None
    # A class that these packages only import is somebody else's; programs in disguise rebuild code.
    theirs = any(f"{found.__module__}.".startswith(f"{package}.") for package in PACKAGES)
    return found if theirs and not issubclass(found, torch.jit.ScriptModule | torch.fx.GraphModule) else None


@contextlib.contextmanager
def _lent(classes: dict[str, type[nn.Module]]) -> Iterator[None]:
    """Inside it ``torch.load`` makes instances of these classes, and afterwards no longer."""
    before = list(torch.serialization.get_safe_globals())
    # PyTorch 2.4 does not yet know sets by itself, and every network's state has one.
    own: list[Any] = [set]
    own += [(cls, name) if name != f"{cls.__module__}.{cls.__qualname__}" else cls for name, cls in classes.items()]
    torch.serialization.add_safe_globals(own)
    try:
        yield
    finally:
        # What else came to be allowed meanwhile, by an import of torch's own, stays allowed.
        kept = [one for one in torch.serialization.get_safe_globals() if one in before or one not in own]
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(kept)


def load_pickled(file: IO[bytes], classes: Iterable[tuple[str, type[nn.Module]]]) -> Any:
    """What ``torch.load`` makes of the file with ``weights_only=True`` and these classes."""
    with warnings.catch_warnings(), _lent(dict(classes)):
        warnings.simplefilter("ignore")
        return torch.load(file, map_location="cpu", weights_only=True)
