"""Gates that are computed of more than one pooled vector: windows, strips and hourglasses spread over the map again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import conv_norm
from stages import IMAGES, Stages, same_and_alive
from torch import Tensor, nn
from trained import seeded, trained_like

import dcafy


class EnhancedSpatial(nn.Module):
    """Enhanced spatial attention of RFDN: one path is pooled, one is not, and the gate hears both."""

    def __init__(self, width: int) -> None:
        super().__init__()
        own = width // 4
        self.conv1, self.conv_f = nn.Conv2d(width, own, 1), nn.Conv2d(own, own, 1)
        self.conv2, self.conv3 = nn.Conv2d(own, own, 3, stride=2), nn.Conv2d(own, own, 3, padding=1)
        self.conv4 = nn.Conv2d(own, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        pooled = self.conv3(F.max_pool2d(self.conv2(y), 3, 2))
        spread = F.interpolate(pooled, (x.size(2), x.size(3)), mode="bilinear", align_corners=False)
        return x * torch.sigmoid(self.conv4(spread + self.conv_f(y)))


class TwoScales(nn.Module):
    """The same idea with a mean of windows and a plain layer on X."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.near, self.far = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        far = F.interpolate(self.far(F.avg_pool2d(x, 4)), size=x.shape[2:])
        return x.mul((self.near(x) + far).sigmoid())


class WindowedMean(nn.Module):
    """NAFNet's pooling at test time: the mean of the window around each place, by running sums."""

    def __init__(self, side: int = 4) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        k, (h, w) = self.side, x.shape[2:]
        s = F.pad(x.cumsum(dim=-1).cumsum_(dim=-2), (1, 0, 1, 0))
        sums = s[:, :, k:, k:] + s[:, :, :-k, :-k] - s[:, :, :-k, k:] - s[:, :, k:, :-k]
        means = sums / (k * k)
        rows, columns = h - means.shape[2], w - means.shape[3]
        return F.pad(means, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2), mode="replicate")


class SimplifiedChannel(nn.Module):
    """NAFNet's simplified channel attention with windowed means: one layer, and nothing that bounds it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pool, self.conv = WindowedMean(), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(self.pool(x))


class WindowedExcitation(nn.Module):
    """Squeeze-excitation with windowed means."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            WindowedMean(), nn.Conv2d(width, 4, 1), nn.ReLU(), nn.Conv2d(4, width, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.layers(x)


class StripPooling(nn.Module):
    """SPNet: strips of rows and of columns, expanded and added, and a convolution behind."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rows = nn.Sequential(nn.Conv2d(width, width, (3, 1), padding=(1, 0)), nn.BatchNorm2d(width))
        self.columns = nn.Sequential(nn.Conv2d(width, width, (1, 3), padding=(0, 1)), nn.BatchNorm2d(width))
        self.conv = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        rows = self.rows(F.adaptive_avg_pool2d(x, (None, 1))).expand(-1, -1, h, w)
        columns = F.interpolate(self.columns(F.adaptive_avg_pool2d(x, (1, None))), (h, w))
        return x * self.conv(F.relu(rows + columns)).sigmoid()


class Hourglass(nn.Module):
    """Residual attention: a mask from a map that is pooled twice and raised again, on a trunk beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.trunk, self.first, self.beside, self.second = (conv_norm(width, width) for _ in range(4))
        self.out = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        half = self.first(F.max_pool2d(x, 3, 2, 1))
        quarter = self.second(F.max_pool2d(half, 3, 2, 1))
        raised = F.interpolate(quarter, size=half.shape[2:], mode="bilinear") + self.beside(half)
        return (1 + self.out(F.interpolate(raised, size=x.shape[2:], mode="bilinear"))) * self.trunk(x)


class Interpolating(nn.Module):
    """A gate between a map and what a layer makes of it: a + T · (b - a)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.gate = conv_norm(width, width), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.lerp(x, y, torch.sigmoid(self.gate(F.adaptive_avg_pool2d(y, 1))))


class InterpolatingByMethod(Interpolating):
    """The same as a method, with X as one end and zeros as the other."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x).lerp(x, self.gate(x.mean((2, 3), keepdim=True)).sigmoid())


GATES: tuple[Callable[[int], nn.Module], ...] = (
    EnhancedSpatial,
    TwoScales,
    SimplifiedChannel,
    WindowedExcitation,
    StripPooling,
    Hourglass,
    Interpolating,
    InterpolatingByMethod,
)


@pytest.mark.parametrize("attention", GATES)
def test_each_stage_hears_the_one_before(attention: Callable[[int], nn.Module]) -> None:
    with seeded(2):
        model = trained_like(Stages(attention, (16, 24, 32), (1, 2, 1)), IMAGES).eval()
    plan = dcafy.inspect(model, example_inputs=IMAGES)
    assert [block.name.removesuffix(".layers") for block in plan.blocks] == [f"attention.{i}" for i in range(3)]
    assert len(plan.links) == 2
    same_and_alive(model, dcafy.convert(model, example_inputs=IMAGES).eval())


def test_a_windowed_mean_is_the_context() -> None:
    """G is the mean of each window and no sum: as what the convolution behind it reads."""
    with seeded(3):
        model = trained_like(Stages(SimplifiedChannel, (16, 16), (1, 1)), IMAGES).eval()
    plan = dcafy.inspect(model, example_inputs=IMAGES)
    assert [(block.channels, block.size, block.gate) for block in plan.blocks] == [(16, (29, 29), "none")] * 2
    connected = dcafy.convert(model, example_inputs=IMAGES).eval()
    heard: list[Tensor] = []
    dcafy.connections(connected)["attention.1"].register_forward_pre_hook(lambda _, given: heard.extend(given[:1]))
    x = F.relu(model.convs[1](model.attention[0](F.relu(model.convs[0](model.stem(IMAGES))))))
    with torch.no_grad():
        connected(IMAGES)
    torch.testing.assert_close(heard[0], F.avg_pool2d(x, 4, 1), rtol=1e-3, atol=1e-4)
