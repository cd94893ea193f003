"""Maps that are neither plain vectors nor plain maps, and networks that are no straight line: found in either case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from networks import BAM, SELinear, conv_norm
from stages import IMAGES, Stages, same_and_alive
from torch import Tensor, nn
from trained import seeded, trained, trained_like

import dcafy


class Coordinate(nn.Module):
    """Coordinate attention: a strip of averages for each axis, one shared layer, and a gate for each axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shared = conv_norm(width, 8, kernel=1)
        self.rows, self.columns = nn.Conv2d(8, width, 1), nn.Conv2d(8, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        strips = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)], 2)
        rows, columns = F.hardswish(self.shared(strips)).split([height, width], 2)
        return x * self.rows(rows).sigmoid() * self.columns(columns.transpose(2, 3)).sigmoid()


class LongRange(nn.Module):
    """The decoupled attention of GhostNetV2: a map of all channels, computed at half the resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Sequential(
            conv_norm(width, width, kernel=1),
            nn.Conv2d(width, width, (1, 5), padding=(0, 2), groups=width, bias=False),
            nn.Conv2d(width, width, (5, 1), padding=(2, 0), groups=width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        gate = self.map(F.avg_pool2d(x, 2, 2)).sigmoid()
        return x * F.interpolate(gate, size=x.shape[-2:], mode="nearest")


class GroupedSpatial(nn.Module):
    """Spatial group-wise enhance as published: groups are folded into the batch, and each map is standardised."""

    def __init__(self, width: int, groups: int = 4) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(1, groups, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.view(n * self.groups, -1, h, w)
        t = (x * F.adaptive_avg_pool2d(x, 1)).sum(1, keepdim=True).view(n * self.groups, -1)
        t = t - t.mean(1, keepdim=True)
        t = (t / (t.std(1, keepdim=True) + 1e-5)).view(n, self.groups, h, w) * self.weight
        return (x * torch.sigmoid(t.view(n * self.groups, 1, h, w))).view(n, c, h, w)


class NormalisedByHand(nn.Module):
    """Global context with weights of a sigmoid, which the sum is divided by."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mask, self.map = nn.Conv2d(width, 1, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        w = torch.sigmoid(self.mask(x))
        return x + self.map((x * w).sum((2, 3), keepdim=True) / w.sum((2, 3), keepdim=True))


class FloorOfMask(nn.Module):
    """A mean over what a mask leaves, the mask seen in the data, the count kept away from 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        mask = (x.abs().sum(1, keepdim=True) > 0).to(x.dtype)
        g = (x * mask).sum((2, 3)) / mask.sum((2, 3)).clamp(min=1)
        return x * torch.sigmoid(self.map(g))[:, :, None, None]


class NamedOutputs(nn.Module):
    """CBAM's spatial part with ``.values`` where others write ``[0]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [x.max(1, keepdim=True).values, x.mean(1, keepdim=True)]
        return x * torch.sigmoid(self.map(torch.cat(pooled, 1)))


class LargestChannel(nn.Module):
    """A spatial map from a maximum over channels that keeps no axis for them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Conv2d(1, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.map(x.max(1).values[:, None]))


class Columns(nn.Module):
    """A gate for every column of every channel, without an axis for the rows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.map(x.mean(2)))[:, :, None]


class Written(nn.Module):
    """Squeeze-excitation of a map that was written part by part into an empty one (a temporal shift)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = SELinear(width)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[:, :4, 1:] = x[:, :4, :-1]
        out[:, 4:] = x[:, 4:]
        return self.attention(out)


class WrittenThroughSlices(Written):
    """The same, written into slices of the empty map."""

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(x.shape)
        out[:, :4, 1:].copy_(x[:, :4, :-1])
        out[:, 4:].copy_(x[:, 4:])
        return self.attention(out)


class Shuffled(nn.Module):
    """A gate whose channels are mixed after it is computed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, width)

    def gate(self, g: Tensor) -> Tensor:
        return F.channel_shuffle(torch.sigmoid(self.map(g))[:, :, None, None], 4)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3)))


