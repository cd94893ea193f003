"""What ``dcafy.json`` says, as frozen data that is checked when it is read."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch

import dcafy
from dcafy.attention import ATTENTIONS, Init, Insertion
from dcafy.errors import CheckpointError, PlanError
from dcafy.plan.blocks import Link, Plan
from dcafy.plan.tables import printable
from dcafy.settings import Settings
from dcafy.trace.inputs import from_data

__all__ = [
    "FILES",
    "FORMAT_VERSION",
    "Built",
    "Description",
    "Facts",
    "State",
    "Weights",
    "described",
    "installed_versions",
    "read",
]

FORMAT_VERSION = 1

FILES = {True: "model.safetensors", False: "connections.safetensors"}
"""Whether the base is in it -> the file that holds the tensors."""


@dataclass(frozen=True)
class Built:
    """How torchvision or timm builds the network: a name such as ``timm:seresnet50``, and arguments.

    ``insertions``  the attention that :func:`dcafy.insert` then put into it
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    insertions: tuple[Insertion, ...] = ()


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


@dataclass(frozen=True)
class Weights:
    """The tensors in the folder, and what it takes to put them back as they were.

    ``file``          one of :data:`FILES`
    ``sha256``        the fingerprint of everything in the file
    ``base_sha256``   the fingerprint of the base weights: every key without ``dca`` in its path
    ``base``          without the base in the file: key -> facts about the weights that have to be there
    ``tied``          key -> the key under which its tensor is stored
    ``layouts``       key -> the strides (``27x1x9x3``) of a tensor that is dense and not laid out contiguously
    """

    file: str
    sha256: str
    base_sha256: str
    base: dict[str, Facts]
    tied: dict[str, str]
    layouts: dict[str, str]

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
    unsaved: dict[str, str]


@dataclass(frozen=True)
class Description:
    """Everything that ``dcafy.json`` says.

    ``versions``   package -> version, of those that made the model
    ``model``      how the network is built, where that is known
    ``options``    the options of :func:`dcafy.convert`
    ``inputs``     the example it was traced with (see :func:`dcafy.trace.inputs.as_data`), where that is known
    ``plan``       what was connected
    """

    versions: dict[str, str]
    model: Built | None
    options: dict[str, Any]
    inputs: Any
    weights: Weights
    state: State
    plan: Plan


def installed_versions(model: Built | None) -> dict[str, str]:
    """The versions of dcafy, torch, and the package that builds ``model``, that are installed here."""
    versions = {"dcafy": dcafy.__version__, "torch": str(torch.__version__)}
    zoo = model.name.partition(":")[0] if model else None
    if zoo in ("torchvision", "timm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[zoo] = importlib.metadata.version(zoo)
    return versions


def described(description: Description) -> str:
    """The text of ``dcafy.json``; :func:`read` gives the description back."""
    data: dict[str, Any] = {"format_version": FORMAT_VERSION}
    for item in dataclasses.fields(description):
        value = getattr(description, item.name)
        data[item.name] = value.to_dict() if isinstance(value, Plan) else value
    return json.dumps(data, indent=2, allow_nan=False, default=_as_data) + "\n"


def _as_data(value: Any) -> Any:
    if isinstance(value, Facts):
        return str(value)  # one of hundreds: a line each
    return {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}


def read(text: bytes, path: str) -> Description:
    """The description that ``text``, found at ``path``, holds; ``CheckpointError`` says what is wrong with it."""
    try:
        data = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path!r} is damaged: it is not JSON ({_short(error)}). {_AGAIN}") from error
    if not isinstance(data, dict) or "format_version" not in data:
        raise CheckpointError(f"{path!r} was not written by dcafy.save: it has no format_version.")
    version, writer = data.pop("format_version"), _writer(data)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{path!r} is damaged: its format_version is {_short(version)}. {_AGAIN}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path!r} has format version {version}, written by dcafy {writer}; this is dcafy {dcafy.__version__}, "
            f"which reads up to version {FORMAT_VERSION}. Install a newer dcafy (pip install -U dcafy)."
        )
    try:
        description: Description = _description(data, "")
        return description
    except _Unknown as unknown:
        raise CheckpointError(
            f"{path!r} has an entry that this dcafy ({dcafy.__version__}) does not know: {unknown}. It was written by "
            f"dcafy {writer}: install that version, or save the model again."
        ) from unknown
    except _Wrong as wrong:
        raise CheckpointError(f"{path!r} is damaged: {wrong}. {_AGAIN}") from wrong


_AGAIN = "Save the model again, or copy the folder again."


def _writer(data: Mapping[str, Any]) -> str:
    versions = data.get("versions")
    version = versions.get("dcafy") if isinstance(versions, dict) else None
    return printable(version[:40]) if isinstance(version, str) else "of an unknown version"


