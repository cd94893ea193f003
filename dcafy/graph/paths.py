"""Paths of modules: their parts, joined and taken apart, and what stands at one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn


def joined(*parts: str) -> str:
    """The parts as one path; empty ones are left out, as the root's own path is empty.

    >>> joined("", "layer1", "0.se")
    'layer1.0.se'
    """
    return ".".join(part for part in parts if part)


def above(path: str) -> Iterator[str]:
    """The paths of what the module at ``path`` lies in, the nearest first; the last is the root's.

    >>> list(above("layer1.0.se"))
    ['layer1.0', 'layer1', '']
    """
    while path:
        path = path.rpartition(".")[0]
        yield path


def within(path: str, around: str) -> bool:
    """Whether ``path`` is that of the module ``around``, or of one inside it."""
    return not around or f"{path}.".startswith(f"{around}.")


def below(path: str, around: str) -> str:
    """``path`` as seen from the module ``around`` that it lies in.

    >>> below("layer1.0.se", "layer1")
    '0.se'
    """
    return path[len(around) + 1 :] if around and within(path, around) else path


def outermost(paths: Iterable[str]) -> tuple[str, ...]:
    """The modules, by path, that lie inside no other one of them."""
    known = tuple(dict.fromkeys(paths))
    return tuple(path for path in known if not any(other != path and within(path, other) for other in known))


def holder(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds the one at ``path``, and the name it has there."""
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def put(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """``model`` with ``module`` in the place of what stands at ``path``; ``module`` itself for the root."""
    if not path:
        return module
    parent, name = holder(model, path)
    parent._modules[name] = module
    return model


def free_name(parent: nn.Module, name: str) -> str:
    """``name``, changed where ``parent`` has something else under it (a block may be called ``alpha``)."""
    while hasattr(parent, name):
        name += "_"
    return name
