"""``dcafy finetune`` as a folder: what was asked for, where it stands, what it has measured, and the model.

::

    runs/flowers/finetune.json            the request, written before the first step
                 checkpoint.safetensors   where the training stands
                 log.jsonl                an object for each epoch
                 dcafy.json, model.safetensors   the model, as dcafy.save writes it
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dcafy.attention.inserted import hands_on, kinds_inserted
from dcafy.attention.starting import trained
from dcafy.checkpoint import load
from dcafy.checkpoint.description import FILES
from dcafy.checkpoint.folder import MARKER, Folder
from dcafy.checkpoint.hub import is_address
from dcafy.checkpoint.saving import store
from dcafy.conversion import convert, inspect, with_attention
from dcafy.converted import revert
from dcafy.detection.backbone import with_settled_backbone
from dcafy.emit.dca import connections, is_connected
from dcafy.errors import CheckpointError, InputError, UsageError
from dcafy.images.about import About, Trained, about, put_about
from dcafy.images.data import Data
from dcafy.images.order import seeded
from dcafy.plan.options import Conversion
from dcafy.runs.options import conversion_of
from dcafy.runs.recipes import PURPOSES, Ready
from dcafy.runs.request import REQUEST, Request, read_request
from dcafy.sources import FileOptions, open_model
from dcafy.training.history import Epoch, History
from dcafy.training.loop import finetune
from dcafy.training.options import TrainingConfig
from dcafy.training.parallel import is_main_process
from dcafy.training.telling import LOG, JsonLines, Listener, Several
from dcafy.training.trial import Trial, tried
from dcafy.wording import one_line, printable, quoted
from dcafy.zoos.packages import ZOOS
from dcafy.zoos.specs import runs_code


@dataclass(frozen=True)
class Subject:
    """What is trained on what: a network, connected or not, its data, and the data made ready for it.

    ``came_connected``: whether the network was connected before it was opened here.
    """

    network: nn.Module
    data: Data
    ready: Ready
    came_connected: bool = False


def subject(request: Request, *, seed: int, arm: str | None = None, file: FileOptions | None = None) -> Subject:
    """The network that ``request`` names with a head for its data, connected or not, and the data.

    ``arm``: what is made of the network; default: the request's. Whatever is new in it follows from ``seed``, and is
    the same in every arm that has it.
    """
    arm = arm or request.arm
    require_arm(request, arm)
    purpose = PURPOSES[request.task]
    purpose.task(request.training)  # refuses options that mean nothing for it
    data = purpose.open_data(request.data, request.images)
    with seeded(seed, 3):  # a network without weights of its own begins with those that follow from the seed
        whose = {name: getattr(request, name) for name in ("arch", "prefix", "ignore_head")}
        options = dataclasses.asdict(dataclasses.replace(file or FileOptions(), **whose))
        source = open_model(request.model, settings=request.settings, **options)
    network = source.model
    if request.backbone is not None:
        if request.task != "detection":
            raise UsageError(
                "--backbone puts a trained network under a detector. Add --task detection, or leave it out."
            )
        network = with_settled_backbone(network, trained_in(Path(request.backbone), arm))
    conversion = request.conversion
    if request.backbone is not None and conversion.attention in kinds_inserted(network):
        conversion = dataclasses.replace(conversion, attention=None)  # it came along with the backbone
    with seeded(seed, 2):
        ready = purpose.ready(network, data, request)
        came_connected = is_connected(network)
        if came_connected:
            if request.conversion not in (Conversion(), conversion_of(request.task, request.recipe)):
                raise UsageError(
                    f"{request.model!r} is connected already, so the options of a conversion do not apply."
                )
            if arm != "connected":
                network = _without_connections(network, request.model)
        elif arm == "connected":
            network = convert(network, example_inputs=ready.example, copy=False, **conversion.said())
        elif arm != "plain":
            network = with_attention(network, conversion, example_inputs=ready.example, copy=False)
        _require_difference(request, network, arm, ready.example)
    return Subject(network, data, ready, came_connected)


def _require_difference(request: Request, network: nn.Module, arm: str, example: Any) -> None:
    """Nothing where the arms of a comparison are networks of their own; else ``UsageError``, before any is trained."""
    alike = {"attention", "original", "connected"} & set(request.arms or ("original", "connected"))
    if not request.seeds or "connected" not in alike or len(alike) < 2 or arm not in alike or not hands_on(network):
        return
    if not is_connected(network) and not inspect(network, example_inputs=example).blocks:
        raise UsageError(
            f"With --attention {request.conversion.attention} there is no block to connect in {request.model!r}, so "
            f"that {' and '.join(sorted(alike))} are one and the same network. Compare it with the network as it is: "
            "--compare plain,attention."
        )


def require_arm(request: Request, arm: str) -> None:
    """Nothing where the request says all that this arm needs; else ``UsageError``."""
    if arm == "attention" and request.conversion.attention is None:
        raise UsageError(
            "--compare attention is the network with inserted attention, and --attention names none. Add it, or "
            "compare with plain: the network as it is."
        )


def trained_in(run: Path, arm: str = "connected") -> nn.Module:
    """The network that the run in this folder has trained, or that arm of it where it is a comparison.

    Raises ``CheckpointError`` where there is none, ``UsageError`` where it is built by code that the folder names.
    """
    asked, shown = read_request(run), printable(str(run))
    if asked.arms:
        if arm not in asked.arms:
            raise UsageError(
                f"{shown} compares {', '.join(asked.arms)}, and no {arm}: there is no such backbone in it."
            )
        run = run / "seeds" / f"{asked.training.seed}-{arm}"
    weights = run / FILES[True]
    if not weights.exists():
        raise CheckpointError(f"{shown} has trained nothing to its end. Go on with it: dcafy finetune {shown} --resume")
    if (run / MARKER).exists():
        return load(run)
    if any(runs_code(spec) or is_address(spec) for spec in (asked.model, asked.arch or "")):
        raise UsageError(
            f"The network in {shown} is built by code or fetched, which a folder may not choose. Put it under the "
            "detector in Python: dcafy.detection.with_backbone(detector, classifier)."
        )
    named = asked.model.partition(":")[0] in ZOOS and not os.path.exists(asked.model)
    spec = asked.model.partition("@")[0] if named else asked.model  # its own weights come next
    whose = {name: getattr(asked, name) for name in ("arch", "prefix", "ignore_head")}
    network = open_model(spec, settings=asked.settings, **whose).model
    if (asked.arm if not asked.arms else arm) != "plain":
        network = with_attention(network, asked.conversion, copy=False)
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"The weights in {shown} are damaged ({one_line(error)}). Train them again.") from error
    _fill(network, tensors, shown)
    return network


@torch.no_grad()
def _fill(network: nn.Module, tensors: Mapping[str, torch.Tensor], shown: str) -> None:
    """Gives ``network`` these values, all but a head of another size."""
    state = network.state_dict()
    fits = {key for key, value in tensors.items() if key in state and state[key].shape == value.shape}
    filled = {state[key].data_ptr() for key in fits}
    left = [key for key, value in state.items() if key not in fits and value.data_ptr() not in filled]
    if len({key.rpartition(".")[0] for key in left}) > 1 or tensors.keys() - state.keys():
        raise CheckpointError(
            f"The weights in {shown} do not fit the network that its {REQUEST} names: "
            f"{printable(', '.join([*left, *sorted(tensors.keys() - state.keys())][:3]))}."
        )
    for key in fits:
        state[key].copy_(tensors[key])


def _without_connections(network: nn.Module, name: str) -> nn.Module:
    """What a connected network was converted from; ``UsageError`` where its connections have been trained."""
    for path in trained(network):
        one = connections(network)[path]
        raise UsageError(
            f"The connections of {name!r} have been trained already ({path}: α {one.alpha.item():.3g}, β "
            f"{one.beta.item():.3g}), so there is no original that begins where it does. Compare from the network that "
            "it was converted from."
        )
    return revert(network)


def train(
    request: Request, on: Subject, directory: Path, *, seed: int, resume: bool, listeners: tuple[Listener, ...] = ()
) -> History:
    """Trains the subject, with checkpoint and log in ``directory``."""
    config = dataclasses.replace(request.training, seed=seed)
    task = PURPOSES[request.task].task(config)
    best = () if request.keep == "last" else (_Best(request, on, directory / BEST, task.headline),)
    strict = (_Strict(),) if request.images.strict else ()
    history = finetune(
        on.network,
        on.ready.train,
        on.ready.val,
        config,
        task=task,
        directory=directory,
        resume=resume,
        new_layers=on.ready.new_layers,
        listener=Several((*strict, *best, JsonLines(directory / LOG), *listeners)),
    )
    if history.epochs:
        put_about(on.network, _after(request, on, history.epochs[-1]))
    if request.keep == "best" and is_main_process() and (directory / BEST).is_dir():
        _take_best(on, directory / BEST)
    return history


def trial(request: Request, on: Subject) -> Trial:
    """What a training of the subject takes; it is no good for one afterwards."""
    task = PURPOSES[request.task].task(request.training)
    return tried(on.network, on.ready.train, on.ready.val, request.training, task, on.ready.new_layers)


BEST = "best"
"""The folder of the best epoch's model, in the folder of a run."""


