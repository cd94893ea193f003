"""How results are shown: in one line at a prompt, as tables in print, and as HTML in a notebook.

What is in them comes from other people's networks and files. At a prompt it is shortened and printable; in HTML it is
escaped, and there is no script in it.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from dcafy.tables import Sheet, plain, unfolded
from dcafy.text import printable, short
from dcafy.wording import needing

if TYPE_CHECKING:
    import pandas
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

FEW, DEEP, LETTERS = 3, 2, 60
"""Of what is in a result a prompt shows so many items, so many levels, and so much of a text."""


class Brief:
    """A dataclass that a prompt shows in a line: what it holds is shortened, and what is as by default left out."""

    def __repr__(self) -> str:
        return brief(self)


def brief(value: Any, level: int = 0) -> str:
    """``value`` in a line.

    >>> brief({"a": [1, 2, 3, 4, 5]})
    "{'a': [1, 2, 3, ... 2 more]}"
    """
    if isinstance(value, str):
        return repr(short(value, LETTERS))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if type(value).__repr__ not in (Brief.__repr__, object.__repr__):
            return short(repr(value), 200) if level else repr(value)
        return f"{type(value).__name__}({', '.join(_fields(value, level)) if level < DEEP else '...'})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(_few((f"{brief(k)}: {brief(v, level + 1)}" for k, v in value.items()), len(value))) + "}"
    if isinstance(value, tuple | list):
        inside = ", ".join(_few((brief(item, level + 1) for item in value), len(value)))
        return f"[{inside}]" if isinstance(value, list) else f"({inside},)" if len(value) == 1 else f"({inside})"
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__}{list(shape)}" if isinstance(shape, tuple) else short(repr(value), LETTERS)


def _fields(value: Any, level: int) -> Iterator[str]:
    for item in dataclasses.fields(value):
        held = getattr(value, item.name)
        factory = item.default_factory
        usual = item.default if factory is dataclasses.MISSING else factory()
        if item.repr and not (type(held) is type(usual) and held == usual):
            yield f"{item.name}={brief(held, level + 1)}"


def _few(items: Iterable[str], number: int) -> Iterator[str]:
    for place, item in enumerate(items):
        if place == FEW and number > FEW + 1:
            yield f"... {number - FEW} more"
            return
        yield item


class Shown:
    """A result with a headline and tables: short at a prompt, tables in ``print`` and in rich, HTML in a notebook."""

    def _headline(self) -> str:
        """What it is, in a line."""
        raise NotImplementedError

    def _parts(self) -> Iterable[RenderableType]:
        """What is printed of it; tables are also what a notebook shows."""
        raise NotImplementedError

    def _body(self) -> Iterable[RenderableType]:
        """What a notebook shows below the headline."""
        return self._parts()

    def _picture(self) -> str:
        """HTML of what is drawn of it."""
        return ""

    def _records(self) -> list[dict[str, Any]]:
        """Its rows, as plain data."""
        raise NotImplementedError

    def to_pandas(self) -> pandas.DataFrame:
        """Its rows as a data frame of pandas; ``UsageError`` where pandas is not installed."""
        with needing("A data frame", "notebook"):
            import pandas
        return pandas.DataFrame(self._records())

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {short(self._headline(), 400)}>"

    def __str__(self) -> str:
        return printed(self._parts())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._parts()

    def _repr_html_(self) -> str:
        tables = "".join(map(_as_html, self._body()))
        head = f"<p><b>{type(self).__name__}</b>: {escape(printable(self._headline()))}</p>"
        picture = self._picture()
        drawn = f"<div>{picture}</div>" if picture else ""
        side = "display:flex;flex-wrap:wrap;gap:1em;align-items:flex-start"
        return f'<div class="dcafy">{head}<div style="{side}">{drawn}<div>{tables}</div></div></div>'


def _as_html(part: RenderableType) -> str:
    if isinstance(part, Sheet):
        return part.html()
    return f'<p style="white-space:pre-wrap;max-width:60em">{escape(str(part))}</p>'


def printed(parts: Iterable[RenderableType], otherwise: int | None = None) -> str:
    """What ``print`` writes: as wide as the terminal, and elsewhere ``otherwise``, or as wide as it takes."""
    if sys.stdout.isatty():
        return plain(parts, shutil.get_terminal_size().columns)
    return unfolded(list(parts)) if otherwise is None else plain(parts, otherwise)


def natural_size(svg: str) -> str:
    """An SVG element that is as many pixels large as it has units, and not as large as there is room.

    >>> natural_size('<svg viewBox="0 0 40 30" style="width:100%">')
    '<svg width="40" height="30" viewBox="0 0 40 30" style="">'
    """
    found = re.search(r'viewBox="0 0 (\d+) (\d+)"', svg)
    if found is None:
        return svg
    head, rest = svg[: svg.index(">")], svg[svg.index(">") :]
    head = re.sub(r'(?<=style=")[^"]*', lambda style: _sizeless(style[0]), head)
    return head.replace("<svg", f'<svg width="{found[1]}" height="{found[2]}"', 1) + rest


def _sizeless(style: str) -> str:
    return ";".join(part for part in style.split(";") if not re.match(r"\s*(max-)?(width|height)\s*:", part))
