"""What the analysis says is what the network does: against hooks on the original's gates, and against captum itself."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import networks
import pytest
import timm
import torch
import torchvision
from captum.attr import LayerGradCam
from subjects import case, subject
from torch import Tensor, nn
from trained import images, seeded, with_betas

import dcafy
from dcafy.analysis import AttentionValues, attention_values, contributions, grad_cam
from dcafy.analysis.tapped import tapped
from dcafy.errors import InputError, NoAttentionError, UsageError


def lively(model: nn.Module) -> nn.Module:
    """Batch norms and biases that differ, so that attention differs from image to image."""
    with seeded(0), torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.3, 0.8)
                module.weight.uniform_(0.7, 1.4)
    return model.eval()


SE_NETWORKS = {
    # network -> the class of its attention, the gate in it
    "torchvision:mobilenet_v3_small": ("SqueezeExcitation", "scale_activation"),
    "torchvision:efficientnet_b0": ("SqueezeExcitation", "scale_activation"),
    "torchvision:regnet_y_400mf": ("SqueezeExcitation", "scale_activation"),
    "timm:seresnext26d_32x4d": ("SEModule", "gate"),
    "timm:legacy_seresnet18": ("SEModule", "sigmoid"),
    "timm:mobilenetv3_small_100": ("SqueezeExcite", "gate"),
}


def gates_by_hooks(
    model: nn.Module, kind: str, gate: str, given: Tensor, like: nn.Module | None = None
) -> list[Tensor]:
    """What the gates of a network yield; their paths are those of ``like``, where classes are known."""
    paths = [path for path, module in (like or model).named_modules() if type(module).__name__ == kind]
    seen: list[Tensor] = []
    handles = [
        model.get_submodule(f"{path}.{gate}").register_forward_hook(lambda _m, _i, out: seen.append(out.clone()))
        for path in paths
    ]
    with torch.no_grad():
        model(given)
    for handle in handles:
        handle.remove()
    return seen


def same_values(found: tuple[AttentionValues, ...], wanted: list[Tensor]) -> bool:
    assert len(found) == len(wanted) > 2
    return all(torch.equal(block.values.flatten(1), gate.flatten(1)) for block, gate in zip(found, wanted, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", [case(name) for name in SE_NETWORKS])
def test_values_are_those_of_the_gates(name: str) -> None:
    kind, gate = SE_NETWORKS[name]
    model, connected = subject(name).pair()
    given = images(3)
    wanted = gates_by_hooks(model, kind, gate, given)
    for network in (model, connected, dcafy.revert(connected)):
        assert same_values(attention_values(network, given), wanted)
    # One image after the other, they are the same to a rounding: kernels differ with the size of the batch.
    for block, gates in zip(attention_values(model, given, batch_size=1), wanted, strict=True):
        torch.testing.assert_close(block.values.flatten(1), gates.flatten(1), rtol=1e-2, atol=1e-3)
    moved = with_betas(copy.deepcopy(connected), 0.7)
    found = attention_values(moved, given)
    assert not same_values(found, wanted)
    if name.startswith("torchvision:"):  # timm's gates are functions in modules of its own, which are entered
        assert same_values(found, gates_by_hooks(moved, kind, gate, given, like=model))


def test_values_of_gates_that_are_no_modules() -> None:
    with seeded(0):
        model = lively(networks.with_attention(networks.CBAM))
    seen: dict[str, list[Tensor]] = {"channel": [], "spatial": []}
    with_sigmoid = {"channel": networks.ChannelGate, "spatial": networks.SpatialGate}
    handles = []
    for kind, gate in with_sigmoid.items():
        for module in model.modules():
            if isinstance(module, gate):  # it yields x · T: T is told by dividing
                hook = module.register_forward_hook(lambda _m, i, out, kind=kind: seen[kind].append(out / i[0]))
                handles.append(hook)
    given = images(3)
    with torch.no_grad():
        model(given)
    for handle in handles:
        handle.remove()
    found = attention_values(model, given)
    for kind, maps in seen.items():
        own = [block for block in found if block.dimension == kind]
        assert len(own) == len(maps) > 1
        for block, ratio in zip(own, maps, strict=True):
            whole = ratio.isfinite()
            values = block.values.flatten(1)[..., None, None] if kind == "channel" else block.values
            expanded = values.expand_as(ratio)
            torch.testing.assert_close(expanded[whole], ratio[whole], rtol=1e-2, atol=1e-3)


def test_looking_changes_nothing() -> None:
    with seeded(0):
        connected = dcafy.convert(torchvision.models.mobilenet_v3_small(), example_inputs=images(3)).train()
    before = {name: value.clone() for name, value in connected.state_dict().items()}
    modes = [module.training for module in connected.modules()]
    paths = [path for path, _ in connected.named_modules()]
    attention_values(connected, images(3))
    grad_cam(connected, images(3))
    assert [path for path, _ in connected.named_modules()] == paths
    assert [module.training for module in connected.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in connected.state_dict().items())
    assert all(parameter.grad is None for parameter in connected.parameters())


def test_spread_and_share_near_half_by_hand() -> None:
    block = AttentionValues("se", "channel", True, torch.tensor([[0.0, 0.5, 0.54, 1.0]]))
    assert block.near_half == 0.5
    assert block.mean == pytest.approx(0.51)
    assert block.spread == pytest.approx(((0.51**2 + 0.01**2 + 0.03**2 + 0.49**2) / 4) ** 0.5)
    histogram = block.histogram(bins=4)
    assert histogram.edges == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert histogram.shares == (0.25, 0.0, 0.5, 0.25)


def test_no_attention_gives_no_values() -> None:
    assert attention_values(torchvision.models.resnet18(), images(1)) == ()


@pytest.mark.parametrize("wrong", [torch.rand(3, 8, 8), torch.rand(0, 3, 8, 8), "cat.jpg"])
def test_what_is_no_images(wrong: Any) -> None:
    with pytest.raises(InputError, match=r"\[N, C, H, W\]"):
        attention_values(torchvision.models.mobilenet_v3_small(), wrong)


class Moody(nn.Module):
    """Attention in a forward that takes another path in training: it may not be written down as a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + 0.1
        return x * torch.sigmoid(self.fc(x.mean((2, 3))))[:, :, None, None]