class Frames(nn.Module):
    """Channel excitation of videos whose frames are folded into the batch: a convolution over two frames."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Conv1d(width, width, 3, padding=1)

    def gate(self, g: Tensor) -> Tensor:
        frames, width = g.shape
        t = torch.sigmoid(self.map(g.view(frames // 2, 2, width).transpose(1, 2)))
        return t.transpose(1, 2).reshape(frames, width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3)))


class WholeKernel(nn.Module):
    """Gather-excite of global extent with parameters: a depth-wise convolution as large as the map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gather = nn.Conv2d(width, width, SIDES[width], groups=width, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.norm(self.gather(x)))


class WholeKernelByFunction(nn.Module):
    """The same as a function with a parameter, and two layers behind it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, 1, SIDES[width], SIDES[width]) * 0.1)
        self.fc = nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, width))

    def forward(self, x: Tensor) -> Tensor:
        g = F.conv2d(x, self.weight, groups=x.shape[1]).flatten(1)
        return x * torch.sigmoid(self.fc(g))[:, :, None, None]


SIDES = {16: 32, 24: 16, 32: 8}
"""Width of a stage -> the side of its map, in images of 64 px."""


@pytest.mark.parametrize("attention", [WholeKernel, WholeKernelByFunction])
def test_a_kernel_as_large_as_the_map_is_an_extraction(attention: type[nn.Module]) -> None:
    with seeded(7):
        model = trained_like(Stages(attention, (16, 24, 32), (1, 2, 2)), IMAGES).eval()
    plan = dcafy.inspect(model, example_inputs=IMAGES)
    assert [(b.name, b.dimension, b.channels) for b in plan.blocks] == [
        (f"attention.{i}", "channel", width) for i, width in enumerate((16, 24, 32))
    ]
    assert all("conv2d" in block.extraction[0] or "gather" in block.extraction[0] for block in plan.blocks)
    connected = dcafy.convert(model, example_inputs=IMAGES).eval()
    assert len(dcafy.connections(connected)) == 2
    with torch.no_grad():
        assert torch.equal(connected(IMAGES), model(IMAGES))


class Modalities(nn.Module):
    """Two streams that are squeezed together and excite each other (MMTM)."""

    def __init__(self, widths: tuple[int, int]) -> None:
        super().__init__()
        self.squeeze = nn.Linear(sum(widths), 8)
        self.excite = nn.ModuleList([nn.Linear(8, width) for width in widths])

    def gates(self, g: Tensor) -> list[Tensor]:
        e = F.relu(self.squeeze(g))
        return [torch.sigmoid(excite(e)) for excite in self.excite]

    def forward(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.gates(torch.cat([one.view(*one.shape[:2], -1).mean(-1) for one in (u, v)], 1))
        return u * a.view(*a.shape, *(1,) * (u.ndim - 2)), v * b.view(*b.shape, *(1,) * (v.ndim - 2))


class ModalitiesPooled(Modalities):
    """The same with adaptive pooling, and one layer whose output is split."""

    def gates(self, g: Tensor) -> list[Tensor]:
        widths = [excite.out_features for excite in self.excite]
        weight = torch.cat([excite.weight for excite in self.excite])
        return list(torch.sigmoid(F.linear(F.relu(self.squeeze(g)), weight)).split(widths, 1))

    def forward(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        pooled = [F.adaptive_avg_pool3d(u, 1).flatten(1), F.adaptive_avg_pool2d(v, 1).flatten(1)]
        a, b = self.gates(torch.cat(pooled, dim=1))
        return u * a[:, :, None, None, None], v * b[:, :, None, None]


class TwoStreams(nn.Module):
    """A clip and an image, with one exchange after each of three pairs of layers."""

    def __init__(self, exchange: Callable[[tuple[int, int]], nn.Module]) -> None:
        super().__init__()
        self.clip = nn.ModuleList([nn.Conv3d(i, o, 3, (1, 2, 2), 1) for i, o in ((3, 8), (8, 16), (16, 16))])
        self.image = nn.ModuleList([nn.Conv2d(i, o, 3, 2, 1) for i, o in ((3, 8), (8, 8), (8, 12))])
        self.exchanges = nn.ModuleList([exchange(widths) for widths in ((8, 8), (16, 8), (16, 12))])
        self.head = nn.Linear(28, 5)

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        for clip, image, exchange in zip(self.clip, self.image, self.exchanges, strict=True):
            u, v = exchange(F.relu(clip(u)), F.relu(image(v)))
        return self.head(torch.cat([u.mean((2, 3, 4)), v.mean((2, 3))], 1))


@pytest.mark.parametrize("exchange", [Modalities, ModalitiesPooled])
def test_one_context_of_several_tensors(exchange: type[Modalities]) -> None:
    """One block and one G, of as many numbers as both have channels; T̃ is both fused outputs, pooled once more."""
    inputs = (torch.rand(2, 3, 4, 32, 32), torch.rand(2, 3, 32, 24))
    with seeded(8):
        model = TwoStreams(exchange).double().eval()
    inputs = tuple(one.double() for one in inputs)
    plan = dcafy.inspect(model, example_inputs=inputs)
    assert [(block.name, block.channels) for block in plan.blocks] == [
        (f"exchanges.{i}", channels) for i, channels in enumerate((16, 24, 28))
    ]
    connected = dcafy.convert(model, example_inputs=inputs).eval()
    connections = dcafy.connections(connected)
    assert list(connections) == ["exchanges.1", "exchanges.2"]
    with torch.no_grad(), seeded(9):
        assert torch.equal(connected(*inputs), model(*inputs))
        for connection in connections.values():
            for parameter in connection.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        u, v = inputs
        told = None
        for i, (clip, image, block) in enumerate(zip(model.clip, model.image, model.exchanges, strict=True)):
            u, v = F.relu(clip(u)), F.relu(image(v))
            g = torch.cat([u.mean((2, 3, 4)), v.mean((2, 3))], 1)
            if told is not None:
                connection = connections[f"exchanges.{i}"]
                g = connection.alpha * g + connection.beta * connection.match(told)
            a, b = block.gates(g)
            u, v = u * a[:, :, None, None, None], v * b[:, :, None, None]
            told = torch.cat([u.mean((2, 3, 4)), v.mean((2, 3))], 1)
        expected = model.head(torch.cat([u.mean((2, 3, 4)), v.mean((2, 3))], 1))
        plain = model(*inputs)
        assert (expected - plain).abs().max() > 1e-4 * expected.abs().max()
        assert torch.allclose(connected(*inputs), expected, rtol=1e-9, atol=1e-12)


@dataclass(frozen=True)
class Case:
    """Attention in three stages: how many blocks each has, and which of them can hear the stage before.

    ``same``      where all stages have one width and one size
    ``different`` where each stage is wider and smaller than the one before
    ``channels``  of G in stages of 16 channels, where it is worth telling
    """

    attention: Callable[[int], nn.Module]
    blocks: int
    same: int
    different: int
    channels: int | None = None


CASES = {
    "coordinate": Case(Coordinate, blocks=1, same=1, different=1),
    "long range": Case(LongRange, blocks=1, same=1, different=1),
    "bottleneck": Case(BAM, blocks=2, same=2, different=2),
    "standardised map": Case(GroupedSpatial, blocks=1, same=1, different=1, channels=1),
    "mean normalised by hand": Case(NormalisedByHand, blocks=1, same=1, different=1, channels=16),
    "masked mean": Case(FloorOfMask, blocks=1, same=1, different=1, channels=16),
    "named outputs": Case(NamedOutputs, blocks=1, same=1, different=1, channels=2),
    "largest channel": Case(LargestChannel, blocks=1, same=1, different=1, channels=1),
    "columns": Case(Columns, blocks=1, same=1, different=1, channels=16),
    "shuffled gate": Case(Shuffled, blocks=1, same=1, different=1, channels=16),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shrinking", [False, True], ids=["same", "different"])
def test_unusual_maps(name: str, shrinking: bool) -> None:
    """Every stage's blocks are found, and each hears the stage before or is listed with the reason."""
    case = CASES[name]
    widths, strides = ((16, 24, 32), (1, 2, 2)) if shrinking else ((16, 16, 16), (1, 1, 1))
    with seeded(2):
        model = trained_like(Stages(case.attention, widths, strides), IMAGES).eval()
    plan = dcafy.inspect(model, example_inputs=IMAGES)
    stages = [f"attention.{i}" for i in range(3)]
    expected = sorted(stages * case.blocks)
    assert sorted(block.name.split("#")[0] for block in plan.blocks) == expected
    if case.channels is not None and not shrinking:
        assert {block.channels for block in plan.blocks} == {case.channels}
    heard = case.different if shrinking else case.same
    assert sorted(link.target.split("#")[0] for link in plan.links) == sorted(stages[1:] * heard)
    told = [item.name.split("#")[0] for item in plan.skipped if item.reason.startswith("cannot hear")]
    assert sorted(told) == sorted(stages[1:] * (case.blocks - heard))
    if plan.links:
        same_and_alive(model, dcafy.convert(model, example_inputs=IMAGES).eval())


