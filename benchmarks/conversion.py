"""What a conversion costs: time against a bare ``torch.fx.symbolic_trace`` of the same network, and memory.

    python benchmarks/conversion.py                     # writes benchmarks/results/conversion.md
    python benchmarks/conversion.py --repetitions 3 timm:seresnet50

Each network has a process of its own and one thread. In every repetition the bare trace is timed twice and
the conversion (``inspect``, then ``convert(plan=plan, verify=False, copy=False)``) once, in an order that
changes from one to the next: the ratio of the two bare traces is how far a ratio of 1 strays here.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

NETWORKS = {
    "torchvision:efficientnet_b0": False,
    "torchvision:efficientnet_b7": False,
    "torchvision:regnet_y_128gf": True,
    "timm:seresnet152d": False,
    "timm:legacy_senet154": False,
}
"""Spec -> whether it is built on the meta device (645 M parameters need no storage to be timed)."""

GOAL = 5.0
TIME_HEADER = ["network", "blocks", "bare trace s", "inspect s", "whole s", "whole / bare", "bare / bare", "within 5x"]
MEMORY_HEADER = ["network", "M parameters", "weights", "connections", "second copy", "peak"]

Row = dict[str, Any]


def seconds(work: Callable[[], object]) -> float:
    """Processor seconds: one thread, so they are those of a quiet machine's clock, and steadier on a busy one."""
    gc.collect()
    gc.disable()
    try:
        start = time.process_time()
        work()
        return time.process_time() - start
    finally:
        gc.enable()


def measure(connection: Any, spec: str, on_meta: bool, repetitions: int) -> None:
    import torch

    import dcafy
    from dcafy.zoos.specs import parse

    torch.set_num_threads(1)
    model = parse(spec, {}).build(on_meta=on_meta).eval()
    plan = dcafy.inspect(model)

    def bare() -> object:
        return torch.fx.symbolic_trace(model)

    def find() -> object:
        return dcafy.inspect(model)

    def whole() -> object:
        found = dcafy.inspect(model)
        return dcafy.convert(model, plan=found, verify=False, copy=False)

    for warm_up in (bare, whole):  # torch loads its meta kernels at first use
        warm_up()
    order = [("bare", bare), ("bare again", bare), ("inspect", find), ("whole", whole)]
    times: dict[str, list[float]] = {name: [] for name, _ in order}
    for repetition in range(repetitions):
        shift = repetition % len(order)
        for name, work in order[shift:] + order[:shift]:
            times[name].append(seconds(work))
    connection.send(
        {
            "blocks": len(plan.blocks),
            "links": len(plan.links),
            "parameters": sum(p.numel() for p in model.parameters()),
            "times": times,
            **memory(model, plan),
        }
    )


def memory(model: Any, plan: Any) -> Row:
    """MB of the weights, of the new parameters, of weights that exist twice, and by how much the peak rose."""
    import dcafy

    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    converted = dcafy.convert(model, plan=plan, verify=False, copy=False)
    peak = resident("VmHWM")
    theirs = {id(t): t for t in (*model.parameters(), *model.buffers())}
    ours = {id(t): (n, t) for n, t in (*converted.named_parameters(), *converted.named_buffers())}
    new = [(name, t) for key, (name, t) in ours.items() if key not in theirs]
    return {
        "weights": megabytes(theirs.values()),
        "connections": megabytes(t for name, t in new if "dca" in name.split(".")),
        "second copy": megabytes(t for name, t in new if "dca" not in name.split(".")),
        "peak": max(0.0, peak - before),
        "on_meta": any(t.is_meta for t in theirs.values()),
    }


def megabytes(tensors: Any) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


def resident(field: str) -> float:
    """A field of this process's memory status, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def in_own_process(spec: str, on_meta: bool, repetitions: int) -> Row:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(theirs, spec, on_meta, repetitions))
    process.start()
    theirs.close()
    try:
        row: Row = ours.recv()
    except EOFError:
        raise SystemExit(f"{spec}: its process died, see above") from None
    finally:
        process.join()
    return row


def spread(values: list[float]) -> str:
    """Median, and the middle half in brackets."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def ratios(times: dict[str, list[float]], above: str, below: str) -> list[float]:
    return [a / b for a, b in zip(times[above], times[below], strict=True)]


def lines_of(spec: str, row: Row) -> tuple[list[str], list[str]]:
    """The row of the table of times, and of the table of memory."""
    times = row["times"]
    both = ratios(times, "whole", "bare")
    verdict = "yes" if statistics.median(both) <= GOAL else "no"
    time_line = [spec, str(row["blocks"]), f"{statistics.median(times['bare']):.3f}"]
    time_line += [f"{statistics.median(times[name]):.3f}" for name in ("inspect", "whole")]
    time_line += [spread(both), spread(ratios(times, "bare again", "bare")), verdict]
    where = " (meta)" if row["on_meta"] else ""
    memory_line = [spec, f"{row['parameters'] / 1e6:.1f}", f"{row['weights']:.0f}{where}", f"{row['connections']:.1f}"]
    memory_line += [f"{row['second copy']:.1f}", "" if row["on_meta"] else f"{row['peak']:.0f}"]
    return time_line, memory_line


def document(rows: dict[str, Row], repetitions: int, load: str) -> str:
    import torch
    import torchvision

    import dcafy

    time_lines, memory_lines = zip(*(lines_of(spec, row) for spec, row in rows.items()), strict=True)
    versions = [f"dcafy {dcafy.__version__}", f"torch {torch.__version__}", f"torchvision {torchvision.__version__}"]
    versions += [_timm(), f"Python {platform.python_version()}", f"{os.cpu_count()} cores"]
    return f"""# What a conversion costs

{datetime.date.today().isoformat()}; {", ".join(versions)}; load average before and after: {load}.
Made by `python {" ".join(["benchmarks/conversion.py", *sys.argv[1:]])}`.

## Time

Processor seconds on one thread, medians of {repetitions} repetitions. `whole` is `inspect`, then
`convert(plan=plan, verify=False, copy=False)`. Ratios are paired, repetition by repetition: median and, in
brackets, the middle half. The ratio of two bare traces says how far a ratio of 1 strays.

{markdown(TIME_HEADER, time_lines)}

## Memory

MB. `second copy` counts the bytes of parameters and buffers of the converted network that are neither the
original's own tensors nor connections. `peak` is by how much the resident memory of the process rose at most
during `convert`; it holds the connections and the graph, too.

{markdown(MEMORY_HEADER, memory_lines)}
"""


def _timm() -> str:
    import timm

    return f"timm {timm.__version__}"


def markdown(header: list[str], lines: tuple[list[str], ...]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", default=list(NETWORKS))
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--report", type=Path, default=HERE / "results" / "conversion.md")
    options = parser.parse_args()
    if options.repetitions < 2:
        parser.error("--repetitions: at least 2, or nothing can be said about the spread")
    os.environ["OMP_NUM_THREADS"] = "1"
    before = os.getloadavg()[0]
    rows = {}
    for spec in options.specs:
        print(spec, file=sys.stderr)
        rows[spec] = in_own_process(spec, NETWORKS.get(spec, False), options.repetitions)
    text = document(rows, options.repetitions, f"{before:.1f}, {os.getloadavg()[0]:.1f}")
    print(text)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(text)


if __name__ == "__main__":
    main()
