"""What other libraries do with a connected model: does it work, beside the same on the original?

    python benchmarks/clients.py                                     # every case, as a table
    python benchmarks/clients.py --only 'timm/*' peft/lora           # these
    python benchmarks/clients.py --write benchmarks/results/clients.md

Each case of ``client_cases`` runs in a process of its own (those of two processes under torchrun) on the original
network and on the connected one. Networks are small and have random weights, with values as after training. Where a
client is to give what it gives on the original, connections are at their start (α = 1, β = 0); where they are to
count, α, β and the matching layers are moved away from it, and the model's output is checked to be another one. A
client that is not installed is reported as such; the exit code is 1 where a case works on the original only. All of
them besides what dcafy itself needs::

    pip install accelerate captum fastai grad-cam lightning onnxruntime onnxscript peft segmentation-models-pytorch \
        timm torch-pruning torchao torchinfo transformers
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OURS = (str(HERE), str(HERE.parent), str(HERE.parent / "tests"))
sys.path[:0] = OURS

MARK = "case: "
"""What the line begins with on which a process says how a case went."""

ALWAYS = ("torch", "torchvision", "timm")

Row = dict[str, Any]


# -- in the process of a case --------------------------------------------------------------------------------------


def outcome(name: str, side_name: str) -> str:
    """``works``, with a detail where there is one, or ``fails`` with the reason."""
    from client_cases import CASES, Side

    try:
        detail = CASES[name].run(Side(side_name))
    except Exception as error:  # clients fail in every way
        traceback.print_exc()
        return f"fails: {reason(error)}"
    return f"works: {detail}" if detail else "works"


def reason(error: BaseException) -> str:
    """The kind of an error that is not a comparison's, and the first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = "" if type(error).__name__ == "Differs" else f"{type(error).__name__}: "
    return f"{kind}{lines[0] if lines else 'without a word'}"[:300]


def in_child(name: str, sides: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # clients' own deprecations
    for side in sides:
        told = outcome(name, side)
        print(f"\n{MARK}{json.dumps({'side': side, 'outcome': told})}", flush=True)


# -- in the process that asks --------------------------------------------------------------------------------------


def examine(name: str, timeout: float, verbose: bool) -> Row:
    """The row of one case."""
    from client_cases import CASES

    case = CASES[name]
    row: Row = {"name": name, "client": case.client, "compares": case.compares}
    missing = [need for need in (case.client, *case.needs) if version(need) is None]
    if missing:
        return {**row, **dict.fromkeys(("original", "converted"), f"not installed: {', '.join(missing)}")}
    command = [sys.executable]
    if case.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.processes}"]
    # Where processes wait for each other, a side that failed in one of them would hold up the next side.
    runs = [["original"], ["converted"]] if case.processes > 1 else [["original", "converted"]]
    for sides in runs:
        row.update(_told([*command, __file__, "--case", name, *sides], sides, timeout, verbose))
    return row


def _told(command: list[str], sides: list[str], timeout: float, verbose: bool) -> dict[str, str]:
    """Side -> its outcome, as the processes of a command say it; of several, what failed counts."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=timeout, env=environment, errors="replace"
        )
        ended, printed = f"ended with code {done.returncode}", (done.stdout, done.stderr)
    except subprocess.TimeoutExpired as error:
        ended = f"took more than {timeout:.0f} s"
        printed = tuple(part.decode(errors="replace") if part else "" for part in (error.stdout, error.stderr))
    told: dict[str, str] = {}
    for line in printed[0].splitlines():
        _, found, text = line.partition(MARK)
        if found:
            one = json.loads(text)
            if told.get(one["side"], "works").startswith("works"):
                told[one["side"]] = one["outcome"]
    result = {side: told.get(side, f"fails: its process {ended}") for side in sides}
    if verbose and any(text.startswith("fails") for text in result.values()):
        print(printed[1][-3000:], file=sys.stderr)
    return result


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


# -- the table -----------------------------------------------------------------------------------------------------


def lost(rows: list[Row]) -> list[Row]:
    """What works on the original only."""
    return [row for row in rows if row["original"].startswith("works") and not row["converted"].startswith("works")]


def document(rows: list[Row], command: str) -> str:
    import dcafy

    clients = dict.fromkeys([*ALWAYS, *(row["client"] for row in rows)])
    versions = [f"{client} {version(client) or '(not installed)'}" for client in clients]
    works = {side: sum(row[side].startswith("works") for row in rows) for side in ("original", "converted")}
    lines = [
        "# What other libraries do with a connected model",
        "",
        f"{time.strftime('%Y-%m-%d')}; dcafy {dcafy.__version__}, Python {platform.python_version()}, CPU; "
        f"{', '.join(versions)}. Made by `{command}`.",
        "",
        f"{len(rows)} cases: {works['original']} work on the original network, {works['converted']} on the connected "
        f"one; {len(lost(rows))} only on the original. Every network is small, with random weights and values as "
        "after training. Connections are at their start where a client is to give what it gives on the original, and "
        "away from it where they are to count.",
        "",
        "| case | what is compared | original | connected |",
        "|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["name"], row["compares"], row["original"], row["converted"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of cases, or patterns such as 'timm/*'")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table here, as Markdown")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each process of a case")
    parser.add_argument("--verbose", action="store_true", help="show what a failed case printed on stderr")
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        in_child(options.case[0], options.case[1:])
        return
    from client_cases import CASES

    only = options.only or ["*"]
    unknown = [pattern for pattern in only if not fnmatch.filter(CASES, pattern)]
    if unknown:
        parser.error(f"no case is called {', '.join(unknown)}; there are {', '.join(CASES)}")
    rows = []
    for name in sorted(CASES):
        if any(fnmatch.fnmatch(name, pattern) for pattern in only):
            start = time.monotonic()
            row = examine(name, options.timeout, options.verbose)
            rows.append(row)
            print(f"{name} ({time.monotonic() - start:.0f} s)", file=sys.stderr)
            for side in ("original", "converted"):
                print(f"    {side}: {row[side]}", file=sys.stderr)
    text = document(rows, " ".join(["python benchmarks/clients.py", *sys.argv[1:]]))
    print(text)
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(text)
    if lost(rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
