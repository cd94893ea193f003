"""A torchvision checkpoint, connected and fine-tuned in a loop of plain PyTorch: dcafy is two calls in it.

python examples/finetune_torchvision.py                          # torchvision's own weights, which are downloaded
python examples/finetune_torchvision.py --weights my_weights.pth # or a state dict of yours
python examples/finetune_torchvision.py --data pictures          # a folder for each class, instead of digits
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

import dcafy


def images(folder: str | None, size: int) -> tuple[Dataset, int]:
    """Pictures in folders, one for each class, or scikit-learn's digits; and the number of classes."""
    if folder is not None:
        v2 = torchvision.transforms.v2
        scaled = [v2.Resize((size, size)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        normalised = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        found = torchvision.datasets.ImageFolder(folder, v2.Compose([*scaled, normalised]))
        return found, len(found.classes)
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    enlarged = nn.functional.interpolate(grey, size=size, mode="bilinear").repeat(1, 3, 1, 1)
    return TensorDataset(enlarged, torch.tensor(digits.target)), 10


def main(arguments: Sequence[str] | None = None) -> tuple[float, nn.Module]:
    """The accuracy on a fifth of the images that were not trained on, and the network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="DEFAULT", help="torchvision's name for them, or a file")
    parser.add_argument("--data", help="a folder with a folder for each class (default: scikit-learn's digits)")
    parser.add_argument("--size", type=int, default=96, help="side of the images in pixels")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, help="stop each epoch after so many steps")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    data, classes = images(options.data, options.size)
    train, test = random_split(data, [0.8, 0.2])

    named = options.weights in torchvision.models.MobileNet_V3_Small_Weights.__members__
    model = torchvision.models.mobilenet_v3_small(weights=options.weights if named else None)
    if not named:
        model.load_state_dict(torch.load(options.weights, weights_only=True))
    model.classifier[-1] = nn.Linear(1024, classes)

    model = dcafy.convert(model, example_inputs=torch.zeros(2, 3, options.size, options.size))
    groups = dcafy.parameter_groups(model, lr=5e-4, connection_lr=5e-3, weight_decay=1e-2)
    optimizer = torch.optim.AdamW(groups)

    for epoch in range(options.epochs):
        model.train()
        for step, (batch, labels) in enumerate(DataLoader(train, batch_size=32, shuffle=True, drop_last=True)):
            if step == options.steps:
                break
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(batch), labels)
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: last loss {loss.item():.4f}")

    model.eval()
    with torch.no_grad():
        right = sum(
            (model(batch).argmax(1) == labels).sum().item() for batch, labels in DataLoader(test, batch_size=64)
        )
    for name, connection in dcafy.connections(model).items():
        print(f"{name:<24} α {connection.alpha.item():.4f}  β {connection.beta.item():+.4f}")
    print(f"accuracy on {len(test)} images: {right / len(test):.2%}")
    return right / len(test), model


if __name__ == "__main__":
    main()
