"""A tiny detector, pictures, and a damaged set of boxes; in a module that other processes import quickly."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FrozenBatchNorm2d
from trained import seeded

import dcafy


def unit(inputs: int, outputs: int) -> BasicBlock:
    shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.GroupNorm(2, outputs))
    return BasicBlock(inputs, outputs, 2, shortcut, norm_layer=lambda width: nn.GroupNorm(2, width))


def retinanet(num_classes: int = 3) -> nn.Module:
    """RetinaNet on three SE units without batch norm, for images of 48 pixels."""
    with seeded(0):
        stem = nn.Conv2d(3, 8, 3, 2, 1)
        layers = OrderedDict(stem=stem, layer1=unit(8, 8), layer2=unit(8, 12), layer3=unit(12, 16))
        body = dcafy.insert(nn.Sequential(layers), "se", reduction=4, init="paper")
        backbone = BackboneWithFPN(body, {"layer2": "0", "layer3": "1"}, [12, 16], 8)
        anchors = AnchorGenerator(((8.0, 12.0), (16.0, 24.0), (32.0, 40.0)), ((1.0,),) * 3)
        return detection.RetinaNet(
            backbone, num_classes, anchor_generator=anchors, min_size=36, max_size=48, detections_per_img=20,
            image_mean=[0.5] * 3, image_std=[0.25] * 3, score_thresh=0.0,
        )  # fmt: skip


def pictures(*sizes: tuple[int, int]) -> list[Tensor]:
    """Pictures of these heights and widths; the same ones at every call."""
    with seeded(1):
        return [torch.rand(3, *size) for size in sizes]


def with_statistics(model: nn.Module) -> nn.Module:
    """Statistics of batch norms that have seen data, also of frozen ones, and attention that does something."""
    with seeded(0), torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
                module.running_mean.normal_(0, 0.05)
                module.running_var.uniform_(0.4, 0.9)
                module.weight.uniform_(0.5, 0.9)
        for name, parameter in model.named_parameters():
            if any(part in ("se", "gc", "cbam") for part in name.split(".")):
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def altered(file: Path, **changes: Any) -> Path:
    """The annotations with changes: ``boxes`` (index -> box) and other entries at the top; in a file beside."""
    content = json.loads(file.read_text())
    for index, box in changes.pop("boxes", {}).items():
        content["annotations"][index]["bbox"] = box
    content.update(changes)
    content = {name: value for name, value in content.items() if value is not None}
    beside = file.with_name("altered.json")
    beside.write_text(json.dumps(content))
    return beside


def trained_detector(folder: str) -> tuple[Any, nn.Module]:
    """One epoch on the set in ``folder``."""
    from dcafy.detection import Boxes, Detection, open_coco
    from dcafy.training import DataOptions, TrainingConfig, finetune

    data = open_coco(f"coco:{folder}/images:{folder}/annotations.json", DataOptions(val_fraction=0.3))
    model = dcafy.convert(retinanet(len(data.classes) + 1), verify=False)
    config = TrainingConfig(epochs=1, batch_size=4, optimizer="sgd", lr=0.001, cpu=True)
    history = finetune(model, shown(data.train, Boxes()), shown(data.val, Boxes()), config, task=Detection(config))
    return history, model


def shown(pictures: Any, transform: Any) -> Any:
    """The pictures with the transform that makes them ready."""
    pictures.transform_sample = transform
    return pictures
