"""The packages whose networks go by name: torchvision and timm."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import inspect
import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dcafy.errors import UsageError
from dcafy.wording import one_line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Zoo:
    """A package whose networks are built by name.

    ``install``        what to type where it is missing
    ``names``          every name it lists
    ``build``          (name, weights or ``None``, settings) -> network
    ``knows``          whether it builds a name that it may not list
    ``check_weights``  (name, weights or ``None``); raises ``UsageError`` where it has no such weights
    ``code``           the source that reads the arguments of a network, and the names of those that it is known to take
    """

    package: str
    install: str
    names: Callable[[], list[str]]
    build: Callable[[str, str | None, dict[str, Any]], nn.Module]
    knows: Callable[[str], bool]
    check_weights: Callable[[str, str | None], None]
    code: Callable[[str], tuple[str, Collection[str]]]


def installed_names(zoo: Zoo) -> list[str]:
    """Every name the zoo lists; where the package is missing ``UsageError`` says what to install."""
    try:
        with quiet():
            importlib.import_module(zoo.package)
    except ImportError as error:
        raise UsageError(
            f"{zoo.package} is not installed here ({one_line(error)}). Install it with: {zoo.install}"
        ) from error
    return zoo.names()


def named_elsewhere(name: str) -> list[str]:
    """Specs of the networks, in any installed zoo, that carry this name."""
    found = []
    for prefix, zoo in ZOOS.items():
        with contextlib.suppress(UsageError):
            if name in installed_names(zoo):
                found.append(f"{prefix}:{name}")
    return found


def check(prefix: str, name: str, weights: str | None) -> None:
    """Nothing where the zoo can build that; else ``UsageError`` with what was perhaps meant."""
    zoo = ZOOS[prefix]
    names = installed_names(zoo)
    if not zoo.knows(name):
        near = [f"{prefix}:{n}" for n in difflib.get_close_matches(name.partition(".")[0], names, n=3, cutoff=0.6)]
        meant = list(dict.fromkeys(named_elsewhere(name) + near))
        hint = f" Did you mean {' or '.join(meant)}?" if meant else f" It has {len(names)} others."
        raise UsageError(f"{prefix} has no model {name!r}.{hint}")
    zoo.check_weights(name, weights)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside it packages do not warn about their own defaults, which the user did not choose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- building without storage -----------------------------------------------------------------------

_FILLS = {"fill_", "kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "uniform_", "zero_"}


class _WithoutStorage(TorchFunctionMode):
    """Inside it parameters are made on the meta device, and filling them costs nothing.

    Only what ``torch.empty`` makes goes without storage. ``torch.device("meta")`` takes everything, and
    several networks compute their widths with small tensors while they are built.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        elif getattr(func, "__name__", "") in _FILLS and args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **kwargs)


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """What ``build`` builds, on the meta device, in a fraction of the time."""
    try:
        with _WithoutStorage():
            return build().to("meta")
    except (RuntimeError, NotImplementedError) as error:
        log.debug("a network mixes parameters with computed values (%s); building it on meta altogether", error)
        with torch.device("meta"), _WithoutStorage():
            return build().to("meta")


# --- arguments --------------------------------------------------------------------------------------


@functools.cache
def _code(builder: Any, *shared: str) -> tuple[str, Collection[str]]:
    """The source of the modules that hold a builder and what it calls classes in, and the arguments it surely takes."""
    homes = {inspect.unwrap(builder).__module__, *shared}
    module = importlib.import_module(inspect.unwrap(builder).__module__)
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, nn.Module)]
    homes |= {cls.__module__ for cls in classes if cls.__module__.startswith(module.__name__.partition(".")[0])}
    source = "\n".join(inspect.getsource(importlib.import_module(home)) for home in sorted(homes))
    takes: set[str] = {"num_classes"}
    for called in (inspect.unwrap(builder), *(cls.__init__ for cls in classes if cls.__module__ == module.__name__)):
        takes |= inspect.signature(called).parameters.keys() - {"self", "args", "kwargs"}
    return source, takes


# --- torchvision ------------------------------------------------------------------------------------


def _models() -> Any:
    return importlib.import_module("torchvision.models")


def _torchvision_build(name: str, weights: str | None, settings: dict[str, Any]) -> nn.Module:
    models = _models()
    builder = models.get_model_builder(name)
    chosen = None if weights is None else models.get_model_weights(builder)[weights]
    arguments = {**settings, "weights": chosen}
    if chosen is None and "weights_backbone" in inspect.signature(builder).parameters:
        # Detectors and segmenters fetch a pretrained backbone unless they are told not to.
        arguments["weights_backbone"] = None
    model: nn.Module = builder(**arguments)
    return model


def _torchvision_check_weights(name: str, weights: str | None) -> None:
    if weights is None:
        return
    known = [choice.name for choice in _models().get_model_weights(name)]
    if weights not in {*known, "DEFAULT"} or not known:
        offered = f"It has {', '.join(known)} (or DEFAULT)." if known else "It has none: leave the @ out."
        raise UsageError(f"torchvision:{name} has no weights {weights!r}. {offered}")


# --- timm -------------------------------------------------------------------------------------------


def _timm() -> Any:
    return importlib.import_module("timm")


def _timm_build(name: str, weights: str | None, settings: dict[str, Any]) -> nn.Module:
    model: nn.Module = _timm().create_model(name, pretrained=weights is not None, **settings)
    return model


def _timm_knows(name: str) -> bool:
    # is_model also knows the names that timm has renamed since; hub and folder addresses are no names.
    return re.fullmatch(r"\w[\w.-]*", name) is not None and bool(_timm().is_model(name.partition(".")[0]))


def _timm_check_weights(name: str, weights: str | None) -> None:
    timm = _timm()
    architecture, dot, tag = name.partition(".")
    known = [full.partition(".")[2] for full in timm.list_models(f"{architecture}.*", include_tags=True)]
    offered = ", ".join(filter(None, known)) or "none"
    if dot and tag not in known:
        raise UsageError(f"timm:{architecture} has no tag {tag!r}. Its tags: {offered}.")
    if weights is None:
        return
    if weights != "DEFAULT":
        raise UsageError(
            f"timm's weights are chosen by the tag in the name, timm:{architecture}.TAG@DEFAULT, and not by "
            f"@{weights}. Its tags: {offered}."
        )
    if not timm.models.is_model_pretrained(name):
        raise UsageError(f"timm has no pretrained weights for {name!r}: leave @DEFAULT out.")


ZOOS: dict[str, Zoo] = {
    "torchvision": Zoo(
        "torchvision",
        "pip install torchvision",
        lambda: list(_models().list_models()),
        _torchvision_build,
        lambda name: name in _models().list_models(),
        _torchvision_check_weights,
        lambda name: _code(_models().get_model_builder(name)),
    ),
    "timm": Zoo(
        "timm",
        "pip install 'dcafy[timm]'",
        lambda: list(_timm().list_models()),
        _timm_build,
        _timm_knows,
        _timm_check_weights,
        lambda name: _code(
            _timm().models.model_entrypoint(name.partition(".")[0]), "timm.models._builder", "timm.models._factory"
        ),
    ),
}
"""Prefix of a spec -> the package it means."""
