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
from PIL import Image
from torch import Tensor, nn
from trained import trained_like

import dcafy
from dcafy.errors import CheckpointError, InputError, UsageError, VerificationError
from dcafy.export import ExportOptions, export, writing
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


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("suffix", RUN)
def test_other_networks(suffix: str, network: str, pictures: Path, tmp_path: Path) -> None:
    model = moved(NETWORKS[network]())
    made = export(model, ExportOptions(output=tmp_path / f"m{suffix}", images=pictures, image_size=96))
    assert made.open_batch
    assert made.difference <= 1e-5


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
    detector = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    with pytest.raises(InputError, match="is no classifier"):
        export(detector, ExportOptions(output=tmp_path / "n.pt2"))
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
