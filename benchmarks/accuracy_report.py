"""The tables of the study (benchmarks/accuracy.py), from its rows."""

from __future__ import annotations

import collections
import itertools
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accuracy import ALONG, FAMILY, SETTINGS, VALIDATION, Setting, due, home, unpacked
from accuracy import __doc__ as EXPECTED

import dcafy
from dcafy.runs.evidence import Difference, crossed_difference, paired_difference

Row = dict[str, Any]

WANTED = 0.7
"""The largest standard deviation between seeds, in points, with which a setting can show what is looked for."""

AGAINST = {
    "connected": ("α alone",),
    "centred": ("connected", "own message", "shuffled", "α alone"),
    "centred x1": ("connected x1", "centred"),
    "connected x1": ("connected",),
    "own message": ("connected", "α alone"),
    "normalised": ("connected", "α alone"),
    "rla alone": ("no attention",),
    "mrla": ("no attention",),
    "dia": ("no attention",),
    "inserted x10": ("inserted",),
    "inserted, connected": ("inserted", "inserted x10"),
    "inserted x10, connected": ("inserted x10",),
    "inserted x10, centred": ("inserted x10", "inserted x10, connected"),
    **{f"{name} x10": (name, f"{name} x10, shuffled", f"{name} x10, unheard") for name in ALONG},
    "inserted, centred": ("inserted", "inserted x10", "inserted, connected", "inserted, own message"),
    "inserted, own message": ("inserted",),
}
"""Arm -> what it is compared with besides *vanilla*."""

MAPPED = (
    ("connected", "vanilla"),
    ("centred", "vanilla"),
    ("α alone", "vanilla"),
    ("connected", "α alone"),
    ("centred", "α alone"),
    ("inserted, connected", "inserted"),
    ("inserted, centred", "inserted"),
)
"""Whose attention values are compared (paper Fig. 1)."""


Verdict = Callable[[float, float], str]
"""From the ends of an interval, in points, whether it is as it was expected."""


def _above(low: float, high: float) -> str:
    return "yes" if low > 0 else "no: it is below" if high < 0 else "open"


def _not_above(low: float, high: float) -> str:
    return "no: it is above" if low > 0 else "not contradicted"


def _within_half(low: float, high: float) -> str:
    return "yes" if low > -0.5 and high < 0.5 else "no" if low > 0.5 or high < -0.5 else "open"


def _under_half(low: float, high: float) -> str:
    return "yes" if high < 0.5 else "no" if low > 0.5 else "open"


JUDGED: tuple[tuple[int, tuple[str, ...], str, str, str, Verdict], ...] = (
    (1, ("switch", "cued"), "centred", "vanilla", "above", _above),
    (1, ("switch", "cued"), "centred", "connected", "above", _above),
    (1, ("switch", "cued"), "connected", "vanilla", "not above", _not_above),
    (2, ("switch", "cued"), "own message", "vanilla", "above", _above),
    (2, ("switch", "cued"), "centred", "own message", "less than half a point above", _under_half),
    (3, ("switch", "cued", "tuned"), "shuffled", "vanilla", "not above", _not_above),
    (4, ("switch", "cued"), "connected x1", "connected", "within half a point of", _within_half),
    (5, ("switch", "cued", "tuned"), "α alone", "vanilla", "within half a point of", _within_half),
    (5, ("switch", "cued", "tuned"), "normalised", "centred", "not above", _not_above),
    (6, ("gain", "noise"), "centred", "vanilla", "above", _above),
    (6, ("wide",), "centred", "vanilla", "not above", _not_above),
    (7, ("tuned",), "centred", "vanilla", "above", _above),
    (7, ("tuned",), "centred", "connected", "above", _above),
    (8, ("inserted",), "inserted", "vanilla", "above", _above),
    (8, ("inserted",), "inserted, connected", "inserted", "within half a point of", _within_half),
    (8, ("inserted",), "inserted, centred", "inserted", "above", _above),
    (8, ("inserted",), "inserted, centred", "inserted, connected", "above", _above),
    (9, ("blur", "cast"), "centred", "vanilla", "above", _above),
    (10, ("tuned, adamw",), "centred", "vanilla", "above", _above),
)
"""What was expected, by its number: in which settings which arm is what of which other.

What 7, 9 and 10 say of one setting beside another is not judged: settings are not paired.
"""


def judged(rows: list[Row]) -> list[str]:
    """What came of what was expected, as far as there are runs."""
    lines = ["| expected | setting | seeds | | difference, points | as expected? |", "|---|---|---|---|---|---|"]
    for number, settings, name, other, words, verdict in JUDGED:
        for setting in (SETTINGS[one] for one in settings):
            found = _difference(by_seed(rows, setting, name), by_seed(rows, setting, other))
            if found is None or found.low is None or found.high is None:
                continue
            seeds = len(_paired(by_seed(rows, setting, name), by_seed(rows, setting, other)))
            cells = [str(number), setting.name, str(seeds), f"{name} is {words} {other}", _shown(found, "{:+.2f}", 100)]
            told = verdict(100 * found.low, 100 * found.high) if setting.main else "(exploratory)"
            lines.append(f"| {' | '.join(cells)} | {told} |")
    return lines


