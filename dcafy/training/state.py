"""Everything that decides how a training goes on: taken down, and put back so that it goes on as if never stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from dcafy.checkpoint.keys import Keys
from dcafy.checkpoint.tensors import pack
from dcafy.emit.dca import is_connected, recipes
from dcafy.errors import CheckpointError
from dcafy.training.checkpoint import Checkpoint
from dcafy.training.fitting import (
    check_draws,
    check_facts,
    check_optimizer,
    check_tensors,
    numpy_state,
    python_state,
)
from dcafy.training.history import Epoch
from dcafy.training.optimization import rates_at
from dcafy.training.options import TIMES, TrainingConfig
from dcafy.wording import printable, short

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Progress:
    """Where a training stands: ``batch`` batches into ``epoch`` (from 0), after ``step`` steps in all.

    The sums are of this epoch and process; they stay on the device, so that no step waits for them. ``rate``: of the
    last step.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0
    losses: Any = 0.0
    right: Any = None
    images: int = 0
    broken: Any = field(default=False)
    rate: float = 0.0

    def add(self, loss: Tensor, right: Tensor | None, images: int) -> None:
        """Adds one batch."""
        self.losses = self.losses + loss.double() * images
        self.broken = ~torch.isfinite(loss) | self.broken
        if right is not None:
            self.right = right.double() if self.right is None else self.right + right.double()
        self.images += images

    def means(self, accelerator: Accelerator | None = None) -> tuple[float, float | None]:
        """Loss and accuracy per image, of this process or of all of them."""
        if not self.images:
            return 0.0, None
        sums = torch.stack([torch.as_tensor(value, dtype=torch.float64).cpu() for value in self._sums()])
        if accelerator is not None and accelerator.num_processes > 1:
            sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
        losses, right, images = sums.tolist()
        return losses / images, None if self.right is None else right / images

    def _sums(self) -> tuple[Any, Any, float]:
        return self.losses, 0.0 if self.right is None else self.right, float(self.images)

    def unlike_a_number(self, device: torch.device) -> Tensor:
        """1 where a loss was infinite or not a number, else 0."""
        return torch.as_tensor(self.broken, device=device).float()

    def next_epoch(self) -> None:
        """Goes on to the next epoch."""
        self.epoch, self.batch, self.images = self.epoch + 1, 0, 0
        self.seconds, self.losses, self.right = 0.0, 0.0, None

    def to_dict(self) -> dict[str, Any]:
        """The progress as JSON-ready data."""
        losses, right, _ = map(float, self._sums())
        known = {"losses": losses, "right": None if self.right is None else right, "broken": bool(self.broken)}
        return {**vars(self), **known}


@dataclass(frozen=True)
class Standing:
    """All that a training consists of; ``images`` are those that it trains on."""

    config: TrainingConfig
    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    average: nn.Module | None
    images: int
    progress: Progress
    epochs: list[Epoch]
    skipped: dict[str, None]


@torch.no_grad()
def unlike_numbers(model: nn.Module) -> Tensor:
    """1 where a weight or a running statistic is infinite or not a number, else 0."""
    values = [value for value in (*model.parameters(), *model.buffers()) if value.is_floating_point()]
    return torch.stack([~torch.isfinite(value).all() for value in values]).any().float()


def captured(now: Standing) -> Checkpoint:
    """Where the training stands. All processes call it, and all get the same."""
    from accelerate.utils import gather_object

    draws = gather_object([_random_state(now.accelerator.device)])
    packed = pack(now.model, kept=lambda key: True)
    tensors = {f"model/{name}": value for name, value in packed.tensors.items()}
    if now.average is not None:
        tensors |= {f"average/{name}": value for name, value in now.average.state_dict().items()}
    tensors |= _optimizer_tensors(now)
    for rank, (generators, _) in enumerate(draws):
        tensors |= {f"rng/{rank}/{name}": value for name, value in generators.items()}
    scaler = now.accelerator.scaler
    facts = {
        "run": _identity(now),
        "progress": now.progress.to_dict(),
        "epochs": [epoch.to_dict() for epoch in now.epochs],
        "skipped": list(now.skipped),
        "tied": packed.tied,
        "schedule": {name: now.schedule.state_dict()[name] for name in ("last_epoch", "_step_count", "_last_lr")},
        "scaler": None if scaler is None else scaler.state_dict(),
        "rng": [plain for _, plain in draws],
    }
    return Checkpoint(tensors, facts)


