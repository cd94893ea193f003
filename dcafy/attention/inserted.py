"""Attention that was inserted into a network: where it is, and which of it still lets everything through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from dcafy.attention.kinds import ATTENTIONS, INSERTED, KIND, Insertion
from dcafy.emit.relay import Relay
from dcafy.graph.paths import joined
from dcafy.wording import counted


def insertions_of(model: nn.Module) -> tuple[Insertion, ...]:
    """The calls of :func:`dcafy.insert` that ``model`` went through."""
    found: tuple[Insertion, ...] = getattr(model, INSERTED, ())
    return found


def inserted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of all attention that :func:`dcafy.insert` put into ``model``."""
    for path, module in model.named_modules():
        if module.__dict__.get(KIND) in ATTENTIONS:
            yield path, module


def kinds_inserted(model: nn.Module) -> set[str]:
    """The names of the attentions that were put into ``model``."""
    return {module.__dict__[KIND] for _, module in inserted(model)}


def hands_on(model: nn.Module) -> bool:
    """Whether attention was put in whose units hand a state on: it is connected by nature."""
    return any(ATTENTIONS[kind].along is not None for kind in kinds_inserted(model))


@dataclass(frozen=True)
class HandedOn:
    """Attention that was put in and hands a state on.

    ``kind``        its name
    ``what``        what it is, and where it comes from
    ``hears``       its modules, by path -> the units whose state each of them hears
    ``parameters``  of all of them; what they share is counted once
    """

    kind: str
    what: str
    hears: dict[str, tuple[str, ...]]
    parameters: int

    def __str__(self) -> str:
        counts = f"{counted(len(self.hears), 'module')}, {self.parameters:,} parameters"
        return f"{self.kind} in {counts}: it hands a state on from each to the next"


def handed_on(model: nn.Module) -> tuple[HandedOn, ...]:
    """What was put in that hands a state on, one for each kind."""
    kinds: dict[str, dict[str, nn.Module]] = {}
    for path, module in inserted(model):
        kind = module.__dict__[KIND]
        if ATTENTIONS[kind].along is not None:
            kinds.setdefault(kind, {})[path] = module
    return tuple(
        HandedOn(
            kind,
            ATTENTIONS[kind].what,
            {path: _relay(module).hears for path, module in modules.items()},
            sum({id(p): p.numel() for module in modules.values() for p in module.parameters()}.values()),
        )
        for kind, modules in kinds.items()
    )


def hearing_states(model: nn.Module) -> dict[str, Relay]:
    """Inserted module, by path -> where it hears the state of the unit before it; without those that only tell."""
    found = {path: _relay(model.get_submodule(path)) for one in handed_on(model) for path in one.hears}
    return {path: relay for path, relay in found.items() if relay.hears}


def _relay(module: nn.Module) -> Relay:
    relay: Relay = module.relay  # type: ignore[assignment]
    return relay


def inserted_modules(model: nn.Module) -> set[int]:
    """The identities of all modules that inserted attention is made of."""
    return {id(part) for _, module in inserted(model) for part in module.modules()}


def inserted_parameters(model: nn.Module) -> set[int]:
    """The identities of all parameters that inserted attention has."""
    return {id(parameter) for _, module in inserted(model) for parameter in module.parameters()}


def silent(model: nn.Module, blocks: Iterable[str]) -> frozenset[str]:
    """Those of the blocks whose T is the same whatever G is: inserted as a no-op, and not trained since."""
    found = dict(inserted(model))
    return frozenset(name for name in blocks if _is_silent(name.partition("#")[0], found))


def _is_silent(block: str, found: dict[str, nn.Module]) -> bool:
    root = next((path for path in found if f"{block}.".startswith(f"{path}.")), None)
    if root is None:
        return False
    paths = ATTENTIONS[found[root].__dict__[KIND]].silent
    own = [path for path in paths if joined(root, path).startswith(f"{block}.")] or paths
    layers = [found[root].get_submodule(path) for path in own]
    return bool(layers) and all(_is_zero(parameter) for layer in layers for parameter in layer.parameters())


def _is_zero(parameter: nn.Parameter) -> bool:
    return parameter.device.type != "meta" and not parameter.any()
