"""``dcafy export``: what the file computes is what the network computes, on real pictures, or there is no file."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from detection_data import retinanet, with_statistics
from PIL import Image
from torch import Tensor, nn
from trained import evaluate, seeded, trained_like

import dcafy
from dcafy.errors import CheckpointError, InputError, UsageError, VerificationError
from dcafy.export import ExportOptions, detectors, export, writing
from dcafy.images.about import About, put_about

Run = Callable[..., tuple[int, str, str]]


def moved(model: nn.Module, size: int = 64) -> nn.Module:
    """Connected, with statistics of pictures like those below, and α and β away from the start.

    On others, values grow until float32 itself is off by more than an exported file may be.
    """
    torch.manual_seed(0)
    channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
    like = nn.functional.interpolate(4 * torch.rand(8, channels, 7, 9) - 2, size=(size, size), mode="bicubic")
    model = dcafy.convert(trained_like(model, like), verify=False).eval()
    with torch.no_grad():
        for connection in dcafy.connections(model).values():
            connection.beta.fill_(0.3)
    return model


@pytest.fixture
def model() -> nn.Module:
    found = moved(timm.create_model("test_efficientnet", num_classes=3))
    put_about(found, About(classes=("a", "b", "ü c")))
    return found


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(3):
        low = rng.integers(0, 255, (7, 9, 3), dtype=np.uint8)
        Image.fromarray(low).resize((220, 180), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def run_onnx(path: Path, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = json.loads(session.get_modelmeta().custom_metadata_map["dcafy"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), found


def run_program(path: Path, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
    extra = {"dcafy": ""}
    with path.open("rb") as file:
        program = torch.export.load(file, extra_files=extra)
    return program.module()(images), json.loads(extra["dcafy"])


RUN = {".onnx": run_onnx, ".pt2": run_program}


@pytest.mark.slow
@pytest.mark.parametrize("suffix", RUN)
def test_the_file_computes_what_the_network_does(suffix: str, model: nn.Module, pictures: Path, tmp_path: Path) -> None:
    """At other numbers of pictures and other sizes, too; preprocessing and classes are in it."""
    made = export(model, ExportOptions(output=tmp_path / f"m{suffix}", images=pictures, image_size=96), spec="runs/a")
    assert (made.open_batch, made.open_size, made.images) == (True, True, 3)
    assert made.difference <= 1e-5
    found = dcafy.about(model)
    assert found.preparation is not None
    how = found.preparation.resized(96)
    put_about(model, dataclasses.replace(found, preparation=how))
    ready = dcafy.transforms(model)
    images = torch.stack([ready(pictures / f"{number}.png") for number in (0, 1, 2, 0, 1)])
    for given in (images, images[:1], nn.functional.interpolate(images[:2], size=(128, 96))):
        outputs, said = RUN[suffix](made.file, given)
        with torch.no_grad():
            expected = model(given)
        assert (outputs - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert not torch.allclose(outputs, dcafy.revert(model).eval()(given), atol=1e-4), "connections count"
    assert said["classes"] == ["a", "b", "ü c"]
    assert (tuple(said["preparation"]["size"]), tuple(said["preparation"]["mean"])) == (how.size, how.mean)
    assert said["model"] == "a"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"m{suffix}"]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "cbam": lambda: dcafy.insert(timm.create_model("test_resnet"), "cbam", init="paper"),
    "eca": lambda: dcafy.insert(timm.create_model("test_resnet"), "eca", init="paper"),
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
    "grey": lambda: timm.create_model("mobilenetv3_small_050", in_chans=1),
    "seresnet": lambda: timm.create_model("legacy_seresnet18"),
}


@pytest.mark.zoo
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("suffix", RUN)
def test_other_networks(suffix: str, network: str, pictures: Path, tmp_path: Path) -> None:
    model = moved(NETWORKS[network]())
    made = export(model, ExportOptions(output=tmp_path / f"m{suffix}", images=pictures, image_size=96))
    assert made.open_batch
    assert made.difference <= 1e-5


def sure(model: nn.Module, head: str, *, beta: float = 0.5, scale: float = 1.0, statistics: bool = True) -> nn.Module:
    """The detector with scores that differ, as trained ones do, and connections that count."""
    connected = dcafy.convert(with_statistics(model) if statistics else model, verify=False).eval()
    return _with_scores(connected, head, scale, beta)


def _with_scores(connected: nn.Module, head: str, scale: float, beta: float = 0.0) -> nn.Module:
    with seeded(3), torch.no_grad():
        for name, parameter in connected.named_parameters():
            if head in name and name.endswith("weight"):
                parameter.copy_(scale * torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
        for connection in dcafy.connections(connected).values() if beta else ():
            connection.beta.fill_(beta)
    return connected


def run_detector(path: Path, picture: Tensor) -> dict[str, Tensor]:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = session.run(None, {"image": picture.numpy()})
    return dict(zip(names, map(torch.from_numpy, found), strict=True))


def test_a_detector_as_onnx(pictures: Path, tmp_path: Path) -> None:
    """Box by box, at other sizes too; with its connections, which count."""
    pytest.importorskip("onnxruntime")
    model = sure(retinanet(), "classification_head", beta=5.0)
    made = export(model, ExportOptions(output=tmp_path / "m.onnx", images=pictures))
    assert (made.open_size, made.open_batch, made.images) == (True, False, 3)
    assert made.difference <= 1e-5
    picture = dcafy.transforms(model)(pictures / "0.png")
    for given in (picture, nn.functional.interpolate(picture[None], size=(150, 230))[0]):
        found, (expected,) = run_detector(made.file, given), evaluate(model, [given])
        assert list(found) == ["boxes", "scores", "labels"]
        assert torch.equal(found["labels"], expected["labels"])
        for name in ("boxes", "scores"):
            assert (found[name] - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name
    (original,) = evaluate(dcafy.revert(model).eval(), [picture])
    assert detectors.apart(run_detector(made.file, picture), original) > 1e-3


def test_a_file_that_finds_otherwise_is_not_written(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    real = detectors.runs

    def off(given: Any) -> Callable[[Tensor], dict[str, Tensor]]:
        run = real(given)
        return lambda picture: {**(found := run(picture)), "boxes": found["boxes"] + 0.1}

    monkeypatch.setattr(detectors, "runs", off)
    with pytest.raises(VerificationError, match="was not written: it computes something else"):
        export(sure(retinanet(), "classification_head"), ExportOptions(output=tmp_path / "m.onnx", images=pictures))
    assert not list(tmp_path.iterdir())


def test_detectors_that_are_not_exported(pictures: Path, tmp_path: Path) -> None:
    untrained = dcafy.convert(with_statistics(retinanet()), verify=False).eval()
    nothing = sure(retinanet(), "classification_head")
    nothing.score_thresh = 1.0
    cases: list[tuple[nn.Module, str, dict[str, Any], str]] = [
        (untrained, "m.pt2", {}, "torch.export takes none.*Write -o NAME.onnx"),
        (untrained, "m.onnx", {}, "gives all boxes the same score, as untrained detectors do"),
        (nothing, "m.onnx", {}, "finds nothing in the pictures"),
        (untrained, "m.onnx", {"image_size": 64}, "--image-size is for classifiers"),
    ]
    for model, name, options, said in cases:
        with pytest.raises((InputError, UsageError), match=said):
            export(model, ExportOptions(output=tmp_path / name, images=pictures, **options))
    assert not list(tmp_path.iterdir())


DETECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "ssdlite320_mobilenet_v3_large": ("classification_head", {}),
    "fasterrcnn_mobilenet_v3_large_320_fpn": ("cls_score", {"min_size": 64, "max_size": 96}),
}
"""torchvision's detectors of two kinds -> what is called the part that tells classes, and how they are built."""


