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
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

from dcafy.attention.insertion import insert
from dcafy.attention.kinds import INSERTED, Insertion
from dcafy.checkpoint.description import Built
from dcafy.checkpoint.tensors import is_connection
from dcafy.draws import OwnDraws
from dcafy.emit.dca import Recipe
from dcafy.errors import CheckpointError, InputError, TracingError, UsageError
from dcafy.graph.rewritten import is_rewritten, original_class
from dcafy.records import read, written
from dcafy.trace.inputs import from_data
from dcafy.wording import printable
from dcafy.zoos import specs
from dcafy.zoos.fitting import Shapes, difference, shapes_of
from dcafy.zoos.packages import ZOOS

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
"""Arguments that a folder may give to a builder, and their types: none of them loads or imports anything."""


# --- building -------------------------------------------------------------------------------------------


def built(how: Built, expected: Shapes, inputs: Any = None) -> nn.Module:
    """The network of that name with new weights, once a copy without data has shown the ``expected`` shapes.

    ``inputs``: the example that the network was converted with. Nothing is fetched. Raises ``CheckpointError`` for a
    name that is not registered, an argument that may not be given, and a network with other keys or shapes.
    """
    try:
        differs = difference(expected, shapes_of(_network_of(how, inputs, on_meta=True).state_dict()))
        if differs:
            raise CheckpointError(
                f"the tensors in the folder do not fit the {printable(how.name)} that is built here: {differs}. "
                "If the installed version builds it differently, pass the network: dcafy.load(directory, model=...)."
            )
        return _network_of(how, inputs, on_meta=False)
    except (UsageError, InputError, TracingError) as error:
        raise CheckpointError(f"its network cannot be built here: {error}") from error


def _network_of(how: Built, inputs: Any, *, on_meta: bool) -> nn.Module:
    """The network, with the attention that was inserted into it."""
    model = _blueprint(how).build(on_meta=on_meta)
    example = None if inputs is None else from_data(inputs)
    with OwnDraws():
        try:
            for insertion in how.insertions:
                model = insert(model, **dataclasses.asdict(insertion), example_inputs=example, copy=False)
        except TracingError:
            if not on_meta:
                raise
            return _network_of(how, inputs, on_meta=False)  # detectors look at their boxes, so they need data
    return model


def _blueprint(how: Built) -> specs.Blueprint:
    for name, value in how.arguments.items():
        allowed = type(value) in _ARGUMENTS.get(name, ())
        if not allowed or (isinstance(value, tuple) and any(type(item) is not int for item in value)):
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


def recognised(model: nn.Module, recipe: Recipe) -> Built | None:
    """How torchvision or timm builds the network that ``model`` was converted from; ``None`` where they do not."""
    ours = _network(model)
    inserted: tuple[Insertion, ...] = getattr(model, INSERTED, ())
    for named in _candidates(model, ours, recipe):
        candidate = dataclasses.replace(named, insertions=inserted)
        theirs = _zoo_network(candidate, recipe.inputs)
        if theirs is None:
            continue
        if ours.is_like(theirs):
            return candidate
        for number in _class_counts(ours.shapes, theirs.shapes):
            headed = dataclasses.replace(candidate, arguments={**candidate.arguments, "num_classes": number})
            theirs = _zoo_network(headed, recipe.inputs)
            if theirs is not None and ours.is_like(theirs):
                return headed
    return None


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


def _candidates(model: nn.Module, ours: _Network, recipe: Recipe) -> Iterator[Built]:
    if recipe.model is not None:
        yield Built(recipe.model, recipe.arguments)
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and isinstance(config.get("architecture"), str):
        given = getattr(model, "_model_args", None)  # kept by timm since 1.0.31
        arguments = {k: v for k, v in given.items() if type(v) in _ARGUMENTS.get(k, ())} if given else {}
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


def _torchvision_names(home: str, size: int) -> list[str]:
    """The names whose builders are in that module, the one nearest in size first."""
    models = importlib.import_module("torchvision.models")
    # By its beginning: SSDlite is an SSD whose builder has a module of its own, ssdlite.
    names = [n for n in models.list_models() if models.get_model_builder(n).__module__.startswith(home)]

    def distance(name: str) -> int:
        known = [weights.meta.get("num_params", 0) for weights in models.get_model_weights(name)]
        return abs(known[0] - size) if known else sys.maxsize

    return sorted(names, key=distance)


def _zoo_network(how: Built, inputs: Any) -> _Network | None:
    """What a zoo builds that way."""
    return _described_network(json.dumps([written(how), inputs]))


@functools.lru_cache(maxsize=32)  # a training program saves after every epoch
def _described_network(described: str) -> _Network | None:
    how, inputs = json.loads(described)
    try:
        return _network(_network_of(read(Built, how), inputs, on_meta=True))
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
    plain = {name: _plain(value) for name, value in vars(module).items() if name not in _MACHINERY}
    tensors = {
        name: tuple(value.shape)
        for holder in (module._parameters, module._buffers)
        for name, value in holder.items()
        if value is not None
    }
    return _Module(kind, {k: v for k, v in plain.items() if v is not _NOT_PLAIN}, tensors, is_rewritten(module))


_MACHINERY = frozenset(vars(nn.Module()))
"""Attributes that belong to torch's own class and not to a network."""


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
