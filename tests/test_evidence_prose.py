"""What README and docs say of the study is what its tables say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOUND = re.compile(r"([+-]\d+\.\d+)\W{1,4}\[([+-]\d+\.\d+), ([+-]\d+\.\d+)\]")

PAGES = {
    "README.md": (r"<!-- evidence -->.*?## Set-up", 10),
    "docs/index.md": (r"\*\*Does it help\?\*\*.*?```", 1),
    "docs/connections.md": (r"## `message`.*?## `topology`", 5),
    "docs/concepts/evidence.md": (r"## Does connecting help\?.*?## What holds", 26),
    "docs/family.md": (r"## What each gained.*?## What goes", 11),
}
"""Page -> the part of it that speaks of the study, and how many intervals it has at least."""


STUDIES = ("accuracy.md", "pretrained.md")


def triples(text: str) -> list[tuple[float, ...]]:
    return [tuple(map(float, one)) for one in FOUND.findall(text)]


@pytest.mark.parametrize("page", PAGES)
def test_every_interval_that_is_told_is_in_the_tables(page: str) -> None:
    pattern, least = PAGES[page]
    part = re.search(pattern, (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert part is not None
    told = triples(part[0])
    assert len(told) >= least
    pages = ((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8") for name in STUDIES)
    tables = [one for page in pages for one in triples(page)]
    for one in told:
        near = [two for two in tables if all(abs(a - b) <= 0.0501 for a, b in zip(one, two, strict=True))]
        assert near, f"{one} is no interval of {STUDIES}"
