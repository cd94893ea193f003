"""Saving and loading: what comes back, what a folder holds, and what is said about one that is no good.

``test_checkpoint_safety.py`` has what strangers and power failures do to a folder.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import pickle
import shutil
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import pytest
import timm
import torch
import torchvision
from family import Plain
from safetensors.torch import load_file
from snapshot import differences, snapshot
from torch import Tensor, nn
from trained import connected, evaluate, images, moved, seeded, trained

import dcafy
from dcafy.checkpoint.architecture import recognised
from dcafy.checkpoint.description import Built
from dcafy.emit.dca import Recipe
from dcafy.errors import CheckpointError, InputError
from dcafy.zoos import specs

IMAGES = images()


@functools.cache
def se_original() -> nn.Module:
    return trained(functools.partial(networks.with_attention, networks.SELinear))


def se_model() -> nn.Module:
    """A trained network with channel attention, the same one at every call."""
    return copy.deepcopy(se_original())


@functools.cache
def _se_connected() -> Any:
    return connected(se_original())


def se_connected(**options: Any) -> Any:
    """The same network, converted."""
    return connected(se_model(), **options) if options else copy.deepcopy(_se_connected())


@functools.cache
def _mobilenet() -> Any:
    return connected(trained(torchvision.models.mobilenet_v3_small))


def mobilenet() -> Any:
    """A network of torchvision's, converted."""
    return copy.deepcopy(_mobilenet())


def untrained() -> nn.Module:
    return networks.with_attention(networks.SELinear)


def assert_same(one: nn.Module, other: nn.Module, images: Tensor = IMAGES, *, unconnected: bool = False) -> None:
    """The same state, flags and outputs, bit for bit, in both modes."""
    state, theirs = one.state_dict(), other.state_dict()
    assert list(state) == list(theirs)
    for key, value in state.items():
        assert value.dtype == theirs[key].dtype, key
        assert torch.equal(value, theirs[key]), key
    assert {path: m.training for path, m in one.named_modules()} == {p: m.training for p, m in other.named_modules()}
    flags = [{name: p.requires_grad for name, p in model.named_parameters()} for model in (one, other)]
    assert flags[0] == flags[1]
    if not unconnected:
        assert list(dcafy.connections(one)) == list(dcafy.connections(other)) != []
    for training in (False, True):
        outputs = []
        for model in (one, other):
            with seeded(32):
                outputs.append(evaluate(copy.deepcopy(model).train(training), images))
        assert torch.equal(*outputs)


def description(folder: Path) -> Any:
    return json.loads((folder / "dcafy.json").read_text())


# What comes back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [True, False], ids=["everything", "connections"])
@pytest.mark.parametrize("attention", [networks.SELinear, networks.CBAM, networks.GlobalContext])
def test_round_trip(attention: Callable[[int], nn.Module], base: bool, tmp_path: Path) -> None:
    model = trained(functools.partial(networks.with_attention, attention))
    before = copy.deepcopy(model)
    dca = connected(model)
    dcafy.save(dca, tmp_path, base=base)
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["README.md", "dcafy.json", "model.safetensors" if base else "connections.safetensors"]
    )
    given = networks.with_attention(attention) if base else before
    facts = snapshot(given)
    loaded = dcafy.load(tmp_path, model=given)
    assert differences(facts, snapshot(given)) == []
    assert isinstance(loaded, torch.fx.GraphModule)
    assert_same(dca, loaded)
    other = torch.randn(3, 3, 48, 48)
    assert torch.equal(evaluate(dca, other), evaluate(loaded, other))
    assert not torch.equal(evaluate(before, IMAGES), evaluate(loaded, IMAGES)), "the connections do nothing"
    ours = {value.data_ptr() for value in given.state_dict().values()}
    assert not ours & {value.data_ptr() for value in loaded.state_dict().values()}, "memory shared with what was given"


def test_the_file_has_the_keys_of_the_state_dict(tmp_path: Path) -> None:
    dca = se_connected()
    dcafy.save(dca, tmp_path / "all")
    dcafy.save(dca, tmp_path / "part", base=False)
    everything, part = (
        load_file(tmp_path / "all/model.safetensors"),
        load_file(tmp_path / "part/connections.safetensors"),
    )
    assert everything.keys() == dca.state_dict().keys()
    assert part.keys() == {key for key in dca.state_dict() if "dca" in key.split(".")}
    assert {key.partition(".dca.")[0] for key in part} == set(dcafy.connections(dca))
    assert 2 * len(part) < len(everything)


