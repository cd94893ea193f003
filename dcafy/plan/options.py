"""Options as frozen data: what a command asks for, and what a function takes, written down once.

A configuration is a frozen dataclass whose fields carry their help (:func:`setting`). ``dcafy.cli.configured`` makes
the command's options from it, so that the two cannot drift apart.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dcafy.errors import UsageError

__all__ = ["Conversion", "check_choices", "from_mapping", "nearest", "setting"]


def setting(
    default: Any, text: str, *, choices: tuple[str, ...] = (), metavar: str | None = None, short: str | None = None
) -> Any:
    """A field with a default, the help that the command shows, the values that it may have, and a short name."""
    metadata = {"help": text, "choices": choices, "metavar": metavar, "short": short}
    return dataclasses.field(default=default, metadata=metadata)


def nearest(name: str, known: tuple[str, ...] | list[str]) -> str:
    """`` Did you mean 'x'?`` for the known name most like ``name``; empty where none is.

    >>> nearest("adamv", ("adamw", "sgd"))
    " Did you mean 'adamw'?"
    """
    found = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {found[0]!r}?" if found else ""


def check_choices(configuration: Any) -> None:
    """Nothing; ``UsageError`` where a field has a value that is none of its choices."""
    for item in dataclasses.fields(configuration):
        value, choices = getattr(configuration, item.name), item.metadata.get("choices", ())
        if choices and value is not None and value not in choices:
            option = item.name.replace("_", "-")
            raise UsageError(
                f"--{option} {value!r} is not known.{nearest(str(value), choices)} Use one of: {', '.join(choices)}."
            )


def from_mapping(cls: type[Any], data: Mapping[str, Any]) -> Any:
    """A configuration from data of the same names; ``UsageError`` for a name or a type that it does not have."""
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for name, value in data.items():
        if name not in fields:
            raise UsageError(f"{name!r} is no option of {cls.__name__}.{nearest(name, list(fields))}")
        kinds = str(fields[name].type).split(" | ")
        if not any(_is(value, kind) for kind in kinds):
            raise UsageError(f"{name} should be {' or '.join(kinds)}, not {value!r}.")
    return cls(**data)


_KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "bool": (bool,), "int": (int,), "float": (int, float)}


def _is(value: object, kind: str) -> bool:
    if kind == "None" or isinstance(value, bool):
        return value is None or kind == "bool"
    return isinstance(value, _KINDS[kind])


@dataclass(frozen=True)
class Conversion:
    """The options of :func:`dcafy.convert` and of the insertion before it."""

    attention: str | None = setting(
        None,
        "Put this attention into the network's residual units first.",
        choices=("se", "ge", "ge-theta", "sk", "cbam", "bam", "gc", "sge", "eca"),
    )
    attention_reduction: int = setting(16, "Channels over the width of the inserted attention's bottleneck.")
    where: str = setting(
        "auto",
        "Where attention is put: auto (every residual unit), or a glob of module paths such as 'layer3.*'.",
        metavar="GLOB",
    )
    init: str = setting(
        "identity",
        "How inserted attention starts: identity (an exact no-op) or paper (the paper's own form).",
        choices=("identity", "paper"),
    )
    schema: str = setting(
        "direct",
        "How a block's own context and what it hears are joined (paper 3.2).",
        choices=("direct", "weighted", "softmax"),
    )
    channel_match: str = setting("fc2", "The layers that match widths (paper 3.3).", choices=("fc1", "fc2"))
    reduction: int = setting(16, "A block's channels over the hidden width of fc2.")
    min_hidden: int = setting(8, "The least hidden width of fc2, in channels.")
    spatial_match: str = setting("avg", "What shrinks maps (paper 3.3).", choices=("avg", "max", "conv"))
    dimension: str = setting("all", "What is connected (paper 4.2).", choices=("channel", "spatial", "all"))
    topology: str = setting(
        "chain", "Who hears whom: each block the one before it, or all before it.", choices=("chain", "dense")
    )
