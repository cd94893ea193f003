"""What a spec means: the blueprint for a network."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dcafy.draws import OwnDraws
from dcafy.errors import SourceError, UsageError
from dcafy.wording import nearest, one_line, quoted, short
from dcafy.zoos.factories import call_factory, factory_takes, is_factory
from dcafy.zoos.packages import ZOOS, build_on_meta, check, named_elsewhere, quiet

_OURS = {"checkpoint_path", "pretrained", "weights", "weights_backbone"}
"""Arguments of the zoos that say which weights to load: the spec says that."""


@dataclass(frozen=True)
class Blueprint:
    """How a network is built: a spec that was understood, and the arguments for it.

    ``zoo``      the package it is from; ``None`` for the user's own factory
    ``name``     its name there, or ``package.module:factory``
    ``weights``  the pretrained weights that were asked for
    """

    zoo: str | None
    name: str
    weights: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> str:
        """The blueprint as the user would write it."""
        start = self.name if self.zoo is None else f"{self.zoo}:{self.name}"
        return start if self.weights is None else f"{start}@{self.weights}"

    def without_weights(self) -> Blueprint | None:
        """The same network, untrained; ``None`` where only running the user's code can build it."""
        return None if self.zoo is None else dataclasses.replace(self, weights=None)

    def with_settings(self, **more: Any) -> Blueprint:
        """The blueprint with these arguments added."""
        return dataclasses.replace(self, settings={**self.settings, **more})

    def takes(self, argument: str) -> bool:
        """Whether the network may be built with this argument (a zoo's networks are taken to)."""
        return argument not in self.settings and (self.zoo is not None or factory_takes(self.name, argument))

    def build(self, *, on_meta: bool = False) -> nn.Module:
        """The network; with ``on_meta`` a zoo's network comes without storage for its parameters."""
        if self.zoo is None:
            return call_factory(self.name, self.settings)
        zoo = ZOOS[self.zoo]

        def build() -> nn.Module:
            return zoo.build(self.name, self.weights, dict(self.settings))

        with OwnDraws(), quiet():
            try:
                model = build_on_meta(build) if on_meta else build()
                model.__dict__[_BLUEPRINT] = self
                if self.weights is None:
                    has_random_weights_now(model)
                return model
            except Exception as error:
                explained = self._explained(error)
                if explained is None:
                    raise
                raise explained from error

    def _explained(self, error: Exception) -> UsageError | SourceError | None:
        """What the user can do about a network that did not come about; ``None``: nothing, it is a bug."""
        text = f"{type(error).__name__}: {one_line(error)}"
        if self.weights is not None and _is_download(error):
            return SourceError(
                f"The weights of {self.spec!r} could not be fetched ({text}). Check the connection, or leave "
                f"@{self.weights} out: attention is found without weights too."
            )
        if self.settings:
            given = ", ".join(f"{key}={value!r}" for key, value in self.settings.items())
            return UsageError(f"{self.spec!r} cannot be built with {given} ({text}).")
        if self.weights is not None:
            return SourceError(f"{self.spec!r} could not be loaded ({text}).")
        return None


_BLUEPRINT = "dcafy_blueprint"
"""The attribute of a zoo's network that says how it was built."""


def blueprint_of(model: nn.Module) -> Blueprint | None:
    """How a network was built that dcafy built by a zoo's name; ``None`` for any other."""
    found = vars(model).get(_BLUEPRINT)
    return found if isinstance(found, Blueprint) else None


_RANDOM = "dcafy_random_weights"
"""The attribute of a zoo's network with some of the weights that it was made with, while nothing else was loaded."""


NOTES = frozenset({_BLUEPRINT, _RANDOM})
"""Attributes that dcafy leaves on a zoo's network; they are no settings of it."""


RANDOM = "weights: random (add @DEFAULT for trained ones)"
"""What is said of such a network, wherever it is used."""


def has_random_weights(model: nn.Module) -> bool:
    """Whether a network that dcafy built by a zoo's name still has the weights that it was made with.

    Nothing was loaded into it since, and it was not trained: its first weights are those (to 1%: it may be cast).
    """
    made = vars(model).get(_RANDOM)
    if not isinstance(made, list):
        return False
    now = _some_weights(model)
    return len(now) == len(made) and all(
        math.isclose(here, there, rel_tol=1e-2, abs_tol=1e-4) for here, there in zip(now, made, strict=True)
    )


def has_weights_now(model: nn.Module) -> None:
    """Notes that a network was given weights."""
    if _RANDOM in vars(model):
        model.__dict__[_RANDOM] = None


def has_random_weights_now(model: nn.Module) -> None:
    """Notes that a network has the weights that it was made with, also where a folder brought them."""
    model.__dict__[_RANDOM] = _some_weights(model)


def _some_weights(model: nn.Module) -> list[float]:
    """Eight of the first layer; none of a network without data."""
    first = next((p for p in model.parameters() if p.ndim > 1 and p.is_floating_point()), None)
    some: list[float] = [] if first is None or first.is_meta else first.detach().reshape(-1)[:8].tolist()
    return some


