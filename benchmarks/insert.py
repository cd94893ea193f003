"""dcafy.insert on every torchvision classification model: how many units get attention, and is it an identity?

    python benchmarks/insert.py                 # writes benchmarks/results/insert.md
    python benchmarks/insert.py resnet18 vgg11  # measures only these anew

Models run at a small image size where they take one. ``identity``: outputs of
the original and of the model with SE bit-identical in eval mode, with batch norm statistics and gains away from
their initial values. Models over --largest parameters are built without data: their structure is shown, and
nothing is computed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "insert.md"
ROWS = RESULT.with_suffix(".json")
LARGEST = 100_000_000
"""Parameters up to which a model is built with data."""
AT_ONCE = 8
"""Models per process."""


def names() -> list[str]:
    import torchvision

    return sorted(torchvision.models.list_models(module=torchvision.models))


def examine(name: str, largest: int) -> dict[str, Any]:
    """One row of the table."""
    import torch
    import torchvision

    import dcafy

    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    try:
        with torch.device("meta"):
            model = torchvision.models.get_model(name, weights=None, **options).eval()
    except NotImplementedError:  # RegNet computes its widths with tensors
        model = torchvision.models.get_model(name, weights=None, **options).eval().to("meta")
    size = _side(model, name)
    count = sum(p.numel() for p in model.parameters())
    row: dict[str, Any] = {"name": name, "parameters": count, "size": size}
    with_data = count <= largest
    if with_data:
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None, **options).eval()
        _leave_initial_values(model)
    example = torch.rand(2, 3, size, size, device=None if with_data else "meta")
    try:
        result = dcafy.insert(model, "se", example_inputs=example)
    except dcafy.DcafyError as error:
        return {**row, "units": 0, "says": str(error).partition(". ")[0]}
    row["units"] = sum(path.rpartition(".")[2] in ("se", "se_") for path, _ in _new(model, result))
    plan = dcafy.inspect(result, example_inputs=example)
    new = {path for path, _ in _new(model, result)}
    row["found"] = sum(block.name in new for block in plan.blocks)
    row["links"] = len(plan.links)
    if with_data:
        with torch.no_grad():
            row["identity"] = torch.equal(model(example), result(example))
    return row


def _side(model: Any, name: str) -> int:
    """The image side to look with: the model's own where it takes only that one."""
    own = getattr(model, "image_size", None)
    return own if isinstance(own, int) else 224 if name.startswith(("maxvit", "vit")) else 128


def _leave_initial_values(model: Any) -> None:
    import torch
    from torch import nn

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.7, 1.3)
                module.bias.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:
                parameter.uniform_(0.5, 1.0)


def _new(model: Any, result: Any) -> list[tuple[str, Any]]:
    old = dict(model.named_modules())
    return [(path, module) for path, module in result.named_modules() if path not in old]


def rows(chosen: list[str], largest: int) -> list[dict[str, Any]]:
    """Every row, from processes of a few models each: one that ends early costs only its own."""
    from rich.progress import track

    found: dict[str, dict[str, Any]] = {}
    for name in track(chosen, description="insert"):
        if name in found:
            continue
        several = [other for other in chosen if other not in found][:AT_ONCE]
        command = [sys.executable, __file__, "--largest", str(largest), "--only", *several]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                row = json.loads(line)
                found[row["name"]] = row
        if name not in found:
            last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
            found[name] = {"name": name, "parameters": 0, "units": 0, "says": f"FAILED: {last}"}
    return [found[name] for name in chosen]


def document(results: list[dict[str, Any]], largest: int) -> str:
    """The table as Markdown."""
    from importlib.metadata import version

    worked = [row for row in results if row["units"]]
    checked = [row for row in worked if "identity" in row]
    lines = [
        "# dcafy.insert on every torchvision classification model",
        "",
        f"`python benchmarks/insert.py`, torch {version('torch')}, torchvision {version('torchvision')}: SE, "
        f'`where="auto"`, `init="identity"`. {len(worked)} of {len(results)} models have units; '
        f"{sum(row['identity'] for row in checked)} of the {len(checked)} that were run give bit-identical outputs. "
        f"Models over {largest // 1_000_000}M parameters were built without data (-). *found*: inserted blocks that "
        "`dcafy.inspect` finds again; *connections*: of the result, with the blocks that the model had before.",
        "",
        "| model | parameters | image | units | found | connections | identity | says |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for row in results:
        identity = {True: "yes", False: "NO", None: "-"}[row.get("identity")]
        cells = [row["name"], f"{row['parameters']:,}", row.get("size", ""), row["units"], row.get("found", "")]
        cells += [row.get("links", ""), identity if row["units"] else "", row.get("says", "")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names of torchvision models; all of them by default")
    parser.add_argument("--largest", type=int, default=LARGEST, help="parameters up to which a model is run")
    parser.add_argument("--only", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        for name in options.only:
            print(json.dumps(examine(name, options.largest)), flush=True)
        return
    measured = {row["name"]: row for row in rows(options.models or names(), options.largest)}
    kept = {row["name"]: row for row in json.loads(ROWS.read_text())} if options.models and ROWS.exists() else {}
    results = sorted({**kept, **measured}.values(), key=lambda row: str(row["name"]))
    RESULT.parent.mkdir(exist_ok=True)
    ROWS.write_text("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n")
    RESULT.write_text(document(results, options.largest))
    print(f"wrote {RESULT}")


if __name__ == "__main__":
    main()
