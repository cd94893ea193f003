"""``--config``: the options of a run in a file, YAML or JSON; the ``finetune.json`` of another run is one.

Such a file is data, and may be a stranger's. It names no code, no file to write and no server to tell; what it may not
choose by itself has to stand on the command line.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from dcafy.checkpoint.architecture import may_be_given
from dcafy.choices import CHOICES
from dcafy.disk import content
from dcafy.errors import CheckpointError, UsageError
from dcafy.images.about import Trained
from dcafy.images.options import DataOptions
from dcafy.images.sources import anchored
from dcafy.plan.options import Conversion, check, meant
from dcafy.records import Unknown, Wrong, parsed, read, shallow
from dcafy.runs.asking import Asked
from dcafy.runs.options import RunOptions
from dcafy.runs.request import Request, request_in
from dcafy.sources.options import FileOptions
from dcafy.training.options import TrainingConfig
from dcafy.wording import needing, one_line, printable, quoted, refused
from dcafy.zoos.specs import runs_code

_LARGEST = {True: 2**20, False: 2**16}
"""Bytes that a file of JSON, or else of YAML, may have; YAML takes much longer to read."""

_SECTIONS: dict[str, type[Any]] = {"training": TrainingConfig, "images": DataOptions, "conversion": Conversion}
"""Groups of options that ``finetune.json`` has; in a file of one's own their names may also stand alone."""

_OF_THE_RUN = ("data", "task", "recipe", "backbone", "plain", "compare", "seeds", "keep")
_OF_THE_FILE = ("arch", "prefix", "ignore_head")

_ONLY_SAID = {
    **dict.fromkeys(("output", "json_log", "overwrite"), "a file does not choose what is written"),
    **dict.fromkeys(("track", "download"), "a file does not choose what is sent or fetched"),
    **dict.fromkeys(("trust_pickle", "any_size"), "a file does not choose what is trusted"),
    **dict.fromkeys(("resume", "dry_run", "config"), "it is about this call"),
}
"""Options that a file may not give -> why."""

_RIVALS = (("plain", "compare"), ("warmup_steps", "warmup_epochs"))
"""Options that exclude one another: one on the command line beats the other in a file."""


def completed(asked: Asked) -> Asked:
    """``asked`` with the options of its ``--config`` for all that does not stand on the command line.

    Raises ``UsageError`` for a file that is none, and for what it may not say.
    """
    path = asked.run.config
    if path is None:
        return asked
    if asked.goes_on:
        raise UsageError("A run that goes on has its options in its folder. Leave --config out.")
    shown = quoted(str(path), 200)
    found = options_in(path)
    for rivals in _RIVALS:
        if not asked.given.keys().isdisjoint(rivals):
            found = {name: value for name, value in found.items() if name not in rivals}
    if "compare" not in found and "compare" not in asked.given:
        found.pop("seeds", None)
    new = {name: value for name, value in found.items() if name not in asked.given}
    _require_said(new, asked.given, shown)
    try:
        made = {
            part: dataclasses.replace(getattr(asked, part), **_own(new, getattr(asked, part)))
            for part in ("run", "training", "images", "conversion", "file")
        }
        for part in made.values():
            check(part, CHOICES)
    except UsageError as error:
        raise UsageError(f"{shown}: {error}") from error
    return dataclasses.replace(
        asked,
        **made,
        model=asked.model or new.get("model", ""),
        settings=new.get("settings", asked.settings),
        given={**new, **asked.given},
    )


def _own(options: Mapping[str, Any], configuration: Any) -> dict[str, Any]:
    return {item.name: options[item.name] for item in dataclasses.fields(configuration) if item.name in options}


def _require_said(new: Mapping[str, Any], given: Mapping[str, Any], shown: str) -> None:
    """Nothing where all that a file may not choose by itself stands on the command line as well."""
    for name, says in (("model", "MODEL"), ("arch", "--arch")):
        spec = new.get(name)
        if spec is not None and not given.get(name) and not os.path.exists(spec) and runs_code(spec):
            raise UsageError(
                f"{shown} names a network that is built by code: {printable(spec)}. Name it as {says}, so that it is "
                "run because you say so."
            )
    data = new.get("data")
    if data is not None and not Trained(anchored(data), 0, {}).opened_unasked:
        raise UsageError(
            f"{shown} names {printable(data)}, which may hold pickles. Name it, so that it is opened because you say "
            f"so: --data {printable(data)}"
        )
    if new.get("follow_links"):
        raise UsageError(f"{shown} wants links to be followed out of the folder of images. Say so: --follow-links.")
    for key, value in new.get("settings", {}).items():
        if not may_be_given(key, value):
            raise UsageError(
                f"{shown} gives the network {printable(key)}, which a file may not choose. Say it: --set "
                f"{printable(key)}=..."
            )


# --- the file -------------------------------------------------------------------------------------------