def test_a_map_of_a_module_that_decides_by_its_mode_is_that_of_eval() -> None:
    alone = nn.Sequential(nn.Conv2d(3, 8, 3), Moody(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert [block.name for block in dcafy.inspect(alone, example_inputs=images(3)).blocks] == ["1"]
    seen = tapped(alone.eval(), images(3))
    assert (list(seen.maps), seen.unread) == (["1"], ())
    (values,) = attention_values(alone, images(3))
    fc, x = alone[1].fc, alone[0](images(3))
    assert torch.equal(values.values, torch.sigmoid(fc(x.mean((2, 3)))).detach())


# -- stages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: timm.create_model("legacy_seresnet18"), ["layer1", "layer2", "layer3", "layer4"]),
        (torchvision.models.mobilenet_v3_large, ["features.6", "features.12", "features.16"]),
        (torchvision.models.regnet_y_400mf, [f"trunk_output.block{i}" for i in (1, 2, 3, 4)]),
        (lambda: timm.create_model("efficientnet_b0"), ["blocks.0", "blocks.1", "blocks.2", "blocks.4", "bn2"]),
    ],
)
def test_stages_are_the_modules_that_a_reader_would_name(build: Callable[[], nn.Module], expected: list[str]) -> None:
    model = build()
    connected = dcafy.convert(model, verify=False)
    for network in (model, connected, dcafy.revert(connected)):
        seen = tapped(network)
        assert [stage.name for stage in seen.stages] == expected
        assert sorted(name for stage in seen.stages for name in stage.blocks) == sorted(seen.maps)


# -- Grad-CAM --------------------------------------------------------------------------------------------


def by_captum(model: nn.Module, stage: str, given: Tensor, targets: Tensor) -> Tensor:
    inputs = given.clone().requires_grad_()
    maps: Tensor = LayerGradCam(model, model.get_submodule(stage)).attribute(
        inputs, target=targets, relu_attributions=True
    )
    return maps.detach()[:, 0]


