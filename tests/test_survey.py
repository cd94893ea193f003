"""Looking at a network is quick and leaves nothing behind: what is computed, how often, and what is told."""

from __future__ import annotations

import contextlib
import gc
import itertools
from typing import Any

import pytest
import torch
import zoo
from networks import SELinear, conv_norm
from torch import Tensor, fx, nn
from trained import seeded

import dcafy
from dcafy.errors import TracingError
from dcafy.graph.evaluator import Evaluator
from dcafy.trace.islands import observe
from dcafy.trace.recorder import Recorder
from dcafy.trace.recording import Observed

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of the modules that are recorded, one entry for each time."""
    names: list[str] = []
    record = Recorder.record

    def counted(self: Recorder) -> Any:
        names.append(type(self.model).__name__)
        return record(self)

    monkeypatch.setattr(Recorder, "record", counted)
    return names


class Baking(nn.Module):
    """A unit whose forward counts the rows of its input by itself, around attention if it has one."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.conv = conv_norm(8, 8)
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.conv(x)) / len(range(x.shape[2]))


class BakingAttention(SELinear):
    """Attention that counts the rows of its input by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / len(range(x.shape[2]))


class Units(nn.Module):
    """A stem, units, a head."""

    def __init__(self, *units: nn.Module) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8, stride=2)
        self.units = nn.Sequential(*units)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.units(self.stem(x)).mean((2, 3)))


def test_all_baked_sizes_are_noticed_at_once(recorded: list[str]) -> None:
    """However many modules that would be rewritten bake a size, the network is recorded anew a few times at most."""
    with seeded(1):
        model = Units(*[BakingAttention(8) for _ in range(5)], SELinear(8), SELinear(8))
    plan = dcafy.inspect(model.eval(), example_inputs=IMAGES)
    told = {item.name for item in plan.skipped if item.reason.startswith("kept whole")}
    assert told == {f"units.{i}" for i in range(5)}
    assert [(link.source, link.target) for link in plan.links] == [("units.5", "units.6")]
    assert 2 <= recorded.count("Units") <= 4


def test_a_size_that_is_baked_around_attention_costs_no_connection(recorded: list[str]) -> None:
    """Those forwards stay Python: all that is missing is one graph of the whole, and the plan says so."""
    with seeded(1):
        model = Units(*[Baking(SELinear(8)) for _ in range(5)], SELinear(8), SELinear(8)).eval()
    plan = dcafy.inspect(model, example_inputs=IMAGES)
    blocks = [*(f"units.{i}.attention" for i in range(5)), "units.5", "units.6"]
    assert [(link.source, link.target) for link in plan.links] == list(itertools.pairwise(blocks))
    assert ["no graph of the whole can be written" in item.reason for item in plan.skipped] == [True]
    assert recorded.count("Units") <= 4
    connected = dcafy.convert(model, example_inputs=IMAGES).eval()
    with torch.no_grad():
        for images in (IMAGES, torch.rand(3, 3, 96, 80)):
            assert torch.equal(connected(images), model(images))


class Between(nn.Module):
    """Two attention blocks, and between them what no graph can have."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.first, self.second, self.between = SELinear(8), SELinear(8), between

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.between == "mode" and self.training:
            x = x + torch.randn_like(x)
        with torch.no_grad() if self.between == "switch" else contextlib.nullcontext():
            x = x + len(range(x.shape[-1])) if self.between == "size" else x * 2
        return self.second(x)


@pytest.mark.parametrize("between", ["mode", "switch", "size"])
def test_the_plan_says_what_around_two_blocks_no_graph_can_have(between: str) -> None:
    """A link inside one module: that module, too, is written out in the graph of the whole."""
    with seeded(1):
        model = Units(Between(between)).eval()
    connected = dcafy.convert(model, example_inputs=IMAGES).eval()
    (skipped,) = dcafy.inspect(model, example_inputs=IMAGES).skipped
    assert "no graph of the whole can be written" in skipped.reason
    assert not isinstance(connected, fx.GraphModule)
    dcafy.connections(connected)["units.0.second"].beta.data.fill_(1.0)
    exported = torch.export.export(connected, (IMAGES,)).module()
    with torch.no_grad():
        assert torch.equal(exported(IMAGES), connected(IMAGES))
        assert not torch.equal(connected(IMAGES), model(IMAGES))


def test_the_graph_calls_what_bakes_a_size_and_holds_nothing_connected() -> None:
    with seeded(1):
        model = Units(SELinear(8), BakingAttention(8), SELinear(8)).eval()
    connected = dcafy.convert(model, example_inputs=IMAGES).eval()
    assert isinstance(connected, fx.GraphModule)
    dcafy.connections(connected)["units.2"].beta.data.fill_(1.0)
    with torch.no_grad():
        for images in (IMAGES, torch.rand(3, 3, 96, 80)):
            assert torch.equal(fx.GraphModule(connected, connected.graph)(images), connected(images))
            assert torch.equal(dcafy.flat(connected)(images), connected(images))


def test_a_baked_size_is_no_news_where_nothing_is_emitted(recorded: list[str]) -> None:
    """A network without attention has no graph that a size could be baked into: it is recorded once."""
    plan = dcafy.inspect(Units(*[Baking(nn.Identity()) for _ in range(3)]).eval(), example_inputs=IMAGES)
    assert plan.blocks == ()
    assert plan.skipped == ()
    assert recorded == ["Units"]