@pytest.mark.parametrize("written", [Written, WrittenThroughSlices])
def test_attention_behind_a_tensor_that_is_written_into(written: type[Written]) -> None:
    model = trained(lambda: Stages(written, (16, 24, 32), (1, 2, 2)), IMAGES)
    plan = dcafy.inspect(model, example_inputs=IMAGES)
    assert [(link.source, link.target) for link in plan.links] == [
        (f"attention.{i}.attention", f"attention.{i + 1}.attention") for i in range(2)
    ]
    with seeded(0):  # in one of many networks a narrow matching layer yields zeros alone
        converted = dcafy.convert(model, example_inputs=IMAGES).eval()
    same_and_alive(model, converted)


@pytest.mark.parametrize("attention", [Frames, Shuffled])
@pytest.mark.parametrize("widths", [(16, 16, 16), (16, 24, 32)], ids=["same", "different"])
def test_the_map_is_passed_on_in_the_layout_of_its_context(
    attention: type[Frames] | type[Shuffled], widths: tuple[int, ...]
) -> None:
    """T ⊙ G multiplies each channel of each sample by the very gate that its X was multiplied by."""
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with seeded(4):
        model = trained_like(Stages(attention, widths, (1, 1, 1)), images).eval()
    connected = dcafy.convert(model, example_inputs=images).eval()
    for i, name in ((0, "attention.1"), (1, "attention.2")):
        connection = dcafy.connections(connected)[name]
        seen: list[tuple[Tensor, ...]] = []
        connection.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given))
        with torch.no_grad():
            connected(images)
            (_, passed, context), *_ = seen
            gate = model.attention[i].gate(context)
        assert torch.equal(passed.flatten(1), gate.flatten(1)), name


