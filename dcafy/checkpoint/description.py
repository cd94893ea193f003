"""What ``dcafy.json`` says, as frozen data that is checked when it is read."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch

from dcafy import records
from dcafy.attention.kinds import Insertion
from dcafy.errors import CheckpointError, PlanError
from dcafy.images.about import About
from dcafy.plan.options import Linking
from dcafy.plan.plan import Plan
from dcafy.records import Format, OtherVersion, ReadBy, Unknown, Wrong, matching, one_of, parsed, short, within, written
from dcafy.trace.inputs import from_data
from dcafy.version import __version__
from dcafy.wording import printable


def _with_insertions(data: dict[str, Any]) -> dict[str, Any]:
    """Folders from before hand-written networks had them say it of a zoo's network; the oldest do not say it at all."""
    model, said = data.get("model"), []
    if isinstance(model, dict) and "insertions" in model:
        said = model["insertions"]
        data = {**data, "model": {name: value for name, value in model.items() if name != "insertions"}}
    return {"insertions": said, **data}


def _keyed_by_block(data: dict[str, Any]) -> dict[str, Any]:
    """Folders of version 1 have all connections under one ``dca``, by the path of the block."""
    weights = data.get("weights")
    return {**data, "weights": {**weights, "keyed_by": "block"}} if isinstance(weights, dict) else data


def _about_nothing(data: dict[str, Any]) -> dict[str, Any]:
    """Folders of version 2 do not say what is known of the network besides itself."""
    return {"about": None, **data}


def _as_now(data: dict[str, Any]) -> dict[str, Any]:
    """Folders of version 3 from before one could insert attention, or was told of random weights, say nothing of it."""
    about = data.get("about")
    data = {**data, "about": {"random": False, **about}} if isinstance(about, dict) else data
    return _with_insertions(data)


FORMAT = Format("format_version", 3, {1: _keyed_by_block, 2: _about_nothing, 3: _as_now})
"""The version of ``dcafy.json``, and the way from older ones."""

FILES = {True: "model.safetensors", False: "connections.safetensors"}
"""Whether the base is in it -> the file that holds the tensors."""


@dataclass(frozen=True)
class Facts:
    """One tensor: its dtype (``float32``), its shape, and the SHA-256 of its bytes.

    >>> str(Facts("float32", (16, 3), "af31..."))
    'float32 [16, 3] af31...'
    """

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)} {self.sha256}"


# --- what an entry has to be ------------------------------------------------------------------------------


def _argument(value: Any, where: str) -> Any:
    """An argument for a builder, with lists as tuples: ``architecture`` says which there may be."""
    if isinstance(value, dict):
        return {key: _argument(item, where) for key, item in value.items()}
    return tuple(_argument(item, where) for item in value) if isinstance(value, list) else value


def _inputs(value: Any, where: str) -> Any:
    if value is not None:
        try:
            from_data(value)
        except ValueError as error:
            raise Wrong(where, f"a description of inputs ({short(error)})", value) from error
    return value