@pytest.mark.parametrize("collecting", [True, False])
@pytest.mark.parametrize("example", [IMAGES, torch.rand(2, 7, 64, 64)], ids=["fits", "does not fit"])
def test_garbage_is_collected_afterwards_as_before(collecting: bool, example: Tensor) -> None:
    during: list[bool] = []

    class Watching(Units):
        def forward(self, x: Tensor) -> Tensor:
            during.append(gc.isenabled())
            return super().forward(x)

    before = gc.isenabled()
    (gc.enable if collecting else gc.disable)()
    try:
        if example is IMAGES:
            dcafy.inspect(Watching(), example_inputs=example)
        else:
            with pytest.raises(TracingError):
                dcafy.inspect(Watching(), example_inputs=example)
        assert gc.isenabled() == collecting
    finally:
        (gc.enable if before else gc.disable)()
    assert during
    assert not any(during)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("projected", [0, 3])
def test_shapes_of_recurrent_layers(
    kind: type[nn.RNNBase], batch_first: bool, bidirectional: bool, projected: int
) -> None:
    options = {"proj_size": projected} if kind is nn.LSTM else {}
    layer = kind(6, 5, num_layers=2, batch_first=batch_first, bidirectional=bidirectional, **options)
    output, state = layer(torch.rand(4, 7, 6))
    seen, seen_state = Evaluator(torch.device("cpu")).module(layer, (torch.empty(4, 7, 6, device="meta"),), {})
    assert seen.device.type == "meta"
    assert seen.shape == output.shape
    pairs = zip(seen_state, state, strict=True) if kind is nn.LSTM else [(seen_state, state)]
    assert all(a.shape == b.shape for a, b in pairs)


class Chooser(nn.Module):
    """Needs data: it works on the rows that it chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.rows = nn.Sequential(nn.Linear(8, 6), nn.Softmax(1), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.conv(x).flatten(2).transpose(1, 2).flatten(0, 1)
        return self.rows(rows[torch.nonzero(rows.sum(1) > -1e9)[:, 0]])


def test_a_guess_is_looked_at_without_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Submodules are seen with the shapes that a real run gives them, and no convolution is computed for it."""
    computed: list[torch.Size] = []
    convolve = nn.Conv2d._conv_forward

    def noted(self: nn.Conv2d, value: Tensor, *rest: Any) -> Tensor:
        if value.device.type != "meta":
            computed.append(value.shape)
        return convolve(self, value, *rest)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", noted)
    seen = []
    for real in (IMAGES, torch.empty_like(IMAGES, device="meta")):
        computed.clear()
        example = Observed((torch.empty_like(IMAGES, device="meta"),), {}, (real,))
        inside = observe(Chooser().eval(), example, Evaluator(torch.device("cpu")))
        assert isinstance(inside, dict), inside
        seen.append({path: observed.args[0].shape for path, observed in inside.items()})
        assert bool(computed) == (real is IMAGES)
    assert seen[0] == seen[1]
    assert seen[0]["rows.2"] == (2 * 31 * 31, 6)


class Caches(nn.Module):
    """Keeps what it computed in eval mode, by device, as timm's EfficientViT does with its biases."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.rand(8))
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        key = str(x.device)
        if self.training or key not in self.cache:
            self.cache[key] = self.bias.exp()
        return x * self.cache[key][:, None, None]


def test_a_network_that_has_run_is_still_understood() -> None:
    """Tensors that a forward left in a dict do not get in the way, and stay the user's own."""
    with seeded(4), torch.no_grad():
        model = Units(SELinear(8), Caches(), SELinear(8)).eval()
        expected = model(IMAGES)
    cached = model.units[1].cache["cpu"]
    connected = dcafy.convert(model, example_inputs=IMAGES).eval()
    assert list(dcafy.connections(connected)) == ["units.2"]
    with torch.no_grad():
        assert torch.equal(connected(IMAGES), expected)
    assert model.units[1].cache["cpu"] is cached
    assert cached.device.type == "cpu"


class TwoResolutions(nn.Conv2d):
    """A convolution that takes and makes two maps, as octave convolutions do."""

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        fine, coarse = pair
        return super().forward(fine), super().forward(coarse)


class Octaves(nn.Module):
    """Two convolutions of pairs of maps, with attention behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = TwoResolutions(3, 8, 3, padding=1)
        self.units = nn.Sequential(SELinear(8), conv_norm(8, 8), SELinear(8))

    def forward(self, x: Tensor) -> Tensor:
        fine, coarse = self.first((x, nn.functional.avg_pool2d(x, 2)))
        return self.units(fine + nn.functional.interpolate(coarse, size=fine.shape[2:]))


def test_a_layer_that_makes_two_maps() -> None:
    with seeded(1):
        plan = dcafy.inspect(Octaves().eval(), example_inputs=IMAGES)
    assert [(link.source, link.target) for link in plan.links] == [("units.0", "units.2")]


def test_a_look_at_larger_maps_that_falls_apart_is_no_gain() -> None:
    """A network of one image size with maps under 4x4: at twice the size only its blocks can be recorded."""
    model = zoo.small_maxvit().eval()
    plan = dcafy.inspect(model, example_inputs=torch.zeros(2, 3, 64, 64))
    assert (len(plan.blocks), len(plan.links), plan.islands) == (5, 4, ())
