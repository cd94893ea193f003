"""The table of a zoo run: a summary against the goals, a row per family, and every failure by name."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import statistics
from collections.abc import Iterable
from typing import Any

from zoo_checks import CHECKS

Row = dict[str, Any]

SMALL = 100_000_000
"""The goal for the time of an inspection is set for networks with fewer parameters."""


def report(rows: list[Row], stage: str) -> str:
    """The Markdown document."""
    parts = [head(rows, stage), *summary(rows, stage), families(rows, stage), *details(rows)]
    return "\n".join(parts).rstrip() + "\n"


def head(rows: list[Row], stage: str) -> str:
    names = ("dcafy", "torch", "torchvision", "timm")
    return (
        f"# Zoo: {len(rows)} networks, stage `{stage}`\n\n"
        f"{datetime.date.today().isoformat()}; {', '.join(_version(name) for name in names)}, "
        f"Python {platform.python_version()}, one core per network. Made by `python benchmarks/zoo.py`.\n"
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


def summary(rows: list[Row], stage: str) -> list[str]:
    built = [row for row in rows if row.get("traced") not in (None, "not built")]
    scored = [row for row in built if "expected" in row]
    holding = [row for row in built if row.get("expected", 0) or row.get("blocks")]
    listed = sum(row["expected"] for row in scored)
    disputed = sum(len(row["disputed"]) for row in scored)
    expected = listed - disputed
    missed = sum(len(row["missed"]) for row in scored)
    without = [row for row in scored if not row["expected"]]
    wrong = sum(len(row["extra"]) for row in without)
    more = sum(len(row["extra"]) for row in scored if row["expected"])
    linked = [row for row in holding if row.get("links")]
    lines: list[tuple[object, ...]] = [
        ("networks built", f"{len(built)} of {len(rows)}", ""),
        ("modules on the yardstick", listed, ""),
        ("of these switched off in the network as it is built", disputed, ""),
        ("of the others found", _share(expected - missed, expected), "100%"),
        ("blocks found in networks without attention", f"{wrong} in {len(without)} networks", "0"),
        ("blocks found beside the yardstick's, in networks with attention", more, ""),
        ("networks with attention", len(holding), ""),
        ("of these traced (root or islands)", _share(sum(r["traced"] != "not" for r in holding), len(holding)), "100%"),
        ("of these with something to connect", len(linked), ""),
    ]
    if stage == "full":
        lines += [(f"check `{name}`", _outcomes(linked, name), "all") for name in ("convert", *CHECKS)]
    small = sorted(r["seconds"]["inspect"] for r in built if r["parameters"] < SMALL and "blocks" in r)
    if small:
        fast = sum(seconds < 1 for seconds in small)
        lines.append((f"inspect under 1 s (below {SMALL // 10**6} M parameters)", _share(fast, len(small)), "95%"))
        lines.append(("inspect, median and slowest", f"{statistics.median(small):.2f} s, {small[-1]:.2f} s", ""))
    return ["## Summary\n", table(("figure", "measured", "goal"), lines), ""]


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / whole:.2f}%)" if whole else "none"


def _outcomes(rows: list[Row], name: str) -> str:
    texts = [row.get("checks", {}).get(name, "failed: not reached") for row in rows]
    ok, other = sum(t == "ok" for t in texts), sum(t.startswith("n/a") for t in texts)
    return f"{ok} ok, {len(texts) - ok - other} failed" + (f", {other} not applicable" if other else "")


# -- by family -------------------------------------------------------------------------------------


def families(rows: list[Row], stage: str) -> str:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.get("family", "not built"), []).append(row)
    header = ["family", "networks", "root", "values", "islands", "not", "blocks", "yardstick", "missed", "extra"]
    header += ["connections", "skipped", "inspect s (median, max)"]
    header += ["all checks ok"] if stage == "full" else []
    lines = [_family(name, group, stage) for name, group in sorted(groups.items())]
    return f"## By family\n\n{table(header, lines)}\n"


def _family(name: str, rows: list[Row], stage: str) -> list[object]:
    traced = [row.get("traced", "not") for row in rows]
    seconds = [row["seconds"]["inspect"] for row in rows if "inspect" in row["seconds"]]
    line: list[object] = [name, len(rows), *(traced.count(how) for how in ("root", "values", "islands"))]
    line += [sum(how.startswith("not") for how in traced)]
    line += [sum(len(row.get("blocks", ())) for row in rows), sum(row.get("expected", 0) for row in rows)]
    line += [sum(len(row.get(key, ())) for row in rows) for key in ("missed", "extra")]
    line += [sum(row.get("links", 0) for row in rows), sum(len(row.get("skipped", ())) for row in rows)]
    line += [f"{statistics.median(seconds):.2f}, {max(seconds):.2f}" if seconds else ""]
    if stage == "full":
        checked = [row["checks"] for row in rows if row.get("links") and "checks" in row]
        passed = sum(not any(text.startswith("failed") for text in checks.values()) for checks in checked)
        line += [f"{passed} of {len(checked)}" if checked else ""]
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
        ("Notes", [(r["model"], _cell(note)) for r in rows for note in r.get("notes", ())]),
    )
    return [f"## {title}\n\n{table(('network', 'what'), lines)}\n" for title, lines in sections if lines]


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
