"""Which networks of torchvision and timm have what attention, found in the networks themselves."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dcafy.conversion import inspect
from dcafy.draws import OwnDraws
from dcafy.errors import DcafyError, UsageError
from dcafy.graph.rewritten import original_class
from dcafy.plan.plan import Plan
from dcafy.wording import nearest, one_line
from dcafy.zoos.packages import ZOOS, installed_names
from dcafy.zoos.specs import parse

_KINDS: tuple[tuple[str, str], ...] = (
    ("se", r"(effective)?(se|squeezeexcit\w*|concurrentspatial\w*)(module|block|layer)?\d*"),
    ("eca", r"c?ecam?(module|block|layer)?"),
    ("cbam", r"(light)?(cbam|channelattn|spatialattn|lightchannelattn|lightspatialattn)(module)?"),
    ("gc", r"globalcontext|gc(module|block)?"),
    ("ge", r"gatherexcite|ge(module|block)?"),
    ("sk", r"selectivekernel(attn)?|sk\w*"),
    ("bam", r"bam"),
    ("sge", r"sge\w*"),
)
"""Kind of attention -> what classes of it are called, in lower case: for the list, not for finding blocks."""


@dataclass(frozen=True)
class Listed:
    """A network, and how many attention blocks of which kinds it has: found by dataflow, named after their classes.

    ``failed``: why it could not be looked at.
    """

    spec: str
    attention: dict[str, int]
    connections: int = 0
    failed: str = ""


def kinds() -> tuple[str, ...]:
    """The names that ``--attention`` knows; a class's own name is taken as well."""
    return tuple(kind for kind, _ in _KINDS)


def specs_that_match(pattern: str) -> list[str]:
    """The networks whose spec or name matches the glob, as specs; ``UsageError`` where none does."""
    known = [f"{prefix}:{name}" for prefix, zoo in ZOOS.items() for name in _names(prefix, zoo)]
    found = [spec for spec in known if _matches(spec, pattern)]
    if not found:
        hint = nearest(pattern.strip("*"), known + [spec.partition(":")[2] for spec in known])
        raise UsageError(f"No network of torchvision or timm matches {pattern!r}.{hint}")
    return found


def _names(prefix: str, zoo: Any) -> Sequence[str]:
    try:
        return installed_names(zoo)
    except UsageError:
        return ()


def _matches(spec: str, pattern: str) -> bool:
    name = spec if ":" in pattern else spec.partition(":")[2]
    return fnmatch.fnmatchcase(name, pattern)


def listed(specs: Sequence[str], attention: str | None, advance: Callable[[], None]) -> Iterator[Listed]:
    """Each of the networks with what it has; with ``attention`` only those that have it.

    ``advance`` is called after each one that was looked at. Nothing is fetched and no data is computed.
    """
    for spec in specs:
        row = _looked_at(spec, attention)
        advance()
        if row is not None:
            yield row


def _looked_at(spec: str, attention: str | None) -> Listed | None:
    try:
        with OwnDraws():
            model = parse(spec, {}).build(on_meta=True)
            if attention is not None and not any(_is(module, attention) for module in model.modules()):
                return None
            plan = _plan(model, spec)
    except Exception as error:  # builders fail in any way; the row says so
        return None if attention is not None else Listed(spec, {}, failed=one_line(error)[:100])
    counts: dict[str, int] = {}
    for block in plan.blocks:
        name = kind_of(_module(model, block.name))
        counts[name] = counts.get(name, 0) + 1
    if attention is not None and not any(attention.lower() == kind.lower() for kind in counts):
        return None
    return Listed(spec, counts, len(plan.links))


def _plan(model: nn.Module, spec: str) -> Plan:
    try:
        return inspect(model)
    except DcafyError:  # detectors look at their values
        return inspect(parse(spec, {}).build())


def _module(model: nn.Module, block: str) -> nn.Module:
    path = block.partition("#")[0].partition("[")[0]
    return model if path == "root" else model.get_submodule(path)


def kind_of(module: nn.Module) -> str:
    """The kind of attention, by the name of the class; the name itself where it is of no known kind."""
    name = original_class(module).__name__
    return next((kind for kind, pattern in _KINDS if re.fullmatch(pattern, name.lower())), name)


def _is(module: nn.Module, attention: str) -> bool:
    return kind_of(module).lower() == attention.lower()