def test_description(tmp_path: Path) -> None:
    plan = dcafy.inspect(se_model(), example_inputs=IMAGES).without("blocks.1.attention")
    dcafy.save(se_connected(plan=plan, channel_match="fc1", reduction=4), tmp_path)
    written = description(tmp_path)
    assert written["format_version"] == 3
    assert written["weights"]["keyed_by"] == "module"
    assert written["versions"] == {"dcafy": dcafy.__version__, "torch": torch.__version__}
    assert written["model"] is None
    assert written["options"]["channel_match"] == "fc1"
    assert written["inputs"] == {"tuple": [{"tensor": {"shape": [2, 3, 64, 64], "dtype": "float32"}}]}
    assert len(written["weights"]["base_sha256"]) == 64
    links = dcafy.Plan.from_dict(written["plan"]).links
    assert [(link.source, link.channel_match, link.reduction) for link in links] == [
        ("blocks.0.attention", "fc1", 4),
        ("blocks.2.attention", "fc1", 4),
    ]
    assert_same(se_connected(plan=plan, channel_match="fc1", reduction=4), dcafy.load(tmp_path, untrained()))


@pytest.mark.parametrize(
    "options",
    [
        {"topology": "dense", "schema": "weighted"},  # blocks that hear several others share matching layers
        {"dimension": "channel"},
        {"schema": "softmax"},
    ],
    ids=str,
)
def test_options(options: dict[str, str], tmp_path: Path) -> None:
    model = trained(functools.partial(networks.with_attention, networks.CBAM))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The schema 'softmax' is not the identity")
        dca = connected(model, **options)
    dcafy.save(dca, tmp_path)
    assert_same(dca, dcafy.load(tmp_path, networks.with_attention(networks.CBAM)))


