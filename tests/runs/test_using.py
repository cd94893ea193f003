"""``dcafy predict`` and ``dcafy evaluate``: the very numbers of training's validation, and bad input told."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F

import dcafy
from dcafy.detection import open_coco, write_shapes
from dcafy.detection.task import AveragePrecision
from dcafy.errors import InputError, UsageError
from dcafy.images.about import About, put_about
from dcafy.images.options import DataOptions
from dcafy.runs.evaluating import evaluation, paired
from dcafy.runs.options import EvaluateOptions, PredictOptions
from dcafy.runs.predicting import Prediction, Unreadable, as_csv, files_in, predictions
from dcafy.training import TrainingConfig
from dcafy.training.tasks import Classification

Run = Callable[..., tuple[int, str, str]]

NAMES = ["bright", "dark", "striped"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes in ``train`` and ``val``, of other proportions each; one of ``val`` is broken."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 3)):
        for kind, name in enumerate(NAMES):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                values = rng.integers(0, 60, (60 + 9 * number, 80, 3)) + 90 * kind
                values[:: 4 if kind == 2 else 99] = 255
                file = root / part / name / f"{number}.png"
                Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(file)
    (root / "val" / "dark" / "1.png").write_bytes(b"\x89PNG\r\n")
    return root


NETWORKS: dict[str, tuple[object, ...]] = {
    "timm:test_efficientnet": (),
    "timm:test_resnet": ("--attention", "se", "--set", 'pretrained_cfg_overlay={"crop_mode": "squash"}'),
    "timm:mobilenetv3_small_050": ("--set", "in_chans=1", "--image-size", 64),
    "torchvision:mobilenet_v3_small": ("--image-size", 64),
    "timm:test_byobnet": (
        "--attention",
        "eca",
        "--set",
        'pretrained_cfg_overlay={"crop_mode": "border", "crop_pct": 0.9, "mean": [0.1, 0.2, 0.3]}',
    ),
    "timm:ecaresnet26t": ("--image-size", 64),
    "timm:tf_efficientnet_lite0": ("--attention", "cbam", "--image-size", 64),
    "torchvision:efficientnet_b0": ("--image-size", 64),
    "timm:legacy_seresnet18": ("--image-size", 72),
    "torchvision:mobilenet_v2": ("--set", "width_mult=0.25", "--attention", "gc", "--image-size", 64),
}
"""Network -> options: timm's with crops of 0.875 to 1, squashed ones, means of their own; torchvision's; grey images.

With the detectors below they are twelve.
"""

QUICK = {"timm:test_efficientnet", "timm:mobilenetv3_small_050"}


@pytest.mark.parametrize(
    "network", [pytest.param(name, marks=() if name in QUICK else pytest.mark.zoo) for name in NETWORKS]
)
def test_the_numbers_are_those_of_training(
    network: str, dcafy_command: Run, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: evaluate has its metrics, and predict the very probabilities, of batches in which all can be read."""
    validated = seen_in_validation(monkeypatch)
    options = ("--data", f"imagefolder:{pictures}", "--epochs", 1, "--batch-size", 4, "--cpu")
    code, _, err = dcafy_command("finetune", network, *NETWORKS[network], *options, "-o", tmp_path / "run")
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    expected = next(row for row in rows if row["event"] == "epoch")["metrics"]
    training = {
        index: row.softmax(0).tolist()
        for batch, outputs in validated
        for index, row in zip(batch, outputs, strict=True)
    }
    validated.clear()
    code, out, err = dcafy_command("evaluate", tmp_path / "run", "--json", "--cpu", "--batch-size", 4)
    assert code == 0, err
    measured = json.loads(out)
    assert measured["metrics"] == expected
    assert expected["images"] == 8
    assert [Path(name.partition(":")[0]).name for name in measured["skipped"]] == ["1.png"]
    right = sum(row[number] for number, row in enumerate(measured["confusion"]["images"]))
    assert right / 8 == expected["top1"]
    code, out, err = dcafy_command("predict", tmp_path / "run", pictures / "val", "--json", "--cpu", "--batch-size", 4)
    assert code == 0, err
    assert "1.png" in err
    seen = json.loads(out)
    losses, hits = [], 0
    for row in seen:
        of = {top["class"]: top["probability"] for top in row["top"]}
        label = Path(row["file"]).parent.name
        losses.append(-np.log(of[label]))
        hits += row["top"][0]["class"] == label
    probabilities = [[top["probability"] for top in sorted(row["top"], key=lambda top: top["class"])] for row in seen]
    assert probabilities[:4] + probabilities[7:] == [training[index] for index in (0, 1, 2, 3, 8)]
    assert len(seen) == 8
    assert np.mean(losses) == pytest.approx(expected["loss"], rel=1e-5)
    assert hits / 8 == expected["top1"]


