"""A timm checkpoint, connected and fine-tuned, with timm's own transforms and dcafy's training loop.

python examples/finetune_timm.py seresnet50.ra2_in1k             # timm's weights, which are downloaded
python examples/finetune_timm.py test_efficientnet --untrained   # no weights: works offline
python examples/finetune_timm.py seresnet50 --data pictures      # a folder for each class, instead of digits
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import timm
import torch

import dcafy
from dcafy.images.options import DataOptions
from dcafy.training import History, TrainingConfig, finetune, open_data


class Shown(torch.utils.data.Dataset):
    """Pictures with labels, made ready by a transform of timm's."""

    def __init__(self, pictures, transform, most: int | None) -> None:
        self.pictures, self.transform = pictures, transform
        self.most = len(pictures) if most is None else min(most, len(pictures))

    def __len__(self) -> int:
        return self.most

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        picture, label = self.pictures[index]
        return self.transform(picture.convert("RGB")), label


def main(arguments: Sequence[str] | None = None) -> History:
    """What the training has measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="seresnet50.ra2_in1k")
    parser.add_argument("--untrained", action="store_true", help="do not download weights")
    parser.add_argument("--data", default="digits", help="digits, or imagefolder:PATH as in dcafy finetune")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, help="train and validate on so many images at most")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    data = open_data(options.data, DataOptions())
    model = timm.create_model(options.model, pretrained=not options.untrained, num_classes=len(data.classes))
    config = timm.data.resolve_model_data_config(model)
    train, val = (
        Shown(part, timm.data.create_transform(**config, is_training=training, hflip=0.0), options.images)
        for part, training in ((data.train, True), (data.val, False))
    )

    model = dcafy.convert(model)
    history = finetune(model, train, val, TrainingConfig(epochs=options.epochs, ema=0.99))
    for epoch in history.epochs:
        print(f"epoch {epoch.epoch}: loss {epoch.loss:.4f}, accuracy {epoch.metrics['top1']:.2%}")
    if history.usage is not None:
        for row in history.usage.connections:
            print(f"{row.name:<24} loss if cut {row.cut.loss:+.4f} ± {row.cut.loss_error or 0:.4f}")
    return history


if __name__ == "__main__":
    main()
