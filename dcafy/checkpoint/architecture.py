"""Which ``torchvision:`` or ``timm:`` name builds a network, shown by building it again without data.

A name is only given where the network that it builds is the same one: the same classes at the same paths,
the same tensors, and the same plain settings (strides, dropout rates, ...) in every module. A network that
somebody has changed has no name, but for a classifier with another number of classes, which the zoos
can build.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import logging
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

from dcafy.attention.inserted import insertions_of
from dcafy.attention.insertion import put
from dcafy.attention.kinds import Insertion
from dcafy.checkpoint.description import Built
from dcafy.checkpoint.tensors import is_connection
from dcafy.draws import OwnDraws
from dcafy.emit.dca import Recipe
from dcafy.errors import CheckpointError, InputError, TracingError, UsageError
from dcafy.graph.rewritten import is_rewritten, original_class
from dcafy.records import read, written
from dcafy.trace.inputs import from_data, in_dtype_of
from dcafy.wording import printable
from dcafy.zoos import specs
from dcafy.zoos.fitting import Shapes, difference, shapes_of
from dcafy.zoos.packages import ZOOS
from dcafy.zoos.specs import NOTES

log = logging.getLogger(__name__)

_ARGUMENTS: dict[str, tuple[type, ...]] = {
    "num_classes": (int,),
    "in_chans": (int,),
    "img_size": (int, tuple),
    "output_stride": (int,),
    "global_pool": (str,),
    "aux_loss": (bool,),
    **dict.fromkeys(("drop_rate", "drop_path_rate", "drop_block_rate", "attn_drop_rate"), (int, float)),
    **dict.fromkeys(("proj_drop_rate", "dropout", "stochastic_depth_prob"), (int, float)),
}
"""Arguments whose types are known; others are numbers, words, and lists and dictionaries of them."""

_LOADING = re.compile(r"pretrained|checkpoint|weights|cache|hub|url|download|file|model|progress", re.IGNORECASE)
"""In the name of an argument: it may say what a builder loads, from where, and is not taken from a folder."""

_WORD = re.compile(r"\w{0,64}", re.ASCII)
"""A text that is taken from a folder: a zoo looks such words up in its own tables; it is no path and no module."""


def may_be_given(name: str, value: Any, depth: int = 4) -> bool:
    """Whether a folder may give a builder this argument."""
    if not name.isidentifier() or name.startswith("_") or _LOADING.search(name):
        return False
    known = _ARGUMENTS.get(name)
    if known is not None:
        numbers = not isinstance(value, tuple) or all(type(item) is int for item in value)
        return type(value) in known and numbers and _is_data(value, 1)
    return _is_data(value, depth)


def _is_data(value: Any, depth: int) -> bool:
    if value is None or type(value) in (bool, int):
        return True
    if type(value) is float:
        return math.isfinite(value)
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    if isinstance(value, dict):
        named = all(isinstance(key, str) and may_be_given(key, item, depth - 1) for key, item in value.items())
        return depth > 0 and len(value) <= 64 and named
    inside = isinstance(value, tuple | list) and len(value) <= 256
    return inside and depth > 0 and all(_is_data(item, depth - 1) for item in value)


# --- building -------------------------------------------------------------------------------------------


def with_insertions(model: nn.Module, insertions: Iterable[Insertion], inputs: Any, *, copy: bool) -> nn.Module:
    """``model`` with the attention that a folder says was put into it.

    ``inputs``: the example that the network was converted with. Raises what :func:`dcafy.insert` raises.
    """
    example = None if inputs is None else in_dtype_of(model, from_data(inputs))
    with OwnDraws():
        for insertion in insertions:
            model, copy = put(model, **dataclasses.asdict(insertion), example_inputs=example, copy=copy), False
    return model


def built(how: Built, insertions: tuple[Insertion, ...], expected: Shapes, inputs: Any = None) -> nn.Module:
    """The network of that name with new weights, once a copy without data has shown the ``expected`` shapes.

    ``inputs``: the example that the network was converted with. Nothing is fetched. Raises ``CheckpointError`` for a
    name that is not registered, an argument that may not be given, and a network with other keys or shapes.
    """
    try:
        differs = difference(expected, shapes_of(_network_of(how, insertions, inputs, on_meta=True).state_dict()))
        if differs:
            raise CheckpointError(
                f"the tensors in the folder do not fit the {printable(how.name)} that is built here: {differs}. "
                "If the installed version builds it differently, pass the network: dcafy.load(directory, model=...)."
            )
        return _network_of(how, insertions, inputs, on_meta=False)
    except (UsageError, InputError, TracingError) as error:
        raise CheckpointError(f"its network cannot be built here: {error}") from error


def _network_of(how: Built, insertions: tuple[Insertion, ...], inputs: Any, *, on_meta: bool) -> nn.Module:
    """The network, with the attention that was inserted into it."""
    try:
        return with_insertions(_blueprint(how).build(on_meta=on_meta), insertions, inputs, copy=False)
    except TracingError:
        if not on_meta:
            raise
        return _network_of(how, insertions, inputs, on_meta=False)  # detectors look at their boxes, so they need data


def _blueprint(how: Built) -> specs.Blueprint:
    for name, value in how.arguments.items():
        if not may_be_given(name, value):
            raise UsageError(
                f"{printable(name)} with the value {printable(repr(value)[:60])} is not given to a builder."
            )
    prefix, _, name = how.name.partition(":")
    if prefix not in ZOOS or "@" in name:
        raise UsageError(f"{printable(how.name[:80])!r} is not a torchvision: or timm: name.")
    return specs.parse(how.name, how.arguments)


# --- recognising ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Module:
    """One module of a network, without its values: ``tensors`` are shapes, by name."""

    kind: str
    settings: dict[str, Any]
    tensors: Shapes
    rewritten: bool = False

    def is_like(self, zoo: _Module, informative: frozenset[str]) -> bool:
        if self.kind != zoo.kind or self.tensors != zoo.tensors:
            return False
        # What training leaves on a connected root (Accelerate keeps a forward there) is no setting of the network's.
        names = zoo.settings.keys() if self.rewritten else self.settings.keys() | zoo.settings.keys()
        return all(self.settings.get(n, ...) == zoo.settings.get(n, ...) for n in names - informative)


@dataclass(frozen=True)
class _Network:
    """All modules of a network by path, and the shapes in its state dict."""

    modules: dict[str, _Module]
    shapes: Shapes = field(repr=False)

    def is_like(self, zoo: _Network) -> bool:
        return self.modules.keys() == zoo.modules.keys() and all(
            module.is_like(zoo.modules[path], frozenset() if path else _INFORMATIVE)
            for path, module in self.modules.items()
        )


_INFORMATIVE = frozenset(
    ("num_classes", "pretrained_cfg", "default_cfg", "pretrained_model_args", "_model_args", "_traits")
)
"""Attributes of the outermost module that describe it: a new head leaves them as they were."""


def recognised(model: nn.Module, recipe: Recipe | None, inputs: Any = None) -> Built | None:
    """How torchvision or timm builds the network that ``model`` was converted from; ``None`` where they do not.

    ``recipe``: how it was converted, where it was. ``inputs``: an example for what was inserted; else the recipe's.
    """
    inputs = recipe.inputs if inputs is None and recipe is not None else inputs
    ours = _network(model)
    zoo_network = functools.partial(_zoo_network, insertions=insertions_of(model), inputs=inputs)
    for candidate in _candidates(model, ours, recipe):
        theirs = zoo_network(candidate)
        if theirs is None:
            continue
        if ours.is_like(theirs):
            return candidate
        told = _told(ours, theirs)
        if told:
            candidate = dataclasses.replace(candidate, arguments={**candidate.arguments, **told})
            theirs = zoo_network(candidate)
            if theirs is None:
                continue
            if ours.is_like(theirs):
                return candidate
        for number in _class_counts(ours.shapes, theirs.shapes):
            headed = dataclasses.replace(candidate, arguments={**candidate.arguments, "num_classes": number})
            theirs = zoo_network(headed)
            if theirs is not None and ours.is_like(theirs):
                return headed
    return None


_TOLD: dict[str, dict[str, str]] = {
    "": {name: name for name in ("transform_input", "aux_logits", "score_thresh", "nms_thresh", "detections_per_img",
         "topk_candidates", "aux_loss", "replace_stride_with_dilation")},
    "transform": {"min_size": "min_size", "max_size": "max_size", "image_mean": "image_mean", "image_std": "image_std"},
    "roi_heads": {f"{name}": f"box_{name}" for name in ("score_thresh", "nms_thresh", "detections_per_img")},
    "rpn": {"nms_thresh": "rpn_nms_thresh", "score_thresh": "rpn_score_thresh"},
}  # fmt: skip
"""Module of a torchvision network -> its settings that are arguments of the builder, and their names there."""


def _told(ours: _Network, theirs: _Network) -> dict[str, Any]:
    """Arguments that a network has kept as settings, where they are others than the zoo's network has."""
    found = {}
    for path, names in _TOLD.items():
        if path in ours.modules and path in theirs.modules:
            here, there = ours.modules[path].settings, theirs.modules[path].settings
            for name, argument in names.items():
                if name in here and name in there and here[name] != there[name]:
                    value = here[name]
                    # The detectors keep a list of sizes for what is one number.
                    one = argument == "min_size" and isinstance(value, list) and len(value) == 1
                    found[argument] = value[0] if one else value
    return _given(found)