def _after(request: Request, on: Subject, epoch: Epoch) -> About:
    """What is known of the network after an epoch."""
    trained = Trained(request.data, epoch.epoch, dict(epoch.metrics), request.images.val_fraction)
    return dataclasses.replace(about(on.network), trained=trained)


def _take_best(on: Subject, place: Path) -> None:
    """Gives the network the values that the best epoch had; other than ``dcafy.load`` it needs no way to build it."""
    description, tensors = Folder(place).read()
    left = on.network.load_state_dict(tensors, strict=False)
    unlike = [*left.unexpected_keys, *(key for key in left.missing_keys if key not in description.weights.tied)]
    if unlike:
        raise CheckpointError(
            f"{quoted(str(place), 200)} does not hold the network of this run ({printable(unlike[0])}). Remove it: the "
            "last epoch is in the checkpoint."
        )
    if description.about is not None:
        put_about(on.network, description.about)


class _Best(Listener):
    """Saves what was measured whenever it is the best so far; of equals, the first."""

    def __init__(self, request: Request, on: Subject, place: Path, metric: str) -> None:
        self.request, self.on, self.place, self.metric = request, on, place, metric
        self.so_far = -math.inf

    def begins(self, config: TrainingConfig, steps: int, done: int, epochs: Sequence[Epoch]) -> None:
        if not epochs:
            shutil.rmtree(self.place, ignore_errors=True)  # of a run that starts over
        self.so_far = max((epoch.metrics.get(self.metric, -math.inf) for epoch in epochs), default=-math.inf)

    def measured(self, model: nn.Module, epoch: Epoch) -> None:
        # It is saved before the checkpoint is: killed in between, the same epoch comes again.
        value = epoch.metrics.get(self.metric, -math.inf)
        if value > self.so_far and math.isfinite(epoch.metrics.get("loss", 0.0)):
            before = about(model)
            put_about(model, _after(self.request, self.on, epoch))
            try:
                store(model, self.place)
            finally:
                put_about(model, before)
            self.so_far = value


class _Strict(Listener):
    """Stops at the first image that cannot be read."""

    def skipped(self, name: str) -> None:
        raise InputError(f"{printable(name)}. It cannot be read, and --strict was given. Repair or remove the file.")


def finish(on: Subject, directory: Path) -> None:
    """Saves the trained network in ``directory``, from where :func:`dcafy.load` gives it back, connected or not."""
    store(on.network, directory)