def seen_in_validation(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], Any]]:
    """(indices, outputs) of each batch that is measured from now on."""
    seen: list[tuple[list[int], Any]] = []

    for meter in (type(Classification(TrainingConfig()).meter()), AveragePrecision):

        def update(self: Any, model: Any, batch: Any, own: Any = meter.update) -> None:
            def outputs(inputs: Any) -> Any:
                found = model(inputs)
                seen.append((batch.indices.tolist(), copy.deepcopy(found)))
                return found

            own(self, outputs, batch)

        monkeypatch.setattr(meter, "update", update)
    return seen


def classifier(classes: int = 3) -> torch.nn.Module:
    torch.manual_seed(0)
    model = dcafy.convert(timm.create_model("test_efficientnet", num_classes=classes), verify=False).eval()
    put_about(model, About(classes=tuple(NAMES[:classes])))
    return model


def test_global_random_numbers_stay_where_they_are(pictures: Path) -> None:
    model, files = classifier(), files_in([str(pictures / "val")])
    before = torch.get_rng_state()
    list(predictions(model, files, PredictOptions()))
    evaluation(model, f"imagefolder:{pictures}", EvaluateOptions())
    assert torch.equal(torch.get_rng_state(), before)


def test_probabilities_are_those_of_the_network(pictures: Path) -> None:
    model = classifier()
    files = files_in([str(pictures / "val")])
    assert len(files) == 9
    seen = list(predictions(model, files, PredictOptions(batch_size=2, top=2)))
    assert [type(row) for row in seen].count(Unreadable) == 1
    ready = dcafy.transforms(model)
    for row in seen:
        if isinstance(row, Prediction):
            with torch.no_grad():
                expected = F.softmax(model(ready(row.file)[None]), 1)[0].topk(2)
            assert row.scores == pytest.approx(expected.values.tolist(), rel=1e-5)
            assert row.classes == tuple(NAMES[n] for n in expected.indices)


def test_classes_are_matched_by_name(pictures: Path, tmp_path: Path) -> None:
    """A network that numbers its classes otherwise is not measured against the folders' order."""
    model = classifier()
    base = evaluation(model, f"imagefolder:{pictures}", EvaluateOptions())
    turned = [2, 0, 1]
    with torch.no_grad():
        for values in (model.classifier.weight, model.classifier.bias):
            values.copy_(values[turned].clone())
    put_about(model, About(classes=tuple(NAMES[n] for n in turned)))
    again = evaluation(model, f"imagefolder:{pictures}", EvaluateOptions())
    assert again.metrics == pytest.approx(base.metrics)
    assert {row.name: row for row in again.classes} == {row.name: row for row in base.classes}
    put_about(model, About(classes=("cat", *NAMES[1:])))
    with pytest.raises(InputError, match="does not know: bright"):
        evaluation(model, f"imagefolder:{pictures}", EvaluateOptions())


def test_a_part_of_the_classes_is_enough(pictures: Path, tmp_path: Path) -> None:
    for name in NAMES[1:]:
        shutil.copytree(pictures / "train" / name, tmp_path / name)
    model = classifier()
    found = evaluation(model, f"imagefolder:{tmp_path}", EvaluateOptions(part="all"))
    assert [row.images for row in found.classes] == [0, 4, 4]
    assert found.classes[0].recall is None


