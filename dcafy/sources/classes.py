"""The network classes that a pickle may name: those of torch.nn, torchvision and timm."""

from __future__ import annotations

import importlib
import sys
import warnings

import torch
from torch import nn

PACKAGES = ("torch.nn", "torchvision", "timm")
"""Where a network's classes may come from."""

_IMPORTED = {"torchvision": ("torchvision",), "timm": ("timm.layers", "timm.models")}
"""Package -> what is imported where a pickle names one of its classes. No pickle imports anything else."""

_MOVED = {"timm.models.layers.": "timm.layers."}
"""Where timm's classes were, and are now."""


def network_class(full: str) -> type[nn.Module] | None:
    """The ``nn.Module`` class of that full name, if torch.nn, torchvision or timm has it.

    >>> network_class("torch.nn.modules.linear.Linear").__name__, network_class("torch.nn.init.zeros_")
    ('Linear', None)
    """
    if not _is_theirs(full):
        return None
    for before, now in _MOVED.items():
        full = now + full.removeprefix(before) if full.startswith(before) else full
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for home in _IMPORTED.get(full.partition(".")[0], ()):
                importlib.import_module(home)
    except ImportError:
        return None
    module, _, name = full.rpartition(".")
    found = vars(sys.modules[module]).get(name) if module in sys.modules else None
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        return None
    # A class that these packages only import is somebody else's; programs in disguise rebuild code.
    disguised = issubclass(found, torch.jit.ScriptModule | torch.fx.GraphModule)
    return found if _is_theirs(f"{found.__module__}.") and not disguised else None


def _is_theirs(full: str) -> bool:
    return any(full.startswith(f"{package}.") for package in PACKAGES)