def _plan(value: Any, where: str) -> Plan | None:
    """None, or a plan with nothing in it that is not a plan's, and with numbers that layers can be made of."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise Wrong(where, "an object", value)
    try:
        plan = Plan.from_dict(value)
    except PlanError as error:
        cause = error.__cause__
        if isinstance(cause, Unknown):
            raise Unknown(where, cause.path, []) from error
        raise Wrong(where, f"a plan ({short(cause if isinstance(cause, Wrong) else error)})", "this") from error
    _of_its_own_blocks(plan, where)
    for link in plan.links:
        set_ = {name: item for name, item in dataclasses.asdict(link).items() if item is not None}
        _sized(set_, f"{where}.chains.links")
    return plan.with_links(lambda link: dataclasses.replace(link, message=link.message or _UNSAID["message"]))


def _options(value: Any, where: str) -> dict[str, Any]:
    """The options of a conversion, as far as a link may override them."""
    records.read(Linking, value, where)
    return {**_UNSAID, **_sized(value, where)}


def _sized(options: dict[str, Any], where: str) -> dict[str, Any]:
    """Options with numbers that layers can be made of."""
    for item in dataclasses.fields(Linking):
        if item.type == "int" and item.name in options:
            within(1, _WIDEST)(options[item.name], f"{where}.{item.name}")
    return options


def _of_its_own_blocks(plan: Plan, where: str) -> None:
    known = {block.name for block in plan.blocks}
    for chain in plan.chains:
        for name in (*chain.blocks, *(end for link in chain.links for end in (link.source, link.target))):
            if name not in known:
                raise Wrong(f"{where}.chains", "of blocks of the plan", name)


_UNSAID = {"message": "plain"}
"""What an entry is where it is absent, as in folders from before there was another; what is so is not written."""

_WIDEST = 2**16
"""The largest ``reduction`` and ``min_hidden`` that are taken from a folder: layers are made of them."""

_FACTS = re.compile(r"([a-z]\w{0,39}) \[((?:\d{1,15}(?:, \d{1,15})*)?)\] ([0-9a-f]{64})")


def _facts(value: Any, where: str) -> Facts:
    found = _FACTS.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise Wrong(where, "a dtype, a shape and a SHA-256", value)
    dtype, shape, sha256 = found.groups()
    return Facts(dtype, tuple(int(n) for n in shape.split(", ") if n), sha256)


_SHA256 = matching("[0-9a-f]{64}", "a SHA-256 in hexadecimal")
_DTYPE = matching("[a-z][a-z0-9_]{0,39}", "a dtype")
_STRIDES = matching(r"\d{1,15}(x\d{1,15})*", "strides")


# --- the description ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """How torchvision or timm builds the network: a name such as ``timm:seresnet50``, and arguments."""

    name: str
    arguments: dict[str, Annotated[Any, ReadBy(_argument)]] = field(default_factory=dict)


@dataclass(frozen=True)
class Weights:
    """The tensors in the folder, and what it takes to put them back as they were.

    ``file``          one of :data:`FILES`
    ``sha256``        the fingerprint of everything in the file
    ``base_sha256``   the fingerprint of the base weights: all but connections and attention that was put in
    ``base``          without the base in the file: key -> facts about the weights that have to be there
    ``tied``          key -> the key under which its tensor is stored
    ``layouts``       key -> the strides (``27x1x9x3``) of a tensor that is dense and not laid out contiguously
    ``keyed_by``      whether connections are kept by the module that hears, or all under one ``dca`` by block
    """

    file: Annotated[str, one_of(tuple(FILES.values()))]
    sha256: Annotated[str, _SHA256]
    base_sha256: Annotated[str, _SHA256]
    base: dict[str, Annotated[Facts, ReadBy(_facts)]]
    tied: dict[str, str]
    layouts: dict[str, Annotated[str, _STRIDES]]
    keyed_by: Annotated[str, one_of(("block", "module"))] = "module"

    @property
    def with_base(self) -> bool:
        """Whether the base weights are in the file too."""
        return self.file == FILES[True]


@dataclass(frozen=True)
class State:
    """What a state dict does not hold.

    ``training``       the mode of the network
    ``modes``          module -> its mode, where that is not the mode of the module around it
    ``kept_in_eval``   modules that stay in eval mode through ``.train()``
    ``frozen``         parameters that require no gradient
    ``unsaved``        floating-point buffers that the state dict leaves out -> their dtype
    """

    training: bool
    modes: dict[str, bool]
    kept_in_eval: tuple[str, ...]
    frozen: tuple[str, ...]
    unsaved: dict[str, Annotated[str, _DTYPE]]


@dataclass(frozen=True)
class Description:
    """Everything that ``dcafy.json`` says.

    ``versions``    package -> version, of those that made the model
    ``model``       how the network is built, where that is known
    ``insertions``  the attention that was then put into it (:func:`dcafy.insert`)
    ``about``       its classes, how its images are made ready, what it was trained on, where that is known
    ``options``     the options of :func:`dcafy.convert`
    ``inputs``      the example it was traced with (see :func:`dcafy.trace.inputs.as_data`), where that is known
    ``plan``        what was connected; ``None`` for a network without connections
    """

    versions: dict[str, str]
    model: Built | None
    insertions: tuple[Insertion, ...]
    about: About | None
    options: Annotated[dict[str, Any], ReadBy(_options)]
    inputs: Annotated[Any, _inputs]
    weights: Weights
    state: State
    plan: Annotated[Plan | None, ReadBy(_plan)]


def installed_versions(model: Built | None) -> dict[str, str]:
    """The versions of dcafy, torch, and the package that builds ``model``, that are installed here."""
    zoo = model.name.partition(":")[0] if model else ""
    zoos = (zoo,) if zoo in ("torchvision", "timm") else ()
    return {"dcafy": __version__, "torch": str(torch.__version__), **versions_of(*zoos)}


def versions_of(*packages: str) -> dict[str, str]:
    """The versions of those of these packages that are installed here."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def described(description: Description) -> str:
    """The text of ``dcafy.json``; :func:`read` gives the description back."""
    # Facts are one of hundreds: a line each.
    data = written(description, {Facts: str, Plan: Plan.to_dict})
    chains = data["plan"]["chains"] if data["plan"] else ()  # a network that is not connected has no plan
    for options in (data["options"] or {}, *(link for chain in chains for link in chain["links"])):
        for name in [name for name, value in _UNSAID.items() if options.get(name) == value]:
            del options[name]
    return json.dumps(FORMAT.stamped(data), indent=2, allow_nan=False) + "\n"


def read(text: bytes, path: str) -> Description:
    """The description that ``text``, found at ``path``, holds; ``CheckpointError`` says what is wrong with it."""
    try:
        data = parsed(text)
    except ValueError as error:
        raise CheckpointError(f"{path!r} is damaged: it is not JSON ({short(error)}). {_AGAIN}") from error
    if not isinstance(data, dict) or FORMAT.key not in data:
        raise CheckpointError(f"{path!r} was not written by dcafy.save: it has no {FORMAT.key}.")
    try:
        description: Description = records.read(Description, FORMAT.opened(data), whole=True)
        return description
    except OtherVersion as other:
        if not isinstance(other.version, int) or isinstance(other.version, bool) or other.version < FORMAT.version:
            raise CheckpointError(
                f"{path!r} is damaged: its {FORMAT.key} is {short(other.version)}. {_AGAIN}"
            ) from other
        raise CheckpointError(
            f"{path!r} has format version {other.version}, written by dcafy {_writer(data)}; this is dcafy "
            f"{__version__}, which reads up to version {FORMAT.version}. Install a newer dcafy (pip install -U dcafy)."
        ) from other
    except Unknown as unknown:
        raise CheckpointError(
            f"{path!r} has an entry that this dcafy ({__version__}) does not know: {unknown.path}. It was written by "
            f"dcafy {_writer(data)}: install that version, or save the model again."
        ) from unknown
    except Wrong as wrong:
        raise CheckpointError(f"{path!r} is damaged: {wrong}. {_AGAIN}") from wrong


_AGAIN = "Save the model again, or copy the folder again."


def _writer(data: Mapping[str, Any]) -> str:
    versions = data.get("versions")
    version = versions.get("dcafy") if isinstance(versions, dict) else None
    return printable(version[:40]) if isinstance(version, str) else "of an unknown version"