def restored(now: Standing, checkpoint: Checkpoint, file: Path) -> None:
    """Puts the training where ``checkpoint`` (read from ``file``) stands; ``CheckpointError`` where it is another's."""
    shown, facts = repr(printable(str(file))), checkpoint.facts
    differs, further = _differing(_identity(now), facts), _fewer_epochs(now, facts)
    if differs and further is not None and not _differing(_identity(further), facts):
        differs = []
    else:
        further = None
    if differs:
        raise CheckpointError(
            f"{shown} is of another run: its {printable(', '.join(differs))} differ. Go on with the options, the data "
            "and the number of processes that it was started with, or name another folder."
        )
    try:
        if checkpoint.keyed_by == "block" and is_connected(now.model):
            recipe = next(recipe for _, recipe in recipes(now.model))
            checkpoint = checkpoint.renamed(Keys(now.model, recipe.plan).now)
        facts, rank = checkpoint.facts, now.accelerator.process_index
        check_facts(facts, len(now.optimizer.param_groups), scales=now.accelerator.scaler is not None)
        own = _part(checkpoint, "model")
        own |= {name: own[original] for name, original in facts["tied"].items()}
        check_tensors(own, now.model.state_dict(), "model")
        if now.average is not None:
            check_tensors(_part(checkpoint, "average"), now.average.state_dict(), "average")
        kept = _kept_by_optimizer(now, _part(checkpoint, "optimizer"))
        draws = _part(checkpoint, f"rng/{rank}"), facts["rng"][rank]
        check_draws(*draws)
        # Nothing has been touched until here.
        now.model.load_state_dict(own, strict=True)
        if now.average is not None:
            now.average.load_state_dict(_part(checkpoint, "average"), strict=True)
        now.optimizer.load_state_dict({**now.optimizer.state_dict(), "state": kept})
        now.schedule.load_state_dict({**now.schedule.state_dict(), **facts["schedule"]})
        rates = facts["schedule"]["_last_lr"] if further is None else rates_at(now.schedule)
        now.schedule._last_lr = list(rates)
        for group, rate in zip(now.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if now.accelerator.scaler is not None:
            now.accelerator.scaler.load_state_dict(facts["scaler"])
        vars(now.progress).update(facts["progress"])
        now.epochs[:] = [Epoch.from_dict(row) for row in facts["epochs"]]
        now.skipped.update(dict.fromkeys(facts["skipped"]))
        _draw_from(*draws, now.accelerator.device)
    except (LookupError, TypeError, ValueError, OverflowError, RuntimeError, AttributeError) as error:
        reason = short(str(error), 200)
        raise CheckpointError(
            f"{shown} does not fit this network: {reason}. Name the folder of its own run."
        ) from error


def _differing(ours: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """What of our identity a checkpoint has otherwise, or has not."""
    theirs = facts.get("run")
    return [name for name, value in ours.items() if not isinstance(theirs, dict) or theirs.get(name) != value]


def _fewer_epochs(now: Standing, facts: Mapping[str, Any]) -> Standing | None:
    """This training with as many epochs as the checkpoint has behind it, where those are fewer: it had ended there."""
    progress = facts.get("progress")
    done = progress.get("epoch") if isinstance(progress, dict) else None
    if type(done) is not int or not 0 < done < now.config.epochs:
        return None
    # Milestones that lie behind its end are no error of that run's: they were looked at as it began.
    return dataclasses.replace(now, config=dataclasses.replace(now.config, epochs=done))


_LATER = frozenset({"scale_lr", "decayed", "nesterov", "milestones", "warmup_steps", "warmup_from", "balance"})
"""Options that the first runs did not have: at their defaults they are left out, so that those can be gone on with."""


def _identity(now: Standing) -> dict[str, Any]:
    """What has to be the same for a training to go on."""
    usual = {item.name: item.default for item in dataclasses.fields(now.config)}
    config = {
        k: v
        for k, v in dataclasses.asdict(now.config).items()
        if k not in ("workers", "cpu", "checkpoint_steps") and not (k in _LATER and v == usual[k])
    }
    if "scale_lr" not in config and now.config.connection_lr == TIMES * now.config.base_rate:
        config["connection_lr"] = None  # which that meant before there was a scale_lr, whatever the rate was
    return {
        "configuration": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "number of images": now.images,
        "number of processes": now.accelerator.num_processes,
    }


def _part(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    start = f"{name}/"
    return {key.removeprefix(start): value for key, value in checkpoint.tensors.items() if key.startswith(start)}


# --- the optimizer --------------------------------------------------------------------------------------


def _named(now: Standing) -> dict[int, str]:
    """Index of a parameter in the optimizer -> its name in the model."""
    names = {id(parameter): name for name, parameter in now.model.named_parameters()}
    parameters = [parameter for group in now.optimizer.param_groups for parameter in group["params"]]
    return {index: names[id(parameter)] for index, parameter in enumerate(parameters)}


def _optimizer_tensors(now: Standing) -> dict[str, Tensor]:
    names, state = _named(now), now.optimizer.state_dict()["state"]
    return {
        f"optimizer/{names[index]}/{key}": torch.as_tensor(value)
        for index, row in state.items()
        for key, value in row.items()
        if value is not None
    }


def _kept_by_optimizer(now: Standing, tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Index of a parameter in the optimizer -> what a checkpoint has for it; an error where that cannot be."""
    indices = {name: index for index, name in _named(now).items()}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, what = key.rpartition("/")
        state.setdefault(indices[name], {})[what] = value
    parameters = [parameter for group in now.optimizer.param_groups for parameter in group["params"]]
    check_optimizer({parameters[index]: kept for index, kept in state.items()}, now.optimizer)
    return state


# --- random numbers -------------------------------------------------------------------------------------


def _random_state(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The generators of this process: those of torch as tensors, those of Python and numpy as data."""
    generators = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(device)
    kind, keys, place, has_gauss, gauss = cast("tuple[Any, ...]", np.random.get_state(legacy=True))
    version, words, following = random.getstate()
    return generators, {
        "numpy": [kind, keys.tolist(), place, has_gauss, gauss],
        "python": [version, list(words), following],
    }


@contextmanager
def draws_kept(device: torch.device) -> Iterator[None]:
    """Inside it generators may be seeded and drawn from; then they are where they were."""
    state = _random_state(device)
    try:
        yield
    finally:
        _draw_from(*state, device)


def seed_draws(seed: int, device: torch.device) -> None:
    """Seeds the generators of torch that a training draws from, and no other device's."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _draw_from(generators: Mapping[str, Tensor], plain: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(generators["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(generators["cuda"], device)
    np.random.set_state(numpy_state(plain))
    random.setstate(python_state(plain))
