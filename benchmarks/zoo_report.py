"""The table of zoo runs: a summary against the goals, a row per family, and every failure by name.

    python benchmarks/zoo_report.py rest.jsonl yardstick.jsonl --yardstick zoo.jsonl --note note.md -o zoo.md

puts the results of several runs together. Of a network's rows the last one counts, and one of stage
``full`` before one of stage ``inspect``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zoo_checks import CHECKS

Row = dict[str, Any]

SMALL = 100_000_000
"""The goal for the time of an inspection is set for networks with fewer parameters."""


def report(rows: list[Row]) -> str:
    """The Markdown document on one run."""
    parts = [head(rows), "## Summary\n", summary(rows), families(rows), *details(rows)]
    return "\n".join(parts).rstrip() + "\n"


def report_of_groups(groups: dict[str, list[Row]], note: str) -> str:
    """The Markdown document on several runs: what is to be known about them, and a summary for each group."""
    rows = [row for group in groups.values() for row in group]
    parts = [
        head(rows),
        f"{note}\n" if note else "",
        *(f"## {title}\n\n{summary(group)}" for title, group in groups.items()),
    ]
    return "\n".join([*parts, families(rows), *details(rows), checked(rows)]).rstrip() + "\n"


def head(rows: list[Row]) -> str:
    names = ("dcafy", "torch", "torchvision", "timm")
    full = sum(row["stage"] == "full" for row in rows)
    return (
        f"# Zoo: {len(rows)} networks, {full} of them with stage `full`\n\n"
        f"{datetime.date.today().isoformat()}; {', '.join(_version(name) for name in names)}, "
        f"Python {platform.python_version()}, one core per network; seconds are process time. "
        "Made by `python benchmarks/zoo.py`.\n"
    )


def _version(package: str) -> str:
    if package == "dcafy":
        from dcafy import __version__

        return f"dcafy {__version__}"
    return f"{package} {importlib.metadata.version(package)}"


def table(header: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
    cells = [[str(cell) for cell in line] for line in lines]
    head = list(header)
    return "\n".join(
        ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *("| " + " | ".join(c) + " |" for c in cells)]
    )


# -- against the goals -----------------------------------------------------------------------------


def summary(rows: list[Row]) -> str:
    built = [row for row in rows if row.get("traced") not in (None, "not built")]
    holding = [row for row in built if row.get("expected", 0) or row.get("blocks")]
    linked = [row for row in holding if row.get("links")]
    traced = sum(row["traced"] != "not" for row in built)
    lines: list[tuple[object, ...]] = [
        ("networks built", f"{len(built)} of {len(rows)}", ""),
        ("of these traced (root or islands), or run to look inside", _share(traced, len(built)), ""),
        *_against_the_yardstick([row for row in built if "expected" in row]),
        ("networks with attention", len(holding), ""),
        ("of these traced (root or islands)", _share(sum(r["traced"] != "not" for r in holding), len(holding)), "100%"),
        ("of these with something to connect", len(linked), ""),
    ]
    if any(row["stage"] == "full" for row in rows):
        lines += [(f"check `{name}`", _outcomes(linked, name), "all") for name in ("convert", *CHECKS)]
    small = sorted(row["seconds"]["inspect"] for row in built if _is_timed(row))
    if small:
        fast = sum(seconds < 1 for seconds in small)
        lines.append((f"inspect under 1 s (below {SMALL // 10**6} M parameters)", _share(fast, len(small)), "95%"))
        lines.append(("inspect, median and slowest", f"{statistics.median(small):.2f} s, {small[-1]:.2f} s", ""))
    return table(("figure", "measured", "goal"), lines) + "\n"


def _against_the_yardstick(scored: list[Row]) -> list[tuple[object, ...]]:
    if not scored:
        return []
    listed, disputed = (
        sum(count) for count in zip(*((r["expected"], len(r["disputed"])) for r in scored), strict=True)
    )
    missed = sum(len(row["missed"]) for row in scored)
    without = [row for row in scored if not row["expected"]]
    more = sum(len(row["extra"]) for row in scored if row["expected"])
    wrong = sum(len(row["extra"]) for row in without)
    return [
        ("modules on the yardstick", listed, ""),
        ("of these switched off in the network as it is built", disputed, ""),
        ("of the others found", _share(listed - disputed - missed, listed - disputed), "100%"),
        ("blocks found in networks without attention", f"{wrong} in {len(without)} networks", "0"),
        ("blocks found beside the yardstick's, in networks with attention", more, ""),
    ]


def _is_timed(row: Row) -> bool:
    return bool("blocks" in row and row["parameters"] < SMALL)


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / whole:.2f}%)" if whole else "none"


def _outcomes(rows: list[Row], name: str) -> str:
    texts = [row.get("checks", {}).get(name, "failed: not reached") for row in rows if row["stage"] == "full"]
    ok, other = sum(t == "ok" for t in texts), sum(t.startswith("n/a") for t in texts)
    parts = [f"{ok} ok", f"{len(texts) - ok - other} failed"]
    parts += [f"{other} not applicable"] if other else []
    parts += [f"{len(rows) - len(texts)} not run"] if len(rows) > len(texts) else []
    return ", ".join(parts)


# -- by family -------------------------------------------------------------------------------------


def families(rows: list[Row]) -> str:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.get("family", "not built"), []).append(row)
    header = ["family", "networks", "root", "values", "islands", "not", "blocks", "yardstick", "missed", "extra"]
    header += ["connections", "skipped", "inspect s (median, max)"]
    full = any(row["stage"] == "full" for row in rows)
    header += ["checked", "all checks ok"] if full else []
    lines = [_family(name, group, full) for name, group in sorted(groups.items())]
    return f"## By family\n\n{table(header, lines)}\n"


def _family(name: str, rows: list[Row], full: bool) -> list[object]:
    traced = [row.get("traced", "not") for row in rows]
    seconds = [row["seconds"]["inspect"] for row in rows if "inspect" in row["seconds"]]
    line: list[object] = [name, len(rows), *(traced.count(how) for how in ("root", "values", "islands"))]
    line += [sum(how.startswith("not") for how in traced)]
    line += [sum(len(row.get("blocks", ())) for row in rows), sum(row.get("expected", 0) for row in rows)]
    line += [sum(len(row.get(key, ())) for row in rows) for key in ("missed", "extra")]
    line += [sum(row.get("links", 0) for row in rows), sum(len(row.get("skipped", ())) for row in rows)]
    line += [f"{statistics.median(seconds):.2f}, {max(seconds):.2f}" if seconds else ""]
    if full:
        linked = [row for row in rows if row.get("links")]
        outcomes = [row["checks"] for row in linked if "checks" in row]
        passed = sum(not any(text.startswith("failed") for text in checks.values()) for checks in outcomes)
        line += [f"{len(outcomes)} of {len(linked)}", f"{passed} of {len(outcomes)}"] if linked else ["", ""]
    return line


# -- by name ---------------------------------------------------------------------------------------


def details(rows: list[Row]) -> list[str]:
    """Every failure by name, and every reason for which something was left out."""
    sections = (
        ("Not built or not traced", [(r["model"], _cell(r["error"])) for r in rows if "error" in r]),
        (
            "On the yardstick, and switched off",
            [(r["model"], _names(r["disputed"])) for r in rows if r.get("disputed")],
        ),
        ("Missed", [(r["model"], _names(r["missed"])) for r in rows if r.get("missed")]),
        ("Found beside the yardstick", [(r["model"], _names(r["extra"])) for r in rows if r.get("extra")]),
        ("Checks that failed", _outcome_rows(rows, "failed")),
        ("Checks that do not apply", _grouped(_outcome_rows(rows, "n/a"))),
        ("Skipped", _grouped([(r["model"], _general(reason)) for r in rows for _, reason in r.get("skipped", ())])),
        (f"Inspected in 1 s or more, below {SMALL // 10**6} M parameters", _slow(rows)),
        ("Notes", [(r["model"], _cell(note)) for r in rows for note in r.get("notes", ())]),
    )
    return [f"## {title}\n\n{table(('network', 'what'), lines)}\n" for title, lines in sections if lines]


def _slow(rows: list[Row]) -> list[tuple[str, str]]:
    """Where the time went: what is neither recorded, found nor linked was run to see what submodules are given."""
    slow = sorted(
        (row for row in rows if _is_timed(row) and row["seconds"]["inspect"] >= 1),
        key=lambda row: -row["seconds"]["inspect"],
    )
    lines = []
    for row in slow:
        spent = row["seconds"]
        parts = ", ".join(f"{name} {spent[name]:.2f} s" for name in ("trace", "find", "link") if name in spent)
        lines.append((row["model"], f"{spent['inspect']:.2f} s ({parts}), traced: {row['traced']}"))
    return lines


def checked(rows: list[Row]) -> str:
    """Which networks had their conversion checked, by family."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        if "checks" in row and not row["checks"]["convert"].startswith("n/a"):
            groups.setdefault(row["family"], []).append(row["model"].partition(":")[2])
    lines = [(name, ", ".join(sorted(models))) for name, models in sorted(groups.items())]
    return f"## Converted and checked\n\n{table(('family', 'networks'), lines)}\n" if lines else ""


