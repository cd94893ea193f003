"""``dcafy finetune`` as a folder: what was asked for, where it stands, what it has measured, and the model.

::

    runs/flowers/finetune.json            the request, written before the first step
                 checkpoint.safetensors   where the training stands
                 log.jsonl                an object for each epoch
                 dcafy.json, model.safetensors   the model, as dcafy.save writes it
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from dcafy.checkpoint import save
from dcafy.conversion import converted_as
from dcafy.emit.connect import connected_modules, connections, revert
from dcafy.errors import CheckpointError, UsageError
from dcafy.images.data import Data
from dcafy.images.order import seeded
from dcafy.plan.options import Conversion, from_mapping
from dcafy.plan.tables import printable
from dcafy.runs.recipes import PURPOSES, Ready
from dcafy.sources import open_model
from dcafy.training.checkpoint import replace_file
from dcafy.training.config import DataOptions, TrainingConfig
from dcafy.training.history import History
from dcafy.training.loop import finetune
from dcafy.training.telling import LOG, JsonLines, Listener, Several

__all__ = [
    "REQUEST",
    "Request",
    "Subject",
    "finish",
    "read_request",
    "require_empty",
    "subject",
    "train",
    "write_request",
]

REQUEST = "finetune.json"
"""The name of the request in the folder of a run."""

_VERSION = 1


@dataclass(frozen=True)
class Request:
    """All that decides a run. ``seeds``: how many seeds are compared; 0 where nothing is compared."""

    model: str
    data: str
    arch: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    conversion: Conversion = field(default_factory=Conversion)
    images: DataOptions = field(default_factory=DataOptions)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    seeds: int = 0
    task: str = "classification"

    def anchored(self) -> Request:
        """The request with absolute paths, so that it means the same in every folder."""
        kind, colon, rest = self.data.partition(":")
        if rest and kind in ("imagefolder", "fashion-mnist"):
            rest = os.path.abspath(rest)
        elif rest and kind == "torchvision":
            name, second, root = rest.partition(":")
            rest = f"{name}{second}{os.path.abspath(root) if root else ''}"
        elif rest and kind == "coco":
            rest = ":".join(os.path.abspath(part) if part else "" for part in rest.split(":"))
        model = os.path.abspath(self.model) if os.path.exists(self.model) else self.model
        return dataclasses.replace(self, model=model, data=f"{kind}{colon}{rest}")


@dataclass(frozen=True)
class Subject:
    """What is trained on what: a network, connected or not, its data, and the data made ready for it."""

    network: nn.Module
    data: Data
    ready: Ready


def subject(request: Request, *, seed: int, connect: bool = True, trust_pickle: bool = False) -> Subject:
    """The network that ``request`` names with a head for its data, connected or not, and the data.

    Whatever is new in the network follows from ``seed``; it is the same whether the network is connected or not.
    """
    purpose = PURPOSES[request.task]
    purpose.task(request.training)  # refuses options that mean nothing for it
    data = purpose.open_data(request.data, request.images)
    with seeded(seed, 3):  # a network without weights of its own begins with those that follow from the seed
        source = open_model(request.model, arch=request.arch, settings=request.settings, trust_pickle=trust_pickle)
    network = source.model
    with seeded(seed, 2):
        ready = purpose.ready(network, data, request)
        if any(True for _ in connected_modules(network)):
            if request.conversion != Conversion():
                raise UsageError(
                    f"{request.model!r} is connected already, so the options of a conversion do not apply."
                )
            if not connect:
                network = _without_connections(network, request.model)
        elif connect:
            network = converted_as(network, request.conversion, example_inputs=ready.example, copy=False)
        elif request.conversion.attention is not None:
            from dcafy.attention.insertion import insert

            chosen = request.conversion
            network = insert(
                network,
                str(chosen.attention),
                reduction=chosen.attention_reduction,
                where=chosen.where,
                init=chosen.init,  # type: ignore[arg-type]
                example_inputs=ready.example,
                copy=False,
            )
    return Subject(network, data, ready)


def _without_connections(network: nn.Module, name: str) -> nn.Module:
    """What a connected network was converted from; ``UsageError`` where its connections have been trained."""
    for path, connection in connections(network).items():
        if connection.beta.item() != 0 or connection.alpha.item() != 1:
            raise UsageError(
                f"The connections of {name!r} have been trained already ({path}: α {connection.alpha.item():.3g}, β "
                f"{connection.beta.item():.3g}), so there is no original that begins where it does. Compare from the "
                "network that it was converted from."
            )
    return revert(network)


def train(
    request: Request, on: Subject, directory: Path, *, seed: int, resume: bool, listeners: tuple[Listener, ...] = ()
) -> History:
    """Trains the subject, with checkpoint and log in ``directory``."""
    config = dataclasses.replace(request.training, seed=seed)
    strict = (_Strict(),) if request.images.strict else ()
    return finetune(
        on.network,
        on.ready.train,
        on.ready.val,
        config,
        task=PURPOSES[request.task].task(config),
        directory=directory,
        resume=resume,
        new_layers=on.ready.new_layers,
        listener=Several((*strict, JsonLines(directory / LOG), *listeners)),
    )


class _Strict(Listener):
    """Stops at the first image that cannot be read."""

    def skipped(self, name: str) -> None:
        from dcafy.errors import InputError

        raise InputError(f"{printable(name)}. It cannot be read, and --strict was given. Repair or remove the file.")


def finish(on: Subject, directory: Path) -> None:
    """Saves the trained network in ``directory``: a connected one as :func:`dcafy.save` does."""
    if any(True for _ in connected_modules(on.network)):
        save(on.network, directory)
        return
    from safetensors.torch import save_model

    replace_file(directory / "model.safetensors", lambda beside: save_model(on.network, str(beside)))


# --- the request on the disk ----------------------------------------------------------------------------


def require_empty(directory: Path) -> None:
    """Nothing where a run may begin: a new or empty folder; ``CheckpointError`` where it holds other things."""
    try:
        others = sorted(entry.name for entry in directory.iterdir()) if directory.exists() else []
    except OSError as error:
        raise CheckpointError(
            f"{printable(str(directory))!r} cannot be a folder for a run: {error.strerror}."
        ) from error
    others = [name for name in others if not name.startswith(".")]
    if others:
        raise CheckpointError(
            f"{printable(str(directory))!r} holds other things ({printable(', '.join(others[:3]))}). Name a new or "
            "empty folder."
        )


def write_request(directory: Path, request: Request) -> None:
    """Puts the request into the folder of its run."""
    text = json.dumps({"version": _VERSION, **dataclasses.asdict(request)}, indent=2) + "\n"
    replace_file(directory / REQUEST, lambda beside: beside.write_text(text, encoding="utf-8"))


_PARTS: dict[str, type[Any]] = {"conversion": Conversion, "images": DataOptions, "training": TrainingConfig}


def read_request(directory: Path) -> Request:
    """The request in the folder of a run; ``CheckpointError`` where there is none or it is damaged.

    A request is data: where it names code to import, the command asks for that name again.
    """
    file = directory / REQUEST
    shown = repr(printable(str(file)))
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{printable(str(directory))!r} has no {REQUEST}, so no run was started in it. Start one: dcafy finetune "
            f"MODEL --data DATA -o {printable(str(directory))}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{shown} is damaged ({printable(str(error)[:100])}). Start the run anew.") from error
    if not isinstance(data, dict) or data.pop("version", None) != _VERSION:
        raise CheckpointError(f"{shown} was not written by this version of dcafy finetune.")
    try:
        parts = {name: from_mapping(kind, data.pop(name)) for name, kind in _PARTS.items()}
        expected = {"model": str, "data": str, "arch": (str, type(None)), "settings": dict, "seeds": int, "task": str}
        if data.keys() != expected.keys() or not all(isinstance(data[k], kind) for k, kind in expected.items()):  # type: ignore[arg-type]
            raise UsageError("its entries are not those of a request")
        if data["task"] not in PURPOSES:
            raise UsageError(f"its task {data['task']!r} is not known")
        return Request(**data, **parts)
    except (KeyError, TypeError, AttributeError, UsageError) as error:
        raise CheckpointError(f"{shown} is damaged: {printable(str(error)[:200])}. Start the run anew.") from error
