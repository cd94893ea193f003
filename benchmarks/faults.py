"""Thousands of hostile files, folders and arguments: each ends in a result or in one short line, and runs nothing.

    python benchmarks/faults.py --seed 1 --inputs 20000
    python benchmarks/faults.py --seed 1 --inputs 500 --parts coco pictures --keep found

Inputs are opened in forks of one warm process, with limits on the time and memory of each. A *finding* is an exception
that is not dcafy's own, a crash, more than 5 s of processor time, more than 1 GB beyond the file, a message that is not
one short printable line, a file written elsewhere, a program or a connection started, or code of the input's that ran.
The last line has the totals as JSON (after SIGINT or SIGTERM, of the inputs until then); the exit code is 1 where there
is any finding. ``hostile.py`` has the inputs. They are hostile: run it where nothing is to lose, and not as root.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import gc
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

SECONDS = 5.0
"""Processor time that an input may take."""

MEGABYTES = 1024.0
"""Memory that an input may take, beyond what its file has."""

PATIENCE = 120.0
"""Seconds on the clock after which an input hangs: it waits for something, for its processor time is bounded."""

LONGEST = 1000
"""Characters of a message."""

TOGETHER = 8
"""Inputs that one fork opens, one after the other: a fork of so large a process takes as long as most inputs."""

_PROGRAMS = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "os.fork", "os.forkpty", "pty.spawn"),
    *("subprocess.Popen", "socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request", "webbrowser.open"),
    *("os.chown", "os.link", "ftplib.connect", "http.client.connect"),
)
"""What an opened file has no reason to do, as Python's audit events call it."""


_OWN_WORKER = re.compile(r"^\(<socket\.socket [^>]*family=1,[^>]*>, '[^']*/pymp-\w+/listener-\w+'\)$")
"""Where a process of ``--workers`` hands over what it has read: a file socket of multiprocessing's."""


@dataclass
class Verdict:
    """What became of one input.

    ``end``       accepted, refused, or what went wrong: ``traceback``, ``crash``, ``slow``, ``hang``
    ``said``      the message, or where it went wrong
    ``findings``  kind -> what was found
    """

    end: str
    said: str = ""
    seconds: float = 0.0
    megabytes: float = 0.0
    findings: dict[str, str] = field(default_factory=dict)


# --- in the process of one input --------------------------------------------------------------------------


def _status(key: str) -> float:
    """A number of this process's status, in MB."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(key))


def _limit() -> None:
    """Bounds what this process may take; it ends what has already gone too far."""
    space = int((_status("VmSize") + 6 * MEGABYTES) * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(os.devnull, "r+b") as nowhere:
        for number in (0, 1, 2):
            os.dup2(nowhere.fileno(), number)


def _reads() -> bool:
    """Whether multiprocessing makes a process now, which ``--workers`` asks for: it has the same code and limits."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.endswith("multiprocessing/popen_fork.py"):
        frame = frame.f_back
    return frame is not None


class Elsewhere(PermissionError):
    """What the fuzzer keeps an input from."""


def _watch(found: dict[str, str]) -> None:
    """Has what this process does that no input may make it do written into ``found``, and keeps it from writing."""
    inside = tuple(os.path.realpath(folder) + os.sep for folder in (tempfile.gettempdir(), "/dev", "/proc"))

    def is_elsewhere(path: Any, *, itself: bool = False) -> bool:
        """Whether it leads out of the temporary folders, by links too; ``itself``: the link, where it is one."""
        if not isinstance(path, str | bytes | os.PathLike) or b"\0" in os.fsencode(path):
            return False
        folder, name = os.path.split(os.fsdecode(path))
        real = os.path.join(os.path.realpath(folder), name) if itself else os.path.realpath(os.fsdecode(path))
        return not real.startswith(inside)

    def hook(event: str, given: tuple[Any, ...]) -> None:
        touched = ""
        if event == "open":
            path, _, flags = given
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            touched = os.fsdecode(path) if writes and is_elsewhere(path) else ""
        elif event in ("os.remove", "os.rename", "os.rmdir", "shutil.rmtree"):
            touched = f"{event} {given[0]}" if is_elsewhere(given[0], itself=True) else ""
        elif event in _PROGRAMS and not (_OWN_WORKER.search(repr(given)) or (event == "os.fork" and _reads())):
            found["program"] = f"{event} {given!r}"[:300]
        if touched:
            found["file"] = touched
            raise Elsewhere(f"the fuzzer lets no input touch {touched}")

    sys.addaudithook(hook)


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/dcafy/" in frame.filename and "site-packages" not in frame.filename]
    last = f" ({Path(frames[-1].filename).name}:{frames[-1].name})" if frames else ""
    return (f"{ours[-1].filename.rpartition('/dcafy/')[2]}:{ours[-1].name}" if ours else "?") + last