class MaskedNetwork(nn.Module):
    """Squeeze-excitation over the frames that are none of the padding; the lengths are an input."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv1d(8 if i == 0 else 16, 16, 3, padding=1) for i in range(3)])
        self.maps = nn.ModuleList([nn.Conv1d(16, 16, 1) for _ in range(3)])

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        for conv, map_ in zip(self.convs, self.maps, strict=True):
            x = F.relu(conv(x))
            frames = torch.arange(x.shape[-1], device=x.device)
            mask = (frames[None] < (lengths * x.shape[-1])[:, None]).unsqueeze(1).to(x.dtype)
            g = (x * mask).sum(2, keepdim=True) / mask.sum(2, keepdim=True)
            x = x * torch.sigmoid(map_(g))
        return x.mean(2)


def test_a_count_of_frames_is_no_context() -> None:
    with seeded(5):
        model, inputs = MaskedNetwork().eval(), (torch.rand(2, 8, 60), torch.tensor([1.0, 0.5]))
    plan = dcafy.inspect(model, example_inputs=inputs)
    assert [(block.dimension, block.channels) for block in plan.blocks] == [("channel", 16)] * 3
    connected = dcafy.convert(model, example_inputs=inputs).eval()
    assert len(dcafy.connections(connected)) == 2
    with torch.no_grad():
        assert torch.equal(model(*inputs), connected(*inputs))


class Streams(nn.Module):
    """Two resolutions side by side that exchange what they hold, as in HRNet, with attention in both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.start = conv_norm(3, 8, stride=2), conv_norm(8, 16, stride=2)
        self.high = nn.ModuleList([SELinear(8) for _ in range(2)])
        self.low = nn.ModuleList([SELinear(16) for _ in range(2)])
        self.down, self.up = conv_norm(8, 16, stride=2), conv_norm(16, 8, kernel=1)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        high = F.relu(self.stem(x))
        low = F.relu(self.start(high))
        high, low = self.high[0](high), self.low[0](low)
        raised = F.interpolate(self.up(low), size=high.shape[-2:])
        high, low = F.relu(high + raised), F.relu(low + self.down(high))
        high, low = self.high[1](high), self.low[1](low)
        return self.head(torch.cat([high.mean((2, 3)), low.mean((2, 3))], 1))


