"""SIGKILL at random moments: a training goes on to the very bits of an unbroken one; a saved folder is old or new.

    python benchmarks/kills.py --kills 100 --seed 1
    python benchmarks/kills.py --kills 10 --seed 1 --ways bf16 compare
    python benchmarks/kills.py --kills 100 --seed 1 --ways save
    python benchmarks/kills.py --kills 20 --seed 1 --ways convert export

Everything is imported once. Each attempt is a fork that runs the very command (``dcafy finetune``, then with
``--resume``) until it is killed or done. ``--kills`` counts those in training, over all ways, and those in each of
``save``, ``convert -o`` and ``export -o``, over what is there: it is then old or new, whole, and so is a folder's card.
What is compared: the model, the checkpoint, the request, the log without its seconds, ``compare.json`` without times,
and the names of the files. The last line has the totals as JSON; the exit code is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import dcafy

COMMON = (
    *("--image-size", "8", "--epochs", "3", "--batch-size", "12", "--val-fraction", "0.25", "--usage-images", "16"),
    "--cpu",
)

WAYS: dict[str, tuple[str, ...]] = {
    "plain": ("--checkpoint-steps", "1"),
    "bf16": ("--precision", "bf16", "--checkpoint-steps", "1", "--ema", "0.99"),
    "average, mixed": ("--checkpoint-steps", "2", "--ema", "0.9", "--mixup", "0.2", "--cutmix", "0.3"),
    "accumulated": ("--optimizer", "sgd", "--accumulate", "2", "--checkpoint-steps", "3"),
    "frozen at first": ("--freeze-base-epochs", "1", "--augment", "trivial", "--checkpoint-steps", "1"),
    "workers": ("--checkpoint-steps", "1", "--workers", "1"),
    "clipped": ("--clip-norm", "0.5", "--warmup-epochs", "1", "--label-smoothing", "0.1"),
    "compare": ("--compare", "--seeds", "2", "--checkpoint-steps", "2", "--epochs", "2"),
    "further": ("--checkpoint-steps", "1", "--ema", "0.9", "--epochs", "2"),
}
"""Options of a training: what a checkpoint has to hold differs from one to the other."""

FURTHER = {"further": 4}
"""A training that has ended is trained further, to so many epochs in all."""


# --- a small network ----------------------------------------------------------------------------------------


class Squeeze(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Small(nn.Module):
    """Three blocks of convolution, batch norm and attention; dropout before the classifier."""

    def __init__(self, num_classes: int = 10, extra: int = 1) -> None:
        super().__init__()
        widths = (3, 8, 12, 16)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), Squeeze(o))
                for i, o in itertools.pairwise(widths)
            )
        )
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(16, num_classes)
        self.extra = nn.Parameter(torch.rand(extra))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.blocks(x).mean((2, 3)))) + 0 * self.extra.sum()


def small(num_classes: int = 10) -> nn.Module:
    """The network that is trained, under the name that the command has for it."""
    torch.manual_seed(0)
    return Small(num_classes)


# --- attempts -----------------------------------------------------------------------------------------------


def forked(work: Callable[[], None], log: Path) -> int:
    """The number of a process that does the work; what it says goes to ``log``."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1), os.dup2(handle, 2)
        work()
        code = 0
    except SystemExit as ending:
        code = int(ending.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def ended(child: int, seconds: float) -> int | None:
    """The exit code of the process; ``None`` where it was killed after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if code == -signal.SIGKILL else code


def _command(*arguments: str) -> None:
    from dcafy.cli import app

    app(prog_name="dcafy", args=list(arguments))


def command(folder: Path, options: tuple[str, ...], resume: bool) -> None:
    """``dcafy finetune`` in this process, on the images beside the folder."""
    named = ("finetune", "kills:small", "--data", f"imagefolder:{folder.parent / 'images'}", "-o", str(folder))
    _command(*named, *COMMON, *options, *(("--resume",) if resume else ()))


def further(folder: Path, epochs: int) -> None:
    """``--resume --epochs MORE`` for a run that has ended; after a kill the same once more."""
    _command("finetune", "kills:small", "-o", str(folder), "--resume", "--epochs", str(epochs))


def paint(folder: Path) -> None:
    """A folder of 96 small images in four classes."""
    numbers = np.random.default_rng(0)
    for number in range(96):
        place = folder / f"class{number % 4}"
        place.mkdir(parents=True, exist_ok=True)
        values = numbers.integers(0, 160, (8, 8, 3)) + 30 * (number % 4)
        Image.fromarray(values.astype(np.uint8)).save(place / f"{number}.png")


def left(folder: Path) -> dict[str, Any]:
    """All that has to be equal, by file."""
    return {str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        return {key: (str(t.dtype), t.shape, t.reshape(-1).view(torch.uint8).tolist()) for key, t in tensors.items()}
    if path.name == "log.jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows if row["event"] != "begin"]
    if path.suffix == ".json":
        data = json.loads(path.read_text())
        for side in ("original", "connected"):
            data.get(side, {}).pop("step_seconds", None)
        return data
    return "there"


def trained_to_the_end(way: str, kills: int, chosen: random.Random, place: Path) -> tuple[int, list[str]]:
    """How often a training was killed (``kills`` times, where it lasts) and the files in which it ends otherwise."""
    paint(place / "images")
    options = (*WAYS[way], "--seed", str(chosen.randrange(1000)))
    unbroken, broken, log = place / "unbroken", place / "broken", place / "log"
    parts: list[Callable[[Path, bool], None]] = [lambda folder, again: command(folder, options, again)]
    if way in FURTHER:
        parts.append(lambda folder, again: further(folder, FURTHER[way]))
    killed, attempts, whole = 0, 0, []
    for part in parts:
        start = time.monotonic()
        code = ended(forked(functools.partial(part, unbroken, False), log), 600)
        whole.append(time.monotonic() - start)
        if code != 0:
            return 0, [f"the unbroken run ended with {code}: {log.read_text()[-300:]}"]
    for number, (part, taken) in enumerate(zip(parts, whole, strict=True), start=1):
        again = False
        while True:
            # Half of the kills come early, so that there is progress to be lost for many of them.
            early = chosen.uniform(0.02, taken * chosen.choice((0.25, 0.5, 0.9)))
            patience = early if killed < kills * number // len(parts) else 600
            code = ended(forked(functools.partial(part, broken, again), log), patience)
            attempts, again = attempts + 1, True
            if code is None:
                killed += 1
            elif code == 0:
                break
            else:
                return killed, [f"attempt {attempts} ended with {code}: {log.read_text()[-300:]}"]
    one, other = left(unbroken), left(broken)
    return killed, [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]


def saved(kills: int, chosen: random.Random, place: Path) -> tuple[int, list[str]]:
    """How often ``dcafy.save`` over a folder was killed, and after which kills the folder was neither old nor new."""
    versions = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = dcafy.convert(Small(extra=2_000_000), example_inputs=torch.zeros(2, 3, 8, 8))
        with torch.no_grad():
            next(iter(dcafy.connections(model).values())).beta.fill_(0.25 + seed)  # their cards differ
        versions.append(model)
    folder = place / "saved"
    return replaced(
        [functools.partial(dcafy.save, model, folder) for model in versions], functools.partial(_saved, folder), kills,
        chosen, place,
    )  # fmt: skip


def _saved(folder: Path) -> Any:
    """What is in a folder, and what its card says; a folder without one is as good."""
    found = dcafy.load(folder, model=Small(extra=2_000_000)).state_dict()
    return {key: value.reshape(-1)[:50].tolist() for key, value in found.items()}, _card(folder)


def _card(folder: Path) -> str:
    card = folder / "README.md"
    return card.read_text() if card.exists() else ""


def converted(kills: int, chosen: random.Random, place: Path) -> tuple[int, list[str]]:
    """As :func:`saved`, of ``dcafy convert -o FOLDER --overwrite``."""
    folder = place / "converted"
    acts = [
        functools.partial(_command, "convert", "kills:small", "-o", str(folder), "--overwrite", "--no-verify",
                          "--input-size", "3x8x8", "--schema", schema)
        for schema in ("direct", "weighted")
    ]  # fmt: skip
    return replaced(acts, functools.partial(_converted, folder), kills, chosen, place)


def _converted(folder: Path) -> Any:
    dcafy.load(folder, model=small())
    return json.loads((folder / "dcafy.json").read_text())["options"]["schema"], _card(folder)


def exported(kills: int, chosen: random.Random, place: Path) -> tuple[int, list[str]]:
    """As :func:`saved`, of ``dcafy export -o FILE --overwrite``."""
    paint(place / "images")
    file = place / "network.pt2"
    acts = [
        functools.partial(_command, "export", "kills:small", "--set", f"num_classes={classes}", "-o", str(file),
                          "--overwrite", "--fixed", "--image-size", "16", "--images", str(place / "images"))
        for classes in (3, 5)
    ]  # fmt: skip
    return replaced(acts, functools.partial(_exported, file), kills, chosen, place)


def _exported(file: Path) -> Any:
    with file.open("rb") as stream:
        return torch.export.load(stream).module()(torch.zeros(2, 3, 16, 16)).shape[1], ""


def replaced(
    acts: list[Callable[[], None]], look: Callable[[], Any], kills: int, chosen: random.Random, place: Path
) -> tuple[int, list[str]]:
    """How often one of two acts was killed as it took the other's place, and what was then neither old nor new."""
    log, killed, tries, faults = place / "log", 0, 0, list[str]()
    whole, taken = [], 0.0
    for act in acts:
        start = time.monotonic()
        if ended(forked(act, log), 600) != 0:
            return 0, [f"it ended: {log.read_text()[-300:]}"]
        taken = time.monotonic() - start
        whole.append(look())
    now = 1
    while killed < kills and tries < 20 * kills:
        tries += 1
        if ended(forked(acts[1 - now], log), chosen.uniform(0.0005, 1.1 * taken)) is None:
            killed += 1
        try:
            found, card = look()
        except Exception as error:
            return killed, [*faults, f"after {tries}: {type(error).__name__}: {error}"]
        same = [number for number, (content, _) in enumerate(whole) if content == found]
        if not same:
            faults.append(f"after {tries}: neither old nor new")
        elif card not in ("", whole[same[0]][1]):
            faults.append(f"after {tries}: the card of another model")
        now = same[0] if same else now
    if ended(forked(acts[0], log), 600) != 0:
        faults.append(f"at the end: {log.read_text()[-300:]}")
    rest = [str(path.relative_to(place)) for path in place.rglob(".*")]
    return killed, [*faults, *(f"{name} is left over" for name in rest)]


OVER = {"save": saved, "convert": converted, "export": exported}
"""What takes the place of what is there -> how that is killed."""


def main() -> int:
    """The totals, in the last line, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, *OVER], default=[*WAYS, *OVER])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    sys.modules["kills"] = sys.modules["__main__"]  # the command imports it by that name
    for name in ("accelerate", "torchvision.transforms.v2", "dcafy.cli", "dcafy.runs.compare"):
        importlib.import_module(name)  # once, for all forks
    totals: dict[str, Any] = {"seed": asked.seed, "kills in training": 0, "differences": 0}
    ways = [way for way in asked.ways if way not in OVER]
    for number, way in enumerate(ways):
        kills = asked.kills // len(ways) + (number < asked.kills % len(ways))
        totals["kills in training"] += _told(way, kills, asked.seed, trained_to_the_end_of(way), totals)
    for way, act in OVER.items():
        if way in asked.ways:
            totals[f"kills in {way}"] = _told(way, asked.kills, asked.seed, act, totals)
    print(json.dumps(totals))
    return 1 if totals["differences"] else 0


def trained_to_the_end_of(way: str) -> Callable[[int, random.Random, Path], tuple[int, list[str]]]:
    """:func:`trained_to_the_end` of one way."""
    return functools.partial(trained_to_the_end, way)


def _told(
    name: str,
    kills: int,
    seed: int,
    run: Callable[[int, random.Random, Path], tuple[int, list[str]]],
    totals: dict[str, Any],
) -> int:
    """The kills that were made, in as many runs as that takes."""
    made, chosen = 0, random.Random(f"{seed} {name}")
    while made < kills:
        place = Path(tempfile.mkdtemp(prefix="kills-"))
        start = time.monotonic()
        killed, faults = run(kills - made if name in OVER else min(8, kills - made), chosen, place)
        made += killed
        totals["differences"] += len(faults)
        print(f"{name}: {killed} kills, {time.monotonic() - start:.0f} s, differs: {faults or 'nothing'}", flush=True)
        if faults:
            print(f"  kept: {place}", flush=True)
        else:
            shutil.rmtree(place)
        if not killed or faults:  # a run that is over before anything kills it, or a fault that would come again
            break
    return made


if __name__ == "__main__":
    raise SystemExit(main())
