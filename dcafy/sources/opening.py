"""The one door: whatever a user names as a model, opened as an ``nn.Module``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcafy.checkpoint.folder import MARKER, set_aside_in
from dcafy.checkpoint.hub import fetched, is_address
from dcafy.checkpoint.tensors import is_connection
from dcafy.draws import OwnDraws, drawing_apart
from dcafy.errors import SourceError, UsageError
from dcafy.plan.options import takes
from dcafy.sources.contents import network_or_weights
from dcafy.sources.files import listing, read_object
from dcafy.sources.options import FileOptions
from dcafy.wording import few, short
from dcafy.zoos.fitting import architectures_that_fit, load_into, same_shape
from dcafy.zoos.packages import ZOOS
from dcafy.zoos.specs import Blueprint, in_our_notation, parse, runs_code, unknown


@dataclass(frozen=True)
class Source:
    """A model that was opened, and where it came from.

    ``model``         the network, on the CPU
    ``spec``          what the user wrote
    ``architecture``  the ``torchvision:`` or ``timm:`` name from which the network can be built
                      again without its weights, or ``None`` where there is no such name
    ``settings``      the arguments that building it again takes besides the name
    """

    model: nn.Module
    spec: str
    architecture: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@takes(FileOptions)
def open_model(
    spec: str,
    *,
    settings: Mapping[str, Any] | None = None,
    on_meta: bool = False,
    **options: Any,
) -> Source:
    """The network that ``spec`` names: an architecture, a factory, a file, a folder of ``dcafy.save``, one on the Hub.

    ``settings`` are the arguments with which an architecture or a factory is called. With ``on_meta`` an
    architecture that is named without weights is built on the meta device, quickly and only to look at its shapes.
    The further ``options`` are those of a file (:class:`FileOptions`): ``arch`` is the spec of the architecture that
    its bare weights belong to, ``prefix`` where among them. A ``package.module:factory`` runs code, and so does a
    pickle opened with ``trust_pickle``; nothing else does. The global random state is left as it was.

    Raises ``UsageError`` for a name or an argument that is not known, ``SourceError`` for a file that
    cannot be opened or weights that cannot be fetched.

    >>> from dcafy.sources import open_model
    >>> open_model("torchvision:mobilenet_v3_small").architecture
    'torchvision:mobilenet_v3_small'
    """
    chosen, how = dict(settings or {}), FileOptions(**options)
    if not os.path.exists(spec):
        spec = in_our_notation(spec)
    named = spec.partition(":")[0] in ZOOS and ":" in spec
    of_others = how.trust_pickle or any(name is not None and runs_code(name) for name in (spec, how.arch))

    def opened() -> Source | None:
        if is_address(spec):
            return _folder(fetched(spec).path, spec, how, chosen)
        if not named and os.path.isdir(spec):
            return _folder(Path(spec), spec, how, chosen)
        if not named and os.path.exists(spec):
            return _file(Path(spec), spec, how, chosen)
        if named or runs_code(spec):
            return _named(spec, how, chosen, on_meta)
        return None

    if of_others:  # it may set torch's seed
        found = drawing_apart(opened)
    else:
        with OwnDraws():
            found = opened()
    if found is not None:
        return found
    raise _missing(spec)


def _named(spec: str, how: FileOptions, settings: dict[str, Any], on_meta: bool) -> Source:
    _require_no("a file's weights", f"{spec!r} is no file", how)
    blueprint = parse(spec, settings)
    return _source(spec, blueprint, blueprint.build(on_meta=on_meta and blueprint.weights is None))


def _require_no(what: str, why: str, how: FileOptions, *allowed: str) -> None:
    """Nothing; ``UsageError`` where options are given that are about something else than what was named."""
    for name in ("arch", "prefix", "ignore_head"):
        if getattr(how, name) and name not in allowed:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} is about {what}; {why}. Leave {option} out.")


def _source(spec: str, blueprint: Blueprint, model: nn.Module) -> Source:
    """The source, with an architecture only where that gives the same network again."""
    plain = blueprint.without_weights()
    # Weights can bring settings along: another image size, another number of classes.
    if plain is None or (plain != blueprint and not same_shape(plain.build(on_meta=True), model)):
        return Source(model, spec)
    return Source(model, spec, plain.spec, plain.settings)


def _folder(path: Path, spec: str, how: FileOptions, settings: dict[str, Any]) -> Source:
    """A folder that ``dcafy.save`` wrote."""
    if not (path / MARKER).is_file():
        inside = listing(path)
        raise SourceError(
            f"{spec!r} is a folder without a {MARKER}, so dcafy.save did not write it."
            + (set_aside_in(path) or (f" Name one of its files instead: {inside}." if inside else ""))
        )
    _require_no("a file's weights", f"{spec!r} is a folder", how, "arch")
    if settings and how.arch is None:
        raise UsageError(f"--set has nothing to set: the folder {spec!r} says how its model is built.")
    from dcafy.checkpoint import load

    blueprint = None if how.arch is None else parse(how.arch, settings)
    place = spec if is_address(spec) else path
    return Source(load(place, None if blueprint is None else blueprint.build()), spec)


def _file(path: Path, spec: str, how: FileOptions, settings: dict[str, Any]) -> Source:
    """A file: a whole network, or weights for ``how.arch``."""
    blueprint = None if how.arch is None else parse(how.arch, settings)
    held = network_or_weights(read_object(path, spec, how), spec, how)
    if isinstance(held, nn.Module):
        _require_no("bare weights", f"{spec!r} holds a whole network", how)
        if settings:
            raise UsageError(f"{spec!r} holds a whole network, so --set has nothing to say. Leave it out.")
        return Source(held, spec)
    if blueprint is None:
        raise _needs_architecture(spec, held)
    model, used = load_into(blueprint, held, spec, ignore_head=how.ignore_head)
    return _source(spec, used, model)


def _needs_architecture(spec: str, state: Mapping[str, torch.Tensor]) -> SourceError:
    start = f"{short(repr(spec), 200)} holds weights only ({len(state)} tensors), not the network they belong to. "
    if any(is_connection(key) for key in state):
        return SourceError(
            f"{start}They are those of a converted model: name the folder that dcafy.save wrote (with its {MARKER}), "
            "not the file in it."
        )
    found, near = architectures_that_fit(state)
    if not found:
        nearest = f" The nearest is {near[0]}." if near else ""
        if near and near[0].fits[0].head:
            nearest += f" Without that head they are read by --arch {near[0].spec} --ignore-head."
        return SourceError(
            f"{start}No architecture of torchvision or timm that is installed here has these keys and shapes.{nearest} "
            "Say which network they are for: --arch package.module:factory, with --set key=value for its arguments."
        )
    fit, how_well = few([guess.spec for guess in found], 8), "; ".join(map(str, found[:3]))
    return SourceError(
        f"{start}Their keys and shapes fit: {fit}. Say which one it is, such as --arch {found[0].spec}. {how_well}."
    )


def _missing(spec: str) -> SourceError | UsageError:
    """The error for a spec that is neither a name nor anything on the disk."""
    hub = re.fullmatch(r"hf[-_]hub:([\w.-]+/[\w.-]+(?:@[\w.-]+)?)", spec, re.ASCII)
    if hub is not None:
        return UsageError(
            f"{short(repr(spec), 200)} names no network of timm's. A folder of dcafy's on the Hub is hf://{hub[1]}."
        )
    if "/" in spec or "\\" in spec or Path(spec).suffix.lower() in {".pt", ".pth", ".safetensors", ".bin", ".ckpt"}:
        return SourceError(f"There is no file or folder {short(repr(spec), 200)} (looked in {str(Path.cwd())!r}).")
    return unknown(spec)
