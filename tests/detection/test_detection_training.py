"""``dcafy finetune --task detection``: boxes in COCO's format, average precision, and what can be wrong with them."""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from detection_data import altered, retinanet
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import dcafy
from dcafy.detection import AveragePrecision, Boxes, CocoImages, Detection, open_coco, write_shapes
from dcafy.detection.classes import classes_of, labels_for
from dcafy.detection.synthetic import SHAPES
from dcafy.errors import InputError, UsageError
from dcafy.images.order import Sample
from dcafy.training import DataOptions, TrainingConfig, finetune
from dcafy.training.tasks import Batch

pytest.importorskip("pycocotools")
pytest.importorskip("torchmetrics")
pytest.importorskip("accelerate")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Twelve tiny pictures; the folder holds images/ and annotations.json."""
    write_shapes(tmp_path, 12, side=48, most=2, sizes=(0.3, 0.7), seed=3)
    return tmp_path


def opened(shapes: Path, annotations: Path | None = None, **options: Any) -> Any:
    return open_coco(f"coco:{shapes / 'images'}:{annotations or shapes / 'annotations.json'}", DataOptions(**options))


# --- the synthetic set ----------------------------------------------------------------------------------


def test_the_synthetic_set_is_what_its_annotations_say(tmp_path: Path) -> None:
    from pycocotools import mask

    made = write_shapes(tmp_path / "one", 8, side=64, seed=1)
    again = write_shapes(tmp_path / "two", 8, side=64, seed=1)
    other = write_shapes(tmp_path / "three", 8, side=64, seed=2)
    assert made.annotations.read_text() == again.annotations.read_text() != other.annotations.read_text()
    for file in made.images.iterdir():
        assert file.read_bytes() == (again.images / file.name).read_bytes()
    content = json.loads(made.annotations.read_text())
    assert {row["name"] for row in content["categories"]} == set(SHAPES)
    assert "synthetic" in content["info"]["description"]
    for row in content["annotations"]:
        runs = mask.frPyObjects(row["segmentation"], *row["segmentation"]["size"])
        assert mask.area(runs) == row["area"]
        assert mask.toBbox(runs).tolist() == row["bbox"]


# --- opening --------------------------------------------------------------------------------------------


def test_pictures_with_boxes(shapes: Path) -> None:
    data = opened(shapes, val_fraction=0.25)
    assert (len(data.train), len(data.val)) == (9, 3)
    assert not set(data.train.ids) & set(data.val.ids)
    assert data.classes == tuple(SHAPES)
    assert data.amiss == ()
    content = json.loads((shapes / "annotations.json").read_text())
    for number, (picture, target) in zip(data.train.ids, data.train, strict=True):
        own = [row for row in content["annotations"] if row["image_id"] == number]
        x, y, w, h = np.array([row["bbox"] for row in own]).reshape(-1, 4).T
        assert target["boxes"].tolist() == np.stack([x, y, x + w, y + h], axis=1).tolist()
        assert target["labels"].tolist() == [row["category_id"] for row in own]
        assert target["area"].tolist() == [row["area"] for row in own]
        assert target["boxes"].canvas_size == picture.size[::-1]


def test_a_flip_moves_boxes_with_the_picture(shapes: Path) -> None:
    data = opened(shapes)
    picture, target = data.train[0]
    flip = Boxes("standard")
    plain, straight = Boxes()(picture, target)
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        image, turned = flip(picture, target)
        flipped = not torch.equal(image, plain)
        seen.add(flipped)
        if flipped:
            assert torch.equal(image, plain.flip(2))
            width = picture.size[0]
            assert torch.equal(turned["boxes"][:, 0], width - straight["boxes"][:, 2])
    assert seen == {True, False}
    assert type(plain) is torch.Tensor
    assert type(straight["boxes"]) is torch.Tensor


AMISS = {
    "zero area": ([4, 5, 0, 9], "has no area (0 x 9): left out", 0),
    "negative": ([4, 5, -3, 9], "has no area (-3 x 9): left out", 0),
    "outside": ([900, 5, 10, 9], "lies outside the image", 0),
    "no box": ([4, 5, 10], "is [4, 5, 10], not [x, y, width, height]: left out", 0),
    "no number": ([4, 5, float("nan"), 3], "not [x, y, width, height]: left out", 0),
    "over the border": ([-6, -6, 20, 20], "reaches over the border of the image", 1),
}


@pytest.mark.parametrize("name", AMISS)
def test_boxes_that_are_amiss_are_named_and_left_out(shapes: Path, name: str) -> None:
    box, says, kept = AMISS[name]
    whole = sum(len(target["boxes"]) for part in (opened(shapes).train, opened(shapes).val) for _, target in part)
    file = altered(shapes / "annotations.json", boxes={0: box})
    data = opened(shapes, file)
    assert len(data.amiss) == 1
    assert says in data.amiss[0]
    assert "annotation 1 in 00000" in data.amiss[0]
    boxes = [target["boxes"] for part in (data.train, data.val) for _, target in part]
    assert sum(map(len, boxes)) == whole - 1 + kept
    assert all((part >= 0).all() and (part[:, 2:] > part[:, :2]).all() for part in boxes)
    with pytest.raises(InputError, match="--strict was given"):
        opened(shapes, file, strict=True)


def test_a_box_that_is_over_the_border_by_rounding_is_cut_off_silently(shapes: Path) -> None:
    data = opened(shapes, altered(shapes / "annotations.json", boxes={0: [-0.5, 2, 8, 8]}))
    assert data.amiss == ()
    assert min(float(t["boxes"].min()) for part in (data.train, data.val) for _, t in part if len(t["boxes"])) == 0


DAMAGED: dict[str, tuple[Callable[[Path], str], type[Exception], str]] = {
    "no spec": (lambda root: "coco:images", UsageError, "names no pictures with boxes"),
    "another kind": (lambda root: f"imagefolder:{root}:x", UsageError, "names no pictures with boxes"),
    "no folder": (lambda root: f"coco:{root}/none:{root}/annotations.json", InputError, "no folder"),
    "no file": (lambda root: f"coco:{root}/images:{root}/none.json", InputError, "no file"),
    "not JSON": (lambda root: f"coco:{root}/images:{root}/images/000001.png", InputError, "no file of annotations"),
    "other pictures": (lambda root: f"coco:{root}:{root}/annotations.json", InputError, "None of the 12 images"),
    "no categories": (
        lambda root: f"coco:{root}/images:{altered(root / 'annotations.json', categories=None)}",
        InputError,
        "has no 'categories'",
    ),
    "another category": (
        lambda root: f"coco:{root}/images:{altered(root / 'annotations.json', categories=[{'id': 77, 'name': 'x'}])}",
        InputError,
        "of category",
    ),
    "another image": (
        lambda root: f"coco:{root}/images:{altered(root / 'annotations.json', images=_first(root))}",
        InputError,
        "is of image",
    ),
    "no boxes": (
        lambda root: f"coco:{root}/images:{altered(root / 'annotations.json', annotations=[])}",
        InputError,
        "training images of .* has a box",
    ),
    "a list": (lambda root: f"coco:{root}/images:{_listed(root)}", InputError, "no file of annotations"),
}


def _first(root: Path) -> list[Any]:
    return json.loads((root / "annotations.json").read_text())["images"][:1]  # type: ignore[no-any-return]


def _listed(root: Path) -> Path:
    (root / "list.json").write_text("[1, 2]")
    return root / "list.json"


@pytest.mark.parametrize("name", DAMAGED)
def test_data_that_no_detector_can_be_trained_on(shapes: Path, name: str) -> None:
    spec, error, says = DAMAGED[name]
    with pytest.raises(error, match=says):
        open_coco(spec(shapes), DataOptions())


def test_two_sets_need_the_same_categories(tmp_path: Path) -> None:
    one, two = (write_shapes(tmp_path / name, 4, side=48, seed=n) for n, name in enumerate(("one", "two")))
    spec = f"{one.spec}:{two.images}:{two.annotations}"
    data = open_coco(spec, DataOptions())
    assert (len(data.train), len(data.val)) == (4, 4)
    altered(two.annotations, categories=[{"id": 1, "name": "other"}], annotations=[])
    with pytest.raises(InputError, match="other categories"):
        open_coco(spec.replace("two/annotations", "two/altered"), DataOptions())


def test_crowds_are_measured_with_and_not_trained_on(shapes: Path) -> None:
    content = json.loads((shapes / "annotations.json").read_text())
    for row in content["annotations"]:
        row["iscrowd"] = int(row["id"] % 2)
    data = opened(shapes, altered(shapes / "annotations.json", annotations=content["annotations"]))
    assert not any(target["iscrowd"].any() for _, target in data.train)
    assert any(target["iscrowd"].any() for _, target in data.val)


def test_sizes_that_are_not_told_are_read(shapes: Path) -> None:
    content = json.loads((shapes / "annotations.json").read_text())
    images = [{"id": row["id"], "file_name": row["file_name"]} for row in content["images"]]
    data = opened(shapes, altered(shapes / "annotations.json", images=images))
    assert [t["boxes"].tolist() for _, t in data.train] == [t["boxes"].tolist() for _, t in opened(shapes).train]


def test_masks_are_the_outlines(shapes: Path) -> None:
    data = opened(shapes)
    data.train.masks = True
    for _, target in data.train:
        assert target["masks"].shape[0] == len(target["boxes"])
        assert target["masks"].sum((1, 2)).tolist() == target["area"].tolist()


def test_a_detector_of_coco_keeps_its_numbers_for_categories_that_it_knows(shapes: Path) -> None:
    names = [{"id": n + 1, "name": name} for n, name in enumerate(("dog", "person", "cat", "car", "bus"))]
    data = opened(shapes, altered(shapes / "annotations.json", categories=names))
    model = retinanet(num_classes=91)
    assert labels_for(model, data) == 91
    assert data.train.label_of == data.val.label_of == {1: 18, 2: 1, 3: 17, 4: 3, 5: 6}
    data = opened(shapes)
    assert labels_for(model, data) == 6
    assert data.train.label_of == {n: n for n in range(1, 6)}


# --- average precision ----------------------------------------------------------------------------------


class Oracle(nn.Module):
    """Finds what it is told to find."""

    def __init__(self, answers: list[dict[str, torch.Tensor]]) -> None:
        super().__init__()
        self.answers = iter(answers)

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return [next(self.answers) for _ in images]


def _target(corners: list[list[float]]) -> dict[str, torch.Tensor]:
    boxes = torch.tensor(corners).reshape(-1, 4)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    ones = torch.ones(len(boxes), dtype=torch.int64)
    return {"boxes": boxes, "labels": ones, "area": area, "iscrowd": ones * 0}


def _measured(targets: list[dict[str, torch.Tensor]], shift: float, indices: list[int]) -> dict[str, float]:
    known = [target or _target([]) for target in targets]
    answers = [
        {"boxes": t["boxes"] + shift, "labels": t["labels"], "scores": torch.full((len(t["boxes"]),), 0.9)}
        for t in known
    ]
    meter = AveragePrecision()
    images = [torch.zeros(3, 4, 4)] * len(targets)
    meter.update(Oracle(answers), Batch(images, targets, torch.tensor(indices), ()))
    return meter.result(SimpleNamespace(num_processes=1))  # type: ignore[arg-type]


def test_average_precision() -> None:
    small, large = [0.0, 0.0, 20.0, 20.0], [100.0, 100.0, 300.0, 300.0]
    exact = _measured([_target([small, large])], 0.0, [0])
    assert exact == {"AP": 1.0, "AP50": 1.0, "AP75": 1.0, "APS": 1.0, "APL": 1.0, "images": 1.0}
    # Shifted by 2 pixels, the small box has an IoU of 324/476 = 0.68, the large one of 39204/40796 = 0.96.
    moved = _measured([_target([small, large])], 2.0, [0])
    assert moved["AP50"] == pytest.approx(1.0)
    assert moved["APS"] == pytest.approx(0.4)
    assert moved["APL"] == pytest.approx(1.0)
    assert 0 < moved["AP75"] < 1


def test_an_image_counts_once_and_one_that_cannot_be_read_not_at_all() -> None:
    box = _target([[0.0, 0.0, 20.0, 20.0]])
    assert _measured([box, box, _target([]), {}], 0.0, [0, 0, 1, 2])["images"] == 2
    with pytest.raises(InputError, match="None of the validation images"):
        AveragePrecision().result(SimpleNamespace(num_processes=1))  # type: ignore[arg-type]


# --- the task -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["mixup", "cutmix", "label_smoothing"])
def test_options_of_classifiers(option: str) -> None:
    with pytest.raises(UsageError, match="is for classifiers"):
        Detection(TrainingConfig(**{option: 0.1}))
    with pytest.raises(UsageError, match="knows of no boxes"):
        Boxes("trivial")


def test_what_is_no_detector_is_refused(shapes: Path) -> None:
    picture, target = opened(shapes).train[0]
    task = Detection(TrainingConfig())
    sample = Sample(*Boxes()(picture, target), (0, 0))
    task.check(retinanet(6), sample)
    with pytest.raises(InputError, match="is no detector"):
        task.check(nn.Sequential(nn.Conv2d(3, 4, 1)), sample)
    with pytest.raises(InputError, match="boxes and labels"):
        task.check(retinanet(6), Sample(sample.image, 3, (0, 0)))


class _AsUsersHaveThem:
    """Pictures with the boxes and labels alone, as tutorials give them."""

    def __init__(self, shapes: Path) -> None:
        self.pictures = opened(shapes).train

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        image, target = Boxes()(*self.pictures[index])
        return image, {name: target[name] for name in ("boxes", "labels")}


class _Streamed(IterableDataset[Any]):
    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return (self.data[index] for index in range(len(self.data)))

    def __len__(self) -> int:
        return len(self.data)


def _lists(samples: Any) -> Any:
    return tuple(zip(*samples, strict=True))


def test_detectors_take_loaders_and_streams(shapes: Path) -> None:
    """Batches are lists of images and of targets, or what tuples of them are; all train to the same weights."""
    data = _AsUsersHaveThem(shapes)
    config = TrainingConfig(epochs=1, batch_size=2, cpu=True, lr=1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", lambda count, **_: torch.arange(count))  # data sets are shuffled
        ways: list[Any] = [
            data,
            DataLoader(data, 2, collate_fn=lambda samples: [list(part) for part in _lists(samples)]),
            DataLoader(_Streamed(data), 2, collate_fn=_lists),
        ]
        connected = dcafy.convert(retinanet(6), example_inputs=[torch.rand(3, 48, 48)], verify=False)
        seen = []
        for way in ways:
            model = copy.deepcopy(connected)
            history = finetune(model, way, way, config, task=Detection(config))
            seen.append((torch.cat([value.flatten() for value in model.state_dict().values()]), history.metrics))
    assert all(torch.equal(weights, seen[0][0]) for weights, _ in seen)
    assert all(metrics == seen[0][1] for _, metrics in seen)
    assert seen[0][1]["images"] == 4


@pytest.mark.parametrize(
    ("collate", "says"),
    [
        (lambda images, targets: (torch.stack(images), {"boxes": 1}), "gives a Tensor and a dict as a batch"),
        (lambda images, targets: [images, [one["boxes"] for one in targets]], "with a target that has boxes"),
        (lambda images, targets: [images, targets[:1]], "makes 1 of them where a list of 2 targets should be"),
        (lambda images, targets: [images, [{"boxes": targets[0]["boxes"]}] * 2], "gives a dict as a target, not"),
        (
            lambda images, targets: [images, [{"boxes": torch.ones(4), "labels": torch.ones(1)}] * 2],
            r"a tensor \[4\] as boxes and a tensor \[1\] as labels; they should be tensors",
        ),
    ],
)
def test_batches_that_no_detector_is_trained_on(shapes: Path, collate: Any, says: str) -> None:
    data = _AsUsersHaveThem(shapes)
    config = TrainingConfig(epochs=1, cpu=True)
    loader = DataLoader(data, 2, collate_fn=lambda samples: collate(*map(list, _lists(samples))))
    with pytest.raises(InputError, match=says):
        finetune(retinanet(6), loader, data, config, task=Detection(config))


# --- the command ----------------------------------------------------------------------------------------


@pytest.fixture
def command(dcafy_command: Run, monkeypatch: pytest.MonkeyPatch, shapes: Path) -> Iterator[Run]:
    """Run ``dcafy finetune`` in the folder of the shapes: arguments -> exit code, stdout, stderr."""
    monkeypatch.chdir(shapes)
    (shapes / "detector_factory.py").write_text("from detection_data import retinanet\n")
    yield functools.partial(dcafy_command, "finetune")
    sys.modules.pop("detector_factory", None)


MODEL = "detector_factory:retinanet"
QUICK = ["--task", "detection", "--data", "coco:images:annotations.json", "--batch-size", 4, "--cpu"]


def test_a_run_reports_average_precision(command: Run, shapes: Path) -> None:
    file = altered(shapes / "annotations.json", boxes={0: [4, 5, 0, 9], 1: [900, 5, 10, 9]})
    data = ["--task", "detection", "--data", f"coco:images:{file}", "--batch-size", 4, "--cpu"]
    (shapes / "images/000005.png").write_bytes(b"no picture")
    code, out, err = command(MODEL, *data, "--epochs", 2, "-o", "run")
    assert code == 0, err
    assert "has no area (0 x 9): left out" in err
    assert "2 such places in all" in err
    assert "000005.png" in err
    assert "AP50" in out
    assert "images could not be read" in out
    request = json.loads((shapes / "run/finetune.json").read_text())
    assert request["task"] == "detection"
    assert request["data"] == f"coco:{shapes / 'images'}:{file}"
    assert (request["training"]["optimizer"], request["training"]["schedule"]) == ("sgd", "multistep")
    assert request["training"]["lr"] == 0.01 / 4
    rows = [json.loads(line) for line in (shapes / "run/log.jsonl").read_text().splitlines()]
    epochs = [row for row in rows if row["event"] == "epoch"]
    assert {"AP", "AP50", "AP75"} <= set(epochs[-1]["metrics"])
    assert all(state["beta"] != 0 for state in epochs[-1]["connections"].values())
    loaded = dcafy.load("run", model=retinanet(6))
    assert classes_of(loaded) == 6
    code, _, err = command(MODEL, *data, "--strict", "--epochs", 1, "-o", "strict")
    assert code != 0
    assert "--strict was given" in err
    assert not (shapes / "strict").exists()


def test_the_papers_recipe_trains_a_detector(command: Run, shapes: Path) -> None:
    recipe = ["--recipe", "paper-detection", "--data", "coco:images:annotations.json", "--batch-size", 4, "--cpu"]
    code, _, err = command(MODEL, *recipe, "--epochs", 1, "-o", "run")
    assert code == 0, err
    asked = json.loads((shapes / "run/finetune.json").read_text())
    assert (asked["task"], asked["recipe"]) == ("detection", "paper-detection")
    assert asked["training"]["lr"] == asked["training"]["connection_lr"] == 0.01 / 4
    loaded = dcafy.load("run", model=retinanet(6))
    assert all(connection.beta.item() != 0 for connection in dcafy.connections(loaded).values())


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_where_an_unbroken_one_does(
    command: Run, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [MODEL, *QUICK, "--epochs", 2, "--checkpoint-steps", 1]
    assert command(*whole, "-o", "whole")[0] == 0

    from dcafy.training import loop

    write, written = loop.write_checkpoint, []

    def cut_off(*arguments: Any) -> None:
        write(*arguments)
        written.append(1)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "write_checkpoint", cut_off)
    assert command(*whole, "-o", "broken")[0] != 0
    monkeypatch.setattr(loop, "write_checkpoint", write)
    code, _, err = command(MODEL, "-o", "broken", "--resume")
    assert code == 0, err
    assert "going on" in err
    ours, theirs = (load_file(shapes / name / "model.safetensors") for name in ("broken", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_a_comparison_of_detectors(command: Run, shapes: Path) -> None:
    code, out, err = command(MODEL, *QUICK, "--epochs", 1, "--compare", "--seeds", 2, "-o", "run")
    assert code == 0, err
    assert "AP, connected minus original" in out
    assert "95% interval" in out
    found = json.loads((shapes / "run/compare.json").read_text())
    assert {"AP", "AP50", "AP75"} <= set(found["differences"])
    assert found["connected"]["parameters"] > found["original"]["parameters"]
    assert found["original"]["gflops"] > 0
    assert found["original"]["step_seconds"] > 0


MISTAKES = {
    "task": (["--task", "detecton"], "Did you mean 'detection'?"),
    "size": (["--image-size", 64], "--set min_size=400"),
    "mixup": (["--mixup", 0.2], "is for classifiers"),
    "augment": (["--augment", "trivial"], "knows of no boxes"),
    "data": (["--data", "digits"], "names no pictures with boxes"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_cost_nothing(command: Run, shapes: Path, name: str) -> None:
    arguments, says = MISTAKES[name]
    code, _, err = command(MODEL, *QUICK, "--epochs", 1, "-o", "run", *arguments)
    assert code != 0
    assert says in err
    assert not (shapes / "run").exists()


@pytest.mark.slow
def test_keypoints_are_refused_and_masks_trained_on(command: Run, shapes: Path) -> None:
    code, _, err = command("torchvision:keypointrcnn_resnet50_fpn", *QUICK, "--attention", "se", "-o", "keypoints")
    assert code != 0
    assert "trained on keypoints" in err
    content = json.loads((shapes / "annotations.json").read_text())
    rows = [{k: v for k, v in row.items() if k != "segmentation"} for row in content["annotations"]]
    file = altered(shapes / "annotations.json", annotations=rows)
    code, _, err = command("torchvision:maskrcnn_resnet50_fpn", *QUICK, "--data", f"coco:images:{file}", "-o", "masks")
    assert code != 0
    assert "have no segmentation" in err


def test_one_class_of_dataset_serves_the_loop(shapes: Path) -> None:
    data = opened(shapes)
    assert isinstance(data.train, CocoImages)
    Image.new("RGB", (7, 9)).save(shapes / "images" / data.train.known.pictures[data.train.ids[0]]["file_name"])
    from dcafy.images.order import UnreadableImage

    with pytest.raises(UnreadableImage, match="it has 7 x 9 pixels"):
        data.train[0]
