"""Attention whose maps have axes of their own: each block hears the last one of its kind, axis by axis."""

from __future__ import annotations

import functools
from collections.abc import Callable

import einops
import pytest
import torch
import torch.nn.functional as F
from stages import IMAGES, Stages, same_and_alive
from torch import Tensor, nn
from trained import seeded, trained_like

import dcafy


class Coordinate(nn.Module):
    """Coordinate attention as published: a strip for the rows and one for the columns, which one layer reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pool_h, self.pool_w = nn.AdaptiveAvgPool2d((None, 1)), nn.AdaptiveAvgPool2d((1, None))
        self.conv, self.norm, self.act = nn.Conv2d(width, 8, 1), nn.BatchNorm2d(8), nn.Hardswish()
        self.conv_h, self.conv_w = nn.Conv2d(8, width, 1), nn.Conv2d(8, width, 1)

    def gates(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        strips = self.act(self.norm(self.conv(torch.cat([rows, columns.permute(0, 1, 3, 2)], 2))))
        rows, columns = torch.split(strips, [rows.shape[2], columns.shape[3]], 2)
        return self.conv_h(rows).sigmoid(), self.conv_w(columns.permute(0, 1, 3, 2)).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.gates(self.pool_h(x), self.pool_w(x))
        return x * columns * rows


class CoordinateByPatterns(Coordinate):
    """The same with the strips by patterns, one gate that is the product of both, and slices."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.shape[2]
        strips = [einops.reduce(x, "n c h w -> n c h 1", "mean"), einops.reduce(x, "n c h w -> n c w 1", "mean")]
        y = self.act(self.norm(self.conv(torch.cat(strips, 2))))
        rows, columns = self.conv_h(y[:, :, :h]), self.conv_w(y[:, :, h:].transpose(2, 3))
        return x * (torch.sigmoid(rows) * torch.sigmoid(columns)).expand_as(x)


