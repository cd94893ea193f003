"""What a folder knows of a network besides itself: it comes back, survives, and is data whoever wrote it."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

import dcafy
from dcafy.checkpoint.saving import store
from dcafy.errors import CheckpointError, UsageError
from dcafy.images.about import About, Trained, put_about
from dcafy.images.preparation import Preparation, Prepared, preparation
from dcafy.sources import open_model
from dcafy.zoos.specs import has_random_weights

HOW = Preparation((32, 48), (36, 50), (0.5, 0.4, 0.3), (0.2, 0.25, 0.5), "bicubic", "squash")
KNOWN = About("classification", ("a", "b", "\x1b[2Jc"), HOW, Trained("digits", 3, {"loss": 0.5, "top1": 0.75}, 0.4))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    found = dcafy.convert(timm.create_model("test_efficientnet", num_classes=3), verify=False).eval()
    put_about(found, KNOWN)
    return found


@pytest.fixture
def folder(model: nn.Module, tmp_path: Path) -> Path:
    dcafy.save(model, tmp_path / "model")
    return tmp_path / "model"


def test_it_comes_back_and_survives(model: nn.Module, folder: Path) -> None:
    loaded = dcafy.load(folder)
    for found in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded)), dcafy.revert(loaded)):
        assert dcafy.about(found) == KNOWN
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8))
    assert torch.equal(dcafy.transforms(loaded)(picture), dcafy.transforms(model)(picture))
    assert dcafy.transforms(loaded)(picture).shape == (3, 32, 48)


def test_a_network_without_connections_is_a_folder_too(tmp_path: Path) -> None:
    original = dcafy.insert(timm.create_model("test_resnet", num_classes=3), "eca").eval()
    put_about(original, KNOWN)
    store(original, tmp_path / "model")
    loaded = dcafy.load(tmp_path / "model")
    images = torch.rand(2, 3, 48, 48)
    assert torch.equal(loaded(images), original(images))
    assert dcafy.about(loaded) == KNOWN
    assert len(dcafy.inspect(loaded).blocks) == len(dcafy.inspect(original).blocks) > 0


def test_folders_from_before_are_read(folder: Path) -> None:
    marker = folder / "dcafy.json"
    data = json.loads(marker.read_text())
    assert data["format_version"] == 3
    del data["about"]
    marker.write_text(json.dumps({**data, "format_version": 2}))
    found = dcafy.about(dcafy.load(folder))
    assert (found.classes, found.trained) == ((), None)
    assert found.preparation is not None
    assert found.preparation.size == (160, 160), "timm's own"


DAMAGES: dict[str, tuple[tuple[Any, ...], str]] = {
    "an unknown entry": (("about", "hook", "os.system"), "does not know: about.hook"),
    "a task": (("about", "task", "os.system"), "about.task should be one of"),
    "classes": (("about", "classes", [1]), r"about.classes\[0\] should be text"),
    "no size": (("about", "preparation", "size", [0, 32]), "about.preparation.size"),
    "a huge size": (("about", "preparation", "size", [10**9, 32]), "about.preparation.size"),
    "one side": (("about", "preparation", "size", 32), "a height and a width"),
    "resize": (("about", "preparation", "resize", [1, 2, 3]), "about.preparation.resize"),
    "no channels": (("about", "preparation", "mean", []), "a number for each channel"),
    "words": (("about", "preparation", "mean", ["x"] * 3), "a number for each channel"),
    "no deviation": (("about", "preparation", "std", [0, 1, 1]), "a deviation above 0"),
    "other channels": (("about", "preparation", "std", [1, 1, 1, 1]), "a number for each of 3 channels"),
    "a size beyond memory": (("about", "preparation", "size", [4096, 4096]), "about.preparation.size"),
    "interpolation": (("about", "preparation", "interpolation", "x"), "about.preparation.interpolation"),
    "crop": (("about", "preparation", "crop", "x"), "about.preparation.crop"),
    "metrics": (("about", "trained", "metrics", {"loss": "x"}), "about.trained.metrics.loss"),
    "fraction": (("about", "trained", "val_fraction", 2), "about.trained.val_fraction"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged(damage: str, folder: Path) -> None:
    (*keys, last, value), said = DAMAGES[damage]
    marker = folder / "dcafy.json"
    data = json.loads(marker.read_text())
    place = data
    for key in keys:
        place = place[key]
    place[last] = value
    marker.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=said):
        dcafy.load(folder)


def test_names_do_not_steer_the_terminal(folder: Path, dcafy_command: Callable[..., tuple[int, str, str]]) -> None:
    Image.new("RGB", (40, 40)).save(folder.parent / "a.png")
    for command in (("inspect", folder), ("predict", folder, folder.parent / "a.png", "--cpu")):
        code, out, err = dcafy_command(*command)
        assert code == 0, err
        assert "\x1b" not in out + err
        assert "\\x1b[2Jc" in out


BUILT: dict[str, tuple[str, dict[str, Any]]] = {
    "nested": ("timm:test_resnet", {"block_args": {"attn_layer": "se"}, "num_classes": 3}),
    "a fraction": ("torchvision:mobilenet_v3_small", {"width_mult": 0.25, "num_classes": 3}),
    "a list": ("torchvision:resnet18", {"replace_stride_with_dilation": [False, False, False]}),
    "nothing": ("timm:test_efficientnet", {"drop_rate": 0.3}),
}


@pytest.mark.parametrize("case", BUILT)
def test_what_was_set_is_built_again(case: str, tmp_path: Path) -> None:
    name, settings = BUILT[case]
    network = open_model(name, settings=settings).model.eval()
    store(network, tmp_path / "model")
    loaded = dcafy.load(tmp_path / "model")
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(loaded(images), network(images))
    stored = json.loads((tmp_path / "model" / "dcafy.json").read_text())["model"]
    assert (stored["name"], stored["arguments"]) == (name, settings)


def test_what_a_detector_was_built_with_is_found_out(tmp_path: Path) -> None:
    """In Python nobody notes the arguments; the network has kept them."""
    build = torchvision.models.detection.ssdlite320_mobilenet_v3_large
    network = build(weights=None, weights_backbone=None, num_classes=4, score_thresh=0.2, detections_per_img=7).eval()
    store(network, tmp_path / "model")
    loaded = dcafy.load(tmp_path / "model")
    assert (loaded.score_thresh, loaded.detections_per_img) == (0.2, 7)
    assert dcafy.about(loaded).task == "detection"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v3_large_320_fpn", "keypointrcnn_resnet50_fpn"])
def test_a_network_that_ran_is_the_one_that_was_built(name: str, tmp_path: Path) -> None:
    """Detectors find the scales of their maps in the first forward, and keep them."""
    network = open_model(f"torchvision:{name}", settings={"min_size": 32, "max_size": 48}).model.eval()
    network([torch.rand(3, 32, 40)])
    store(network, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "dcafy.json").read_text())["model"]["name"] == f"torchvision:{name}"


STRANGE: list[dict[str, Any]] = [
    {"pretrained_strict": False},
    {"checkpoint": "x"},
    {"model_name": "x"},
    {"norm_layer": "os.system"},
    {"act_layer": "../x"},
    {"block_args": {"pretrained": True}},
    {"block_args": {"a": {"b": {"c": {"d": {"e": 1}}}}}},
    {"__class__": 1},
    {"x": [0] * 1000},
]


@pytest.mark.parametrize("arguments", STRANGE, ids=lambda given: str(given)[:40])
def test_arguments_of_strangers(arguments: dict[str, Any], folder: Path) -> None:
    marker = folder / "dcafy.json"
    data = json.loads(marker.read_text())
    data["model"]["arguments"] = arguments
    marker.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="is not given to a builder"):
        dcafy.load(folder)


def test_what_is_nearly_right_is_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchvison.py").write_text("raise SystemExit('it ran')")
    monkeypatch.chdir(tmp_path)
    for spec in ("torchvison:resnet18", "torchvisoin:resnet18"):
        with pytest.raises(UsageError, match="Did you mean 'torchvision', as in torchvision:resnet18"):
            open_model(spec)
    for spec, wrong in (("torchvision:mobilenet_v3_small", "num_clases"), ("timm:test_resnet", "num_clases")):
        with pytest.raises(UsageError, match=r"takes no argument 'num_clases'\. Did you mean 'num_classes'"):
            open_model(spec, settings={wrong: 3})
    for spec in ("timm/test_resnet.r160_in1k", "hf-hub:timm/test_resnet.r160_in1k", "hf_hub:timm/test_resnet"):
        assert str(open_model(spec, on_meta=True).architecture).startswith("timm:test_resnet")


def test_random_weights_are_known(folder: Path) -> None:
    assert has_random_weights(open_model("timm:test_resnet").model)
    assert has_random_weights(dcafy.convert(open_model("timm:test_efficientnet").model, verify=False))
    assert not has_random_weights(dcafy.load(folder))
    assert not has_random_weights(open_model(str(folder)).model)


def wide_and_high() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in ((213, 340), (400, 131))]


def of_timm(cfg: dict[str, Any]) -> nn.Module:
    """What stands for a network of that configuration: preprocessing is known from it alone."""
    network = nn.Conv2d(cfg["input_size"][0], 1, 1)
    network.pretrained_cfg = cfg
    return network


def of_torchvision(spec: str, picture: Image.Image) -> torch.Tensor:
    return Prepared(preparation(nn.Conv2d(3, 1, 1), spec))(picture, 0)[0]


LIBRARY = ["test_efficientnet", "test_vit", "ecaresnet26t", "mobilenetv3_small_050", "vit_small_patch16_224",
           "efficientnet_b3", "tf_efficientnetv2_b0", "seresnext26d_32x4d", "eca_nfnet_l0"]  # fmt: skip


def test_preprocessing_is_the_librarys_own() -> None:
    """To the bit: timm's and torchvision's, on pictures wide and high, small and large."""
    own = {name: timm.get_pretrained_cfg(name).to_dict() for name in LIBRARY}
    for crop in ("border", "squash", "center"):
        own[crop] = {"input_size": (3, 48, 80), "crop_pct": 0.9, "crop_mode": crop, "interpolation": "bicubic",
                     "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}  # fmt: skip
    for name, cfg in own.items():
        theirs = create_transform(**resolve_model_data_config(of_timm(cfg)))
        for picture in wide_and_high():
            assert torch.equal(dcafy.transforms(of_timm(cfg))(picture), theirs(picture)), name
    for choice in torchvision.models.get_model_weights("efficientnet_b1"):
        for picture in wide_and_high():
            ours = of_torchvision(f"torchvision:efficientnet_b1@{choice.name}", picture)
            assert torch.equal(ours, choice.transforms()(picture)), choice


@pytest.mark.slow
def test_preprocessing_of_every_tag_of_timm() -> None:
    """All of them, and so those with SE, ECA and CBAM; equal configurations are looked at once."""
    tags = timm.list_pretrained()
    configured = {name: resolve_model_data_config(of_timm(timm.get_pretrained_cfg(name).to_dict())) for name in tags}
    once = {repr(sorted(cfg.items())): name for name, cfg in configured.items()}
    crops = {configured[name]["crop_mode"] for name in once.values()}
    assert (len(tags) > 1000, len(once) > 100, crops) == (True, True, {"center", "squash", "border"})
    for name in once.values():
        network, theirs = of_timm(timm.get_pretrained_cfg(name).to_dict()), create_transform(**configured[name])
        for picture in wide_and_high():
            assert torch.equal(dcafy.transforms(network)(picture), theirs(picture)), name


@pytest.mark.slow
def test_preprocessing_of_every_weight_of_torchvision() -> None:
    """All classifiers of images, and so those with attention; equal presets are looked at once."""
    once: dict[str, tuple[str, Any]] = {}
    for name in torchvision.models.list_models(exclude=["quantized_*"]):
        for choice in torchvision.models.get_model_weights(name):
            preset = choice.transforms()
            if type(preset).__name__ == "ImageClassification":
                once[repr(preset)] = (f"torchvision:{name}@{choice.name}", preset)
    assert len(once) > 15
    for spec, preset in once.values():
        for picture in wide_and_high():
            assert torch.equal(of_torchvision(spec, picture), preset(picture)), spec


def test_timms_own_names_are_names(dcafy_command: Callable[..., tuple[int, str, str]]) -> None:
    """Of the network and its weights' preprocessing; of others' repositories it is said how they are named."""
    plain = open_model("timm:eca_nfnet_l0.ra2_in1k", on_meta=True)
    for spec in (
        "timm/eca_nfnet_l0.ra2_in1k",
        "hf-hub:timm/eca_nfnet_l0.ra2_in1k",
        "hf_hub:timm/eca_nfnet_l0.ra2_in1k",
    ):
        named = open_model(spec, on_meta=True)
        assert (named.architecture, named.settings) == (plain.architecture, plain.settings)
        assert dcafy.about(named.model) == dcafy.about(plain.model)
    code, out, err = dcafy_command("inspect", "hf-hub:timm/test_efficientnet.r160_in1k", "--json")
    assert (code, len(json.loads(out)["chains"])) == (0, 1), err
    code, _, err = dcafy_command("inspect", "hf-hub:timm/test_resnett")
    assert (code, "Did you mean" in err) == (2, True), err