def by_seed(rows: list[Row], setting: Setting, arm: str) -> dict[int, Row]:
    """Seed -> the row, of as many seeds as the arm has there."""
    key, seeds = (home(setting, arm), arm), setting.seeds(arm)
    return {row["seed"]: row for row in rows if (row["setting"], row["arm"]) == key and row["seed"] in seeds}


def _paired(mine: dict[int, Row], theirs: dict[int, Row]) -> list[int]:
    """The seeds that both have, trained on one kind of device: what was rounded otherwise is another training."""
    both = sorted(mine.keys() & theirs.keys())
    return [seed for seed in both if mine[seed].get("device", "cpu") == theirs[seed].get("device", "cpu")]


def _compared(mine: dict[int, Row], theirs: dict[int, Row]) -> tuple[str, str]:
    """Differences of accuracy, in points, and of loss, over the seeds that both have."""
    both, found = _paired(mine, theirs), _difference(mine, theirs)
    if found is None:
        return "", ""
    losses = ([rows[seed]["loss"] for seed in both] for rows in (mine, theirs))
    return _shown(found, "{:+.2f}", 100), _shown(paired_difference(*losses), "{:+.4f}")


def _difference(mine: dict[int, Row], theirs: dict[int, Row]) -> Difference | None:
    """That of accuracy, over seeds and images; ``None`` where no seed is in both."""
    both = _paired(mine, theirs)
    if not both:
        return None
    return crossed_difference(
        *(torch.stack([unpacked(rows[seed]["right"]) for seed in both]).double() for rows in (mine, theirs))
    )


def _shown(found: Difference, form: str, scale: float = 1.0) -> str:
    mean = form.format(scale * found.mean)
    if found.low is None or found.high is None:
        return mean
    mark = "" if found.low <= 0 <= found.high else " **"
    return f"{mean} [{form.format(scale * found.low)}, {form.format(scale * found.high)}]{mark}"


def spreads(rows: list[Row], settings: Iterable[Setting] = tuple(SETTINGS.values())) -> str:
    """The standard deviation between seeds of *vanilla* in each setting, which says what it can show."""
    lines = [
        "| setting | seeds | accuracy, % | standard deviation, points | |",
        "|---|---|---|---|---|",
    ]
    for setting in settings:
        name = setting.name
        values = [100 * row["accuracy"] for row in by_seed(rows, setting, "vanilla").values()]
        if not values or home(setting, "vanilla") != name:
            continue
        shown, word = "", "one seed"
        if len(values) > 1:
            spread = statistics.stdev(values)
            shown, word = f"{spread:.2f}", "as wanted" if spread < WANTED else f"over {WANTED}"
        lines.append(f"| {name} | {len(values)} | {statistics.fmean(values):.2f} | {shown} | {word} |")
    return "\n".join(lines)


def _mean(rows: dict[int, Row], name: str, form: str, scale: float = 1.0) -> str:
    values = [scale * row[name] for row in rows.values() if name in row]
    return form.format(statistics.fmean(values)) if values else ""


COLUMNS = (
    "arm",
    "seeds",
    "accuracy",
    "to vanilla, points",
    "loss",
    "to vanilla",
    "added",
    "β",
    "cut",
    "near ½",
    "spread",
)


