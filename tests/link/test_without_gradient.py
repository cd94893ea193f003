"""A part that a forward runs with gradients switched off gets no connection: none of its would ever learn."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dcafy

IMAGES = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))


class SE(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3))).sigmoid()[:, :, None, None]


def part(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 8, 3), SE(), nn.Conv2d(8, 8, 3), SE())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.neck, self.learns = part(3), part(8), True

    def encoded(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Any:
        return self.neck(self.encoded(x))


def under(context: Any) -> Any:
    def encoded(self: Net, x: Tensor) -> Tensor:
        with context(self):
            return self.encoder(x)  # type: ignore[no-any-return]

    return encoded


@torch.no_grad()
def decorated(self: Net, x: Tensor) -> Tensor:
    return self.encoder(x)  # type: ignore[no-any-return]


NEVER = {
    "no_grad": under(lambda net: torch.no_grad()),
    "inference mode": under(lambda net: torch.inference_mode()),
    "set_grad_enabled": under(lambda net: torch.set_grad_enabled(False)),
    "decorated": decorated,
}
AT_TIMES = {
    "with gradients": under(lambda net: contextlib.nullcontext()),
    "enable_grad": under(lambda net: torch.enable_grad()),
    "in evaluation": under(lambda net: contextlib.nullcontext() if net.training else torch.no_grad()),
}


def network(encoded: Any) -> nn.Module:
    return type("Net", (Net,), {"encoded": encoded})().eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", NEVER)
@pytest.mark.parametrize("topology", ["chain", "dense", "own"])
def test_a_part_without_gradients_hears_nothing(way: str, topology: str) -> None:
    model = network(NEVER[way])
    connected = dcafy.convert(model, example_inputs=IMAGES, topology=topology)
    skipped = {item.name: item.reason for item in dcafy.inspect(model, example_inputs=IMAGES).skipped}
    assert "gradients are off" in skipped["encoder.3"]
    names = list(dcafy.connections(connected))
    assert names, "what comes behind it hears it"
    assert all(name.startswith("neck.") for name in names)
    if way != "inference mode":  # whose tensors autograd refuses to save
        connected.train()(IMAGES).pow(2).mean().backward()
        assert all(own.beta.grad is not None for own in dcafy.connections(connected).values())


@pytest.mark.parametrize("way", AT_TIMES)
def test_a_part_with_gradients_at_times_is_connected(way: str) -> None:
    model = network(AT_TIMES[way])
    assert len(dcafy.inspect(model, example_inputs=IMAGES).links) == 3


def test_recording_without_gradients_changes_nothing() -> None:
    with torch.no_grad():
        plan = dcafy.inspect(network(AT_TIMES["with gradients"]), example_inputs=IMAGES)
    assert len(plan.links) == 3
