"""The data of each figure as a CSV file inside the page."""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dcafy.text import cell


@dataclass(frozen=True)
class Download:
    """A file in a link: ``name`` to save it under, ``href``, the file itself, and how many rows it has no room for."""

    name: str
    href: str
    left_out: int = 0


MOST_DATA = 150_000
"""Characters that one file may have: a page holds many of them."""


def download(name: str, columns: Sequence[str], rows: Iterable[Sequence[object]], most: int = MOST_DATA) -> Download:
    """The first of these rows as CSV, up to ``most`` characters; ``name`` is made one that every system takes."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    left_out = 0
    for row in rows:
        if file.tell() < most:
            writer.writerow([_cell(value) for value in row])
        else:
            left_out += 1
    content = base64.b64encode(file.getvalue().encode("utf-8")).decode("ascii")
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "data"
    return Download(f"{safe}.csv", f"data:text/csv;charset=utf-8;base64,{content}", left_out)


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else cell(value) if isinstance(value, str) else value
