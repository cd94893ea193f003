"""Whole zoos through dcafy, network by network, each in its own process; results in a JSONL and a table.

    python benchmarks/zoo.py                                        # everything torchvision and timm build
    python benchmarks/zoo.py --yardstick zoo.jsonl --stage full     # score against a list, check the rules
    python benchmarks/zoo.py --only 'timm:se*' --limit 5 --jobs 2

A run that was stopped goes on where it was: rows already in the JSONL are not made again (``--again``
makes those anew that failed). ``--yardstick`` takes a JSONL of ``{"model": ..., "blocks": [{"module": ...}]}``.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib
import json
import multiprocessing
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OURS = (str(HERE), str(HERE.parent))

Row = dict[str, Any]

PRELOADED = ["torch", "torchvision", "timm", "timm.models", "zoo_checks"]
"""Imported once; every network's process starts as a copy of the one that has them."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", help="models such as timm:seresnet50; default: all, or the yardstick's")
    parser.add_argument("--yardstick", type=Path, help="JSONL of the modules that hold attention, to score against")
    parser.add_argument("--stage", choices=["inspect", "full"], default="full")
    parser.add_argument("--only", action="append", metavar="GLOB", help="of these only (may be given several times)")
    parser.add_argument("--limit", type=int, help="at most so many")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=900, help="seconds for each network")
    parser.add_argument("--memory", type=float, default=12, help="GB for each network")
    parser.add_argument("--again", action="store_true", help="make the rows anew that failed")
    parser.add_argument("--results", type=Path, default=HERE.parent / ".benchmarks" / "zoo.jsonl")
    parser.add_argument("--report", type=Path, help="write the tables here, as Markdown")
    return parser.parse_args()


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSONL; the half line of a killed run is skipped."""
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)


def read_yardstick(path: Path) -> dict[str, list[str]]:
    return {row["model"]: [block["module"] for block in row["blocks"]] for row in read_rows(path)}


def every_model() -> list[str]:
    """The names of everything that torchvision and timm list."""
    from dcafy.zoos.packages import ZOOS, installed_names

    return [f"{prefix}:{name}" for prefix, zoo in ZOOS.items() for name in installed_names(zoo)]


# -- one network, in its own process ---------------------------------------------------------------


def run_one(spec: str, stage: str, expected: list[str] | None, timeout: float, memory: float) -> Row:
    """The row of one network; of a process that died or ran out of time, what it had reported and where it was."""
    zoo_checks = importlib.import_module("zoo_checks")
    ours, theirs = multiprocessing.Pipe(duplex=False)
    start = time.monotonic()
    process = multiprocessing.Process(
        target=zoo_checks.in_child, args=(theirs, spec, stage, expected, memory), daemon=True
    )
    process.start()
    theirs.close()
    row: Row = {"model": spec, "stage": stage, "step": "start", "seconds": {}}
    ended = "died"
    while True:
        left = timeout - (time.monotonic() - start)
        if left <= 0 or not ours.poll(left):
            ended = f"took more than {timeout:.0f} s"
            process.kill()
            break
        try:
            row = ours.recv()
        except EOFError:
            break
    process.join()
    if row["step"] != "done":
        code = f" (exit code {process.exitcode})" if ended == "died" else ""
        row["error"] = f"the process {ended}{code} in step {row['step']!r}"
    row["wall"] = round(time.monotonic() - start, 2)
    return row


def failed(row: Row) -> bool:
    """Whether a row says that something of dcafy did not hold."""
    bad = [text for text in row.get("checks", {}).values() if text.startswith("failed")]
    return bool("error" in row or row.get("missed") or row.get("extra") or bad)


def run(options: argparse.Namespace, specs: list[str], yardstick: dict[str, list[str]]) -> None:
    """Appends the row of every network to the JSONL, with a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    options.results.parent.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    lock = threading.Lock()
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        options.results.open("a") as out,
        ThreadPoolExecutor(options.jobs) as pool,
    ):
        task = progress.add_task("starting", total=len(specs))

        def one(spec: str) -> None:
            progress.update(task, description=spec)
            row = run_one(spec, options.stage, yardstick.get(spec), options.timeout, options.memory)
            with lock:
                out.write(json.dumps(row) + "\n")
                out.flush()
                if failed(row):
                    progress.print(f"{spec}: {summary_of(row)}")
                progress.advance(task)

        try:
            for future in [pool.submit(one, spec) for spec in specs]:
                future.result()
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise


def summary_of(row: Row) -> str:
    """What is wrong with one network, in a line."""
    parts = [row["error"]] if "error" in row else []
    wrong = [(key, row[key]) for key in ("missed", "extra") if row.get(key)]
    parts += [f"{key} {len(names)}: {', '.join(names[:3])}" for key, names in wrong]
    parts += [f"{name} {text}" for name, text in row.get("checks", {}).items() if text.startswith("failed")]
    return "; ".join(parts)


def prepare_processes() -> None:
    """Every network's process will start as a copy of one that has imported what all need, with one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    # The server that processes start from imports what is preloaded, and sys.path does not reach it.
    os.environ["PYTHONPATH"] = os.pathsep.join([*OURS, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    multiprocessing.set_start_method("forkserver", force=True)
    multiprocessing.set_forkserver_preload(PRELOADED)
    importlib.import_module("zoo_checks")  # the server ignores what cannot be imported: that is to fail here


def main() -> None:
    options = arguments()
    sys.path[:0] = OURS
    import zoo_report

    prepare_processes()
    yardstick = read_yardstick(options.yardstick) if options.yardstick else {}
    specs = options.specs or list(yardstick) or every_model()
    if options.only:
        specs = [spec for spec in specs if any(fnmatch.fnmatch(spec, glob) for glob in options.only)]
    specs = specs[: options.limit]
    rows = {row["model"]: row for row in read_rows(options.results) if row["stage"] == options.stage}
    open_specs = [s for s in specs if s not in rows or (options.again and failed(rows[s]))]
    random.Random(0).shuffle(open_specs)  # neighbours in the list are alike; so the time left is a fair guess
    print(f"{len(specs)} networks, {len(specs) - len(open_specs)} of them known already", file=sys.stderr)
    run(options, open_specs, yardstick)
    rows = {row["model"]: row for row in read_rows(options.results) if row["stage"] == options.stage}
    text = zoo_report.report([rows[spec] for spec in specs])
    print(text)
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(text)


if __name__ == "__main__":
    main()