def test_the_paired_interval(pictures: Path) -> None:
    model = classifier()
    one = evaluation(model, f"imagefolder:{pictures}", EvaluateOptions())
    with torch.no_grad():
        model.classifier.bias.add_(torch.tensor([5.0, 0.0, 0.0]))
    other = evaluation(model, f"imagefolder:{pictures}", EvaluateOptions())
    difference = paired(one, other)["loss"]
    expected = [one.rows[i]["loss"] - other.rows[i]["loss"] for i in one.rows]
    assert difference.mean == pytest.approx(np.mean(expected))
    half = 2.365 * np.std(expected, ddof=1) / len(expected) ** 0.5
    assert difference.high is not None
    assert difference.high - difference.mean == pytest.approx(half, rel=1e-3)
    assert difference.mean == pytest.approx(one.metrics["loss"] - other.metrics["loss"])


def test_connections_are_cut(dcafy_command: Run, tmp_path: Path, pictures: Path) -> None:
    model = classifier()
    with torch.no_grad():
        for connection in dcafy.connections(model).values():
            connection.beta.fill_(3.0)
    dcafy.save(model, tmp_path / "model")
    files = (tmp_path / "model", pictures / "val" / "dark" / "0.png", "--json", "--cpu")
    whole, cut = (json.loads(dcafy_command("predict", *files, *more)[1]) for more in ((), ("--cut",)))
    assert whole != cut
    original = dcafy.revert(model).eval()
    ready = dcafy.transforms(model)(files[1])
    with torch.no_grad():
        expected = original(ready[None]).softmax(1)[0].max().item()
    assert cut[0]["top"][0]["probability"] == pytest.approx(expected, rel=1e-5)
    code, _, err = dcafy_command("predict", "timm:test_efficientnet", files[1], "--cut")
    assert (code, "has no connections" in err) == (2, True)


BAD: dict[str, tuple[tuple[object, ...], int, str]] = {
    "nothing there": (("predict", "NET", "nowhere"), 2, "There is no file or folder 'nowhere'"),
    "an empty folder": (("predict", "NET", "EMPTY"), 2, "There are no pictures"),
    "nothing readable": (("predict", "NET", "BROKEN"), 2, "None of 1 file is a picture that can be read"),
    "both forms": (("predict", "NET", "EMPTY", "--json", "--csv"), 2, "Choose one"),
    "no top": (("predict", "NET", "EMPTY", "--top", 0), 2, "--top must be at least 1"),
    "a segmenter": (("predict", "torchvision:lraspp_mobilenet_v3_large", "BROKEN"), 2, "neither scores"),
    "no data": (("evaluate", "NET"), 2, "--data names no images"),
    "other classes": (("evaluate", "NET", "--data", "PICTURES"), 2, "whose names are not known"),
    "boxes": (("evaluate", "NET", "--data", "coco:a:b.json"), 2, "is a classifier"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, dcafy_command: Run, tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "empty").mkdir()
    places = {"NET": "timm:test_efficientnet", "EMPTY": tmp_path / "empty",
              "BROKEN": pictures / "val" / "dark" / "1.png", "PICTURES": f"imagefolder:{pictures}"}  # fmt: skip
    arguments, expected, said = BAD[case]
    code, out, err = dcafy_command(*(places.get(str(argument), argument) for argument in arguments))
    assert (code, out) == (expected, "")
    assert said in err
    assert "Traceback" not in err


def test_random_weights_are_told(dcafy_command: Run, tmp_path: Path, pictures: Path) -> None:
    file = pictures / "val" / "dark" / "0.png"
    assert "weights: random (add @DEFAULT for trained ones)" in dcafy_command("predict", "timm:test_resnet", file)[2]
    dcafy.save(classifier(), tmp_path / "model")
    assert "weights: random" not in dcafy_command("predict", tmp_path / "model", file)[2]


def test_broken_weights_give_no_numbers(pictures: Path) -> None:
    model = classifier()
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="gives no numbers for"):
        list(predictions(model, [str(pictures / "val" / "dark" / "0.png")], PredictOptions()))
    with pytest.raises(UsageError, match="There is no file"):
        files_in(["nowhere"])