def _judged(act: Callable[[], None], work: Path, found: dict[str, str]) -> Verdict:
    from dcafy.errors import DcafyError, NoAttentionError

    found.clear()
    most = int(time.process_time() + 2 * SECONDS) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak counts from here
    before, start = _status("VmRSS"), time.process_time()
    findings: dict[str, str] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            act()
        end, said = "accepted", ""
    except DcafyError as error:
        end, said = "refused", str(error)
        lines = said.split("\n") if isinstance(error, NoAttentionError) else [said]
        if not all(line.isprintable() for line in lines) or len(said) > LONGEST:
            findings["message"] = f"{type(error).__name__}, {len(said)} characters: {said[:200]!a}"
    except Elsewhere as error:
        end, said = "traceback", str(error)
    except BaseException as error:
        end, said = "traceback", f"{type(error).__name__}: {str(error)[:200]!a} @ {_where(error)}"
        findings["traceback"] = said
    seconds, megabytes = time.process_time() - start, _status("VmHWM") - before
    files = sum(path.stat().st_size for path in work.rglob("*") if path.is_file() and not path.is_symlink()) / 2**20
    if seconds > SECONDS:
        findings["slow"] = f"{seconds:.1f} s of processor time"
    if megabytes > MEGABYTES + files:
        findings["memory"] = f"{megabytes:.0f} MB"
    return Verdict(end, said, seconds, megabytes, {**findings, **found})


# --- forks --------------------------------------------------------------------------------------------------

Input = tuple[Callable[[], None], Path]
"""What opens an input, and the folder in which that is done."""


def opened(inputs: Sequence[Input]) -> list[Verdict]:
    """What becomes of each input; where one ends its process, the next ones get another."""
    verdicts: list[Verdict] = []
    while len(verdicts) < len(inputs):
        verdicts += _in_a_fork(inputs[len(verdicts) :])
    return verdicts