def options_in(path: Path) -> dict[str, Any]:
    """The options in a file, by their names in the command; ``UsageError`` where it is not one of options."""
    shown = quoted(str(path), 200)
    try:
        data = _value_in(path)
        if not isinstance(data, dict):
            raise ValueError("it has no names with values, such as epochs: 5")
        if "version" in data:
            return _of_request(request_in(data))
        options: dict[str, Any] = {}
        for key, value in data.items():
            name = _name(key)
            if name in _SECTIONS and not isinstance(value, dict):
                raise Wrong(name, "a group of options", value)
            for inner, item in value.items() if name in _SECTIONS else ((key, value),):
                if _name(inner) in options:
                    raise ValueError(f"{printable(str(inner)[:60])} stands in it twice")
                options[_name(inner)] = _option(_name(inner), item)
        return options
    except (OSError, ValueError, RecursionError, CheckpointError) as error:
        reason = refused(error) if isinstance(error, OSError) else one_line(error)
        raise UsageError(f"--config {shown} is no file of options: {printable(reason[:300])}") from error


def _name(key: Any) -> str:
    """An option's name as it stands in Python: dashes are as good as underscores, and other names are understood."""
    name = str(key).strip().lstrip("-").replace("-", "_")
    return _OTHER_NAMES.get(name, name)


def _value_in(path: Path) -> Any:
    text = content(path, _LARGEST[True])
    if text.lstrip()[:1] == b"{":
        return parsed(text)
    if len(text) > _LARGEST[False]:
        raise ValueError(f"it is too large: more than {_LARGEST[False]:,} bytes")
    with needing("--config", "train", "PyYAML"):
        import yaml
    try:
        return shallow(yaml.load(text, Loader=_loader(yaml)))
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from error


def _loader(yaml: Any) -> Any:
    """A loader of plain data: YAML 1.2's numbers and words (``no`` is a word), no aliases, no name twice."""

    class Plain(yaml.SafeLoader):  # type: ignore[misc]
        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the class's own: not those that it would inherit

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it has an alias (*), and what that stands for could be without end")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            for key in keys:
                if not isinstance(key, str):
                    raise yaml.YAMLError("a name in it is no text")
                if keys.count(key) > 1:
                    raise yaml.YAMLError(f"{key[:60]} stands in it twice")
            return super().construct_mapping(node, deep)

    for tag, pattern, first in _PLAIN:
        Plain.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))
    return Plain


_NUMBER = "-+.0123456789"
_PLAIN = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]{1,18}$", _NUMBER),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", _NUMBER),
)
"""Tag -> what is read as such (YAML 1.2, the core schema), and the characters that it begins with."""


# --- what is in it --------------------------------------------------------------------------------------


def _kinds() -> dict[str, tuple[Any, tuple[str, ...]]]:
    """Option -> its annotation and its choices."""
    found: dict[str, tuple[Any, tuple[str, ...]]] = {"model": (str, ()), "settings": (dict[str, Any], ())}
    for kind, names in (
        (RunOptions, _OF_THE_RUN),
        (FileOptions, _OF_THE_FILE),
        *((k, None) for k in _SECTIONS.values()),
    ):
        hints = get_type_hints(kind)
        for item in dataclasses.fields(kind):
            if (names is None or item.name in names) and item.name not in _ONLY_SAID:
                choices = item.metadata["choices"] or tuple(CHOICES.get(item.name, ()))
                found[item.name] = hints[item.name], choices
    return found


_HOMES: tuple[type[Any], ...] = (RunOptions, *_SECTIONS.values())
_OTHER_NAMES = {
    "set": "settings",
    **{
        other.lstrip("-").replace("-", "_"): item.name
        for kind in _HOMES
        for item in dataclasses.fields(kind)
        for other in item.metadata["names"]
    },
}
"""Other names that the command has for its options."""


def _option(name: str, value: Any) -> Any:
    """The value of an option as the command would have it."""
    if name in _ONLY_SAID:
        raise ValueError(f"--{name.replace('_', '-')} is for the command line: {_ONLY_SAID[name]}")
    kinds = _kinds()
    if name not in kinds:
        raise Unknown("", name, list(kinds))
    annotation, choices = kinds[name]
    is_text = annotation in (str, str | None, Path | None)
    if is_text and isinstance(value, list):
        value = ",".join(str(item) for item in value)
    if is_text and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if annotation == Path | None:
        return None if value is None else Path(read(str, value, name))
    found = read(annotation, value, name)
    return meant(found, choices) if choices else found


def _of_request(request: Request) -> dict[str, Any]:
    """The options that a run was asked for with."""
    images = {name: value for name, value in dataclasses.asdict(request.images).items() if name != "download"}
    options = {
        **{name: getattr(request, name) for name in ("model", "data", "task", "recipe", "keep", *_OF_THE_FILE)},
        "backbone": None if request.backbone is None else Path(request.backbone),
        "settings": dict(request.settings),
        "plain": request.arm == "plain",
        **dataclasses.asdict(request.conversion),
        **images,
        **dataclasses.asdict(request.training),
    }
    return options | ({"compare": ",".join(request.arms), "seeds": request.seeds} if request.seeds else {})
