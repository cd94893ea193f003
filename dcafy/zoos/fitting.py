"""A state dict and the architecture it belongs to: loading it, or finding which one that is."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from dcafy.errors import SourceError, UsageError
from dcafy.wording import few, printable
from dcafy.zoos.packages import ZOOS, build_on_meta, installed_names, quiet
from dcafy.zoos.specs import Blueprint

log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]
T = TypeVar("T")

_TOLERATED = 4
"""Parameters of another shape that a search lets pass: the weight and bias of up to two classifiers."""


@dataclass(frozen=True)
class Misfit:
    """Where a state dict departs from what a network expects.

    ``shapes``  key -> (shape in the state dict, shape in the network)
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def __str__(self) -> str:
        resized = [f"{key} ({_size(here)} instead of {_size(there)})" for key, (here, there) in self.shapes.items()]
        kinds = {"missing": self.missing, "not expected": self.unexpected, "of another shape": resized}
        shown = {kind: [printable(key) for key in keys] for kind, keys in kinds.items() if keys}
        return "; ".join(f"{len(keys)} {kind}: {few(keys, 4)}" for kind, keys in shown.items())

    @property
    def classes(self) -> int | None:
        """The number of classes, where another one explains every difference."""
        if self.missing or self.unexpected or not self.shapes or len(self.shapes) > _TOLERATED:
            return None
        pairs = list(self.shapes.values())
        if any(not here or len(here) != len(there) or here[1:] != there[1:] for here, there in pairs):
            return None
        counts = {(here[0], there[0]) for here, there in pairs}
        return next(iter(counts))[0] if len(counts) == 1 else None


def same_shape(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks have the same keys, shapes and plain settings of their own."""

    def plain(model: nn.Module) -> dict[str, object]:
        kinds = (bool, int, float, str)
        return {k: v for k, v in vars(model).items() if isinstance(v, kinds) and k != "training"}

    return shapes_of(one.state_dict()) == shapes_of(other.state_dict()) and plain(one) == plain(other)


def load_into(blueprint: Blueprint, state: Mapping[str, torch.Tensor], spec: str) -> tuple[nn.Module, Blueprint]:
    """The blueprint's network with these weights in it, and the blueprint that it took.

    Where nothing but the number of classes differs, the network is built with that number.
    ``SourceError`` names every other difference.
    """
    model = blueprint.build()
    fitted = _aligned(state, shapes_of(model.state_dict()))
    differs = _leniently(shapes_of(fitted), shapes_of(model.state_dict()))
    if differs.classes is not None and blueprint.takes("num_classes"):
        headed = blueprint.with_settings(num_classes=differs.classes)
        with contextlib.suppress(UsageError):
            candidate = headed.build()
            if not _leniently(shapes_of(fitted), shapes_of(candidate.state_dict())):
                log.info("%s has %d classes: %s is built with that many", spec, differs.classes, blueprint.spec)
                model, blueprint, differs = candidate, headed, Misfit((), (), {})
    if differs:
        raise SourceError(
            f"The weights in {spec!r} do not fit {blueprint.spec!r}: {differs}. Leave --arch out to see which "
            "architectures fit, or give the arguments of the one it was trained with as --set key=value."
        )
    try:
        model.load_state_dict(fitted, strict=True)
    except (RuntimeError, TypeError) as error:
        raise SourceError(f"The weights in {spec!r} could not be loaded into {blueprint.spec!r}: {error}") from error
    return model, blueprint


def architectures_that_fit(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Specs of the torchvision and timm architectures whose keys and shapes are those of ``state``.

    Every architecture is built on the meta device, and given up at the first few parameters whose shape
    the state dict does not have: that takes seconds for more than a thousand of them.
    """
    shapes = shapes_of(state)
    candidates = [(prefix, name) for prefix in ZOOS for name in _comparable(prefix)]
    log.info("comparing keys and shapes with %d architectures", len(candidates))
    found = []
    with torch.random.fork_rng(devices=[]), quiet(), _progress(len(candidates)) as advance:
        for prefix, name in candidates:
            advance()
            if _fits(Blueprint(prefix, name), shapes):
                found.append(f"{prefix}:{name}")
    return found


def _comparable(prefix: str) -> list[str]:
    """The names whose architectures a state dict is compared with; none where the zoo is not installed."""
    try:
        names = installed_names(ZOOS[prefix])
    except UsageError as error:
        log.info("%s Its architectures are not compared.", error)
        return []
    # torchvision's quantizable networks have the keys of the plain ones.
    return [name for name in names if not name.startswith("quantized_")]


class _Different(Exception):
    """An architecture that is being built has turned out to be another one."""


def _fits(blueprint: Blueprint, shapes: Shapes) -> bool:
    model = _built_unless_different(blueprint, shapes)
    if model is None:
        return False
    expected = shapes_of(model.state_dict())
    given = _aligned(shapes, expected)
    differs = _leniently(given, expected)
    if differs.classes is None:
        return not differs
    headed = _built_unless_different(blueprint.with_settings(num_classes=differs.classes), given)
    return headed is not None and not _leniently(given, shapes_of(headed.state_dict()))


def _built_unless_different(blueprint: Blueprint, shapes: Shapes) -> nn.Module | None:
    """The network on the meta device, or ``None`` as soon as its parameters cannot be those of ``shapes``."""
    known = set(shapes.values())
    # Some networks make parameters that they throw away again, hence not the exact number.
    allowed = len(shapes) + len(shapes) // 4 + 16
    seen = strange = 0

    def watch(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal seen, strange
        if parameter is not None:
            seen += 1
            strange += tuple(parameter.shape) not in known
            if strange > _TOLERATED or seen > allowed:
                raise _Different

    assert blueprint.zoo is not None
    zoo, settings = ZOOS[blueprint.zoo], dict(blueprint.settings)

    def build() -> nn.Module:
        nonlocal seen, strange
        seen = strange = 0
        return zoo.build(blueprint.name, None, settings)

    watching = register_module_parameter_registration_hook(watch)
    try:
        return build_on_meta(build)
    except _Different:
        return None
    except Exception as error:
        log.debug("%s could not be built for comparison: %s", blueprint.spec, error)
        return None
    finally:
        watching.remove()


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    with bar:
        task = bar.add_task("architectures", total=total)
        yield lambda: bar.advance(task)


def shapes_of(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Key -> shape, of the tensors in a state dict."""
    return {key: tuple(value.shape) for key, value in state.items() if isinstance(value, torch.Tensor)}


def _aligned(state: Mapping[str, T], expected: Shapes) -> Mapping[str, T]:
    """``state`` without a wrapper's name in front of every key, where that is what the network calls them."""
    fronts = {key.partition(".")[0] for key in state}
    if len(fronts) == 1 and not any(key in expected for key in state):
        bare = {key.partition(".")[2]: value for key, value in state.items()}
        if any(key in expected for key in bare):
            return bare
    return state


def difference(given: Shapes, expected: Shapes) -> Misfit:
    """Where ``given`` departs from what a network expects: keys and shapes, without any leniency."""
    return Misfit(
        missing=tuple(key for key in expected if key not in given),
        unexpected=tuple(key for key in given if key not in expected),
        shapes={k: (given[k], expected[k]) for k in given if k in expected and given[k] != expected[k]},
    )


def _leniently(given: Shapes, expected: Shapes) -> Misfit:
    # Batch norms of networks saved before PyTorch 0.4.1 did not count; loading them starts at zero.
    uncounted = {key for key in expected if key not in given and key.endswith("num_batches_tracked")}
    return difference(given, {key: shape for key, shape in expected.items() if key not in uncounted})


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "one number"
