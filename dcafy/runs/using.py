"""A trained network in use: on its device, in eval mode, with its connections or without."""

from __future__ import annotations

import logging

import torch
from torch import nn

from dcafy.emit.dca import connections, is_connected
from dcafy.errors import InputError, UsageError
from dcafy.images.about import About, about
from dcafy.runs.options import UseOptions
from dcafy.wording import printable
from dcafy.zoos.specs import RANDOM, has_random_weights

log = logging.getLogger("dcafy")


def ready_for_use(model: nn.Module, spec: str, options: UseOptions) -> nn.Module:
    """``model`` in eval mode on its device; its connections are switched off where the options say so.

    ``UsageError`` where there are none to switch off. Says so where the weights are random.
    """
    if options.cut:
        silence(model, spec)
    tell_random(model, spec)
    return model.eval().to(device_for(cpu=options.cpu))


@torch.no_grad()
def silence(model: nn.Module, spec: str) -> None:
    """Sets β of every connection to 0; ``UsageError`` where there is none."""
    if not is_connected(model):
        raise UsageError(f"{spec!r} has no connections, so --cut has nothing to switch off. Leave it out.")
    for connection in connections(model).values():
        connection.beta.zero_()


def tell_random(model: nn.Module, spec: str) -> None:
    """Says in the log that the weights are random, where nothing was loaded into them."""
    if has_random_weights(model):
        log.warning("%s: %s", printable(spec), RANDOM)


def device_for(*, cpu: bool) -> torch.device:
    """The device that networks run on here, as Accelerate chooses it for training."""
    if not cpu and torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if not cpu and torch.backends.mps.is_available() else "cpu")


def require_task(model: nn.Module, spec: str) -> About:
    """What is known of ``model``; ``InputError`` where it neither tells classes apart nor finds boxes."""
    found = about(model)
    if found.task is None:
        raise InputError(
            f"{spec!r} is a {type(model).__name__}, which gives neither scores of classes nor boxes. Name a classifier "
            "or a detector."
        )
    return found


def fitting_names(found: About, outputs: int, spec: str) -> tuple[str, ...]:
    """The names of the classes; their numbers where none are known, or none that fit, which is told."""
    if len(found.classes) == outputs:
        return found.classes
    if found.classes:
        log.warning(
            "%s gives %d classes and has names for %d: they are numbered", printable(spec), outputs, len(found.classes)
        )
    return tuple(map(str, range(outputs)))