def _outcome_rows(rows: list[Row], start: str) -> list[tuple[str, str]]:
    return [
        (row["model"], _cell(f"{name}: {text.partition(': ')[2]}"))
        for row in rows
        for name, text in row.get("checks", {}).items()
        if text.startswith(start)
    ]


def _grouped(lines: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """One line per reason, with how many networks it holds for and a few of them."""
    by_reason: dict[str, dict[str, None]] = {}
    for model, reason in lines:
        by_reason.setdefault(reason, {})[model] = None
    return [(_names(list(models)), reason) for reason, models in by_reason.items()]


def _names(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _general(reason: str) -> str:
    """A reason without the names and numbers of one network."""
    words = [("…" if any(c.isdigit() for c in word) else word) for word in _cell(reason).split()]
    return " ".join(words)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")[:300]


# -- several runs ----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSONL files that benchmarks/zoo.py wrote, oldest first")
    parser.add_argument("--yardstick", type=Path, help="the list that some of the runs were scored against")
    parser.add_argument("--note", type=Path, help="Markdown on how the runs were made, to be put on top")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    rows: dict[str, Row] = {}
    for path in options.results:
        for row in map(json.loads, path.read_text().splitlines()):
            if row["stage"] == "full" or rows.get(row["model"], row)["stage"] == "inspect":
                rows[row["model"]] = row
    listed = options.yardstick.read_text().splitlines() if options.yardstick else []
    names = {json.loads(line)["model"] for line in listed}
    groups = {
        "The networks of the yardstick": [row for row in rows.values() if row["model"] in names],
        "The other networks" if names else "Summary": [row for row in rows.values() if row["model"] not in names],
    }
    note = options.note.read_text().strip() if options.note else ""
    options.output.write_text(report_of_groups({title: group for title, group in groups.items() if group}, note))


if __name__ == "__main__":
    main()
