"""What a run was asked for, as the file in its folder says it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from dcafy.choices import CHOICES
from dcafy.disk import content, replace_file
from dcafy.errors import CheckpointError, UsageError
from dcafy.images.options import DataOptions
from dcafy.images.sources import anchored
from dcafy.plan.options import Conversion, check
from dcafy.records import Format, OtherVersion, Unknown, Wrong, one_of, parsed, read, written
from dcafy.runs.options import ARMS, KEPT, TASKS
from dcafy.runs.paper import RECIPES
from dcafy.training.options import TIMES, TrainingConfig
from dcafy.wording import printable, quoted, refused

REQUEST = "finetune.json"
"""The name of the request in the folder of a run."""


def _with_rates(data: dict[str, Any]) -> dict[str, Any]:
    """Requests from before messages could be centred, when connections had ten times whatever rate the base has."""
    conversion, training = data.get("conversion"), data.get("training")
    if not isinstance(conversion, dict) or not isinstance(training, dict):
        return data
    renamed = {{"init": "attention_init"}.get(name, name): value for name, value in conversion.items()}
    lr = training.get("lr")
    if "scale_lr" not in training and training.get("connection_lr") is None and isinstance(lr, int | float):
        training = {**training, "connection_lr": TIMES * lr}
    return {**data, "conversion": {"message": "plain", **renamed}, "training": training}


def _without_places(request: dict[str, Any]) -> dict[str, Any]:
    """Requests of version 1 say nothing about where in a file the weights are."""
    return {**request, "prefix": None, "ignore_head": False}


def _completed(request: dict[str, Any]) -> dict[str, Any]:
    """Requests of version 2 kept the last epoch, and were compared with what the network was before."""
    arms = ["original", "connected"] if request.get("seeds") else []
    new = {"keep": "last", "arm": "connected", "arms": arms, "recipe": None, "backbone": None}
    return _with_rates({**new, **request})


FORMAT = Format("version", 2, {1: _without_places, 2: _completed})
"""The version of the request on the disk."""

_LARGEST = 2**20
"""Bytes that a request may have; one takes about two thousand."""


@dataclass(frozen=True)
class Request:
    """All that decides a run.

    ``seeds``: how many seeds are compared; 0 where nothing is compared. ``arms``: what is compared, and ``arm``: what
    is trained where nothing is (``dcafy.runs.options.ARMS``). ``recipe``: whose options they are, but for those that
    were given. ``backbone``: the folder of the run whose network lies under a detector.
    """

    model: str
    data: str
    arch: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    conversion: Conversion = field(default_factory=Conversion)
    images: DataOptions = field(default_factory=DataOptions)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    seeds: int = 0
    task: Annotated[str, one_of(TASKS)] = "classification"
    arm: Annotated[str, one_of(ARMS)] = "connected"
    arms: tuple[Annotated[str, one_of(ARMS)], ...] = ()
    recipe: Annotated[str, one_of(RECIPES)] | None = None
    backbone: str | None = None
    prefix: str | None = None
    ignore_head: bool = False
    keep: Annotated[str, one_of(KEPT)] = "last"

    def anchored(self) -> Request:
        """The request with absolute paths, so that it means the same in every folder."""
        model = os.path.abspath(self.model) if os.path.exists(self.model) else self.model
        backbone = None if self.backbone is None else os.path.abspath(self.backbone)
        return dataclasses.replace(self, model=model, data=anchored(self.data), backbone=backbone)


def write_request(directory: Path, request: Request) -> None:
    """Puts the request into the folder of its run."""
    text = json.dumps(FORMAT.stamped(written(request)), indent=2) + "\n"
    replace_file(directory / REQUEST, lambda beside: beside.write_text(text, encoding="utf-8"))


def read_request(directory: Path) -> Request:
    """The request in the folder of a run; ``CheckpointError`` where there is none or it is damaged.

    A request is data: where it names code to import, the command asks for that name again.
    """
    file = directory / REQUEST
    shown = quoted(str(file), 200)
    try:
        data = parsed(content(file, _LARGEST))
    except FileNotFoundError:
        raise CheckpointError(
            f"{quoted(str(directory), 200)} has no {REQUEST}, so no run was started in it. Start one: dcafy finetune "
            "MODEL --data DATA -o DIR"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{shown} is damaged ({refused(error)[:100]}). Start the run anew.") from error
    try:
        return request_in(data)
    except OtherVersion as other:
        raise CheckpointError(f"{shown} was not written by this version of dcafy finetune.") from other
    except (Wrong, Unknown, UsageError) as error:
        raise CheckpointError(
            f"{shown} is damaged: {printable(str(error)[:200]).removesuffix('.')}. Start the run anew."
        ) from error


def request_in(data: Any) -> Request:
    """The request that JSON says; raises ``OtherVersion``, ``Wrong``, ``Unknown`` or ``UsageError``."""
    entries = FORMAT.opened(data if isinstance(data, dict) else {})
    missing = {item.name for item in dataclasses.fields(Request)} - entries.keys()
    if missing:
        raise UsageError(f"it does not say its {sorted(missing)[0]}")
    request: Request = read(Request, entries)
    check(request.conversion, CHOICES, dashes=False)
    return request