def table(setting: Setting, rows: list[Row]) -> list[str]:
    """What each arm makes of a setting, and what tells them apart."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    vanilla = by_seed(rows, setting, "vanilla")
    for name, arm in setting.arms.items():
        mine = by_seed(rows, setting, name)
        if not mine:
            continue
        accuracy, loss = ("", "") if name == "vanilla" else _compared(mine, vanilla)
        cut = {seed: {"cut": row["cut"] - row["accuracy"]} for seed, row in mine.items() if "cut" in row}
        cells = [
            *(f"{name}: {arm.words}", str(len(mine)), _mean(mine, "accuracy", "{:.2f}", 100), accuracy),
            *(_mean(mine, "loss", "{:.4f}"), loss, _mean(mine, "added", "{:.0f}"), _mean(mine, "beta", "{:.2f}")),
            *(_mean(cut, "cut", "{:+.2f}", 100), _mean(mine, "near_half", "{:.1%}"), _mean(mine, "spread", "{:.3f}")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for name, others in AGAINST.items():
        for other in others:
            mine, theirs = by_seed(rows, setting, name), by_seed(rows, setting, other)
            both = len(_paired(mine, theirs))
            accuracy, loss = _compared(mine, theirs)
            if both and name in setting.arms:
                lines.append(f"| {name} minus {other} | {both} | | {accuracy} | | {loss} | | | | | |")
    return lines


def _carries(setting: Setting, rows: list[Row]) -> list[str]:
    """A sentence where it is not shown that the network needs its attention at all."""
    found = _difference(by_seed(rows, setting, "no attention"), by_seed(rows, setting, "vanilla"))
    if found is None or found.high is None or found.high < 0:
        return []
    return ["Here the network is not shown to need its attention, so that little can be said of its connections.", ""]


def maps(rows: list[Row], settings: Iterable[Setting] = tuple(SETTINGS.values())) -> list[str]:
    """Paper Fig. 1: are attention values further from one half, and spread more, where blocks are connected?"""
    lines = ["| setting | arms | seeds | near ½ | spread |", "|---|---|---|---|---|"]
    for setting, (one, other) in itertools.product(settings, MAPPED):
        if not {one, other} <= setting.arms.keys() or home(setting, one) != setting.name:
            continue
        ours, theirs = by_seed(rows, setting, one), by_seed(rows, setting, other)
        both = [seed for seed in _paired(ours, theirs) if "near_half" in ours[seed]]
        if both:
            cells = []
            for what in ("near_half", "spread"):
                values = ([side[seed][what] for seed in both] for side in (ours, theirs))
                cells.append(_shown(paired_difference(*values), "{:+.3f}"))
            lines.append(f"| {setting.name} | {one} minus {other} | {len(both)} | {' | '.join(cells)} |")
    return lines


def _per_parameter(rows: list[Row]) -> list[str]:
    """Which way of connecting gains how much, for how many parameters: over the network that it was put into."""
    lines = [
        "| way | put into | seeds | added | gain, points | loss | gain per 1,000 parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    setting = SETTINGS["cued, family"]
    for name in ("connected", "centred", "own message", *FAMILY):
        arm = setting.arms[name]
        base = "vanilla" if arm.attention else "no attention"
        mine, theirs = by_seed(rows, setting, name), by_seed(rows, setting, base)
        both = _paired(mine, theirs)
        if not both:
            continue
        gain = 100 * statistics.fmean(mine[s]["accuracy"] - theirs[s]["accuracy"] for s in both)
        added = statistics.fmean(row["added"] for row in mine.values())
        cells = [name, f"*{base}*", str(len(both)), f"{added:,.0f}", *_compared(mine, theirs)]
        lines.append(f"| {' | '.join(cells)} | {1000 * gain / added:+.2f} |")
    return lines


def missing(rows: list[Row], setting: Setting) -> int:
    """How many runs of a setting are still to come."""
    return sum(len(set(setting.seeds(arm)) - by_seed(rows, setting, arm).keys()) for arm in setting.arms)


def _machines(rows: list[Row]) -> list[str]:
    """On what the runs were trained, and how many of them."""
    counts = collections.Counter(row.get("machine", "one core of a CPU") for row in rows)
    return [f"{machine} ({number})" for machine, number in counts.most_common()]


def report(rows: list[Row]) -> str:
    """All tables as Markdown; what is incomplete says so."""
    left = {name: missing(rows, setting) for name, setting in SETTINGS.items()}
    came = {(row["setting"], row["arm"], row["seed"]) for row in rows}
    to_come = len(set(due(list(SETTINGS.values()), None)) - came)
    lines = [
        "# Does connecting attention help?",
        "",
        f"**Incomplete**: {len(rows)} runs are here, and {to_come} are still to come." if to_come else "",
        "",
        f"dcafy {dcafy.__version__}. Made by `python benchmarks/accuracy.py` from `accuracy.jsonl`; the same command "
        f"goes on where it was. Trained on {'; '.join(_machines(rows))}; in float32 everywhere.",
        "",
        f"Accuracy in % of {VALIDATION:,} validation pairs. Differences are paired by seed and by image, with 95% "
        "intervals over both (`dcafy.runs.evidence`), ** where they exclude zero. *cut*: what setting β = 0 "
        "after the training changes, in points. *near ½*: the share of attention values from 0.4 to 0.6; *spread*: "
        "their standard deviation over an image's map. *added*: parameters; *own message* and *normalised* have a "
        "quarter and a half more than *centred*.",
        "",
        "## Expected",
        "",
        (EXPECTED or "").partition("What is expected, ")[2].strip(),
        "",
        "## What came of it",
        "",
        *judged(rows),
        "",
        "## Can the settings show it?",
        "",
        f"The standard deviation between seeds of vanilla networks; wanted is under {WANTED} points.",
        "",
        spreads(rows),
        "",
        "Where it is over that, runs were not made again: differences are paired, and in *tuned* all arms of a seed "
        "begin with one trained network. Their intervals say what could be shown.",
        "",
    ]
    for main in (True, False):
        lines += ["## The main comparison" if main else "## Exploratory: five seeds, and no ground for a claim", ""]
        for name, setting in SETTINGS.items():
            if setting.main != main or not any(row["setting"] == name for row in rows):
                continue
            state = f" Incomplete: {left[name]} runs are still to come." if left[name] else ""
            lines += [
                f"### {name}",
                "",
                f"{setting.words[0].upper()}{setting.words[1:]}; {setting.steps} steps.{state}",
            ]
            lines += ["", *table(setting, rows), "", *_carries(setting, rows)]
    lines += ["## Ways of connecting, by what they add", "", *_per_parameter(rows), ""]
    lines += ["## Attention values (paper Fig. 1)", "", *maps(rows), ""]
    return "\n".join(lines)