def _class_counts(ours: Shapes, theirs: Shapes) -> list[int]:
    """Numbers of classes that may explain every difference; none where something else differs."""
    counts, ratios = set(), set()
    for key in ours.keys() | theirs.keys():
        here, there = ours.get(key), theirs.get(key)
        if here == there:
            continue
        if not here or not there or here[1:] != there[1:]:
            return []
        counts.add(here[0])  # or a multiple: detectors have four numbers for each class
        ratios.add(Fraction(here[0], there[0]))
    numbers = sorted(counts) if len(counts) <= 2 else []
    # Detectors in one stage have some numbers for each class and anchor.
    shared = ratios.pop() * _COCO_CLASSES if len(ratios) == 1 else Fraction(0)
    return [*numbers, shared.numerator] if shared and shared.denominator == 1 else numbers


_COCO_CLASSES = 91
"""What torchvision's detectors tell apart where no number of classes is given."""


def _candidates(model: nn.Module, ours: _Network, recipe: Recipe | None) -> Iterator[Built]:
    if recipe is not None and recipe.model is not None:
        yield Built(recipe.model, recipe.arguments)
    own = specs.blueprint_of(model)
    if own is not None:
        yield Built(f"{own.zoo}:{own.name}", _given(own.settings))
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and isinstance(config.get("architecture"), str):
        given = getattr(model, "_model_args", None)  # kept by timm since 1.0.31
        arguments = _given(given or {})
        for name in dict.fromkeys(
            ".".join(filter(None, (config["architecture"], tag))) for tag in (config.get("tag"), "")
        ):
            yield Built(f"timm:{name}", arguments)
    home, _, _ = ours.modules[""].kind.rpartition(".")
    if home.startswith("torchvision.models."):
        # Segmenters come with a second classifier for training, or without.
        arguments = {"aux_loss": True} if "aux_classifier" in ours.modules else {}
        names = _torchvision_names(home, sum(map(math.prod, ours.shapes.values())))
        yield from (Built(f"torchvision:{name}", arguments) for name in names)


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a folder may give again, as it gives them: lists are tuples."""

    def as_read(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: as_read(item) for key, item in value.items()}
        return tuple(map(as_read, value)) if isinstance(value, list | tuple) else value

    return {name: as_read(value) for name, value in arguments.items() if may_be_given(name, as_read(value))}


def _torchvision_names(home: str, size: int) -> list[str]:
    """The names whose builders are in that module, the one nearest in size first."""
    models = importlib.import_module("torchvision.models")
    # By its beginning: SSDlite is an SSD whose builder has a module of its own, ssdlite.
    names = [n for n in models.list_models() if models.get_model_builder(n).__module__.startswith(home)]

    def distance(name: str) -> int:
        known = [weights.meta.get("num_params", 0) for weights in models.get_model_weights(name)]
        return abs(known[0] - size) if known else sys.maxsize

    return sorted(names, key=distance)


def _zoo_network(how: Built, insertions: tuple[Insertion, ...], inputs: Any) -> _Network | None:
    """What a zoo builds that way, with that attention in it."""
    return _described_network(json.dumps([written(how), [written(one) for one in insertions], inputs]))


@functools.lru_cache(maxsize=32)  # a training program saves after every epoch
def _described_network(described: str) -> _Network | None:
    how, insertions, inputs = json.loads(described)
    try:
        put_in = tuple(read(Insertion, one) for one in insertions)
        return _network(_network_of(read(Built, how), put_in, inputs, on_meta=True))
    except Exception as error:  # a builder may fail in any way; the network then goes without a name
        log.debug("%s could not be built for comparison: %s", how["name"], error)
        return None


_SAME = {"timm.layers.linear.Linear": "torch.nn.modules.linear.Linear"}
"""Classes that compute the same as another: timm's own layer is in its heads, torch's in a user's new one."""


