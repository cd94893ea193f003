"""What a spec means: the blueprint for a network."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dcafy.errors import SourceError, UsageError
from dcafy.wording import one_line
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

        with torch.random.fork_rng(devices=[]), quiet():
            try:
                model = build_on_meta(build) if on_meta else build()
                model.__dict__[_BLUEPRINT] = self
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


def parse(spec: str, settings: Mapping[str, Any]) -> Blueprint:
    """The blueprint that a spec stands for; ``UsageError`` where there is no such network."""
    prefix, colon, rest = spec.partition(":")
    if colon and prefix in ZOOS:
        name, at, weights = rest.partition("@")
        check(prefix, name, weights if at else None)
        for argument in sorted(_OURS & set(settings)):
            raise UsageError(
                f"{argument} is not for --set: weights are chosen in the name, as in {prefix}:{name}@DEFAULT."
            )
        return Blueprint(prefix, name, weights if at else None, dict(settings))
    if runs_code(spec):
        return Blueprint(None, spec, None, dict(settings))
    raise unknown(spec)


def runs_code(spec: str) -> bool:
    """Whether building what a spec names imports and runs the user's own code."""
    return is_factory(spec) and spec.partition(":")[0].lower() not in ZOOS


def unknown(spec: str) -> UsageError:
    """The error for a spec that is of no known form, with what was perhaps meant."""
    prefix, colon, rest = spec.partition(":")
    if colon and prefix.lower() in ZOOS:
        meant = [f"{prefix.lower()}:{rest}"]
    else:
        meant = named_elsewhere(spec.partition("@")[0])
    hint = f" Did you mean {' or '.join(meant)}?" if meant else ""
    return UsageError(
        f"{spec!r} names no model.{hint} A model is torchvision:NAME[@WEIGHTS], timm:NAME[@DEFAULT], "
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