def parse(spec: str, settings: Mapping[str, Any]) -> Blueprint:
    """The blueprint that a spec stands for; ``UsageError`` where there is no such network."""
    spec = in_our_notation(spec)
    prefix, colon, rest = spec.partition(":")
    if colon and prefix in ZOOS:
        name, at, weights = rest.partition("@")
        check(prefix, name, weights if at else None)
        for argument in sorted(_OURS & set(settings)):
            raise UsageError(
                f"{argument} is not for --set: weights are chosen in the name, as in {prefix}:{name}@DEFAULT."
            )
        for argument, value in settings.items():
            _require_argument(prefix, name, argument, value)
        return Blueprint(prefix, name, weights if at else None, dict(settings))
    if runs_code(spec):
        return Blueprint(None, spec, None, dict(settings))
    raise unknown(spec)


def in_our_notation(spec: str) -> str:
    """The spec, where it is written as timm writes its own networks: ``timm/NAME``, ``hf-hub:timm/NAME``.

    >>> in_our_notation("hf-hub:timm/seresnet50.a1_in1k@DEFAULT")
    'timm:seresnet50.a1_in1k@DEFAULT'
    """
    found = re.fullmatch(r"(?:hf[-_]hub:)?timm/([\w.-]+(?:@\w+)?)", spec)
    return f"timm:{found[1]}" if found else spec


def _require_argument(prefix: str, name: str, argument: str, value: Any) -> None:
    """Nothing where the builder may take that argument; builders pass on what they do not know, some to nobody."""
    source, takes = ZOOS[prefix].code(name)
    if not re.search(rf"\b{re.escape(argument)}\b", source):
        raise UsageError(
            f"'{prefix}:{name}' cannot be built with {argument}={value!r}: it takes no argument {argument!r}."
            f"{nearest(argument, list(takes))}"
        )


def nearly_a_zoo(spec: str) -> str | None:
    """The spec that was perhaps meant, where the word before the colon is one edit away from a zoo's name.

    >>> nearly_a_zoo("torchvison:resnet50"), nearly_a_zoo("mymodule:build")
    ('torchvision:resnet50', None)
    """
    prefix, colon, rest = spec.partition(":")
    if not colon or prefix.lower() in ZOOS:
        return None
    return next((f"{zoo}:{rest}" for zoo in ZOOS if _one_edit(prefix.lower(), zoo)), None)


def _one_edit(one: str, other: str) -> bool:
    """Whether one letter more, less, changed, or two that changed places make ``one`` the ``other``."""
    start = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    here, there = one[start:], other[start:]
    swapped = len(here) > 1 and len(there) > 1 and here[:2] == there[1::-1] and here[2:] == there[2:]
    return here[1:] == there[1:] or here[1:] == there or here == there[1:] or swapped


def runs_code(spec: str) -> bool:
    """Whether building what a spec names imports and runs the user's own code."""
    return is_factory(spec) and spec.partition(":")[0].lower() not in ZOOS and nearly_a_zoo(spec) is None


def unknown(spec: str) -> UsageError:
    """The error for a spec that is of no known form, with what was perhaps meant."""
    prefix, colon, rest = spec.partition(":")
    near = nearly_a_zoo(spec)
    if near is not None:
        meant = [f"{near.partition(':')[0]!r}, as in {near}"]
    elif colon and prefix.lower() in ZOOS:
        meant = [f"{prefix.lower()}:{short(rest)}"]
    else:
        meant = named_elsewhere(spec.partition("@")[0])
    hint = f" Did you mean {' or '.join(meant)}?" if meant else ""
    return UsageError(
        f"{quoted(spec, 200)} names no model.{hint} A model is torchvision:NAME[@WEIGHTS], timm:NAME[@DEFAULT], "
        "package.module:factory, or a file."
    )


def build_architecture(name: str, settings: Mapping[str, Any] | None = None) -> nn.Module:
    """The untrained network of a ``torchvision:`` or ``timm:`` name; nothing is fetched, no other code runs.

    >>> from dcafy.sources import build_architecture
    >>> build_architecture("torchvision:mobilenet_v3_small", {"num_classes": 10}).classifier[-1].out_features
    10
    """
    if name.partition(":")[0] not in ZOOS:
        raise UsageError(f"{name!r} is not a torchvision: or timm: name.")
    return dataclasses.replace(parse(name, settings or {}), weights=None).build()


def _is_download(error: BaseException) -> bool:
    """Whether an error comes from fetching, by the classes of the libraries that fetch: they share no base."""
    homes = {"urllib", "http", "httpx", "requests", "huggingface_hub", "ssl", "socket"}
    chain = [link for link in (error, error.__cause__, error.__context__) if link is not None]
    named = any(cls.__module__.split(".")[0] in homes for link in chain for cls in type(link).__mro__)
    return named or isinstance(error, OSError) or "invalid hash value" in str(error)