class EfficientLocal(nn.Module):
    """Two blocks in one: strips of rows and of columns, each through a convolution along it (ELA)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 5, padding=2, groups=width, bias=False)
        self.norm = nn.GroupNorm(4, width)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        rows = torch.sigmoid(self.norm(self.conv(x.mean(3, keepdim=True).view(n, c, h)))).view(n, c, h, 1)
        columns = torch.sigmoid(self.norm(self.conv(x.mean(2, keepdim=True).view(n, c, w)))).view(n, c, 1, w)
        return x * rows * columns


class Polarized(nn.Module):
    """Polarized self-attention: a channel part and a spatial part, each pooled with weights of its own, added up."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.half = width // 2
        self.ch_wv, self.ch_wq = nn.Conv2d(width, self.half, 1), nn.Conv2d(width, 1, 1)
        self.ch_wz, self.norm = nn.Conv2d(self.half, width, 1), nn.LayerNorm(width)
        self.sp_wv, self.sp_wq = nn.Conv2d(width, self.half, 1), nn.Conv2d(width, self.half, 1)

    def channel(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        weights = self.ch_wq(x).reshape(n, -1, 1).softmax(1)
        z = torch.matmul(self.ch_wv(x).reshape(n, self.half, -1), weights).unsqueeze(-1)
        gate = self.norm(self.ch_wz(z).reshape(n, c, 1).permute(0, 2, 1)).sigmoid()
        return x * gate.permute(0, 2, 1).reshape(n, c, 1, 1)

    def spatial(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        weights = F.adaptive_avg_pool2d(self.sp_wq(x), 1).permute(0, 2, 3, 1).reshape(n, 1, self.half).softmax(-1)
        z = torch.matmul(weights, self.sp_wv(x).reshape(n, self.half, -1))
        return x * torch.sigmoid(z.reshape(n, 1, h, w))

    def forward(self, x: Tensor) -> Tensor:
        return self.channel(x) + self.spatial(x)


class PolarizedInTurn(Polarized):
    """The same, the spatial part behind the channel part."""

    def forward(self, x: Tensor) -> Tensor:
        return self.spatial(self.channel(x))


class MultiScale(nn.Module):
    """Efficient multi-scale attention: groups folded into the batch; strips, then one map from two crossed products."""

    def __init__(self, width: int, groups: int = 4) -> None:
        super().__init__()
        self.groups, own = groups, width // groups
        self.norm, self.conv1, self.conv3 = nn.GroupNorm(own, own), nn.Conv2d(own, own, 1), nn.Conv2d(own, own, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.reshape(n * self.groups, -1, h, w)
        strips = torch.cat([y.mean(3, keepdim=True), y.mean(2, keepdim=True).permute(0, 1, 3, 2)], 2)
        rows, columns = self.conv1(strips).split([h, w], 2)
        first = self.norm(y * rows.sigmoid() * columns.permute(0, 1, 3, 2).sigmoid())
        maps = (first, self.conv3(y))
        weights = [F.adaptive_avg_pool2d(one, 1).flatten(1)[:, None].softmax(-1) for one in maps]
        flat = [one.flatten(2) for one in maps]
        z = torch.matmul(weights[0], flat[1]) + torch.matmul(weights[1], flat[0])
        return (y * z.reshape(n * self.groups, 1, h, w).sigmoid()).reshape(n, c, h, w)


class MixedLocal(nn.Module):
    """Mixed local channel attention: a map of 5x5 places for all channels, mixed with its own mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.local, self.whole = (nn.Conv1d(1, 1, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        g = F.adaptive_avg_pool2d(x, 5)
        mean = F.adaptive_avg_pool2d(g, 1)
        own = self.local(g.view(n, c, -1).transpose(-1, -2).reshape(n, 1, -1))
        own = own.reshape(n, 25, c).transpose(-1, -2).view(n, c, 5, 5).sigmoid()
        every = self.whole(mean.view(n, c, -1).transpose(-1, -2)).view(n, c, 1, 1).sigmoid().expand(n, c, 5, 5)
        return x * F.adaptive_avg_pool2d(own * 0.5 + every * 0.5, [h, w])


class Triplet(nn.Module):
    """Triplet attention: CBAM's spatial part on the map as it is, and on the map turned in two ways."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(2, 1, 7, padding=3) for _ in range(3)])

    def gated(self, x: Tensor, i: int) -> Tensor:
        return x * torch.sigmoid(self.convs[i](torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.gated(x.permute(0, 2, 1, 3), 0).permute(0, 2, 1, 3)
        columns = self.gated(x.permute(0, 3, 2, 1), 1).permute(0, 3, 2, 1)
        return (self.gated(x, 2) + rows + columns) / 3


class ChannelsLast(nn.Module):
    """CBAM's spatial part, pooled behind a permutation: G has its channels last, T second."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 2, 3, 1)
        g = torch.cat([y.amax(-1, keepdim=True), y.mean(-1, keepdim=True)], -1).permute(0, 3, 1, 2)
        return x + x * torch.sigmoid(self.conv(g))


KINDS: dict[type[nn.Module], tuple[str, ...]] = {
    Coordinate: ("",),
    CoordinateByPatterns: ("",),
    EfficientLocal: ("", "#2"),
    Polarized: ("", "#2"),
    PolarizedInTurn: ("", "#2"),
    MultiScale: ("", "#2"),
    MixedLocal: ("",),
    Triplet: ("", "#2", "#3"),
    ChannelsLast: ("",),
}
"""Attention -> what its blocks' names have behind its own."""


def three_stages(attention: Callable[[int], nn.Module]) -> nn.Module:
    """Each stage wider and smaller than the one before."""
    with seeded(4):
        return trained_like(Stages(attention, (16, 32, 48), (1, 2, 2)), IMAGES).eval()


@pytest.mark.parametrize("attention", KINDS, ids=[kind.__name__ for kind in KINDS])
def test_each_kind_of_map_has_a_chain_of_its_own(attention: type[nn.Module]) -> None:
    model = three_stages(attention)
    plan = dcafy.inspect(model, example_inputs=IMAGES)
    chains = [[f"attention.{i}{suffix}" for i in range(3)] for suffix in KINDS[attention]]
    assert sorted(list(chain.blocks) for chain in plan.chains) == chains
    assert len(plan.links) == 2 * len(chains)
    same_and_alive(model, dcafy.convert(model, example_inputs=IMAGES).eval())


def test_strips_are_matched_axis_by_axis() -> None:
    """Coordinate attention a second way: each strip hears its own, halved along its axis, then goes through layers."""
    images = IMAGES[:, :, :, :44].double()  # other rows than columns, and an odd number of them in the last stage
    model = three_stages(Coordinate).double()
    connected = dcafy.convert(model, example_inputs=images).eval()
    settings = []
    with seeded(5), torch.no_grad():
        for connection in dcafy.connections(connected).values():
            for parameter in connection.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            linear = [layer for layer in connection.match.modules() if not list(layer.children())]
            layers = [layer for layer in linear if isinstance(layer, nn.Linear | nn.LayerNorm | nn.ReLU)]
            settings.append((connection.alpha, connection.beta, nn.Sequential(*layers)))
        expected = _by_hand(model, settings, images)
        output = connected(images)
        plain = model(images)
    assert [len(layers) for _, _, layers in settings] == [6, 6]
    scale = expected.abs().max()
    assert (expected - plain).abs().max() > 1e-4 * scale
    assert (output - expected).abs().max() <= 1e-9 * scale


def _by_hand(model: nn.Module, settings: list[tuple[Tensor, Tensor, nn.Module]], x: Tensor) -> Tensor:
    told: tuple[Tensor, Tensor] | None = None
    x = model.stem(x)
    for i, (conv, block) in enumerate(zip(model.convs, model.attention, strict=True)):
        x = F.relu(conv(x))
        strips = [x.mean(3, keepdim=True), x.mean(2, keepdim=True)]
        if told is not None:
            alpha, beta, layers = settings[i - 1]
            for j, (own, heard) in enumerate(zip(strips, told, strict=True)):
                halved = heard
                if own.shape[2:] != heard.shape[2:]:
                    halved = F.avg_pool2d(heard, 2, 2, ceil_mode=True, count_include_pad=False)
                strips[j] = alpha * own + beta * layers(halved.movedim(1, -1)).movedim(-1, 1)
        rows, columns = block.gates(*strips)
        x = x * columns * rows
        told = (x.mean(3, keepdim=True), x.mean(2, keepdim=True))
    return model.head(x.mean((2, 3)))


class Flattened(nn.Module):
    """A spatial map that is pooled and transformed with its places in one row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        g = x.flatten(2).mean(1, keepdim=True)
        return x * torch.sigmoid(self.conv(g)).view(len(x), 1, *x.shape[2:])


def test_places_in_one_row_are_not_pooled() -> None:
    """Pooling neighbours in a row would mix places that are none on the map: it is refused, and said."""
    plan = dcafy.inspect(three_stages(Flattened), example_inputs=IMAGES)
    assert len(plan.blocks) == 3
    assert plan.links == ()
    assert all("flattened" in item.reason for item in plan.skipped), plan.skipped
    with seeded(6):
        same = Stages(Flattened, (16, 16, 16), (1, 1, 1)).eval()
    assert len(dcafy.inspect(same, example_inputs=IMAGES).links) == 2


@pytest.mark.parametrize("attention", [Coordinate, MixedLocal])
def test_maps_of_all_channels_survive_saving_and_flattening(
    attention: type[nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = three_stages(attention)
    connected = dcafy.convert(model, example_inputs=IMAGES).eval()
    with torch.no_grad():
        for connection in dcafy.connections(connected).values():
            connection.beta.fill_(0.4)
        expected = connected(IMAGES)
        folder = tmp_path_factory.mktemp("saved")
        dcafy.save(connected, folder)
        assert torch.equal(dcafy.load(folder, model=three_stages(attention)).eval()(IMAGES), expected)
        assert torch.allclose(dcafy.flat(connected)(IMAGES), expected, atol=1e-6)
    connected.train()(IMAGES).square().mean().backward()
    assert all(p.grad is not None for c in dcafy.connections(connected).values() for p in c.parameters())


def test_dense_hears_every_earlier_block_of_any_kind_that_fits() -> None:
    model = three_stages(functools.partial(MultiScale, groups=4))
    plan = dcafy.inspect(model, example_inputs=IMAGES)
    connected = dcafy.convert(model, example_inputs=IMAGES, topology="dense").eval()
    assert len(dcafy.connections(connected)) == 6
    assert {name.partition("<-")[0] for name in dcafy.connections(connected)} == {
        f"attention.{i}{suffix}" for i in (1, 2) for suffix in ("", "#2")
    }
    assert len(plan.links) == 4
    same_and_alive(model, connected)
