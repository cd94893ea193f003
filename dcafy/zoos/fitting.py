"""A state dict and the architecture it belongs to: loading it, or finding which one that is."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from dcafy.draws import OwnDraws
from dcafy.errors import SourceError, UsageError
from dcafy.wording import few, short
from dcafy.zoos.packages import ZOOS, build_on_meta, installed_names, quiet
from dcafy.zoos.specs import NOTES, Blueprint, has_weights_now

log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]

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
        resized = [
            f"{short(key)} ({_size(here)} instead of {_size(there)})" for key, (here, there) in self.shapes.items()
        ]
        kinds = {"missing": self.missing, "not expected": self.unexpected, "of another shape": resized}
        shown = {kind: [short(key) for key in keys] for kind, keys in kinds.items() if keys}
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
        return {k: v for k, v in vars(model).items() if isinstance(v, kinds) and k not in NOTES | {"training"}}

    return shapes_of(one.state_dict()) == shapes_of(other.state_dict()) and plain(one) == plain(other)


@dataclass(frozen=True)
class Fit:
    """How well weights fit a network, where they are taken from one place among others.

    ``prefix``    that place: what all of their keys begin with, ``""`` or with a dot at its end
    ``misfit``    where they depart from what the network expects
    ``agreeing``  how many tensors the network finds there, of the shape that it expects
    ``expected``  how many it has
    ``left_over`` keys elsewhere
    ``head``      whether all that departs is the classifier
    ``classes``   the number of classes that the network is built with because the weights have it
    """

    prefix: str
    misfit: Misfit
    agreeing: int
    expected: int
    left_over: tuple[str, ...]
    head: bool
    classes: int | None = None

    def __str__(self) -> str:
        """How well, in words."""
        count = f"all {self.expected}" if not self.misfit else f"{self.agreeing} of {self.expected}"
        start = f"{count} tensors" + (f" under {self.place!r}" if self.prefix else "")
        if self.misfit:
            start += ", another head" if self.head else f"; {self.misfit}"
        if self.classes is not None:
            start += f", with {self.classes} classes"
        return start + (f", {len(self.left_over)} left over: {_named(self.left_over)}" if self.left_over else "")

    @property
    def place(self) -> str:
        """The prefix as a user gives it."""
        return short(self.prefix.rstrip("."))


def load_into(
    blueprint: Blueprint, state: Mapping[str, torch.Tensor], spec: str, *, ignore_head: bool = False
) -> tuple[nn.Module, Blueprint]:
    """The blueprint's network with these weights in it, and the blueprint that it took.

    The network may be part of what ``state`` holds (``model.*`` beside a criterion): it is looked for. Where nothing
    but the number of classes differs, the network is built with that number; with ``ignore_head`` it keeps the head
    that it has. ``SourceError`` names every other difference, and asks which where there are several such networks.
    """
    model, shown = blueprint.build(), short(repr(spec), 200)
    fits = fitting(shapes_of(state), model)
    whole = [fit for fit in fits if not fit.misfit or (ignore_head and fit.head)]
    if not whole and not ignore_head:
        whole = [fit for fit in fits if fit.misfit.classes is not None]
        if whole and blueprint.takes("num_classes"):
            headed = blueprint.with_settings(num_classes=whole[0].misfit.classes)
            with contextlib.suppress(UsageError):
                candidate = headed.build()
                again = [fit for fit in fitting(shapes_of(state), candidate) if not fit.misfit]
                if again:
                    classes = whole[0].misfit.classes
                    log.info("%s has %d classes: %s is built with that many", shown, classes, blueprint.spec)
                    model, blueprint, whole = candidate, headed, again
        whole = [fit for fit in whole if not fit.misfit]
    chosen = _the_one(whole, state, blueprint, shown)
    if chosen is None:
        raise _does_not_fit(fits[0], blueprint, shown, ignore_head=ignore_head)
    if chosen.prefix:
        log.info("taking what %s has under %s: %s", shown, chosen.place, chosen)
    own = {key.removeprefix(chosen.prefix): value for key, value in state.items() if key.startswith(chosen.prefix)}
    if chosen.misfit:
        dropped = {*chosen.misfit.unexpected, *chosen.misfit.shapes}
        log.warning("the head of %s is new and untrained: %s in %s", blueprint.spec, chosen.misfit, shown)
        own = {**model.state_dict(), **{key: value for key, value in own.items() if key not in dropped}}
    try:
        model.load_state_dict(own, strict=True)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(
            f"The weights in {shown} could not be loaded into {blueprint.spec!r}: {short(str(error), 300)}"
        ) from error
    has_weights_now(model)
    return model, blueprint


def _the_one(whole: Sequence[Fit], state: Mapping[str, torch.Tensor], blueprint: Blueprint, shown: str) -> Fit | None:
    """The only fit, or the first of several that are the same tensors; ``SourceError`` asks which one it is."""

    def tensors(fit: Fit) -> dict[str, int]:
        return {k.removeprefix(fit.prefix): id(v) for k, v in state.items() if k.startswith(fit.prefix)}

    if any(tensors(fit) != tensors(whole[0]) for fit in whole[1:]):
        places = [fit.place or "(no prefix)" for fit in whole]
        raise SourceError(
            f"{shown} holds {len(whole)} networks that fit {blueprint.spec!r}: under {few(places, 6)}. Say which one "
            f"it is: --prefix {places[0]}."
        )
    return whole[0] if whole else None


def _does_not_fit(best: Fit, blueprint: Blueprint, shown: str, *, ignore_head: bool) -> SourceError:
    where = f" Under {best.place!r} they fit best." if best.prefix else ""
    over = f"; left over: {_named(best.left_over)}" if best.left_over else ""
    message = f"The weights in {shown} do not fit {blueprint.spec!r}: {best.misfit}{over}.{where}"
    if best.head and not ignore_head:
        return SourceError(f"{message} Only the head is another: --ignore-head drops it, for a new one to be trained.")
    return SourceError(
        f"{message} Leave --arch out to see which architectures fit, or give the arguments of the one it was trained "
        "with as --set key=value."
    )


def _named(keys: Sequence[str]) -> str:
    return few([short(key, 60) for key in keys], 3)


def fitting(given: Shapes, model: nn.Module) -> list[Fit]:
    """How well weights of these shapes fit ``model``, at each place among them where its keys are; the best first."""
    expected = shapes_of(model.state_dict())
    places: Counter[str] = Counter({"": 0})
    for key, shape in given.items():
        parts = key.split(".")[-_LONGEST:]
        for first in range(len(parts)):
            inner = ".".join(parts[first:])
            if inner in expected:
                places[key.removesuffix(inner)] += 1 + (expected[inner] == shape)
    likely = sorted(places, key=lambda place: (-places[place], len(place)))[:_PLACES]
    heads = _heads(model, expected)
    found = [_fit(given, expected, place, heads) for place in likely]
    return sorted(found, key=lambda fit: (bool(fit.misfit), -fit.agreeing, len(fit.prefix)))


_LONGEST = 40
"""Components that the key of a parameter may have inside its network."""

_PLACES = 8
"""Places among the weights that are looked at closely."""


def _fit(given: Shapes, expected: Shapes, prefix: str, heads: tuple[str, ...]) -> Fit:
    inside = {key.removeprefix(prefix): shape for key, shape in given.items() if key.startswith(prefix)}
    misfit = _leniently(inside, expected)
    agreeing = sum(expected.get(key) == shape for key, shape in inside.items())
    in_head = all(key.startswith(heads) for key in (*misfit.missing, *misfit.unexpected))
    resized = [key for key in misfit.shapes if not key.startswith(heads)]
    other_classes = all(here[1:] == there[1:] and here for here, there in (misfit.shapes[key] for key in resized))
    return Fit(
        prefix,
        misfit,
        agreeing,
        len(expected),
        tuple(key for key in given if not key.startswith(prefix)),
        head=in_head and len(resized) <= _TOLERATED and other_classes and 2 * agreeing > len(expected),
    )


def _heads(model: nn.Module, expected: Shapes) -> tuple[str, ...]:
    """What the keys of the classifier begin with: as timm's networks say, else those of the last part with any.

    Where that part is most of the network, as in ``Sequential(backbone)``, it is the last layer.
    """
    settings = getattr(model, "pretrained_cfg", None) or {}
    said = settings.get("classifier") if isinstance(settings, dict) else None
    names = [said] if isinstance(said, str) else [name for name in said or () if isinstance(name, str)]
    if not names and expected:
        last = list(expected)[-1].rpartition(".")[0]
        part = last.partition(".")[0]
        inside = sum(key.startswith(f"{part}.") for key in expected)
        names = [part if 2 * inside < len(expected) else last]
    return tuple(f"{name}." for name in names if name) or ("\n",)


@dataclass(frozen=True)
class Guess:
    """An architecture that weights may be of, and how well they fit it."""

    spec: str
    fits: tuple[Fit, ...]

    def __str__(self) -> str:
        also = f", or under {few([repr(fit.place) for fit in self.fits[1:]])}" if self.fits[1:] else ""
        return f"{self.spec}: {self.fits[0]}{also}"


def architectures_that_fit(state: Mapping[str, torch.Tensor]) -> tuple[list[Guess], list[Guess]]:
    """The torchvision and timm architectures whose keys and shapes are those of ``state``, and those that come near.

    Every architecture is built on the meta device, and given up at the first few parameters whose shape
    the state dict does not have: that takes seconds for more than a thousand of them.
    """
    shapes = shapes_of(state)
    candidates = [(prefix, name) for prefix in ZOOS for name in _comparable(prefix)]
    log.info("comparing keys and shapes with %d architectures", len(candidates))
    found: list[Guess] = []
    near: list[Guess] = []
    with OwnDraws(), quiet(), _progress(len(candidates)) as advance:
        for prefix, name in candidates:
            advance()
            fits = _fits(Blueprint(prefix, name), shapes)
            if fits:
                (near if fits[0].misfit else found).append(Guess(f"{prefix}:{name}", fits))
    rank = lambda guess: (-guess.fits[0].agreeing / guess.fits[0].expected, bool(guess.fits[0].misfit))  # noqa: E731
    return sorted(found, key=rank), sorted(near, key=rank)


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


def _fits(blueprint: Blueprint, shapes: Shapes) -> tuple[Fit, ...]:
    """How well these shapes fit the architecture: where they do, or else where they do best, if they nearly do."""
    model = _built_unless_different(blueprint, shapes)
    if model is None:
        return ()
    fits = fitting(shapes, model)
    classes = fits[0].misfit.classes
    if classes is not None:
        headed = _built_unless_different(blueprint.with_settings(num_classes=classes), shapes)
        again = [] if headed is None else [fit for fit in fitting(shapes, headed) if not fit.misfit]
        fits = [dataclasses.replace(fit, classes=classes) for fit in again] or fits
    whole = tuple(fit for fit in fits if not fit.misfit)
    return whole or tuple(fit for fit in fits[:1] if fit.head or fit.agreeing >= _NEARLY * fit.expected)


_NEARLY = 0.8
"""The share of a network's tensors that weights must have to come near it."""


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
    """A progress bar on stderr, where that is a terminal and dcafy is not asked to log warnings only."""
    from rich.console import Console
    from rich.progress import Progress

    hidden = not sys.stderr.isatty() or logging.getLogger("dcafy").level > logging.INFO
    bar = Progress(console=Console(stderr=True), transient=True, disable=hidden)
    with bar:
        task = bar.add_task("architectures", total=total)
        yield lambda: bar.advance(task)


def shapes_of(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Key -> shape, of the tensors in a state dict."""
    return {key: tuple(value.shape) for key, value in state.items() if isinstance(value, torch.Tensor)}


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
