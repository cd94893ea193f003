"""The networks of ``zoo.py`` with trained-like values, and their conversions: each made once per worker.

Rules, roles, oracle, survival and analysis ask for the same networks. Tests of one network run in one worker
(``case``), so that it is made once; what a test changes, it takes a copy of.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from snapshot import differences, snapshot
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from zoo import BY_NAME, QUICK, Network

import dcafy


@dataclass
class Subject:
    """One network, its conversion, and what was noted around the conversion.

    ``touched``  what ``inspect`` and ``convert`` changed in the source

    Nobody changes ``model`` and ``converted``: a test that runs them in another mode, trains them or hangs
    something on them takes :meth:`pair`, or copies of its own.
    """

    network: Network
    touched: list[str] = field(default_factory=list)

    @functools.cached_property
    def model(self) -> nn.Module:
        """The network as users bring theirs: see :func:`left_by_user`."""
        return left_by_user(self.network.trained())

    @functools.cached_property
    def modes(self) -> dict[str, bool]:
        """The mode of each module, as the user left it."""
        return {path: module.training for path, module in self.model.named_modules()}

    @functools.cached_property
    def example(self) -> Tensor:
        return self.network.images()

    @functools.cached_property
    def plan(self) -> dcafy.Plan:
        with self.watched():
            return dcafy.inspect(self.model, example_inputs=self.example)

    @functools.cached_property
    def converted(self) -> torch.fx.GraphModule:
        with self.watched():
            return dcafy.convert(self.model, example_inputs=self.example)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Whatever changes in the source meanwhile is noted in ``touched``."""
        _ = self.modes
        before = snapshot(self.model)
        yield
        self.touched += differences(before, snapshot(self.model))

    def in_eval(self) -> tuple[nn.Module, torch.fx.GraphModule]:
        """Copies of the original and the converted network, in eval mode."""
        return copy.deepcopy(self.model).eval(), copy.deepcopy(self.converted).eval()

    def pair(self) -> tuple[nn.Module, torch.fx.GraphModule]:
        """Copies of both in eval mode that nobody has used: every parameter trains, none has a gradient."""
        original, converted = self.in_eval()
        for one in (original, converted):
            one.requires_grad_(True)
            one.zero_grad(set_to_none=True)
        return original, converted


def left_by_user(model: nn.Module) -> nn.Module:
    """The model with modes that differ per module, a frozen first parameter and one old gradient."""
    model.train()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms[::2]:
        norm.eval()
    first, second = list(model.parameters())[:2]
    first.requires_grad_(False)
    second.grad = torch.ones_like(second)
    return model


@functools.cache
def subject(name: str) -> Subject:
    """The subject of a network of ``zoo.py``."""
    return Subject(BY_NAME[name])


def case(name: str, *values: Any, id: str | None = None, quick: Collection[str] = QUICK) -> Any:
    """Parameters of a test of a network: in the worker that has its subject, and in the tier of the network."""
    marks = [pytest.mark.xdist_group(name), *([] if name in quick else [pytest.mark.zoo])]
    return pytest.param(name, *values, id=id or name, marks=marks)


def cases(networks: Iterable[Network], quick: Collection[str] = QUICK) -> list[Any]:
    """The names of these networks, each as a :func:`case`; ``quick``: those whose tests plain ``pytest`` runs."""
    return [case(network.name, quick=quick) for network in networks]
