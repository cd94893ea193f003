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
    """A file in a link: ``name`` to save it under, and ``href``, the file itself."""

    name: str
    href: str


def download(name: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Download:
    """These rows as CSV; ``name`` is made one that every system takes."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(value) for value in row] for row in rows)
    content = base64.b64encode(file.getvalue().encode("utf-8")).decode("ascii")
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "data"
    return Download(f"{safe}.csv", f"data:text/csv;charset=utf-8;base64,{content}")


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else cell(value) if isinstance(value, str) else value
