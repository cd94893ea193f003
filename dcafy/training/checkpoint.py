"""Where a run stands, in one file: written beside, flushed and moved into place, so that there is always a whole one.

Tensors and a JSON header in a safetensors file; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dcafy.checkpoint.tensors import apart, facts, fingerprint
from dcafy.disk import regular, replace_file
from dcafy.errors import CheckpointError
from dcafy.records import Format, OtherVersion, read
from dcafy.wording import quoted, short

CHECKPOINT = "checkpoint.safetensors"
"""The name of the file in the folder of a run."""

_KIND = "dcafy training checkpoint"


def _keyed_by_block(header: dict[str, Any]) -> dict[str, Any]:
    """Checkpoints of version 2 name the connections by block, as folders of format 1 do."""
    return {**header, "keyed_by": "block"}


_FORMAT = Format("version", 3, {2: _keyed_by_block})


@dataclass(frozen=True)
class Checkpoint:
    """``tensors`` by name (``model/...``, ``optimizer/...``, ``rng/...``); ``facts`` is all that is no tensor.

    ``keyed_by``: whether connections are named by the ``module`` that hears, or by ``block`` as in older ones.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    keyed_by: str = "module"

    def renamed(self, now: Callable[[str], str]) -> Checkpoint:
        """The checkpoint with each name of the network's, in its state and in the optimizer's, as ``now`` says."""

        def name(given: str) -> str:
            part, _, rest = given.partition("/")
            if part not in ("model", "average", "optimizer"):
                return given
            outer = "module." if rest.startswith("module.") else ""
            key, slash, what = rest.removeprefix(outer).partition("/")
            return f"{part}/{outer}{now(key)}{slash}{what}"

        tied = {now(key): now(stored) for key, stored in self.facts["tied"].items()}
        tensors = {name(given): tensor for given, tensor in self.tensors.items()}
        return Checkpoint(tensors, {**self.facts, "tied": tied})


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Replaces the file at ``path`` in one step; ``CheckpointError`` where that fails: the old one is whole."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in checkpoint.tensors.items()}
    header = {"kind": _KIND, "sha256": _sha256(tensors, checkpoint.facts), "facts": checkpoint.facts}
    metadata = {"dcafy": json.dumps(_FORMAT.stamped(header))}
    replace_file(path, lambda beside: save_file(apart(tensors), beside, metadata=metadata))


def _sha256(tensors: Mapping[str, Tensor], plain: Any) -> str:
    """Of everything that a checkpoint holds."""
    of_tensors = fingerprint({name: facts(value) for name, value in tensors.items()})
    return hashlib.sha256(f"{of_tensors} {json.dumps(plain, sort_keys=True)}".encode()).hexdigest()


@dataclass(frozen=True)
class Reached:
    """How far a training has come: whole epochs, steps, and the learning rate of the base at the last one."""

    epoch: int
    step: int
    rate: float


_DAMAGED = (SafetensorError, LookupError, ValueError, TypeError, AttributeError, OverflowError)
"""What reading the header of a file raises that is no checkpoint, or is none any more."""


def standing_in(path: Path) -> Reached | None:
    """How far the training of the checkpoint at ``path`` has come; ``None`` where there is none. Reads no tensor.

    Raises ``CheckpointError`` for what is no checkpoint; whether it is whole shows when it is read.
    """
    if not os.path.lexists(path):
        return None
    shown = quoted(str(path), 200)
    try:
        regular(path).close()
        with safe_open(path, framework="pt") as file:
            header = _header(file)
        if header["kind"] != _KIND:
            raise ValueError("it is no checkpoint of a dcafy run")
        progress = header["facts"]["progress"]
        known = {name: progress.get(name, 0) for name in ("epoch", "step", "rate")}
        reached: Reached = read(Reached, known, "progress")
    except (OSError, MemoryError, RuntimeError, *_DAMAGED) as error:
        raise CheckpointError(
            f"{shown} cannot be read ({short(str(error), 160)}). Copy it again, or remove it."
        ) from error
    return reached


def _header(file: Any) -> Any:
    """What a file says of its tensors; ``None`` where it is none of dcafy's."""
    return json.loads((file.metadata() or {}).get("dcafy", "null"))


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint at ``path``, ``None`` where there is none; ``CheckpointError`` where it is damaged or foreign."""
    if not os.path.lexists(path):
        return None
    shown = quoted(str(path), 200)
    try:
        regular(path).close()
        with safe_open(path, framework="pt") as file:
            header = _header(file)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, MemoryError, RuntimeError) as error:  # a RecursionError, too: of the header
        raise CheckpointError(f"{shown} could not be read ({short(str(error), 160)}).") from error
    except _DAMAGED as error:
        raise CheckpointError(
            f"{shown} is damaged ({short(str(error), 160)}). Copy it again, or remove it: then --resume starts over."
        ) from error
    if not isinstance(header, dict) or header.get("kind") != _KIND:
        raise CheckpointError(f"{shown} is no checkpoint of a dcafy run. Name the folder of one.")
    try:
        header = _FORMAT.opened(header)
    except OtherVersion as other:
        raise CheckpointError(f"{shown} was written by another version of dcafy. Go on with that version.") from other
    if header.get("sha256") != _sha256(tensors, header.get("facts")):
        raise CheckpointError(f"{shown} is damaged: its content is not what was written. Copy it again, or remove it.")
    if not isinstance(header.get("facts"), dict):
        raise CheckpointError(f"{shown} is damaged: it does not say where the run stood.")
    return Checkpoint(tensors, header["facts"], header.get("keyed_by", "module"))