def _short(value: object) -> str:
    text = printable(str(value) if isinstance(value, BaseException) else repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- reading: one small function per kind of value ------------------------------------------------------

Reader = Callable[[Any, str], Any]
"""(a value from JSON, where it stands) -> the value, checked."""


class _Wrong(ValueError):
    """A value is not what stands at its place."""

    def __init__(self, where: str, expected: str, value: object) -> None:
        super().__init__(f"{printable(where[:200]) or 'it'} should be {expected}, not {_short(value)}")


class _Unknown(ValueError):
    """An entry has a name that means nothing here."""

    def __init__(self, where: str, name: str) -> None:
        super().__init__(printable((f"{where}.{name}" if where else name)[:80]))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("it has the same entry twice")
    return data


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _Wrong(where, "text", value)
    return value


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise _Wrong(where, "true or false", value)
    return value


def _whole(least: int, most: int) -> Reader:
    def reader(value: Any, where: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise _Wrong(where, f"a whole number from {least} to {most}", value)
        return value

    return reader


def _matching(pattern: str, expected: str) -> Reader:
    def reader(value: Any, where: str) -> str:
        if not isinstance(value, str) or re.fullmatch(pattern, value) is None:
            raise _Wrong(where, expected, value)
        return value

    return reader


def _mapping(of: Reader) -> Reader:
    def reader(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _Wrong(where, "an object", value)
        return {key: of(item, f"{where}.{key}") for key, item in value.items()}

    return reader


def _tuple(of: Reader) -> Reader:
    def reader(value: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise _Wrong(where, "a list", value)
        return tuple(of(item, f"{where}[{i}]") for i, item in enumerate(value))

    return reader


def _optional(of: Reader) -> Reader:
    return lambda value, where: None if value is None else of(value, where)


def _record(
    cls: type[Any], readers: Mapping[str, Reader], *, all_needed: bool = True, may_lack: frozenset[str] = frozenset()
) -> Reader:
    def reader(value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise _Wrong(where, "an object", value)
        for name in value:
            if name not in readers:
                raise _Unknown(where, name)
        for name in readers:
            if all_needed and name not in value and name not in may_lack:
                raise _Wrong(where, f"an object with {name!r}", list(value))
        prefix = f"{where}." if where else ""
        return cls(**{name: readers[name](item, prefix + name) for name, item in value.items()})

    return reader


def _plain(value: Any, where: str) -> Any:
    """A value for an argument: ``architecture`` says which arguments there may be."""
    if isinstance(value, list):
        return tuple(_plain(item, where) for item in value)
    if isinstance(value, dict):
        raise _Wrong(where, "a number, text, or a list of them", value)
    return value


def _inputs(value: Any, where: str) -> Any:
    if value is not None:
        try:
            from_data(value)
        except ValueError as error:
            raise _Wrong(where, f"a description of inputs ({_short(error)})", value) from error
    return value


def _plan(value: Any, where: str) -> Plan:
    """A plan with nothing in it that is not a plan's, and with numbers that layers can be made of."""
    if not isinstance(value, dict):
        raise _Wrong(where, "an object", value)
    try:
        plan = Plan.from_dict(value)
    except (PlanError, AttributeError, TypeError) as error:
        raise _Wrong(where, f"a plan ({_short(error)})", "this") from error
    surplus = _surplus(value, plan.to_dict())
    if surplus:
        raise _Unknown(where, surplus)
    for link in plan.links:
        _link_settings({k: v for k, v in dataclasses.asdict(link).items() if v is not None}, f"{where}.chains.links")
    return plan


def _surplus(given: Any, understood: Any) -> str | None:
    """The path of an entry that is in ``given`` and not in ``understood``; ``None`` where there is none."""
    if isinstance(given, dict) and isinstance(understood, dict):
        for key, value in given.items():
            if key not in understood:
                return str(key)
            inner = _surplus(value, understood[key])
            if inner is not None:
                return f"{key}.{inner}"
    if isinstance(given, list) and isinstance(understood, list):
        for one, other in zip(given, understood, strict=False):
            inner = _surplus(one, other)
            if inner is not None:
                return inner
    return None


_WIDEST = 2**16
"""The largest ``reduction`` and ``min_hidden`` that are taken from a folder: layers are made of them."""

_SETTINGS: dict[str, Reader] = {
    item.name: _whole(1, _WIDEST) if str(item.type) == "int" else _text for item in dataclasses.fields(Settings)
}
"""The options of a conversion."""

_options = _record(dict, _SETTINGS, all_needed=False)
_link_settings = _record(dict, {**{f.name: _text for f in dataclasses.fields(Link)}, **_SETTINGS}, all_needed=False)
_sha256 = _matching("[0-9a-f]{64}", "a SHA-256 in hexadecimal")
_dtype = _matching("[a-z][a-z0-9_]{0,39}", "a dtype")
_names = _tuple(_text)


_insertion = _record(
    Insertion,
    {
        "attention": _matching("|".join(ATTENTIONS), f"one of {', '.join(ATTENTIONS)}"),
        "reduction": _whole(1, _WIDEST),
        "where": _text,
        "init": _matching("|".join(get_args(Init)), f"one of {', '.join(get_args(Init))}"),
    },
)

_FACTS = re.compile(r"([a-z]\w{0,39}) \[((?:\d{1,15}(?:, \d{1,15})*)?)\] ([0-9a-f]{64})")


def _facts(value: Any, where: str) -> Facts:
    found = _FACTS.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise _Wrong(where, "a dtype, a shape and a SHA-256", value)
    dtype, shape, sha256 = found.groups()
    return Facts(dtype, tuple(int(n) for n in shape.split(", ") if n), sha256)


_description = _record(
    Description,
    {
        "versions": _mapping(_text),
        "model": _optional(
            _record(
                Built,
                {"name": _text, "arguments": _mapping(_plain), "insertions": _tuple(_insertion)},
                may_lack=frozenset({"insertions"}),
            )
        ),
        "options": _options,
        "inputs": _inputs,
        "weights": _record(
            Weights,
            {
                "file": _matching("|".join(map(re.escape, FILES.values())), f"one of {', '.join(FILES.values())}"),
                "sha256": _sha256,
                "base_sha256": _sha256,
                "base": _mapping(_facts),
                "tied": _mapping(_text),
                "layouts": _mapping(_matching(r"\d{1,15}(x\d{1,15})*", "strides")),
            },
        ),
        "state": _record(
            State,
            {
                "training": _flag,
                "modes": _mapping(_flag),
                "kept_in_eval": _names,
                "frozen": _names,
                "unsaved": _mapping(_dtype),
            },
        ),
        "plan": _plan,
    },
)