@pytest.fixture(scope="session")
def resnet_with_attention(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved folder; who changes it takes a copy."""
    folder = tmp_path_factory.mktemp("resnet_with_attention")
    dcafy.save(connected(torchvision.models.resnet18().eval(), attention="se"), folder)
    return folder


def test_inserted_attention(tmp_path: Path) -> None:
    dca = connected(torchvision.models.resnet18().eval(), attention="se")
    dcafy.save(dca, tmp_path)
    assert_same(dca, dcafy.load(tmp_path))
    assert_same(dca, dcafy.load(tmp_path, dcafy.insert(torchvision.models.resnet18(), "se")))
    assert_same(dca, dcafy.load(tmp_path, torchvision.models.resnet18()))


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("attention", ["se", "eca", "dia", "mrla"])
def test_attention_inserted_into_a_network_written_by_hand(attention: str, base: bool, tmp_path: Path) -> None:
    model = trained(Plain)
    by_nature = attention == "dia"
    dca = dcafy.insert(model, attention) if by_nature else connected(model, attention=attention)
    with seeded(31), torch.no_grad():
        for name, parameter in dca.named_parameters():
            parameter.add_(torch.rand_like(parameter), alpha=0.1 * (f".{attention}." in name))
    dcafy.save(dca, tmp_path, base=base)
    added = dca.state_dict().keys() - model.state_dict().keys()
    held = load_file(tmp_path / f"{'model' if base else 'connections'}.safetensors").keys()
    assert any("dca" not in key.split(".") for key in added)
    assert base or held <= added
    own, before = (model if not base else Plain()), torch.get_rng_state()
    keys = list(own.state_dict())
    assert_same(dca, dcafy.load(tmp_path, own), unconnected=by_nature)
    assert list(own.state_dict()) == keys
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_inserted_into_a_network_of_another_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    dca = connected(trained(Plain), attention="se").to(dtype)
    dcafy.save(dca, tmp_path)
    for own in (Plain(), Plain().to(dtype)):
        assert_same(dca, dcafy.load(tmp_path, own), IMAGES.to(dtype))


class TwoInputs(nn.Module):
    """Says of no shape what it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Plain()

    def forward(self, image: Tensor, scale: Tensor) -> Tensor:
        return self.net(image * scale[:, None, None, None])


def test_what_hands_a_state_on_in_a_network_of_two_inputs(tmp_path: Path) -> None:
    given = IMAGES, torch.ones(len(IMAGES))
    handing = dcafy.insert(TwoInputs().eval(), "dia", example_inputs=given)
    dcafy.save(handing, tmp_path)
    assert torch.equal(dcafy.load(tmp_path, TwoInputs()).eval()(*given), handing(*given))


def test_attention_inserted_into_another_network_than_is_given(tmp_path: Path) -> None:
    dcafy.save(connected(trained(Plain), attention="se"), tmp_path)
    with pytest.raises(CheckpointError, match="does not fit the network that was given"):
        dcafy.load(tmp_path, nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
    with pytest.raises(CheckpointError, match="do not fit the network that was given"):
        dcafy.load(tmp_path, torchvision.models.resnet18())


def test_a_folder_that_says_of_the_zoos_network_what_was_inserted(resnet_with_attention: Path, tmp_path: Path) -> None:
    """As those of this version did at first."""
    shutil.copytree(resnet_with_attention, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "dcafy.json"
    description = json.loads(file.read_text())
    description["model"]["insertions"] = description.pop("insertions")
    file.write_text(json.dumps(description))
    assert_same(dcafy.load(resnet_with_attention), dcafy.load(tmp_path))


def test_attention_inserted_twice_and_elsewhere(tmp_path: Path) -> None:
    model = dcafy.insert(torchvision.models.resnet18(num_classes=7).eval(), "eca", where="layer1.*")
    model = dcafy.insert(model, "ge-theta", where="layer[34].*", init="paper", example_inputs=IMAGES)
    dca = connected(model)
    dcafy.save(dca, tmp_path)
    assert_same(dca, dcafy.load(tmp_path))


@pytest.mark.parametrize(
    ("entry", "value"), [("attention", "os.system"), ("init", "random"), ("reduction", 0), ("where", 3)]
)
def test_an_insertion_that_is_none(resnet_with_attention: Path, tmp_path: Path, entry: str, value: object) -> None:
    shutil.copytree(resnet_with_attention, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "dcafy.json"
    description = json.loads(file.read_text())
    description["insertions"][0][entry] = value
    file.write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=rf"insertions\[0\]\.{entry}"):
        dcafy.load(tmp_path)


def test_settings_of_one_link(tmp_path: Path) -> None:
    plan = dcafy.inspect(se_model(), example_inputs=IMAGES)
    last = plan.links[-1]
    plan = plan.replace_link(last.source, last.target, channel_match="fc1")
    dca = se_connected(plan=plan)
    dcafy.save(dca, tmp_path)
    assert_same(dca, dcafy.load(tmp_path, untrained()))


def test_what_training_left(tmp_path: Path) -> None:
    """Weights, statistics and counters after some steps, in the mode that it was in."""
    dca = se_connected().train()
    optimizer = torch.optim.SGD(dcafy.parameter_groups(dca, lr=0.05))
    for _ in range(3):
        optimizer.zero_grad()
        dca(IMAGES).square().mean().backward()
        optimizer.step()
    dcafy.save(dca, tmp_path)
    loaded = dcafy.load(tmp_path, untrained().eval())
    assert loaded.training
    assert int(loaded.stem[0][1].num_batches_tracked) == int(se_model().stem[0][1].num_batches_tracked) + 3
    assert_same(dca, loaded)


def test_modes_and_frozen_parameters(tmp_path: Path) -> None:
    dca = se_connected().train()
    dca.blocks[1].eval()
    dca.blocks[1].attention.squeeze.train()
    dca.stem.requires_grad_(False)
    dcafy.save(dca, tmp_path)
    given = untrained().requires_grad_(False)
    loaded = dcafy.load(tmp_path, given)
    assert_same(dca, loaded)
    assert not loaded.stem[0][0].weight.requires_grad
    assert loaded.head.weight.requires_grad
    assert not any(p.requires_grad for p in given.parameters())


@pytest.mark.parametrize("base", [True, False])
def test_frozen_base(base: bool, tmp_path: Path) -> None:
    """An adapter is one again: batch norm of the base stays in eval through ``.train()``, in copies too."""
    dca = dcafy.freeze_base(se_connected())
    dcafy.save(dca, tmp_path, base=base)
    loaded = copy.deepcopy(dcafy.load(tmp_path, se_model())).train()
    assert_same(dca.train(), loaded)
    assert not loaded.stem[0][1].training
    before = {key: value.clone() for key, value in loaded.state_dict().items()}
    loaded(IMAGES).square().mean().backward()
    assert all(torch.equal(value, before[key]) for key, value in loaded.state_dict().items())
    assert {name for name, p in loaded.named_parameters() if p.grad is not None} == {
        name for name in before if "dca" in name.split(".")
    }


def test_saved_again(tmp_path: Path) -> None:
    """What was loaded is saved as the same bytes; reverted and converted anew it is saved as another model."""
    dca = se_connected()
    dcafy.save(dca, tmp_path / "one")
    loaded = dcafy.load(tmp_path / "one", untrained())
    dcafy.save(loaded, tmp_path / "two")
    for name in ("dcafy.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    plain = dcafy.revert(loaded)
    with pytest.raises(InputError, match=r"dcafy\.convert"):
        dcafy.save(plain, tmp_path / "one")
    anew = connected(plain, channel_match="fc1")
    dcafy.save(anew, tmp_path / "one", base=False)
    assert sorted(os.listdir(tmp_path / "one")) == ["README.md", "connections.safetensors", "dcafy.json"]
    assert_same(anew, dcafy.load(tmp_path / "one", plain))
    assert torch.equal(evaluate(anew, IMAGES), evaluate(dcafy.load(tmp_path / "one", se_model()), IMAGES))


def test_random_state_is_left_alone(tmp_path: Path) -> None:
    dca = mobilenet()
    before = torch.get_rng_state()
    dcafy.save(dca, tmp_path)
    dcafy.load(tmp_path)
    assert torch.equal(before, torch.get_rng_state())


# Networks of torchvision and timm -----------------------------------------------------------------


def by_name(model: nn.Module, folder: Path, images: Tensor = IMAGES) -> Any:
    """How the folder says the network is built, after it was built so and gave the same model."""
    dca = connected(model.eval(), images)
    dcafy.save(dca, folder)
    assert_same(dca, dcafy.load(folder), images)
    return description(folder)["model"]


def test_torchvision_by_name(tmp_path: Path) -> None:
    model = trained(torchvision.models.mobilenet_v3_small)
    expected = {"name": "torchvision:mobilenet_v3_small", "arguments": {}}
    assert by_name(model, tmp_path) == expected
    assert description(tmp_path)["versions"]["torchvision"]
    reloaded = dcafy.load(tmp_path)
    assert reloaded.dca.recipe.model == "torchvision:mobilenet_v3_small"


def test_torchvision_with_a_new_head(tmp_path: Path) -> None:
    dca = mobilenet()
    dca.classifier[-1] = nn.Linear(1024, 7)
    dcafy.save(dca, tmp_path)
    expected = {"name": "torchvision:mobilenet_v3_small", "arguments": {"num_classes": 7}}
    assert description(tmp_path)["model"] == expected
    assert_same(dca, dcafy.load(tmp_path))


def test_a_copy_has_the_name_too(tmp_path: Path) -> None:
    """As an exponential moving average is saved."""
    dca = mobilenet()
    for number, twin in enumerate((copy.deepcopy(dca), pickle.loads(pickle.dumps(dca)))):
        dcafy.save(twin, tmp_path / str(number))
        assert_same(dca, dcafy.load(tmp_path / str(number)))


NAMED = {
    "torchvision:efficientnet_b3": {},
    "torchvision:regnet_y_800mf": {"num_classes": 5},
    "torchvision:maxvit_t": {},
    "torchvision:quantized_mobilenet_v3_large": {},
    "torchvision:lraspp_mobilenet_v3_large": {"num_classes": 3},
    "torchvision:deeplabv3_mobilenet_v3_large": {"aux_loss": True},
    "timm:seresnet50.ra2_in1k": {"drop_rate": 0.2, "drop_path_rate": 0.1},
    "timm:seresnet50.a1_in1k": {"output_stride": 16},
    "timm:gcresnet50t.ra2_in1k": {"global_pool": "max"},
    "timm:skresnet18.ra_in1k": {"in_chans": 1, "num_classes": 3},
    "timm:coatnet_0_rw_224.sw_in1k": {"img_size": 256},
}


@pytest.mark.parametrize("name", NAMED)
def test_names_of_networks(name: str) -> None:
    """The very name and arguments, although most of these share their class with dozens of others."""
    model = specs.parse(name, NAMED[name]).build(on_meta=True)
    assert recognised(model, Recipe(dcafy.Plan((), ()), {})) == Built(name, NAMED[name])


def test_a_name_that_was_given() -> None:
    """What the one who built the network knows is used, and checked like any other guess."""
    name = "torchvision:mobilenet_v3_small"
    model = torchvision.models.mobilenet_v3_small(dropout=0.3)
    for given, expected in (({"dropout": 0.3}, Built(name, {"dropout": 0.3})), ({"dropout": 0.4}, None)):
        assert recognised(model, Recipe(dcafy.Plan((), ()), {}, model=name, arguments=given)) == expected


@pytest.mark.parametrize(
    "arguments",
    [{}, {"num_classes": 7, "in_chans": 1, "drop_rate": 0.1, "drop_path_rate": 0.2}],
    ids=["default", "arguments"],
)
def test_timm_by_name(arguments: dict[str, Any], tmp_path: Path) -> None:
    model = timm.create_model("mobilenetv3_small_050", **arguments)
    images = torch.randn(2, arguments.get("in_chans", 3), 64, 64)
    found = by_name(model, tmp_path, images)
    assert found["name"].partition(".")[0] == "timm:mobilenetv3_small_050"
    assert found["arguments"] == arguments


def test_timm_with_a_new_head(tmp_path: Path) -> None:
    dca = connected(timm.create_model("mobilenetv3_small_050").eval())
    dca.classifier = nn.Linear(1024, 3)
    dcafy.save(dca, tmp_path)
    assert description(tmp_path)["model"]["arguments"] == {"num_classes": 3}
    assert_same(dca, dcafy.load(tmp_path))


class Subclass(torchvision.models.MobileNetV3):
    """Modules and tensors of torchvision's, and another computation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(1))


def _dropout(model: nn.Module) -> None:
    model.classifier[2].p = 0.5


def _stride(model: nn.Module) -> None:
    model.features[0][0].stride = (1, 1)


def _activation(model: nn.Module) -> None:
    model.features[0][2] = nn.ReLU()


def _head(model: nn.Module) -> None:
    model.classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(576, 7))


def _class(model: nn.Module) -> None:
    model.__class__ = Subclass


@pytest.mark.parametrize("change", [_dropout, _stride, _activation, _head, _class])
def test_a_changed_network_has_no_name(change: Callable[[nn.Module], None], tmp_path: Path) -> None:
    """Nothing is guessed: such a network has to be passed, and then it comes back."""

    def build() -> nn.Module:
        model = torchvision.models.mobilenet_v3_small()
        change(model)
        return model

    dca = connected(build().eval())
    dcafy.save(dca, tmp_path)
    assert description(tmp_path)["model"] is None
    with pytest.raises(CheckpointError, match=r"does not say how its network is built.*load\(directory, model="):
        dcafy.load(tmp_path)
    assert_same(dca, dcafy.load(tmp_path, build()))


def test_changed_after_it_was_converted(tmp_path: Path) -> None:
    dca = mobilenet()
    dcafy.save(dca, tmp_path)
    loaded = dcafy.load(tmp_path)
    loaded.classifier[2].p = 0.9
    dcafy.save(loaded, tmp_path)
    assert description(tmp_path)["model"] is None


def test_connections_alone_need_the_network(tmp_path: Path) -> None:
    dca = mobilenet()
    dcafy.save(dca, tmp_path, base=False)
    with pytest.raises(CheckpointError, match=r"connections only.*torchvision:mobilenet_v3_small.*with its weights"):
        dcafy.load(tmp_path)
    assert_same(dca, dcafy.load(tmp_path, trained(torchvision.models.mobilenet_v3_small)))


# Islands -------------------------------------------------------------------------------------------


class Undecided(nn.Module):
    """A network whose own forward looks at values, around a body that can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.body = networks.with_attention(networks.SELinear)
        self.other = networks.with_attention(networks.SELinear)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if y.sum() > 1e9:
            y = -y
        return y + self.other(x)


@pytest.mark.parametrize("base", [True, False])
def test_islands(base: bool, tmp_path: Path) -> None:
    model = trained(Undecided)
    dca = connected(model)
    assert {name.partition(".")[0] for name in dcafy.connections(dca)} == {"body", "other"}
    assert type(dca.body) is type(dca.other) is networks.Classifier
    dcafy.save(dca, tmp_path, base=base)
    assert description(tmp_path)["plan"]["islands"] == ["body", "other"]
    loaded = dcafy.load(tmp_path, trained(Undecided) if not base else Undecided())
    assert isinstance(loaded, Undecided)
    assert not isinstance(loaded, torch.fx.GraphModule)
    assert_same(dca, loaded)


@pytest.mark.slow
def test_detector(tmp_path: Path) -> None:
    """torchvision's detectors run on lists of images; their backbone is an island."""
    images = [torch.rand(3, 64, 80), torch.rand(3, 72, 64)]
    build = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    model = build(weights=None, weights_backbone=None, num_classes=4).eval()
    dca = moved(dcafy.convert(model, example_inputs=(images,), verify=False))
    dcafy.save(dca, tmp_path)
    expected = {
        "name": "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn",
        "arguments": {"num_classes": 4},
    }
    assert description(tmp_path)["model"] == expected
    loaded = dcafy.load(tmp_path)
    for ours, theirs in zip(evaluate(dca, images), evaluate(loaded, images), strict=True):
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


# Tensors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("base", [True, False])
def test_dtypes(dtype: torch.dtype, base: bool, tmp_path: Path) -> None:
    """Cast after it was converted: comes back in that dtype, also onto a network in another one."""
    dca = se_connected().to(dtype)
    dcafy.save(dca, tmp_path, base=base)
    loaded = dcafy.load(tmp_path, se_model())
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert_same(dca, loaded, IMAGES.to(dtype))


def test_converted_in_another_dtype(tmp_path: Path) -> None:
    images = IMAGES.to(torch.bfloat16)
    dca = connected(se_model().to(torch.bfloat16), images)
    dcafy.save(dca, tmp_path)
    assert_same(dca, dcafy.load(tmp_path, untrained()), images)


def test_dtypes_that_differ(tmp_path: Path) -> None:
    dca = se_connected()
    dca.head.to(torch.float64)
    dca.stem[0][1].running_mean = dca.stem[0][1].running_mean.half()
    dcafy.save(dca, tmp_path)
    loaded = dcafy.load(tmp_path, untrained())
    assert loaded.head.weight.dtype == torch.float64
    assert {key: value.dtype for key, value in dca.state_dict().items()} == {
        key: value.dtype for key, value in loaded.state_dict().items()
    }


class Buffered(nn.Module):
    """A network with buffers of every kind, one of which is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.body = networks.with_attention(networks.SELinear)
        self.register_buffer("scale", torch.full((1, 3, 1, 1), 1 / 3), persistent=False)
        self.register_buffer("seen", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("phase", torch.tensor([1 + 2j]))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x * self.scale)


def test_buffers(tmp_path: Path) -> None:
    dca = connected(trained(Buffered))
    dca.seen.fill_(9)
    dca.mask.fill_(True)
    dcafy.save(dca, tmp_path / "float")
    assert_same(dca, dcafy.load(tmp_path / "float", Buffered()))
    dcafy.save(dca.to(torch.bfloat16), tmp_path / "bf16")
    loaded = dcafy.load(tmp_path / "bf16", Buffered())
    assert loaded.scale.dtype == torch.bfloat16
    assert_same(dca, loaded, IMAGES.to(torch.bfloat16))


def test_channels_last(tmp_path: Path) -> None:
    """Stored contiguous, for any reader; laid out again as they were, because kernels are chosen by that."""
    dca = se_connected().to(memory_format=torch.channels_last)
    # Of a 1x1 kernel both layouts are contiguous; this one says channels last.
    wide = dca.blocks[2].shortcut[0].weight
    wide.data = torch.empty(wide.shape, memory_format=torch.channels_last).copy_(wide)
    dcafy.save(dca, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert all(value.is_contiguous() for value in stored.values())
    assert torch.equal(stored["stem.0.0.weight"], dca.stem[0][0].weight)
    loaded = dcafy.load(tmp_path, untrained())
    strides = {key: value.stride() for key, value in loaded.state_dict().items()}
    assert strides == {key: value.stride() for key, value in dca.state_dict().items()}
    assert not loaded.stem[0][0].weight.is_contiguous()
    assert_same(dca, loaded)
    last = IMAGES.to(memory_format=torch.channels_last)
    assert torch.equal(evaluate(dca, last), evaluate(loaded, last))
    plain = se_connected()
    dcafy.save(plain, tmp_path)
    assert dcafy.load(tmp_path, untrained().to(memory_format=torch.channels_last)).stem[0][0].weight.is_contiguous()


def test_strange_strides(tmp_path: Path) -> None:
    """Transposed, expanded, and cut out of something larger: the values come back, and no more than those."""
    dca = se_connected()
    head = dca.head.weight
    head.data = head.data.t().contiguous().t()
    dca.head.bias.data = torch.ones(()).expand(10)
    stem = dca.stem[0][1]
    whole = torch.arange(1000.0)
    stem.running_mean, stem.running_var = whole[100:116] / 100, whole[108:124]
    stem.register_buffer("seen", stem.bias.detach().view(4, 4))  # the same memory in another shape
    dcafy.save(dca, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 1.1 * sum(
        v.nbytes for v in dca.state_dict().values()
    ) + 2**14
    given = untrained()
    given.stem[0][1].register_buffer("seen", torch.zeros(4, 4))
    loaded = dcafy.load(tmp_path, given)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in dca.state_dict().items())
    assert loaded.head.bias.stride() == (1,)
    assert torch.equal(evaluate(dca, IMAGES), evaluate(loaded, IMAGES))


class Tied(nn.Module):
    """Two classifiers, made to share their weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.body = networks.with_attention(networks.SELinear)
        self.first, self.second = nn.Linear(10, 10), nn.Linear(10, 10)
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(self.body(x))))


@pytest.mark.parametrize("before", [True, False], ids=["onto tied", "onto untied"])
def test_tied_tensors(before: bool, tmp_path: Path) -> None:
    dca = connected(trained(functools.partial(Tied, True)))
    assert dca.first.weight is dca.second.weight
    dcafy.save(dca, tmp_path)
    assert description(tmp_path)["weights"]["tied"] == {"second.weight": "first.weight"}
    assert "second.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = dcafy.load(tmp_path, Tied(before))
    assert loaded.first.weight is loaded.second.weight
    assert isinstance(loaded.second.weight, nn.Parameter)
    assert_same(dca, loaded)
    loaded = loaded.to(torch.float64)
    assert loaded.first.weight is loaded.second.weight


def test_untied_tensors(tmp_path: Path) -> None:
    """What two names hold apart is not put into one tensor."""
    dca = connected(trained(functools.partial(Tied, False)))
    dcafy.save(dca, tmp_path)
    assert description(tmp_path)["weights"]["tied"] == {}
    given = Tied(True)
    loaded = dcafy.load(tmp_path, given)
    assert loaded.first.weight is not loaded.second.weight
    assert_same(dca, loaded)
    assert given.first.weight is given.second.weight


def test_shared_modules(tmp_path: Path) -> None:
    """One module called three times, with a tensor under each of its names."""
    model = trained(networks.SharedAttention)
    model.add_module("alias", model.se)
    dca = connected(model)
    dcafy.save(dca, tmp_path)
    given = networks.SharedAttention()
    given.add_module("alias", given.se)
    loaded = dcafy.load(tmp_path, given)
    assert loaded.alias is loaded.se
    assert_same(dca, loaded)
    apart = networks.SharedAttention()
    apart.add_module("alias", copy.deepcopy(apart.se))
    assert torch.equal(evaluate(dca, IMAGES), evaluate(dcafy.load(tmp_path, apart), IMAGES))


def test_two_tensors_for_one_module(tmp_path: Path) -> None:
    model = trained(networks.SharedAttention)
    model.add_module("alias", copy.deepcopy(model.se))
    with torch.no_grad():
        next(model.alias.parameters()).add_(1)
    dcafy.save(connected(model), tmp_path)
    given = networks.SharedAttention()
    given.add_module("alias", given.se)
    with pytest.raises(CheckpointError, match="one tensor in the network and two in the folder"):
        dcafy.load(tmp_path, given)


class Counting(nn.Module):
    """Extra state that is a tensor."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.body = networks.with_attention(networks.SELinear)
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_extra_state(tmp_path: Path) -> None:
    class Outer(nn.Sequential):
        pass

    dca = connected(trained(lambda: Outer(Counting(torch.tensor([1.0, 2.0])))))
    dcafy.save(dca, tmp_path)
    loaded = dcafy.load(tmp_path, Outer(Counting(torch.zeros(2))))
    assert loaded.get_submodule("0").state.tolist() == [1.0, 2.0]


def test_a_network_on_meta_gets_its_data(tmp_path: Path) -> None:
    dca = se_connected()
    dcafy.save(dca, tmp_path)
    with torch.device("meta"):
        empty = untrained().eval()
    assert_same(dca, dcafy.load(tmp_path, empty))
    assert all(p.is_meta for p in empty.parameters())
    dcafy.save(connected(trained(Buffered)), tmp_path)
    with torch.device("meta"):
        empty = Buffered()
    with pytest.raises(CheckpointError, match=r"scale is not in the folder.*no data"):
        dcafy.load(tmp_path, empty)


# A network that does not fit -----------------------------------------------------------------------


class SigmoidForHard(networks.SELinear):
    """The same tensors, another gate."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.excite[3] = nn.Hardsigmoid()


def fails(folder: Path, model: nn.Module) -> str:
    """What is said about a network that does not fit; it is as it was."""
    before = snapshot(model)
    with pytest.raises(CheckpointError) as raised:
        dcafy.load(folder, model)
    assert differences(before, snapshot(model)) == []
    assert str(folder) in str(raised.value)
    return str(raised.value)


def test_another_network(tmp_path: Path) -> None:
    dcafy.save(se_connected(), tmp_path)
    other = untrained()
    other.head = nn.Linear(32, 3)
    other.stem[0][0].bias = nn.Parameter(torch.zeros(16))
    other.blocks[3].conv2[1] = nn.Identity()
    said = fails(tmp_path, other)
    assert "head.weight (10x32 instead of 3x32)" in said
    assert "1 missing: stem.0.0.bias" in said
    assert "5 not expected: " in said
    assert "blocks.3.conv2.1.running_mean" in said


@pytest.mark.parametrize("base", [True, False])
def test_the_same_tensors_in_another_network(base: bool, tmp_path: Path) -> None:
    dcafy.save(se_connected(), tmp_path, base=base)
    other = networks.with_attention(SigmoidForHard)
    other.load_state_dict(se_model().state_dict())
    said = fails(tmp_path, other)
    assert "blocks.0.attention" in said
    assert "'sigmoid'" in said
    assert "'hard_sigmoid'" in said


def test_a_network_without_these_blocks(tmp_path: Path) -> None:
    class Idle(networks.SELinear):
        def forward(self, x: Tensor) -> Tensor:
            return x

    dcafy.save(se_connected(), tmp_path)
    assert "no attention block of this model" in fails(tmp_path, networks.with_attention(Idle))


def test_other_base_weights(tmp_path: Path) -> None:
    dcafy.save(se_connected(), tmp_path, base=False)
    other = se_model()
    with torch.no_grad():
        other.head.bias[3] += 1e-6
    said = fails(tmp_path, other)
    assert "other base weights" in said
    assert "1 of" in said
    assert "head.bias" in said
    assert "base=True" in said
    assert "and" in fails(tmp_path, untrained())


def test_a_connected_network_is_refused(tmp_path: Path) -> None:
    dca = se_connected()
    dcafy.save(dca, tmp_path)
    with pytest.raises(InputError, match="revert"):
        dcafy.load(tmp_path, dca)
    with pytest.raises(InputError):
        dcafy.load(tmp_path, "torchvision:resnet18")  # type: ignore[arg-type]


# What cannot be saved ------------------------------------------------------------------------------


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def _meta() -> nn.Module:
    return se_connected().to("meta")


def _extra_state() -> nn.Module:
    return connected(trained(lambda: nn.Sequential(Counting({"a": 1}))))


def _sparse() -> nn.Module:
    dca = se_connected()
    dca.register_buffer("table", torch.eye(3).to_sparse())
    return dca


def _complex() -> nn.Module:
    dca = se_connected()
    dca.register_buffer("table", torch.zeros(3, dtype=torch.complex128))
    return dca


@pytest.mark.parametrize(
    ("make", "said"),
    [
        pytest.param(se_model, "no connections", id="unconverted"),
        pytest.param(lambda: Wrapper(se_connected()), "inside it at 'inner'", id="wrapped"),
        pytest.param(lambda: Wrapper(connected(trained(Undecided))), r"inside it at 'inner'\.", id="wrapped islands"),
        pytest.param(lambda: nn.DataParallel(se_connected()), "model.module", id="data parallel"),
        pytest.param(_meta, "meta device", id="meta"),
        pytest.param(_extra_state, "0._extra_state .* type dict", id="extra state"),
        pytest.param(_sparse, "table is a sparse_coo tensor", id="sparse"),
        pytest.param(_complex, "table has the dtype complex128", id="dtype"),
        pytest.param(lambda: "model", "torch.nn.Module is needed", id="no model"),
    ],
)
def test_what_cannot_be_saved(make: Callable[[], Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        dcafy.save(make(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_files_are_readable_as_the_user_wants(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        dcafy.save(se_connected(), tmp_path / "new")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()}
    assert modes == {0o644}
