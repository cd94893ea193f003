"""Attention that was inserted into a network: where it is, and which of it still lets everything through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from dcafy.attention.kinds import ATTENTIONS, KIND
from dcafy.graph.paths import joined


def inserted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of all attention that :func:`dcafy.insert` put into ``model``."""
    for path, module in model.named_modules():
        if module.__dict__.get(KIND) in ATTENTIONS:
            yield path, module


def hands_on(model: nn.Module) -> bool:
    """Whether attention was put in whose units hand a state on: it is connected by nature."""
    return any(ATTENTIONS[module.__dict__[KIND]].along is not None for _, module in inserted(model))


def handed_on(model: nn.Module) -> str:
    """What was put in that hands a state on, in how many modules, and its parameters, in words."""
    found: dict[str, dict[int, int]] = {}
    counts: dict[str, int] = {}
    for _, module in inserted(model):
        kind = module.__dict__[KIND]
        if ATTENTIONS[kind].along is not None:
            counts[kind] = counts.get(kind, 0) + 1
            found.setdefault(kind, {}).update((id(p), p.numel()) for p in module.parameters())
    told = (f"{kind} in {counts[kind]} modules, {sum(own.values()):,} parameters" for kind, own in found.items())
    return "; ".join(told)


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
