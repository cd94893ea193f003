"""Attention put into networks that have none: where it goes, that it changes nothing, and that it can be connected."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from networks import conv_norm
from snapshot import differences, snapshot
from torch import Tensor, nn
from trained import images, seeded, trained_like

import dcafy
from dcafy.attention import ATTENTIONS
from dcafy.errors import InputError, UsageError

STARTING = [name for name, attention in ATTENTIONS.items() if not attention.obstacle]
FROM_THE_PAPER = [name for name, attention in ATTENTIONS.items() if attention.obstacle]


def small_mobilenet() -> nn.Module:
    return torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.35)


class Dropped(nn.Module):
    """A unit whose main branch ends in a dropped path and whose shortcut pools."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_norm(inputs, outputs, 3, stride), nn.ReLU(), conv_norm(outputs, outputs))
        self.drop = torchvision.ops.StochasticDepth(0.2, "row")
        self.short = nn.Sequential(nn.AvgPool2d(stride), nn.Conv2d(inputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.drop(self.body(x)).add(self.short(x)))


class Network(nn.Module):
    """Two units, then a head; the units' shortcut has a convolution of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 16, stride=2)
        self.units = nn.Sequential(Dropped(16, 16, 1), Dropped(16, 24, 2))
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.units(F.relu(self.stem(x))).mean((2, 3)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "mobilenet_v2": small_mobilenet,
    "hand_written": Network,
}


@pytest.fixture(
    scope="module",
    params=["resnet18", pytest.param("mobilenet_v2", marks=pytest.mark.slow), "hand_written"],
)
def network(request: pytest.FixtureRequest) -> nn.Module:
    with seeded(0):
        model = NETWORKS[request.param]()
    return trained_like(model, images(8))


# Where it goes -----------------------------------------------------------------------------------------


def inserted_at(model: nn.Module, name: str) -> list[str]:
    return [path.removesuffix(f".{name}") for path, _ in model.named_modules() if path.split(".")[-1] == name]


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (torchvision.models.resnet50, 16),
        (torchvision.models.resnet101, 33),
        (torchvision.models.mobilenet_v2, 17),
        (torchvision.models.mnasnet1_0, 16),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_papers_networks(build: Callable[[], nn.Module], count: int) -> None:
    with torch.device("meta"):
        model = build()
    units = inserted_at(dcafy.insert(model, "se"), "se")
    assert len(units) == count
    kinds = {type(model.get_submodule(path)).__name__ for path in units}
    assert len(kinds) == 1
    assert kinds <= {"Bottleneck", "InvertedResidual", "_InvertedResidual"}
    assert count == sum(type(module).__name__ in kinds for module in model.modules())


def test_before_the_addition_and_before_dropped_paths() -> None:
    with seeded(0):
        model = dcafy.insert(Network(), "se", init="paper").eval()
    unit = model.units[1]
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        expected = F.relu(unit.se(unit.body(x)) + unit.short(x))
        assert torch.equal(unit(x), expected)


def test_globs() -> None:
    model = torchvision.models.resnet18()
    assert inserted_at(dcafy.insert(model, "eca", where="layer3.*"), "eca") == ["layer3.0", "layer3.1"]
    assert inserted_at(dcafy.insert(model, "eca", where="*.1"), "eca") == [f"layer{i}.1" for i in range(1, 5)]
    twice = dcafy.insert(dcafy.insert(model, "se", where="*.0"), "gc", where="*.1")
    assert inserted_at(twice, "se") == [f"layer{i}.0" for i in range(1, 5)]
    assert inserted_at(twice, "gc") == [f"layer{i}.1" for i in range(1, 5)]
    both = dcafy.insert(dcafy.insert(model, "se", where="layer1.0"), "se", where="layer1.0")
    assert inserted_at(both, "se") == inserted_at(both, "se_") == ["layer1.0"]


def test_a_network_without_units_says_so_and_takes_a_glob() -> None:
    model = torchvision.models.vgg11(num_classes=10).eval()
    with pytest.raises(InputError, match="VGG has no residual or bottleneck units") as caught:
        dcafy.insert(model, "se", example_inputs=images())
    assert "where='features.*'" in str(caught.value)
    with_se = dcafy.insert(model, "se", where="features.[47]", example_inputs=images())
    assert inserted_at(with_se, "se") == ["features.4", "features.7"]
    assert torch.equal(with_se.eval()(images()), model(images()))
    with pytest.raises(InputError, match="matches no module"):
        dcafy.insert(model, "se", where="layer9.*", example_inputs=images())
    with pytest.raises(InputError, match="does not end in a map"):
        dcafy.insert(model, "se", where="classifier.0", example_inputs=images())


def test_transformers_have_no_units() -> None:
    with torch.device("meta"):
        model = torchvision.models.swin_t()
    with pytest.raises(InputError, match="no residual or bottleneck units with convolutions"):
        dcafy.insert(model, "se")


# What it leaves as it was ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STARTING)
def test_identity(network: nn.Module, name: str) -> None:
    result = dcafy.insert(network, name, reduction=8, example_inputs=images())
    assert len(inserted_at(result, name.replace("-", "_"))) >= 2
    for x in (images(), images(1, seed=2), images(3, 80, seed=3)):
        with torch.no_grad():
            assert torch.equal(network(x), result(x))
    original = copy.deepcopy(network).train()
    result = result.train()
    with seeded(5):
        expected = original(images(4))
    with seeded(5):
        assert torch.equal(result(images(4)), expected)
    buffers = dict(result.named_buffers())
    assert all(torch.equal(value, buffers[key]) for key, value in original.named_buffers())


@pytest.mark.parametrize("name", FROM_THE_PAPER)
def test_what_cannot_start_as_identity_says_so(network: nn.Module, name: str) -> None:
    with pytest.raises(UsageError, match="init='paper'"):
        dcafy.insert(network, name, example_inputs=images())
    result = dcafy.insert(network, name, init="paper", reduction=8, example_inputs=images()).eval()
    with torch.no_grad():
        moved = result(images())
    assert moved.isfinite().all()
    assert not torch.allclose(moved, network(images()))


@pytest.mark.parametrize("name", ["se", "sk", "cbam"])
def test_keys_values_modes_and_source(network: nn.Module, name: str) -> None:
    source = copy.deepcopy(network).train()
    source.get_submodule(next(path for path, m in source.named_modules() if isinstance(m, nn.BatchNorm2d))).eval()
    before = snapshot(source)
    result = dcafy.insert(source, name, init="paper", example_inputs=images())
    after = snapshot(source)
    assert differences(before, after) == []
    state = result.state_dict()
    for key, value in source.state_dict().items():
        assert torch.equal(state[key], value), key
    new = state.keys() - source.state_dict().keys()
    assert new
    assert all(name in key.split(".") for key in new)
    modes = {path: module.training for path, module in result.named_modules()}
    assert all(modes[path] == module.training for path, module in source.named_modules())
    assert not {id(m) for m in source.modules()} & {id(m) for m in result.modules()}
    assert not {p.data_ptr() for p in source.parameters()} & {p.data_ptr() for p in result.parameters()}
    shared = dict(dcafy.insert(source, name, init="paper", example_inputs=images(), copy=False).named_parameters())
    assert all(shared[key] is parameter for key, parameter in source.named_parameters())


def test_selective_kernels_keep_the_trained_branch() -> None:
    with seeded(0):
        model = trained_like(torchvision.models.resnet18(num_classes=10), images(8))
    result = dcafy.insert(model, "sk", init="paper", example_inputs=images())
    unit, sk = result.layer2[0], result.layer2[0].sk
    assert torch.equal(unit.conv1.weight, model.layer2[0].conv1.weight)
    second = sk.second[0]
    assert (second.dilation, second.padding, second.stride) == ((2, 2), (2, 2), unit.conv1.stride)
    assert [type(layer) for layer in sk.second] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    x = torch.randn(2, 64, 16, 16)
    result.eval()
    with torch.no_grad():
        first = F.relu(unit.bn1(unit.conv1(x)))
        expected = F.relu(unit.bn2(unit.conv2(sk(x, first))) + unit.downsample(x))
        assert torch.equal(unit(x), expected)


def test_the_result_survives() -> None:
    with seeded(0):
        model = dcafy.insert(Network(), "cbam", init="paper").eval()
    expected = model(images())
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = torch.load(stream, weights_only=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(twin(images()), expected)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(images().bfloat16()).dtype == torch.bfloat16


# Then connected ----------------------------------------------------------------------------------------


def randomise_last_layers(model: nn.Module, name: str) -> None:
    """What starts at zero so that nothing changes, away from zero."""
    with seeded(9), torch.no_grad():
        for path, parameter in model.named_parameters():
            if name in path.split(".") and "dca" not in path.split("."):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)


@pytest.mark.parametrize("name", [name for name in (*STARTING, *FROM_THE_PAPER) if not ATTENTIONS[name].along])
def test_converts_and_lives(name: str) -> None:
    """Identity at the start, and every β moves the output once the inserted layers have left zero."""
    with seeded(0):
        model = trained_like(torchvision.models.resnet18(num_classes=10), images(8))
    init = "paper" if name in FROM_THE_PAPER else "identity"
    model = dcafy.insert(model, name, reduction=4, init=init, example_inputs=images(), where="layer[12].*").eval()
    if init == "identity":
        randomise_last_layers(model, name.replace("-", "_"))
    converted = dcafy.convert(model, example_inputs=images())
    output = converted(images()).detach()
    assert torch.equal(output, model(images()))
    links = {"cbam": 6, "bam": 6, "sk": 6, "mrla": 2}.get(name, 3)
    connections = dcafy.connections(converted)
    assert len(connections) == links
    for key, connection in connections.items():
        with torch.no_grad():
            start = connection.beta.item()
            connection.beta.fill_(0.9)
            assert not torch.equal(converted(images()), output), f"the beta of {key} does nothing"
            connection.beta.fill_(start)
    converted.train()(images(4)).square().mean().backward()
    assert all(p.grad is not None for k, p in converted.named_parameters() if "dca" in k.split("."))


def test_the_short_form() -> None:
    with seeded(0):
        model = trained_like(torchvision.models.resnet18(num_classes=10), images(8))
    converted = dcafy.convert(model, attention="se", attention_reduction=8, reduction=4, example_inputs=images())
    with torch.no_grad():
        assert torch.equal(converted(images()), model(images()))
    assert list(dcafy.connections(converted)) == [f"layer{i}.{j}.se" for i in range(1, 5) for j in range(2)][1:]
    assert converted.layer1[0].se.reduce.out_channels == 64 // 8
    assert dcafy.connections(converted)["layer2.0.se"].match[0].out_features == 128 // 4


def test_selective_kernels_have_a_connection_per_branch() -> None:
    with seeded(0):
        model = dcafy.insert(torchvision.models.resnet18(num_classes=10), "sk", init="paper", example_inputs=images())
    converted = dcafy.convert(model.eval(), example_inputs=images())
    names = list(dcafy.connections(converted))
    assert names[:4] == ["layer1.1.sk[0]", "layer1.1.sk[1]", "layer2.0.sk[0]", "layer2.0.sk[1]"]
    first, second = (dcafy.connections(converted)[name] for name in names[2:4])
    assert first.match is not second.match
    paths = {path for path, _ in converted.named_modules()}
    assert {path for path in paths if path.startswith("layer2.0.sk.") and path.endswith(("branch0", "branch1"))} == {
        "layer2.0.sk.dca.branch0",
        "layer2.0.sk.dca.branch1",
    }
    back = dcafy.revert(converted)
    assert torch.equal(back(images()), model(images()))


def test_selective_kernels_in_a_dense_topology() -> None:
    with seeded(0):
        model = trained_like(torchvision.models.resnet18(num_classes=10), images(8))
    model = dcafy.insert(model, "sk", init="paper", reduction=4, example_inputs=images(), where="layer[12].*").eval()
    converted = dcafy.convert(model, example_inputs=images(), topology="dense")
    assert torch.equal(converted(images()), model(images()))
    assert list(dcafy.connections(converted))[:4] == [
        "layer1.1.sk[0]",
        "layer1.1.sk[1]",
        "layer2.0.sk[0]<-layer1.0.sk",
        "layer2.0.sk[0]<-layer1.1.sk",
    ]
    assert len(dcafy.connections(converted)) == 2 * (1 + 2 + 3)


def test_selective_kernels_where_an_identity_stands_before_the_activation() -> None:
    class Slotted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.slot = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Identity()
            self.act, self.project = nn.SiLU(), nn.Conv2d(16, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.project(self.act(self.slot(self.norm(self.conv(x)))))

    model = nn.Sequential(Slotted(), Slotted())
    result = dcafy.insert(model, "sk", init="paper", example_inputs=images())
    assert inserted_at(result, "sk") == ["0", "1"]
    assert isinstance(result[0].sk.second[2], nn.SiLU)


def test_refusals() -> None:
    model = torchvision.models.resnet18(num_classes=10)
    with pytest.raises(UsageError, match="bam, cbam, dia, eca"):
        dcafy.insert(model, "senet")
    with pytest.raises(UsageError, match=r"attention=\['se'\] is not known"):
        dcafy.insert(model, ["se"])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="glob of module paths, not 3"):
        dcafy.insert(model, "se", where=3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="identity, paper"):
        dcafy.insert(model, "se", init="zeros")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least 1"):
        dcafy.insert(model, "se", reduction=-1)
    with pytest.raises(UsageError, match="leaves the bottleneck out, which 'se' cannot do; gc can"):
        dcafy.insert(model, "se", reduction=0)
    with pytest.raises(InputError, match="Module"):
        dcafy.insert(torchvision.models.resnet18, "se")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="connected already"):
        dcafy.insert(dcafy.convert(model, attention="eca", example_inputs=images()), "se")


def test_global_context_without_a_bottleneck(tmp_path: Path) -> None:
    model = torchvision.models.resnet18(num_classes=4).eval()
    attended = dcafy.insert(model, "gc", reduction=None).eval()
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(attended(x), model(x))
    assert [name for name, _ in attended.layer1[0].gc.bottleneck.named_children()] == ["expand"]
    converted = dcafy.convert(model, attention="gc", attention_reduction=None).eval()
    assert {**converted.state_dict()}.keys() >= attended.state_dict().keys()
    dcafy.save(converted, tmp_path / "folder")
    assert torch.equal(dcafy.load(tmp_path / "folder").eval()(x), converted(x))


@pytest.mark.parametrize("attention", ["se", "cbam", "sk", "eca"])
def test_no_other_attention_does_without_a_bottleneck(attention: str) -> None:
    with pytest.raises(UsageError, match="gc can"):
        dcafy.insert(torchvision.models.resnet18(), attention, reduction=None, init="paper")


@torch.no_grad()
def test_maps_in_groups_at_sizes_smaller_than_the_window_that_matches_them() -> None:
    """Maps of one place, which pooling over groups, rows and columns refuses."""
    network = timm.create_model("test_resnet", num_classes=2)
    for kind in ("avg", "max"):
        d = dcafy.convert(network, attention="sge", spatial_match=kind, example_inputs=images(size=32)).eval()
        for connection in dcafy.connections(d).values():
            connection.beta.fill_(0.5)
        assert d(images(size=16)).isfinite().all()