@pytest.mark.zoo
@pytest.mark.parametrize("name", DETECTORS)
def test_torchvisions_detectors(name: str, pictures: Path, tmp_path: Path) -> None:
    head, settings = DETECTORS[name]
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=4, **settings).eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    evaluate(model, [dcafy.transforms(model)(pictures / f"{number}.png") for number in range(3)])
    model = sure(model.eval(), head, statistics=False, scale=0.25)
    made = export(model, ExportOptions(output=tmp_path / "m.onnx", images=pictures))
    assert made.difference <= 1e-5


@pytest.mark.zoo
def test_a_detector_without_attention(pictures: Path, tmp_path: Path) -> None:
    """SSD: one scale after another is told apart, and its sizes stay open."""
    with seeded(0):
        model = torchvision.models.get_model("ssd300_vgg16", weights=None, weights_backbone=None, num_classes=4)
    model = _with_scores(model.eval(), "classification_head", 0.1)
    made = export(model, ExportOptions(output=tmp_path / "m.onnx", images=pictures))
    assert (made.open_size, made.difference <= 1e-5) == (True, True)


def test_what_computes_otherwise_is_not_written(
    model: nn.Module, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.pt2"
    file.write_bytes(b"before")
    kind = writing.KINDS[".pt2"]

    def off(path: Path) -> Callable[[Tensor], Tensor]:
        run = kind.reads(path)
        return lambda images: run(images) * (1 + 1e-4)

    monkeypatch.setitem(writing.KINDS, ".pt2", writing.Kind(kind.write, off))
    with pytest.raises(VerificationError, match="was not written: it computes something else"):
        export(model, ExportOptions(output=file, images=pictures, overwrite=True, fixed=True, image_size=64))
    assert file.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"]


def test_a_full_disk_leaves_what_was_there(
    model: nn.Module, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.pt2"
    file.write_bytes(b"before")

    def full(program: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(writing.KINDS, ".pt2", writing.Kind(full, writing.KINDS[".pt2"].reads))
    with pytest.raises(CheckpointError, match=r"No space left on device.*Make room, or name another file"):
        export(model, ExportOptions(output=file, images=pictures, overwrite=True, fixed=True, image_size=64))
    assert file.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"]


def test_what_cannot_be_exported(model: nn.Module, pictures: Path, tmp_path: Path) -> None:
    there = tmp_path / "m.onnx"
    there.write_bytes(b"before")
    cases: list[tuple[ExportOptions, type[Exception], str]] = [
        (ExportOptions(), UsageError, "-o names no file"),
        (ExportOptions(output=tmp_path / "m.h5"), UsageError, "says no kind of file"),
        (ExportOptions(output=there), UsageError, "is there already"),
        (ExportOptions(output=tmp_path / "n.pt2", images=tmp_path / "none"), UsageError, "There is no file or folder"),
        (ExportOptions(output=tmp_path / "n.pt2", images=pictures / "broken.png"), UsageError, "can be read"),
    ]
    for options, error, said in cases:
        with pytest.raises(error, match=said):
            export(model, options)
    segmenter = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)
    with pytest.raises(InputError, match="neither scores of classes nor boxes"):
        export(segmenter, ExportOptions(output=tmp_path / "n.pt2"))
    assert there.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_the_command_says_what_is_open(dcafy_command: Run, tmp_path: Path, pictures: Path) -> None:
    network = ("timm:test_efficientnet", "--set", "num_classes=3")
    code, out, err = dcafy_command(
        "export", *network, "-o", tmp_path / "m.pt2", "--images", pictures, "--fixed", "--image-size", 64
    )
    assert code == 0, err
    assert "any batch; fixed size; within" in out
    assert "weights: random" in err