class Nested(nn.Module):
    """A decoder with nodes between encoder and output, as in UNet++: a node reads all nodes of its row."""

    def __init__(self) -> None:
        super().__init__()
        self.top, self.bottom = conv_norm(3, 8, stride=2), conv_norm(8, 16, stride=2)
        self.encoder = SELinear(16)
        self.middle, self.last = conv_norm(24, 8), conv_norm(32, 8)
        self.attention, self.output = SELinear(8), SELinear(8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        top = F.relu(self.top(x))
        bottom = self.encoder(F.relu(self.bottom(top)))
        raised = F.interpolate(bottom, size=top.shape[-2:])
        middle = self.attention(F.relu(self.middle(torch.cat([top, raised], 1))))
        return self.head(self.output(F.relu(self.last(torch.cat([top, middle, raised], 1)))))


class TwoPaths(nn.Module):
    """A context path and a detail path that a third block joins, as in BiSeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.detail, self.context = conv_norm(3, 8, stride=2), conv_norm(3, 8, stride=4)
        self.refine, self.join = SELinear(8), SELinear(16)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        detail = F.relu(self.detail(x))
        context = F.interpolate(self.refine(F.relu(self.context(x))), size=detail.shape[-2:])
        joined = torch.cat([detail, context], 1)
        return self.head(joined + self.join(joined))


LINKS: dict[type[nn.Module], set[tuple[str, str]]] = {
    Streams: {("low.0", "high.1"), ("low.0", "low.1")},
    Nested: {("encoder", "attention"), ("attention", "output")},
    TwoPaths: {("refine", "join")},
}
"""Who hears whom: along the data, and of several that reach a block the last one that was computed."""


@pytest.mark.parametrize("network", LINKS, ids=[network.__name__ for network in LINKS])
def test_networks_that_are_no_straight_line(network: type[nn.Module]) -> None:
    with seeded(3):
        model = trained_like(network(), IMAGES).eval()
    plan = dcafy.inspect(model, example_inputs=IMAGES)
    assert {(link.source, link.target) for link in plan.links} == LINKS[network]
    same_and_alive(model, dcafy.convert(model, example_inputs=IMAGES).eval())


class CarriesState(nn.Module):
    """One attention module for all stages, with a cell that it hands on from call to call (DIANet)."""

    def __init__(self, width: int, stages: int) -> None:
        super().__init__()
        self.stem = conv_norm(3, width, stride=2)
        self.convs = nn.ModuleList([conv_norm(width, width) for _ in range(stages)])
        self.forget, self.write = nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        cell = torch.zeros_like(x[:, :, 0, 0])
        for conv in self.convs:
            y = conv(x)
            g = y.mean((2, 3))
            cell = torch.sigmoid(self.forget(g)) * cell + torch.tanh(self.write(g))
            x = x + y * torch.sigmoid(cell)[:, :, None, None]
        return self.head(x.mean((2, 3)))


def test_a_state_that_is_handed_on_brings_no_contexts_of_earlier_blocks() -> None:
    model = trained_like(CarriesState(8, 4), IMAGES)
    plan = dcafy.inspect(model, example_inputs=IMAGES)
    assert [len(block.extraction) for block in plan.blocks] == [1, 1, 1, 1]
    connected = dcafy.convert(model, example_inputs=IMAGES).eval()
    assert len(dcafy.connections(connected)) == 3
    same_and_alive(model, connected)


class OneNumber(nn.Module):
    """Adds one number for the whole batch: a map without axes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x.mean((2, 3))).sum()


def test_a_map_without_axes_is_not_passed_on() -> None:
    model = nn.Sequential(conv_norm(3, 8), SELinear(8), OneNumber(8), conv_norm(8, 8), SELinear(8))
    model = trained_like(model, IMAGES).eval()
    plan = dcafy.inspect(model, example_inputs=IMAGES)
    assert [skipped.name for skipped in plan.skipped] == ["4", "Sequential"]
    assert "other axes than its context" in plan.skipped[0].reason
    assert "is a container, whose class stays as it is" in plan.skipped[1].reason
    assert torch.equal(dcafy.convert(model, example_inputs=IMAGES).eval()(IMAGES), model(IMAGES))
