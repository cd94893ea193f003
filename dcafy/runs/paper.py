"""The paper's own trainings, as options: what its sections say, and what the published configuration adds.

The published configuration is that of the paper's authors (github.com/ma-xu/DCANet): ``main.py``, ``main_mobile.py``
and the MMDetection configurations (``Usage.md``: on 8 processes of 32, 64 and 2 images). Where the two differ, the
paper goes: its detectors' rates fall after epochs 18 and 22, in the published configurations after 16 and 22.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrainingRecipe:
    """One training of the paper.

    ``of``         what it is for
    ``task``       what the network is trained for
    ``section``    the section of the paper that says the options in ``stated``
    ``published``  options on which the paper is silent, from the published configuration

    The learning rate is for the batch size that stands with it. Connections have no rate of their own.
    """

    of: str
    task: str
    section: str
    stated: Mapping[str, Any]
    published: Mapping[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """All of its options by name."""
        return {**self.stated, **self.published}


_PAPERS_FORM = {"attention_init": "paper", "min_hidden": 1}
_CROPS = {"augment": "standard", "crop_scale": 0.1, "crop_ratio": 1.25, "val_resize": 256}

RECIPES: dict[str, TrainingRecipe] = {
    "paper": TrainingRecipe(
        "ResNets on ImageNet (Table 1)",
        "classification",
        "4.1",
        {
            "optimizer": "sgd",
            "lr": 0.1,
            "batch_size": 256,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "epochs": 100,
            "schedule": "step",
            "step_epochs": 30,
            "image_size": 224,
        },
        {"nesterov": False, "decayed": "all", **_CROPS, **_PAPERS_FORM},
    ),
    "paper-mobile": TrainingRecipe(
        "MobileNetV2 and MnasNet on ImageNet (Table 1)",
        "classification",
        "4.1",
        {"optimizer": "sgd", "momentum": 0.9, "image_size": 224},
        {
            "lr": 0.1,
            "batch_size": 512,
            "weight_decay": 4e-5,
            "epochs": 150,
            "schedule": "cosine",
            "warmup_epochs": 5.0,
            "nesterov": False,
            "decayed": "dense",
            **_CROPS,
            **_PAPERS_FORM,
        },
    ),
    "paper-detection": TrainingRecipe(
        "RetinaNet on COCO (Table 3; Cascade R-CNN with --lr 0.02)",
        "detection",
        "4.4",
        {
            "optimizer": "sgd",
            "lr": 0.01,
            "batch_size": 16,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "epochs": 24,
            "schedule": "multistep",
            "milestones": "18,22",
        },
        {
            "nesterov": False,
            "decayed": "all",
            "clip_norm": 35.0,
            "warmup_steps": 500,
            "warmup_from": 1 / 3,
            "augment": "standard",
            **_PAPERS_FORM,
        },
    ),
}
"""Name -> the training; ``dcafy.runs.options.chosen`` makes options of it."""


def explained() -> str:
    """What each recipe is, as the help says it: the options of the paper's section, and those of the published code."""
    return " ".join(
        f"{name}: {recipe.of}; section {recipe.section}: {_written(recipe.stated)}; where the paper is silent, as "
        f"published: {_written(recipe.published)}."
        for name, recipe in RECIPES.items()
    )


def _written(options: Mapping[str, Any]) -> str:
    """Options as they stand on a command line."""
    flags = {True: "--{}", False: "--no-{}"}
    words = []
    for name, value in options.items():
        dashed = name.replace("_", "-")
        plain = f"{value:.3g}" if isinstance(value, float) else str(value)
        words.append(flags[value].format(dashed) if isinstance(value, bool) else f"--{dashed} {plain}")
    return " ".join(words)
