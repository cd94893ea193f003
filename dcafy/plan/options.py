"""Every option once, as frozen data: its default, its choices and bounds, and its help.

An option is a field of a frozen dataclass (:func:`setting`). The command's options and their help are made from these
fields (``dcafy.cli.configured``), so is the signature of :func:`dcafy.convert`; a link's own settings are those of
:class:`Overrides`.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from dcafy.errors import UsageError
from dcafy.records import LATER
from dcafy.wording import nearest, shown

Dimension = Literal["channel", "spatial"]
"""What attention maps vary over."""

Init = Literal["identity", "paper"]
"""How inserted attention starts: as an exact no-op, or in the paper's own form and initialisation."""


def setting(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    above: float | None = None,
    below: float = math.inf,
    metavar: str | None = None,
    short: str | None = None,
    also: tuple[str, ...] = (),
) -> Any:
    """A field with a default, the help that the command shows, the values that it may have, and other names.

    A number with bounds is at least ``least`` (or more than ``above``) and below ``below``.
    """
    bounds = None if least is above is None else (least, above, below)
    names = (*((short,) if short else ()), *also)
    metadata = {"help": text, "choices": choices, "metavar": metavar, "names": names, "bounds": bounds}
    return dataclasses.field(default=default, metadata=metadata)


def meant(value: Any, choices: Collection[str]) -> Any:
    """The choice that a text means, in whatever case it was written; other values are told by :func:`check`.

    >>> meant("SE", ("se", "ge")), meant("sse", ("se", "ge"))
    ('se', 'sse')
    """
    return next((c for c in choices if isinstance(value, str) and c.lower() == value.lower()), value)


def check(configuration: Any, tables: Mapping[str, Collection[str]] | None = None, *, dashes: bool = True) -> None:
    """Nothing; ``UsageError`` where a field has a value that is none of its choices, or a number out of bounds.

    ``tables``: choices of fields that do not say them themselves. ``dashes``: whether messages name the command's
    option, or the argument in Python.
    """
    for item in dataclasses.fields(configuration):
        value, meta = getattr(configuration, item.name), item.metadata
        option = f"--{item.name.replace('_', '-')}" if dashes else item.name
        choices = meta["choices"] or (tables or {}).get(item.name, ())
        may_be_none = value is None and item.default is None
        if choices and not may_be_none and not (isinstance(value, str) and value in choices):
            asked = f"{option} {shown(value)}" if dashes else f"{option}={shown(value)}"
            known = list(choices)
            like = nearest(value[:100] if isinstance(value, str) else shown(value), known)
            raise UsageError(f"{asked} is not known.{like} Use one of: {', '.join(known)}.")
        if meta["bounds"] and not may_be_none:
            _check_bounds(option, value, *meta["bounds"], whole=str(item.type).startswith("int"))


_MOST = 2**63
"""What no whole number reaches: torch counts up to there, and so do the readers of a run's file."""


def _check_bounds(
    option: str, value: Any, least: float | None, above: float | None, below: float, *, whole: bool
) -> None:
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    lowest = -math.inf if least is None else least
    if type(value) is int and value >= _MOST:
        below = min(below, _MOST)
    if is_number and value >= lowest and (above is None or value > above) and value < below:
        return
    low = f"above {above:g}" if least is None else f"at least {least:g}"
    high = f" and below {below:g}" if below < math.inf else "" if whole else " and finite"
    kind = "a whole number of " if whole and not (option.startswith("--") and is_number) else ""
    raise UsageError(f"{option} must be {kind}{low}{high}, not {shown(value)}.")


@dataclass(frozen=True)
class Overrides:
    """The options of a conversion that one link may have otherwise; ``None``: as the conversion has it."""

    schema: str | None = None
    channel_match: str | None = None
    reduction: int | None = None
    min_hidden: int | None = None
    spatial_match: str | None = None
    message: str | None = dataclasses.field(default=None, metadata=LATER)