def test_links_out_of_a_folder_are_passed_over(
    tmp_path: Path, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    theirs = sorted((pictures / "val").rglob("*.png"))[0]
    (mine / "own.png").write_bytes(theirs.read_bytes())
    (mine / "link.png").symlink_to(theirs)
    (mine / "folder").symlink_to(theirs.parent)
    with caplog.at_level("WARNING"):
        assert [Path(file).name for file in files_in([str(mine)])] == ["own.png"]
    assert caplog.text.count("--follow-links") == 2
    assert len(files_in([str(mine)], follow_links=True)) > 2


DETECTORS: dict[str, tuple[object, ...]] = {
    "torchvision:ssdlite320_mobilenet_v3_large": ("--attention", "se"),
    "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn": ("--set", "min_size=64", "--set", "max_size=96",
                                                          "--set", "box_detections_per_img=9"),
}  # fmt: skip


@pytest.mark.zoo
@pytest.mark.parametrize("network", DETECTORS)
def test_detectors(network: str, dcafy_command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes as in training, to the bit, and so the precisions; they are in pixels of the picture."""
    validated = seen_in_validation(monkeypatch)
    write_shapes(tmp_path / "shapes", 8, seed=0)
    data = f"coco:{tmp_path}/shapes/images:{tmp_path}/shapes/annotations.json"
    options = ("--task", "detection", "--data", data, "--epochs", 1, "--batch-size", 4, "--cpu", "-o", tmp_path / "run")
    code, _, err = dcafy_command("finetune", network, *DETECTORS[network], *options)
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    expected = next(row for row in rows if row["event"] == "epoch")["metrics"]
    (indices, boxes) = validated[0]
    code, out, err = dcafy_command("evaluate", tmp_path / "run", "--json", "--cpu", "--batch-size", 4)
    assert code == 0, err
    assert json.loads(out)["metrics"] == expected
    against = ("--cut", "--against", tmp_path / "run")
    code, out, err = dcafy_command("evaluate", tmp_path / "run", *against, "--json", "--cpu", "--batch-size", 4)
    assert code == 0, err
    found = json.loads(out)
    difference = found["against"]["differences"]["AP"]
    assert difference["images"] == expected["images"]
    assert difference["mean"] == pytest.approx(found["metrics"]["AP"] - expected["AP"], abs=1e-6)
    val = open_coco(data, DataOptions()).val
    files = [val.known.root / val.known.pictures[val.ids[index]]["file_name"] for index in indices]
    images = ("--json", "--cpu", "--threshold", 0.0, "--batch-size", 4)
    code, out, err = dcafy_command("predict", tmp_path / "run", *files, *images)
    assert code == 0, err
    names = dcafy.about(dcafy.load(tmp_path / "run")).classes
    for row, found in zip(json.loads(out), boxes, strict=True):
        assert len(row["boxes"]) == min(len(found["boxes"]), 100) > 0
        own = [found[name].tolist() for name in ("labels", "scores", "boxes")]
        for box, *expected in zip(row["boxes"], *(values[:100] for values in own), strict=True):
            assert [names.index(box["class"]), box["score"], box["box"]] == expected
    images = ("--json", "--cpu", "--threshold", 0.0, "--top", 3)
    code, out, err = dcafy_command("predict", tmp_path / "run", tmp_path / "shapes" / "images", *images)
    assert code == 0, err
    seen = json.loads(out)
    assert len(seen) == 8
    for row in seen:
        assert len(row["boxes"]) == 3
        with Image.open(row["file"]) as picture:
            width, height = picture.size
        for box in row["boxes"]:
            assert box["class"] in names[1:]
            assert 0 <= box["box"][0] <= box["box"][2] <= width
            assert 0 <= box["box"][1] <= box["box"][3] <= height


def test_names_in_a_table_are_text_whatever_they_say() -> None:
    """Of files that no text can name, and of classes that a stranger's folder names: for spreadsheets and terminals."""
    seen = Prediction(os.fsdecode(b"\xff.png"), ("=HYPERLINK(0)", "\x1b[31m", "-1"), (0.5, 0.25, 0.25))
    assert [row[:3] for row in as_csv(seen)] == [
        ["\\udcff.png", 1, "'=HYPERLINK(0)"], ["\\udcff.png", 2, "\\x1b[31m"], ["\\udcff.png", 3, "'-1"]
    ]  # fmt: skip
