"""Train or eval, module by module: looked at, kept and put back."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside it the model is in eval mode; afterwards every module is in the mode it was in."""
    modes: Mapping[nn.Module, bool] = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def keep_in_eval(module: nn.Module) -> None:
    """Puts ``module`` in eval mode, where it stays through ``.train()``."""
    module.eval()
    # On the instance, so that the class stays the user's; a partial, so that it can be pickled.
    module.__dict__["train"] = functools.partial(_stay_in_eval, module)


def stays_in_eval(module: nn.Module) -> bool:
    """Whether :func:`keep_in_eval` was called on ``module``."""
    own = module.__dict__.get("train")
    return isinstance(own, functools.partial) and own.func is _stay_in_eval


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    module.training = False
    return module