@dataclass(frozen=True)
class Linking:
    """The options of a conversion that a link may override."""

    schema: str = setting("direct", "How a block's own context and what it hears are joined (paper 3.2).")
    channel_match: str = setting("fc2", "The layers that match widths (paper 3.3).", choices=("fc1", "fc2"))
    reduction: int = setting(16, "A block's channels over the hidden width of fc2.", least=1)
    min_hidden: int = setting(8, "The least hidden width of fc2, in channels.", least=1, below=16_385)
    spatial_match: str = setting("avg", "What shrinks maps (paper 3.3).", choices=("avg", "max", "conv"))
    message: str = setting(
        "plain",
        "What of a message is heard: plain (all of it, as in the paper) or centred (how it differs between images). "
        "[default: plain; where dcafy finetune trains a classifier: centred]",
        choices=("plain", "centred"),
    )

    def overridden(self, own: Overrides) -> dict[str, Any]:
        """Every option by its name, with those that ``own`` sets in the place of these."""
        chosen = {item.name: getattr(own, item.name) for item in dataclasses.fields(Overrides)}
        return {name: getattr(self, name) if value is None else value for name, value in chosen.items()}


@dataclass(frozen=True)
class Inserting:
    """The options of the insertion before a conversion."""

    attention: str | None = setting(None, "Put this attention into the network's residual units first.")
    attention_reduction: int | None = setting(
        16, "Channels over the width of the inserted attention's bottleneck; 0 leaves that of gc out."
    )
    where: str = setting(
        "auto",
        "Where attention is put: auto (every residual unit), or a glob of module paths such as 'layer3.*'.",
        metavar="GLOB",
    )
    attention_init: str = setting(
        "identity",
        "How inserted attention starts: identity (an exact no-op) or paper (the paper's own form).",
        choices=get_args(Init),
        short="--init",
    )


@dataclass(frozen=True)
class Conversion(Linking, Inserting):
    """The options of :func:`dcafy.convert` and of the insertion before it."""

    dimension: str = setting("all", "What is connected (paper 4.2).", choices=(*get_args(Dimension), "all"))
    topology: str = setting(
        "chain",
        "What each block hears.",
    )

    def said(self) -> dict[str, Any]:
        """The options that are others than the defaults; of an insertion, where there is one."""
        options = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        silent = _OF_INSERTION if self.attention is None else ()
        return {name: value for name, value in options.items() if name not in silent and value != _DEFAULTS[name]}


_DEFAULTS = dataclasses.asdict(Conversion())
_OF_INSERTION = [item.name for item in dataclasses.fields(Inserting) if item.name != "attention"]


def require_heeded(options: Inserting, given: Iterable[str], *, dashes: bool) -> None:
    """``UsageError`` where an option of a conversion was given that nothing would go by.

    ``dashes``: whether the message names the command's options.
    """

    def written(name: str) -> str:
        return f"--{name.replace('_', '-')}" if dashes else name

    given = set(given)
    idle = [] if options.attention is not None else [name for name in _OF_INSERTION if name in given]
    if idle:
        raise UsageError(
            f"{written(idle[0])} is for attention that is put in, and none is. Add {written('attention')}, or leave it "
            "out."
        )
    hears_itself = isinstance(options, Conversion) and (options.topology, options.message) == ("own", "plain")
    if hears_itself and "message" in given:
        raise UsageError(
            f"With {written('topology')} own each block hears itself, of which a plain message is G once more. Leave "
            f"{written('message')} out, or use centred."
        )


Function = TypeVar("Function", bound=Callable[..., Any])


def takes(
    configuration: type[Any], tables: Mapping[str, Collection[str]] | None = None
) -> Callable[[Function], Function]:
    """What gives a function's ``**options`` the names, choices and defaults of a configuration's fields, to be seen.

    ``tables``: choices of fields that do not say them themselves.
    """

    def kind(item: dataclasses.Field[Any]) -> Any:
        choices = tuple(item.metadata["choices"] or (tables or {}).get(item.name, ()))
        if not choices:
            return item.type
        return Literal[choices] if item.default is not None else Literal[choices] | None

    def decorated(function: Function) -> Function:
        own = inspect.signature(function)
        named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        options = [
            inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=kind(item))
            for item in dataclasses.fields(configuration)
        ]
        function.__signature__ = own.replace(parameters=[*named, *options])  # type: ignore[attr-defined]
        return function

    return decorated