def _network(model: nn.Module) -> _Network:
    modules = {
        path: _module(module) for path, module in model.named_modules(remove_duplicate=False) if not is_connection(path)
    }
    state = shapes_of(model.state_dict())
    return _Network(modules, {key: shape for key, shape in state.items() if not is_connection(key)})


def _module(module: nn.Module) -> _Module:
    cls = original_class(module)
    kind = f"{cls.__module__}.{cls.__qualname__}"
    kind = _SAME.get(kind, kind)
    left_out = _MACHINERY | NOTES | _FOUND_IN_FORWARD.get(kind, set())
    own = {name: value for name, value in vars(module).items() if name not in left_out}
    plain = {name: _plain(value) for name, value in own.items()}
    tensors = {
        name: tuple(value.shape)
        for holder in (module._parameters, module._buffers)
        for name, value in holder.items()
        if value is not None
    }
    return _Module(kind, {k: v for k, v in plain.items() if v is not _NOT_PLAIN}, tensors, is_rewritten(module))


_MACHINERY = frozenset(vars(nn.Module()))
"""Attributes that belong to torch's own class and not to a network."""


_FOUND_IN_FORWARD = {
    "torchvision.ops.poolers.MultiScaleRoIAlign": {"scales", "map_levels"},
    "timm.layers.conv2d_same.Conv2dSameExport": {"pad_input_size"},
}
"""Class -> attributes that its first forward sets: what ran is the network that was built, all the same."""


_NOT_PLAIN = object()


def _plain(value: Any) -> Any:
    """A setting as it can be compared; tensors, modules and other objects are no settings."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return value
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, tuple | list):
        items = [_plain(item) for item in value]
        return _NOT_PLAIN if any(item is _NOT_PLAIN for item in items) else items
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        entries = {key: _plain(item) for key, item in value.items()}
        return _NOT_PLAIN if any(item is _NOT_PLAIN for item in entries.values()) else entries
    return _NOT_PLAIN
