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
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from dcafy.checkpoint.folder import Folder
from dcafy.checkpoint.saving import store
from dcafy.conversion import convert, with_attention
from dcafy.converted import revert
from dcafy.emit.dca import connections, is_connected
from dcafy.errors import CheckpointError, InputError, UsageError
from dcafy.images.about import About, Trained, about, put_about
from dcafy.images.data import Data
from dcafy.images.order import seeded
from dcafy.plan.options import Conversion
from dcafy.runs.recipes import PURPOSES, Ready
from dcafy.runs.request import Request
from dcafy.sources import FileOptions, open_model
from dcafy.training.history import Epoch, History
from dcafy.training.loop import finetune
from dcafy.training.options import TrainingConfig
from dcafy.training.parallel import is_main_process
from dcafy.training.telling import LOG, JsonLines, Listener, Several
from dcafy.wording import printable, quoted


@dataclass(frozen=True)
class Subject:
    """What is trained on what: a network, connected or not, its data, and the data made ready for it."""

    network: nn.Module
    data: Data
    ready: Ready


def subject(request: Request, *, seed: int, connect: bool = True, file: FileOptions | None = None) -> Subject:
    """The network that ``request`` names with a head for its data, connected or not, and the data.

    Whatever is new in the network follows from ``seed``; it is the same whether the network is connected or not.
    """
    purpose = PURPOSES[request.task]
    purpose.task(request.training)  # refuses options that mean nothing for it
    data = purpose.open_data(request.data, request.images)
    with seeded(seed, 3):  # a network without weights of its own begins with those that follow from the seed
        whose = {name: getattr(request, name) for name in ("arch", "prefix", "ignore_head")}
        options = dataclasses.asdict(dataclasses.replace(file or FileOptions(), **whose))
        source = open_model(request.model, settings=request.settings, **options)
    network = source.model
    with seeded(seed, 2):
        ready = purpose.ready(network, data, request)
        if is_connected(network):
            if request.conversion != Conversion():
                raise UsageError(
                    f"{request.model!r} is connected already, so the options of a conversion do not apply."
                )
            if not connect:
                network = _without_connections(network, request.model)
        elif connect:
            options = dataclasses.asdict(request.conversion)
            network = convert(network, example_inputs=ready.example, copy=False, **options)
        else:
            network = with_attention(network, request.conversion, example_inputs=ready.example, copy=False)
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
