"""Sequences of different lengths in one batch: their means are of what is theirs, and the lengths are an input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from trained import seeded

import dcafy

Mean = Callable[[Tensor, Tensor], Tensor]
"""(x, lengths) -> the mean of each sequence, ``[N, C]``."""


def own(x: Tensor, lengths: Tensor) -> Tensor:
    """Where there is something, ``[N, 1, L]``."""
    return (torch.arange(x.shape[2], device=x.device)[None] < lengths[:, None])[:, None]


def of_a_kept_sum(x: Tensor, lengths: Tensor) -> Tensor:
    return (torch.sum(x, dim=-1, keepdim=True) / lengths.view(-1, 1, 1).to(x.dtype)).transpose(1, 2)


def of_a_sum(x: Tensor, lengths: Tensor) -> Tensor:
    return x.masked_fill(~own(x, lengths), 0.0).sum(2).div(lengths.clamp(min=1)[:, None])


def of_halved_lengths(x: Tensor, lengths: Tensor) -> Tensor:
    return torch.sum(x, 2) / torch.ceil(lengths.float() / 2 + 1).unsqueeze(1)


def of_a_mask(x: Tensor, lengths: Tensor) -> Tensor:
    mask = own(x, lengths).to(x.dtype)
    return (x * mask).sum(2) / mask.sum(2)


class Squeeze(nn.Module):
    """Squeeze-excitation of sequences of different lengths (ContextNet)."""

    def __init__(self, width: int, mean: Mean, reduction: int) -> None:
        super().__init__()
        hidden = width // reduction
        self.mean, self.layers = mean, nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        t = self.layers(self.mean(x, lengths))
        return x * (t.transpose(1, 2) if t.ndim == 3 else t[..., None]).sigmoid()


class Speech(nn.Module):
    """Two convolutions, the second one wider, with attention behind each."""

    def __init__(self, mean: Mean, reduction: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv1d(20, 16, 5, padding=2), nn.Conv1d(16, 32, 5, padding=2)])
        self.attention = nn.ModuleList([Squeeze(width, mean, reduction) for width in (16, 32)])

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        for conv, attention in zip(self.convs, self.attention, strict=True):
            x = attention(conv(x), lengths)
        return x


@pytest.mark.parametrize("reduction", [1, 4])
@pytest.mark.parametrize("mean", [of_a_kept_sum, of_a_sum, of_halved_lengths, of_a_mask])
def test_a_sum_divided_by_a_length_is_g(mean: Mean, reduction: int) -> None:
    with seeded(6):
        model = Speech(mean, reduction).eval()
        example, other = torch.rand(2, 20, 50), torch.rand(3, 20, 64)
    given = [(example, torch.tensor([50, 31])), (other, torch.tensor([64, 9, 20]))]
    plan = dcafy.inspect(model, example_inputs=given[0])
    assert [(b.name, b.dimension, b.channels) for b in plan.blocks] == [
        ("attention.0", "channel", 16),
        ("attention.1", "channel", 32),
    ]
    connected = dcafy.convert(model, example_inputs=given[0]).eval()
    (connection,) = dcafy.connections(connected).values()
    with torch.no_grad():
        assert all(torch.equal(model(*inputs), connected(*inputs)) for inputs in given)
        connection.beta.fill_(0.5)
        assert not any(torch.equal(model(*inputs), connected(*inputs)) for inputs in given)


def of_a_scaled_sum(x: Tensor, lengths: Tensor) -> Tensor:
    return (x.sum(2, keepdim=True) * lengths.view(-1, 1, 1).reciprocal()).transpose(1, 2)


def test_a_narrower_layer_is_no_pooling() -> None:
    """From [N, 1, C] to [N, 1, C / 4]: it yields fewer channels, and not one of many."""
    inputs = torch.rand(2, 20, 50), torch.tensor([50, 31])
    assert dcafy.inspect(Speech(of_a_scaled_sum, 4), example_inputs=inputs).blocks == ()
