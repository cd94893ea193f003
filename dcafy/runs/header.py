"""What is known before the first step: what is trained on what, how, where, and what it would take."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import RenderableType
from torch import nn

from dcafy.attention.inserted import inserted_modules
from dcafy.checkpoint.tensors import is_connection
from dcafy.emit.dca import connections, is_connected
from dcafy.images.about import about
from dcafy.runs.asking import places_of
from dcafy.runs.request import Request
from dcafy.runs.run import Subject
from dcafy.runs.using import device_for
from dcafy.training.checkpoint import CHECKPOINT, Reached, standing_in
from dcafy.training.freezing import frozen_base
from dcafy.training.optimization import part_of_rate
from dcafy.training.options import TrainingConfig
from dcafy.training.telling import lasting
from dcafy.training.trial import Trial
from dcafy.wording import counted, few, printable
from dcafy.zoos.specs import RANDOM, has_random_weights


def header(
    request: Request,
    on: Subject,
    output: Path | None,
    *,
    trackers: Sequence[str] = (),
    asked_before: Request | None = None,
) -> str:
    """The lines that stand before the first step.

    ``output``: where the run is kept; ``None`` for a trial. ``trackers``: by whom it is tracked. ``asked_before``: what
    a run that goes on was asked for.
    """
    config = request.training
    steps = _steps(on, config)
    rows = {
        "network": _network(request, on.network, goes_on=asked_before is not None),
        "data": f"{request.data}: {counted(len(on.data.train), 'image')} to train on, {len(on.data.val)} to validate "
        f"on, {counted(len(on.data.classes), 'class')}: {few(on.data.classes, 8)}".replace("classs", "classes"),
        "images": _images(request, on),
        "trained": _trained(on, config),
        "rates": _rates(config, on.network),
        "budget": f"{counted(config.epochs, 'epoch')} of {counted(steps, 'step')}, {_batch(config)}"
        + (f"; {_compared(request)}" if request.seeds else ""),
        "device": _device(config),
        "writes": "nothing (--dry-run)" if output is None else _writes(request, output, trackers),
    }
    if asked_before is not None and output is not None and asked_before.training.epochs < config.epochs:
        rows["further"] = _further(request, asked_before, output, steps)
    return "\n".join(f"{name:<8} {printable(text)}" for name, text in rows.items())


_FEW = 8
"""Images with fewer of which the mean of a batch says little of that of all."""


def _network(request: Request, network: nn.Module, *, goes_on: bool) -> str:
    conversion = request.conversion
    parts = [request.model if request.arch is None else f"{request.model} ({request.arch})"]
    if conversion.attention is not None and request.arm != "plain":
        parts.append(f"with {conversion.attention} put in")
    if request.backbone is not None:
        parts.append(f"on the network of {request.backbone}")
    own = connections(network) if is_connected(network) else {}
    centred = any(one.centre is not None for one in own.values())
    at_once = request.training.batch_size // int(os.environ.get("WORLD_SIZE", "1"))
    few = f", of {counted(at_once, 'image')} at once, which is few: --message plain" if at_once < _FEW else ""
    told = f" with centred messages{few}" if centred else ""
    parts.append(f"{counted(len(own), 'connection')}{told}" if own else "no connections")
    begun = RANDOM if has_random_weights(network) else "weights: loaded"
    return f"{', '.join(parts)}; {'weights: as far as the run has come' if goes_on else begun}"


def _images(request: Request, on: Subject) -> str:
    how = about(on.network).preparation
    size = "as the detector resizes them" if how is None else f"{' x '.join(map(str, how.size))} pixels"
    if how is not None and how.crop == "center" and how.resize != min(how.size):
        size += f" (to validate on, the centre of {how.resize})"
    channels = "" if how is None else f", {counted(how.channels, 'channel')}"
    augment = request.images.augment
    if augment == "auto":
        drawn = "shift" if on.data.drawn else "standard"
        augment = "a flip" if how is None else drawn
    return f"{size}{channels}; varied in training: {augment}"


def _trained(on: Subject, config: TrainingConfig) -> str:
    """What is trained, with its numbers of parameters."""
    model, new = on.network, [on.network.get_submodule(path) for path in on.ready.new_layers]
    every = sum(parameter.numel() for parameter in model.parameters())
    own = sum(parameter.numel() for name, parameter in model.named_parameters() if is_connection(name))
    with frozen_base(model, new):
        alone = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    trained = alone if config.freeze_base else sum(p.numel() for p in model.parameters() if p.requires_grad)
    what = "everything" if trained == every else "all but what is frozen"
    what = "connections and what is new" if config.freeze_base else what
    parts = [f"{what}: {trained:,} of {every:,} parameters"]
    if own:
        parts.append(f"{own:,} of them in connections")
    if on.ready.new_layers:
        parts.append(f"new classifier: {', '.join(on.ready.new_layers[:3])}")
    if config.freeze_base_epochs and not config.freeze_base:
        parts.append(f"at first, for {counted(config.freeze_base_epochs, 'epoch')}, {alone:,} alone")
    if config.balance:
        parts.append("classes weighed by how rare they are")
    return "; ".join(parts)


def _rates(config: TrainingConfig, network: nn.Module) -> str:
    own = f", connections {config.connection_rate:g}, α and β {config.scale_rate:g}" if is_connected(network) else ""
    own += f", attention that was put in {config.connection_rate:g}" if inserted_modules(network) else ""
    warmup = f" after {config.warmup_steps} steps of warm-up" if config.warmup_steps else ""
    warmup = f" after {config.warmup_epochs:g} epochs of warm-up" if config.warmup_epochs else warmup
    return (
        f"{config.optimizer}, base {config.base_rate:g}{own}; {_SCHEDULES[config.schedule](config)}{warmup}; weight "
        f"decay {config.decay:g}"
    )


_SCHEDULES: Mapping[str, Callable[[TrainingConfig], str]] = {
    "cosine": lambda config: "cosine to 0",
    "constant": lambda config: "constant",
    "step": lambda config: f"by 10 every {counted(config.step_epochs, 'epoch')}",
    "multistep": lambda config: f"by 10 after epochs {' and '.join(f'{epoch:g}' for epoch in config.falls_at)}",
}


def _batch(config: TrainingConfig) -> str:
    more = f" times {config.accumulate}" if config.accumulate > 1 else ""
    return f"{counted(config.batch_size, 'image')}{more} in a step"


def _compared(request: Request) -> str:
    runs = request.seeds * len(request.arms)
    return f"{', '.join(request.arms)} with {counted(request.seeds, 'seed')}: {counted(runs, 'run')}"


def _device(config: TrainingConfig) -> str:
    device = device_for(cpu=config.cpu)
    name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    precision = "float32" if config.precision == "no" else f"mixed precision ({config.precision})"
    return f"{name}, {precision}{f', {processes} processes' if processes > 1 else ''}"


def _writes(request: Request, output: Path, trackers: Sequence[str]) -> str:
    model = {"last": "the model of the last epoch", "best": "the model of the best epoch"}
    model["both"] = f"{model['last']}, the best in {output / 'best'}"
    steps = request.training.checkpoint_steps
    often = f", a checkpoint after each epoch{f' and every {steps} steps' if steps else ''}"
    return f"{output}: {model[request.keep]}{often}, log.jsonl{''.join(f', tracked by {name}' for name in trackers)}"


def _further(request: Request, before: Request, output: Path, steps: int) -> str:
    """From which epoch to which, and what the rates are there."""
    config, done = request.training, before.training.epochs
    reached: Reached | None = standing_in(places_of(request, output)[0] / CHECKPOINT)
    was = "" if reached is None else f" (they had come to {reached.rate:.2g})"
    part = part_of_rate(config, steps)
    which = f"epoch {done + 1}" if done + 1 == config.epochs else f"epochs {done + 1} to {config.epochs}"
    begins, ends = (config.base_rate * part(step) for step in (done * steps, config.epochs * steps - 1))
    return (
        f"{which}, with the rates that a run of {config.epochs} epochs has there: of the "
        f"base {begins:.2g}{was}, in the end {ends:.2g}"
    )


def _steps(on: Subject, config: TrainingConfig) -> int:
    """Steps of an epoch."""
    images, size = len(on.ready.train), config.batch_size
    batches = images // size if images >= size else 1
    return -(-batches // config.accumulate)


def in_words(trials: Mapping[str, Trial], request: Request) -> list[RenderableType]:
    """What was tried, and how long the whole run takes; ``trials``: of every arm that is trained."""
    lines: list[RenderableType] = []
    whole = 0.0
    for arm, trial in trials.items():
        title = f"{arm}: " if request.seeds else ""
        peak = "" if trial.peak is None else f"; at most {trial.peak / 1e9:.1f} GB {_WHERE[trial.device == 'cpu']}"
        lines.append(f"{title}one batch went through training (loss {trial.loss:.4f}) and validation{peak}")
        train, val = trial.batches * trial.seconds, trial.val_batches * trial.val_seconds
        parts = f"training {lasting(train)}, validation {lasting(val)}"
        lines.append(f"{title}an epoch takes about {lasting(train + val)}: {parts}")
        whole += request.training.epochs * trial.epoch_seconds + trial.usage_seconds
    whole *= max(request.seeds, 1)
    runs = f" of all {request.seeds * len(trials)} runs" if request.seeds else ""
    lines.append(f"all {request.training.epochs} epochs{runs}: about {lasting(whole)}; nothing was written")
    return lines


_WHERE = {True: "in this process", False: "on the device"}
