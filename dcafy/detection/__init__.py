"""Detectors: trained and measured on boxes, with connected backbones (the paper's Table 3).

The names are resolved when they are first used, as those of ``dcafy`` are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcafy.fronts import front

if TYPE_CHECKING:
    from dcafy.detection.backbone import with_backbone
    from dcafy.detection.coco import CocoImages, open_coco
    from dcafy.detection.synthetic import write_shapes
    from dcafy.detection.task import AveragePrecision, Boxes, Detection

_HOME = {
    "AveragePrecision": "task",
    "Boxes": "task",
    "CocoImages": "coco",
    "Detection": "task",
    "open_coco": "coco",
    "with_backbone": "backbone",
    "write_shapes": "synthetic",
}

__all__ = ["AveragePrecision", "Boxes", "CocoImages", "Detection", "open_coco", "with_backbone", "write_shapes"]


__getattr__, __dir__ = front(__name__, _HOME)
