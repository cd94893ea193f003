"""Writes what ``test_formats.py`` reads: folders, plans and runs as the dcafy that is installed writes them.

    git checkout COMMIT && python tests/formats/write.py tests/formats/COMMIT

What is written once is never written anew: a later dcafy has to read it as it is.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

import dcafy
from dcafy.cli import main

sys.path.insert(0, str(Path(__file__).parents[1]))  # where networks and trained are

from networks import CBAM, SELinear, with_attention
from trained import seeded, trained_like


def images(size: int = 48) -> torch.Tensor:
    with seeded(1):
        return torch.randn(2, 3, size, size)


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """The connected model with α and β away from the start."""
    with seeded(2), torch.no_grad():
        for connection in dcafy.connections(model).values():
            connection.alpha.uniform_(0.8, 1.2)
            connection.beta.uniform_(-0.5, 0.5)
    return model.eval()


def folder(place: Path, model: torch.nn.Module, *, base: bool = True) -> None:
    """``model`` as :func:`dcafy.save` writes it, and what it computes."""
    dcafy.save(model, place, base=base)
    with torch.no_grad():
        save_file({"images": images(), "outputs": model(images())}, place / "expected.safetensors")


def command(*arguments: object) -> str:
    """What ``dcafy`` prints."""
    printed = io.StringIO()
    sys.argv = ["dcafy", *map(str, arguments)]
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main()
    return printed.getvalue()


def write(root: Path) -> None:
    torch.use_deterministic_algorithms(True)
    networks = {
        "channel_and_spatial": lambda: with_attention(CBAM, (16, 16, 24)),
        "dense": lambda: with_attention(SELinear, (8, 8, 12)),
        "zoo": lambda: timm.create_model("test_byobnet", num_classes=10),
        "inserted": lambda: dcafy.insert(timm.create_model("test_resnet", num_classes=10), "se", reduction=8),
    }
    options = {"dense": {"topology": "dense", "schema": "weighted", "channel_match": "fc1"}}
    for name, build in networks.items():
        with seeded(0):
            model = trained_like(build(), images())
        with seeded(3):
            connected = dcafy.convert(model, example_inputs=images(), **options.get(name, {}))
        folder(root / name, moved(connected))
        if name == "channel_and_spatial":
            folder(root / "connections_only", connected, base=False)
    (root / "plan.json").write_text(command("inspect", "torchvision:mobilenet_v3_small", "--json"))
    run = root / "run"
    command(
        "finetune", "timm:test_byobnet", "--set", "num_classes=10", "--data", "digits", "-o", run, "--epochs", 1,
        "--image-size", 32, "--batch-size", 64, "--cpu", "--val-fraction", 0.1,
    )  # fmt: skip
    (root / "exit_codes.json").write_text(json.dumps(exit_codes(), indent=2) + "\n")


def exit_codes() -> dict[str, int]:
    from dcafy.cli import app
    from dcafy.cli.app import exit_code

    assert app
    kinds = [DcafyError, *_below(DcafyError)]
    made = {kind.__name__: kind("", 15) if kind.__name__ == "Interrupted" else kind("") for kind in kinds}
    return {name: exit_code(error) for name, error in sorted(made.items())}


def _below(kind: type) -> list[type]:
    return [inner for direct in kind.__subclasses__() for inner in (direct, *_below(direct))]


from dcafy.errors import DcafyError  # noqa: E402

if __name__ == "__main__":
    write(Path(sys.argv[1]))