@pytest.mark.parametrize(
    "name",
    [case(name) for name in ("torchvision:mobilenet_v3_small", "timm:legacy_seresnet18", "timm:seresnext26d_32x4d")],
)
def test_grad_cam_is_the_librarys(name: str) -> None:
    model, connected = subject(name).pair()
    given = images(3)
    for network in (model, connected, dcafy.revert(connected)):
        cams = grad_cam(network, given)
        assert torch.equal(cams.targets, model(given).argmax(1))
        assert len(cams.stages) >= 4
        for stage in cams.stages:
            assert torch.equal(stage.maps, by_captum(model, stage.name, given, cams.targets)), stage.name
        assert cams.stages[-1].maps.max() > 0
    moved = grad_cam(with_betas(copy.deepcopy(connected), 0.7), given, target=cams.targets)
    assert not all(torch.equal(a.maps, b.maps) for a, b in zip(moved.stages[1:-1], cams.stages[1:-1], strict=True))


def test_target_and_stages_are_what_was_asked_for() -> None:
    with seeded(0):
        model = lively(torchvision.models.resnet18())  # no attention: its stages are to be named
    given = images(3)
    cams = grad_cam(model, given, target=5, stages=("layer3",))
    assert cams.targets.tolist() == [5, 5, 5]
    assert torch.equal(cams.stages[0].maps, by_captum(model, "layer3", given, torch.full((3,), 5)))
    with pytest.raises(NoAttentionError, match="stages="):
        grad_cam(model, given)
    with pytest.raises(UsageError, match="layer9"):
        grad_cam(model, given, stages=("layer9",))
    with pytest.raises(UsageError, match=r"no class 1000: .* 0 to 999"):
        grad_cam(model, given, target=1000, stages=("layer4",))


class Undecided(nn.Module):
    """Its forward asks for the content of a tensor, so that its network is an island."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) < 0:
            x = -x
        scores: Tensor = self.head(self.inner(x)[:, :4])
        return scores


def test_islands_are_looked_into() -> None:
    with seeded(0):
        model = lively(Undecided(torchvision.models.mobilenet_v3_small(num_classes=4)))
    given = images(3)
    wanted = gates_by_hooks(model, "SqueezeExcitation", "scale_activation", given)
    connected = dcafy.convert(model, example_inputs=given)
    assert dcafy.inspect(model, example_inputs=given).islands == ("inner",)
    for network in (model, connected):
        assert same_values(attention_values(network, given), wanted)
        cams = grad_cam(network, given)
        assert [stage.name for stage in cams.stages][-1] == "inner.features.12"
        for stage in cams.stages:
            assert torch.equal(stage.maps, by_captum(model, stage.name, given, cams.targets))


def test_grad_cam_needs_a_classifier() -> None:
    model = nn.Sequential(networks.with_attention(networks.SELinear), nn.Unflatten(1, (-1, 1)))
    with pytest.raises(InputError, match=r"\[N, classes\]"):
        grad_cam(model, images(3))


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(UsageError, match=re.escape("pip install 'dcafy[report]'")):
        grad_cam(torchvision.models.mobilenet_v3_small(), images(1))


# -- contributions ---------------------------------------------------------------------------------------


def test_contributions_by_hand() -> None:
    connected = dcafy.convert(torchvision.models.mobilenet_v3_small(), verify=False)
    first = next(iter(dcafy.connections(connected).values()))
    with torch.no_grad():
        first.alpha.fill_(-1.0)
        first.beta.fill_(3.0)
    rows = contributions(connected)
    assert [row.name for row in rows] == list(dcafy.connections(connected))
    assert (rows[0].source, rows[0].target) == ("features.1.block.1", "features.4.block.2")
    assert (rows[0].alpha, rows[0].beta, rows[0].ratio) == (-1.0, 3.0, 0.75)
    assert rows[0].parameters == sum(parameter.numel() for parameter in first.parameters())
    with pytest.raises(InputError, match="no connections"):
        contributions(torchvision.models.mobilenet_v3_small())


@pytest.mark.parametrize("topology", ["chain", "dense"])
def test_contributions_name_source_and_target_in_every_topology(topology: str) -> None:
    for model in (timm.create_model("skresnet18"), dcafy.insert(torchvision.models.resnet18(), "sk", init="paper")):
        connected = dcafy.convert(model, topology=topology, verify=False)
        rows = contributions(connected)
        links = {(link.source, link.target) for link in connected.dca.recipe.plan.links}
        assert {(row.source, row.target) for row in rows} == links
        assert len({row.name for row in rows}) == len(rows) >= len(links)
