"""A trained network in use: on its device, in eval mode, with its connections or without."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn

from dcafy.emit.dca import connections, is_connected
from dcafy.errors import InputError, UsageError
from dcafy.images.about import About, about
from dcafy.runs.options import UseOptions
from dcafy.wording import few, nearest, printable, quoted
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


def class_of(model: nn.Module, named: str) -> int:
    """The number of the class with that name, else that number; ``UsageError`` where there is none."""
    names = about(model).classes
    spellings: tuple[Callable[[str], str], ...] = (str, str.casefold)
    for spelt in spellings:
        found = [number for number, name in enumerate(names) if spelt(name) == spelt(named)]
        if len(found) == 1:
            return found[0]
        if found:
            which = few(list(map(str, found)))
            raise UsageError(f"--target {quoted(named)} is the name of the classes {which}. Choose one by its number.")
    if named.isdecimal() and len(named) < 10:
        return int(named)
    known = f"It knows {few([quoted(name, 30) for name in names], 8)}." if names else "It has no names: give a number."
    raise UsageError(f"--target {quoted(named)} is no class of the network.{nearest(named, names)} {known}")


def fitting_names(found: About, outputs: int, spec: str) -> tuple[str, ...]:
    """The names of the classes; their numbers where none are known, or none that fit, which is told."""
    if len(found.classes) == outputs:
        return found.classes
    if found.classes:
        log.warning(
            "%s gives %d classes and has names for %d: they are numbered", printable(spec), outputs, len(found.classes)
        )
    return tuple(map(str, range(outputs)))
