"""Connected backbones under detectors: what they cost, and a small paired training on synthetic data.

    python benchmarks/detection.py costs --work FOLDER
    python benchmarks/detection.py compare --seeds 3 --work FOLDER
    python benchmarks/detection.py report --work FOLDER > benchmarks/results/detection.md

The paper (DCANet, arXiv 2007.05099, 4.3 and Table 3) says that connecting comes with "almost no additional
calculations". ``costs`` counts that: multiply-adds of convolutions and matrix products for one image of 800 x 1333
pixels (512 x 512 for segmentation), with 1000 proposals and 100 masks where there are such. ``compare`` trains a small
RetinaNet with inserted attention, unconnected and connected, from the same weights with the same images in the same
order; a run that was stopped goes on. What it shows holds for these synthetic images and this budget only.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import detection, segmentation
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock

import dcafy
from dcafy.detection import Boxes, Detection, open_coco, write_shapes
from dcafy.runs.evidence import paired_difference
from dcafy.training import DataOptions, TrainingConfig, finetune

# --- what connecting costs ------------------------------------------------------------------------------

UNTRAINED: dict[str, Any] = {"weights": None, "weights_backbone": None}
ATTENTIONS = ("se", "gc", "cbam")
BY_NATURE = ("rla",)
"""What is connected by the insertion itself: beside the network as it is."""

COSTS = "costs.md"


def _features(model: Any, size: tuple[int, int]) -> list[Tensor]:
    return list(model.backbone(torch.empty(1, 3, *size, device="meta")).values())


def _one_stage(model: Any, size: tuple[int, int]) -> None:
    model.head(_features(model, size))


def _two_stages(model: Any, size: tuple[int, int]) -> None:
    model.rpn.head(_features(model, size))
    model.roi_heads.box_predictor(model.roi_heads.box_head(torch.empty(1000, 256, 7, 7, device="meta")))
    if model.roi_heads.has_mask():
        model.roi_heads.mask_predictor(model.roi_heads.mask_head(torch.empty(100, 256, 14, 14, device="meta")))


def _segmenter(model: Any, size: tuple[int, int]) -> None:
    model(torch.empty(1, 3, *size, device="meta"))


@dataclass(frozen=True)
class Kind:
    """``build``: a network of torchvision; ``run``: what one image of ``size`` (height, width) takes in it."""

    build: Callable[[], nn.Module]
    run: Callable[[Any, tuple[int, int]], None]
    size: tuple[int, int] = (800, 1333 // 32 * 32)
    own: bool = False


KINDS = {
    "RetinaNet, ResNet-50-FPN": Kind(lambda: detection.retinanet_resnet50_fpn(**UNTRAINED), _one_stage),
    "Faster R-CNN, ResNet-50-FPN": Kind(lambda: detection.fasterrcnn_resnet50_fpn(**UNTRAINED), _two_stages),
    "Mask R-CNN, ResNet-50-FPN": Kind(lambda: detection.maskrcnn_resnet50_fpn(**UNTRAINED), _two_stages),
    "DeepLabV3, ResNet-50": Kind(lambda: segmentation.deeplabv3_resnet50(**UNTRAINED), _segmenter, (512, 512)),
    "Faster R-CNN, MobileNetV3-FPN": Kind(
        lambda: detection.fasterrcnn_mobilenet_v3_large_fpn(**UNTRAINED), _two_stages, own=True
    ),
}
"""``own``: the backbone has attention of its own."""


@dataclass(frozen=True)
class Cost:
    """Parameters, and multiply-adds of one image."""

    parameters: int
    operations: int


def cost(model: nn.Module, kind: Kind) -> Cost:
    """What ``model``, of that kind, has and takes; it is moved to the meta device."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model.eval().to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        kind.run(model, kind.size)
    return Cost(parameters, counter.get_total_flops() // 2)


def costs() -> list[str]:
    """A table of all kinds, vanilla and connected, in Markdown."""
    rows = [
        "| network | attention | parameters, vanilla | connected | added | GMAC, vanilla | connected | added |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, kind in KINDS.items():
        for attention in (None,) if kind.own else (*ATTENTIONS, *BY_NATURE):
            vanilla = (
                kind.build() if attention not in ATTENTIONS else dcafy.insert(kind.build(), attention, init="paper")
            )
            by_nature = attention in BY_NATURE
            connected = dcafy.insert(vanilla, attention) if by_nature else dcafy.convert(vanilla, verify=False)
            one, other = cost(vanilla, kind), cost(connected, kind)
            rows.append(
                f"| {name} | {attention.upper() if attention else 'its own SE'} "
                f"| {one.parameters:,} | {other.parameters:,} | {other.parameters / one.parameters - 1:+.2%} "
                f"| {one.operations / 1e9:.3f} | {other.operations / 1e9:.3f} "
                f"| {other.operations / one.operations - 1:+.4%} |"
            )
    return rows


# --- a small paired training ----------------------------------------------------------------------------

CLASSES = 5
SIDE = 64
IMAGES, VAL = 240, 40
CONFIG = TrainingConfig(epochs=12, batch_size=8, lr=3e-3, weight_decay=1e-4, clip_norm=5.0, cpu=True)


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    first = BasicBlock(inputs, outputs, stride, shortcut)
    return nn.Sequential(first, BasicBlock(outputs, outputs))


def small_retinanet(attention: str, seed: int) -> nn.Module:
    """An untrained RetinaNet for images of 64 pixels: three stages of two residual units, and an FPN.

    Its units have the attention, but for one that is connected by nature.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        layers = {"stem": stem, "layer1": _stage(16, 16, 2), "layer2": _stage(16, 32, 2), "layer3": _stage(32, 64, 2)}
        body: nn.Module = nn.Sequential(OrderedDict(layers))
        if attention in ATTENTIONS:
            body = dcafy.insert(body, attention, reduction=4, init="paper")
        returned = {"layer1": "0", "layer2": "1", "layer3": "2"}
        backbone = BackboneWithFPN(body, returned, [16, 32, 64], 32)
        sizes = ((6.0, 8.0, 10.0), (13.0, 16.0, 20.0), (25.0, 32.0, 40.0), (50.0, 64.0, 80.0))
        anchors = AnchorGenerator(sizes, ((1.0,),) * 4)
        size = {"min_size": SIDE * 3 // 4, "max_size": SIDE}
        return detection.RetinaNet(backbone, CLASSES + 1, anchor_generator=anchors, **size)


class Shown:
    """Pictures with the way in which they are made ready."""

    def __init__(self, pictures: Any, transform: Boxes) -> None:
        self.pictures, self.transform_sample = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Any:
        return self.pictures[index]


def one_run(work: Path, attention: str, seed: int, *, connected: bool, config: TrainingConfig) -> dict[str, Any]:
    """The result of one training, from its file where it is there already."""
    name = f"{attention}-{seed}-{'connected' if connected else 'vanilla'}"
    file = work / f"{name}.json"
    if file.exists():
        return json.loads(file.read_text())  # type: ignore[no-any-return]
    made = write_shapes(work / "shapes", IMAGES, side=SIDE, most=2, sizes=(0.3, 0.7), seed=0)
    data = open_coco(made.spec, DataOptions(val_fraction=VAL / IMAGES))
    model: nn.Module = small_retinanet(attention, seed)
    if connected:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = dcafy.insert(model, attention) if attention in BY_NATURE else dcafy.convert(model)
    config = dataclasses.replace(config, seed=seed)
    start = time.perf_counter()
    history = finetune(
        model, Shown(data.train, Boxes("standard")), Shown(data.val, Boxes()), config, task=Detection(config),
        directory=work / name, resume=True,
    )  # fmt: skip
    result = {"attention": attention, "seed": seed, "connected": connected, "metrics": dict(history.metrics),
              "loss": history.epochs[-1].loss, "seconds": time.perf_counter() - start,
              "configuration": dataclasses.asdict(config)}  # fmt: skip
    if connected and attention in ATTENTIONS:
        last = history.epochs[-1].connections
        result["betas"] = {block: state.beta for block, state in last.items()}
    file.write_text(json.dumps(result) + "\n")
    return result


def compared(work: Path, attention: str, seeds: Sequence[int]) -> list[str]:
    """The paired results of one attention as rows of Markdown."""
    sides = {
        side: [one_run(work, attention, s, connected=side == "connected", config=CONFIG) for s in seeds]
        for side in ("vanilla", "connected")
    }
    rows = []
    for metric in [name for name in sides["vanilla"][0]["metrics"] if name != "images"]:
        values = {side: [run["metrics"][metric] for run in runs] for side, runs in sides.items()}
        difference = paired_difference(values["connected"], values["vanilla"])
        interval = (
            "" if difference.low is None else f"{100 * difference.low:+.1f} to {100 * (difference.high or 0):+.1f}"
        )
        rows.append(
            f"| {attention.upper()} | {metric} | {_percent(values['vanilla'])} | {_percent(values['connected'])} "
            f"| {100 * difference.mean:+.1f} | {interval} | {difference.verdict} |"
        )
    return rows


def _percent(values: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(values):.1f} ({', '.join(f'{100 * value:.1f}' for value in values)})"


def report(work: Path) -> str:
    """The page that is committed: from the results in ``work`` alone."""
    runs = [json.loads(file.read_text()) for file in sorted(work.glob("*-*-*.json"))]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "torchmetrics", "pycocotools"))
    lines = [
        "# Connected backbones under detectors",
        "",
        f"{datetime.datetime.now(tz=datetime.timezone.utc):%Y-%m-%d}; dcafy {dcafy.__version__}, {versions}, Python "
        f"{platform.python_version()}; CPU ({platform.machine()}, {os.cpu_count()} cores, shared).",
        "Made by `python benchmarks/detection.py costs`, `compare` and `report`.",
        "",
        "## Parameters and multiply-adds",
        "",
        'The paper: connecting comes with "almost no additional calculations". One image of 800 x 1312 pixels (512 x '
        "512 for DeepLabV3), 1000 proposals, 100 masks; convolutions and matrix products. Connections as "
        "`dcafy.convert` makes them by default (two FC layers, reduction 16, at least 8 hidden channels).",
        "",
        *(work / COSTS).read_text(encoding="utf-8").splitlines(),
        "",
        "## A small paired training on synthetic images",
        "",
        "RetinaNet with FPN and heads of 32 channels, on three stages of two residual units (16, 32, 64 channels) with "
        'inserted attention (`init="paper"`, reduction 4), from random weights. '
        f"{IMAGES - VAL} training and {VAL} validation images of {SIDE} pixels with textured shapes of {CLASSES} "
        f"kinds, made by `dcafy.detection.write_shapes({IMAGES}, side={SIDE}, most=2, sizes=(0.3, 0.7))`; "
        f"{CONFIG.epochs} epochs, {CONFIG.optimizer} with {CONFIG.base_rate:g} (connections "
        f"{CONFIG.connection_rate:g}), batches of {CONFIG.batch_size}, cosine. For each seed both networks "
        "start from the same weights and see the same images in the same order. Means, in brackets the seeds; AP in "
        "percent. For RLA, which is connected by nature (`docs/family.md`), vanilla is the network without attention, "
        'and connected the same with `dcafy.insert(model, "rla")`, an exact no-op at first.',
        "",
        "| attention | metric | vanilla | connected | difference (points) | 95% interval | verdict |",
        "| --- | --- | --- | --- | ---: | --- | --- |",
    ]
    for attention in dict.fromkeys(run["attention"] for run in runs):
        own = [run for run in runs if run["attention"] == attention]
        both = [s for s in sorted({run["seed"] for run in own}) if sum(run["seed"] == s for run in own) == 2]
        if both:
            lines += compared(work, attention, both)
    lines += [
        "",
        "These are synthetic shapes, a small network and a training that ends long before either side has learned "
        "them: at such precisions the table shows that the paired training runs, and cannot tell which network is "
        "better. It says nothing about COCO, and does not repeat the paper's Table 3: that takes ImageNet backbones, "
        "COCO and GPUs.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("costs", "compare", "report"))
    parser.add_argument("--work", type=Path, default=Path("detection-runs"), help="where runs are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--attention", choices=(*ATTENTIONS, *BY_NATURE), nargs="+", default=["se"])
    options = parser.parse_args(arguments)
    if options.what == "costs":
        options.work.mkdir(parents=True, exist_ok=True)
        (options.work / COSTS).write_text("\n".join(costs()) + "\n", encoding="utf-8")
        print((options.work / COSTS).read_text(encoding="utf-8"), end="")
    elif options.what == "report":
        print(report(options.work), end="")
    else:
        for attention in options.attention:
            for seed in range(options.seeds):
                for connected in (False, True):
                    run = one_run(options.work, attention, seed, connected=connected, config=CONFIG)
                    print(f"{attention} seed {seed} connected={connected}: {run['metrics']}, {run['seconds']:.0f} s")


if __name__ == "__main__":
    main()