def _in_a_fork(inputs: Sequence[Input]) -> list[Verdict]:
    """The verdicts on the first inputs, up to one that ends the process."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        os.close(reads)
        try:
            _limit()
            found: dict[str, str] = {}
            _watch(found)
            for act, work in inputs:
                os.chdir(work)
                os.write(writes, json.dumps(vars(_judged(act, work, found))).encode() + b"\n")
        finally:
            os._exit(0)
    os.close(writes)
    text, waits = b"", True
    while waits:
        waits = bool(select.select([reads], [], [], PATIENCE)[0])
        part = os.read(reads, 2**16) if waits else b""
        text += part
        if not part:
            break
    if not waits:
        os.kill(child, signal.SIGKILL)
    os.close(reads)
    _, status, used = os.wait4(child, 0)
    verdicts = [Verdict(**json.loads(line)) for line in text.split(b"\n") if line]
    if len(verdicts) < len(inputs):
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        end = "hang" if not waits else "slow" if number == signal.SIGXCPU else "crash"
        said = f"ended by {signal.Signals(number).name}" if number else "it ended without a word"
        verdicts.append(Verdict(end, said, used.ru_utime + used.ru_stime, 0, {end: said}))
    return verdicts


# --- all inputs ---------------------------------------------------------------------------------------------


class Faults:
    """Counts what became of all inputs, and keeps the first of every kind of finding."""

    def __init__(self, keep: Path | None) -> None:
        self.keep = keep
        self.inputs: collections.Counter[str] = collections.Counter()
        self.ends: collections.Counter[str] = collections.Counter()
        self.findings: collections.Counter[str] = collections.Counter()
        self.groups: dict[tuple[str, str, str], list[str]] = {}
        self.slowest, self.largest = 0.0, 0.0

    def add(self, part: str, plan: Any, verdict: Verdict, work: Path) -> None:
        self.inputs[part] += 1
        self.ends[verdict.end] += 1
        self.slowest, self.largest = max(self.slowest, verdict.seconds), max(self.largest, verdict.megabytes)
        for kind, what in verdict.findings.items():
            self.findings[kind] += 1
            group = part, kind, re.sub(r"0x[0-9a-f]+|\d+", "#", what)[:160]
            first = group not in self.groups
            self.groups.setdefault(group, []).append(what)
            if first:
                print(f"{part}: {kind}: {what[:300]}\n    {plan!a}"[:1500], flush=True)
                if self.keep is not None:
                    place = self.keep / f"{part}-{kind}-{len(self.groups)}"
                    with contextlib.suppress(OSError, shutil.Error):  # pipes and devices cannot be copied
                        shutil.copytree(work, place, symlinks=True)
                    (place.parent / f"{place.name}.txt").write_text(f"{what}\n{plan!a}\n", encoding="utf-8")

    def totals(self, seed: int) -> dict[str, Any]:
        kinds = ("traceback", "crash", "slow", "hang", "memory", "message", "code", "program", "file")
        return {
            "seed": seed,
            "inputs": sum(self.inputs.values()),
            "parts": dict(self.inputs),
            "accepted": self.ends["accepted"],
            "refused": self.ends["refused"],
            "findings": {kind: self.findings[kind] for kind in kinds},
            "slowest_seconds": round(self.slowest, 2),
            "largest_megabytes": round(self.largest),
        }


def search(seed: int, inputs: int, parts: list[str], root: Path, keep: Path | None) -> Faults:
    """Opens so many inputs of these parts; ``SystemExit`` where one that is whole is not taken."""
    from hostile import MARKER, PARTS, Seeds

    seeds = Seeds.made(root)
    faults = Faults(keep)
    gc.collect()
    gc.freeze()  # a collection in a fork would write to every page
    shares = sum(PARTS[name].share for name in parts)
    wanted = {name: inputs * PARTS[name].share // shares for name in parts}
    wanted[parts[0]] += inputs - sum(wanted.values())

    def judged(name: str, some: Sequence[Any]) -> Iterator[tuple[Any, Verdict, Path]]:
        works = [Path(tempfile.mkdtemp(dir=root)) for _ in some]
        acts = [functools.partial(PARTS[name].act, seeds, *one) for one in zip(works, some, strict=True)]
        for plan, work, verdict in zip(some, works, opened(list(zip(acts, works, strict=True))), strict=True):
            if (work / MARKER).exists() or (root / MARKER).exists():
                (root / MARKER).unlink(missing_ok=True)
                verdict.findings["code"] = "code or a program of the input's ran"
            yield plan, verdict, work
            shutil.rmtree(work, ignore_errors=True)

    for name in parts:
        for plan, verdict, _ in judged(name, PARTS[name].whole):
            if verdict.end != "accepted" or verdict.findings:
                raise SystemExit(f"{name}: {plan} changes nothing, and is not taken: {verdict}")
    with contextlib.suppress(KeyboardInterrupt):  # what is told then is of the inputs so far
        for name, some in _in_turns({name: _plans(PARTS[name].plans, wanted[name], seed) for name in parts}):
            for plan, verdict, work in judged(name, some):
                faults.add(name, plan, verdict, work)
    return faults


def _in_turns(plans: dict[str, list[Any]]) -> list[tuple[str, list[Any]]]:
    """Part and plans for one fork, the parts in turns: where a run is cut short, it has had something of each."""
    turns = []
    for name, all_of_it in plans.items():
        starts = range(0, len(all_of_it), TOGETHER)
        turns += [((start + 1) / len(all_of_it), name, all_of_it[start : start + TOGETHER]) for start in starts]
    return [(name, some) for _, name, some in sorted(turns, key=lambda turn: turn[:2])]


def _plans(strategy: Any, wanted: int, seed: int) -> list[Any]:
    """So many plans, always the same for a seed; fewer where there are no more."""
    import hypothesis

    plans: list[Any] = []
    rounds, before = 0, -1
    while before < len(plans) < wanted:
        before = len(plans)
        test = hypothesis.given(strategy)(lambda plan: plans.append(plan))
        bounded = hypothesis.settings(
            max_examples=wanted - before,
            deadline=None,
            database=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )(test)
        hypothesis.seed(seed * 1000 + rounds)(bounded)()
        rounds += 1
    return plans[:wanted]


def _warm() -> None:
    """Imports what the inputs need, once."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    import torch

    torch.set_num_threads(1)
    import accelerate  # noqa: F401
    import hostile  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import timm  # noqa: F401
    import torchvision.transforms.v2  # noqa: F401


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument(
        "--parts", nargs="+", help="pt, safetensors, folders, runs, config, coco, pictures, uses, arguments"
    )
    parser.add_argument("--keep", type=Path, help="a folder for the first input of every kind of finding")
    asked = parser.parse_args()
    start = time.time()
    for number in (signal.SIGINT, signal.SIGTERM):  # also where the shell had them ignored
        signal.signal(number, signal.default_int_handler)
    _warm()
    from hostile import PARTS

    unknown = set(asked.parts or ()) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if asked.keep is not None:
        asked.keep = asked.keep.resolve()
        asked.keep.mkdir(parents=True, exist_ok=True)
    home = Path.cwd()
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        faults = search(asked.seed, asked.inputs, asked.parts or list(PARTS), root, asked.keep)
    finally:
        os.chdir(home)
        shutil.rmtree(root, ignore_errors=True)
    for (part, kind, what), found in sorted(faults.groups.items(), key=lambda item: -len(item[1])):
        print(f"{len(found)} x {part}: {kind}: {what}")
    print(json.dumps({**faults.totals(asked.seed), "minutes": round((time.time() - start) / 60, 1)}))
    return 1 if faults.findings else 0


if __name__ == "__main__":
    sys.exit(main())
