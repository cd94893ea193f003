"""Trained-like values for freshly built networks, and what such networks are asked.

A fresh network hides mistakes: batch norms that never saw a batch, gains that start at zero (timm zero-initialises
the last norm of a block, ConvNeXt its layer scale), biases at zero. Surgery on such a network looks like an identity
whatever it does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import dcafy

NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)

Network = TypeVar("Network", bound=nn.Module)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's CPU random numbers under one seed inside, as they were afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def images(batch: int = 2, size: int = 64, seed: int = 1) -> torch.Tensor:
    """Random images that differ in brightness, so that pooled contexts differ too; the same ones at every call."""
    with seeded(seed):
        return torch.randn(batch, 3, size, size) + 0.5 * torch.randn(batch, 3, 1, 1)


def evaluate(model: nn.Module, *inputs: object) -> Any:
    """The output without gradients, in the mode that the model is in."""
    with torch.no_grad():
        return model(*inputs)


def trained_like(network: Network, images: torch.Tensor, seed: int = 0) -> Network:
    """The same network, in eval mode, with values as after training, and outputs that depend on the input.

    Every parameter gets away from its initial value, none stays at zero; batch norm statistics are those of
    such images, off by some percent as running averages are.
    """
    modes = [(module, module.training) for module in network.modules()]
    with seeded(seed), torch.no_grad():
        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                _move(parameter, is_norm=isinstance(module, NORMS), is_bias="bias" in name)
        _calibrate(network, images)
        output = network.eval()(images)
        output = [*output.values()][-1] if isinstance(output, dict) else output  # a body of a detector
        spread = output.float().std(dim=0).max().item()
    if not (1e-3 < spread < 1e3):
        raise AssertionError(f"{type(network).__name__} is no trained-like network: outputs spread {spread:.2e}")
    for module, training in modes:
        module.training = training
    return network.eval()


def trained(build: Callable[[], Network], given: torch.Tensor | None = None) -> Network:
    """A new network with trained-like values; the same one at every call."""
    with seeded(0):
        return trained_like(build(), images(8) if given is None else given)


def connected(model: nn.Module, example: torch.Tensor | None = None, **options: Any) -> Any:
    """The network with connections as they are some way into training."""
    example = images() if example is None else example
    return moved(dcafy.convert(model, example_inputs=example, verify=False, **options))


def moved(converted: Any) -> Any:
    """The converted model with connections as they are some way into training."""
    with seeded(31), torch.no_grad():
        for connection in dcafy.connections(converted).values():
            for parameter in connection.parameters():
                parameter.add_(torch.rand_like(parameter), alpha=0.3)
    return converted


def with_betas(converted: Any, value: float, step: float = 0.0) -> Any:
    """The converted model with this β in its first connection, and ``step`` more in each that follows."""
    with torch.no_grad():
        for number, connection in enumerate(dcafy.connections(converted).values()):
            connection.beta.fill_(value + step * number)
    return converted


def _move(parameter: torch.Tensor, *, is_norm: bool, is_bias: bool) -> None:
    """Put one parameter where training could have left it."""
    constant = bool((parameter == parameter.flatten()[0]).all())
    per_channel = parameter.ndim < 2 or parameter[0].numel() == 1
    if is_bias:
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    elif is_norm or (constant and per_channel):
        parameter.copy_(torch.rand_like(parameter) * 0.6 + 0.7)  # gains: norms, layer scale
    elif constant:
        parameter.copy_(torch.randn_like(parameter) / max(parameter[0].numel(), 1) ** 0.5)
    else:
        parameter.add_(torch.randn_like(parameter) * parameter.std(), alpha=0.3)


def _calibrate(network: nn.Module, images: torch.Tensor) -> None:
    """Batch norm statistics from three batches like ``images``, then moved by some percent."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average: three batches are enough
        norm.train()
    for _ in range(3):
        network(images + 0.5 * torch.randn_like(images))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None
        assert var is not None
        mean.add_(torch.randn_like(mean) * var.sqrt(), alpha=0.05)
        var.mul_(torch.rand_like(var) * 0.4 + 0.8)
