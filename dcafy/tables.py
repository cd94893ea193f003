"""Tables of one style that fit the width there is: on a terminal, in a file, in a notebook.

A table that is too wide for its place gives up, in this order and no more than it must, what is told elsewhere::

    1. the rows' names, where other columns repeat them     hears features.4.block.2   ->  hears 2
    2. what all its names begin or end with                 features.4.block.2         ->  4.block.2
    3. the middles of long names                            4.block.2                  ->  4.b…k.2
    4. to be one table: it becomes several, one under another, each with the rows' numbers or names

Words are not broken for it. Names come from other people's networks and files: they are put into ``rich.text.Text`` and
never into markup, escaped in HTML, and what is not printable in them is written as an escape.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from dcafy.text import printable

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderResult

WIDTH = 120
"""Columns of text that nobody told a width."""

NONE = "-"
"""What stands where there is nothing to say."""

GAP = 2
"""Blanks between columns."""

LEAST_NAME, LEAST_TEXT = 12, 30
"""Columns that a name keeps when its middle is left out, and that a sentence has to be written in."""

Cell = str | tuple[str, ...]
"""What stands in a cell; several lines of it are a tuple."""

Kind = Literal["name", "row", "number", "word", "text"]
"""``name``: of a row; ``row``: names of other rows; ``number``; ``word``: short, on one line; ``text``: sentences."""


@dataclass(frozen=True)
class Column:
    """One column: its heading, and what kind of thing stands in it."""

    title: str
    kind: Kind = "word"

    @property
    def least(self) -> int:
        """Columns of text that the heading takes, which may be written over several lines."""
        return max(map(cell_len, self.title.split()), default=0)


@dataclass(frozen=True)
class Sheet:
    """A table: ``columns``, ``rows`` of as many cells each, with ``None`` for a line that sets what follows apart.

    Columns in which nothing stands are left out. ``numbers``: name of a row -> its number, or another short sign, which
    then stands before it; where there is little room, numbers stand for names (kind ``row``).
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...] | None, ...]
    title: str = ""
    numbers: Mapping[str, object] = field(default_factory=dict)

    # --- what is shown ----------------------------------------------------------------------------------

    def _whole(self) -> _Grid:
        """All of it, with printable cells of one or more lines and the rows' numbers."""
        rows = [None if row is None else [_lines(cell) for cell in row] for row in self.rows]
        columns = list(self.columns)
        if self.numbers:
            columns.insert(0, Column("#", "number"))
            for given, row in zip(self.rows, rows, strict=True):
                if given is not None and row is not None:
                    number = self.numbers.get(given[0]) if isinstance(given[0], str) else None
                    row.insert(0, ["" if number is None else str(number)])
        grid = _Grid(columns, rows, {printable(name): str(number) for name, number in self.numbers.items()})
        full = [n for n in range(len(columns)) if any(grid.cell(row, n) not in ([NONE], [""]) for row in grid.cells)]
        return grid.of(full) if grid.cells else grid

    def fitted(self, width: int) -> Iterator[Table]:
        """The table, or the tables, that have room in so many columns of text."""
        grid = self._whole()
        for smaller in (_Grid.by_number, _Grid.without_the_same):
            if grid.needed > width:
                grid = smaller(grid)
        whole = grid.shortened(width)
        for part in [whole] if whole.needed <= width else grid.parts(width):
            yield part.shortened(width).table(width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title:
            yield Text(printable(self.title), "bold")
        for table in self.fitted(options.max_width):
            yield table
            yield Text("")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, max(self._whole().wanted, cell_len(printable(self.title))))

    def html(self, most: int = 100) -> str:
        """The first rows as an HTML table, in which everything is escaped."""
        grid = self._whole()
        side = ["right" if column.kind == "number" else "left" for column in grid.columns]
        head = "".join(_cell("th", [c.title], s) for c, s in zip(grid.columns, side, strict=True))
        body = [f"<tr>{''.join(map(_cell, ['td'] * len(row), row, side))}</tr>" for row in grid.cells[:most]]
        if len(grid.cells) > most:
            body.append(f'<tr><td colspan="{len(side)}">... {len(grid.cells) - most} more</td></tr>')
        caption = f"<caption {_CAPTION}>{escape(printable(self.title))}</caption>" if self.title else ""
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


_CAPTION = 'style="text-align:left;font-weight:bold;caption-side:top"'


def _cell(tag: str, lines: Sequence[str], side: str) -> str:
    return f'<{tag} style="text-align:{side};vertical-align:top">{"<br>".join(map(escape, lines))}</{tag}>'


def _lines(cell: Cell) -> list[str]:
    return [printable(line) for line in ((cell,) if isinstance(cell, str) else cell)] or [NONE]


@dataclass(frozen=True)
class _Grid:
    """A table on its way to what is shown; cells are lists of lines."""

    columns: list[Column]
    rows: list[list[list[str]] | None]
    numbers: Mapping[str, str]

    @property
    def cells(self) -> list[list[list[str]]]:
        return [row for row in self.rows if row is not None]

    @staticmethod
    def cell(row: list[list[str]], column: int) -> list[str]:
        return row[column]

    def of(self, chosen: Sequence[int]) -> _Grid:
        """These columns of it."""
        rows = [None if row is None else [row[n] for n in chosen] for row in self.rows]
        return dataclasses.replace(self, columns=[self.columns[n] for n in chosen], rows=rows)

    def width(self, number: int) -> int:
        """Columns of text that a column takes where nothing in it is left out."""
        lines = (line for row in self.cells for line in row[number])
        return max(self.columns[number].least, max(map(cell_len, lines), default=0))

    def least(self, number: int) -> int:
        """Columns of text with which a column can do."""
        column, width = self.columns[number], self.width(number)
        if column.kind == "text":
            return min(width, max(column.least, LEAST_TEXT))
        return min(width, max(column.least, LEAST_NAME)) if column.kind in ("name", "row") else width

    @property
    def wanted(self) -> int:
        """Columns of text for the whole table."""
        return sum(map(self.width, range(len(self.columns)))) + GAP * (len(self.columns) - 1)

    @property
    def needed(self) -> int:
        """The same where sentences are written over several lines."""
        over = (self.width(n) - LEAST_TEXT for n, column in enumerate(self.columns) if column.kind == "text")
        return self.wanted - sum(max(width, 0) for width in over)

    def _mapped(self, kinds: Sequence[Kind], change: Mapping[str, str]) -> _Grid:
        """With other words for what stands in columns of these kinds."""
        chosen = [column.kind in kinds for column in self.columns]
        rows = [
            None
            if row is None
            else [[change.get(x, x) for x in lines] if yes else lines for lines, yes in zip(row, chosen, strict=True)]
            for row in self.rows
        ]
        return dataclasses.replace(self, rows=rows)

    def by_number(self) -> _Grid:
        """With the numbers of rows in the place of their names, where other columns repeat them."""
        return self._mapped(["row"], self.numbers)

    def without_the_same(self) -> _Grid:
        """With names that lack the components with which all of them begin or end; the heading has these."""
        kinds: tuple[Kind, ...] = ("name", "row")
        chosen = [n for n, column in enumerate(self.columns) if column.kind in kinds]
        shown = dict.fromkeys(line for row in self.cells for n in chosen for line in row[n])
        paths = [
            name.split(".") for name in shown if "." in name or self.numbers.get(name, "").isdecimal()
        ]  # and not "-"
        start = _shared([path[:-1] for path in paths])
        end = _shared([path[: len(start) : -1] for path in paths])[::-1]
        if len(paths) < 2 or not (start or end):
            return self
        lacking = {".".join(path): ".".join(path[len(start) : len(path) - len(end)]) for path in paths}
        grid = self._mapped(kinds, lacking)
        first = next(n for n in chosen if self.columns[n].kind == "name")
        words = [
            self.columns[first].title,
            *(["in", ".".join(start)] if start else []),
            *([f"….{'.'.join(end)}"] if end else []),
        ]
        told = dataclasses.replace(self.columns[first], title=" ".join(words))
        return dataclasses.replace(grid, columns=[*grid.columns[:first], told, *grid.columns[first + 1 :]])

    def shortened(self, width: int) -> _Grid:
        """With the middles of names left out, by as much as it takes and a name can do without."""
        over = self.needed - width
        rows = [None if row is None else list(row) for row in self.rows]
        for n, column in enumerate(self.columns):
            if column.kind in ("name", "row") and over > 0:
                most = max(self.least(n), self.width(n) - over)
                over -= self.width(n) - most
                short = _told_apart(dict.fromkeys(line for row in self.cells for line in row[n]), most)
                for row in rows:
                    if row is not None:
                        row[n] = [short[line] for line in row[n]]
        return dataclasses.replace(self, rows=rows)

    def parts(self, width: int) -> Iterator[_Grid]:
        """The columns in tables that have room, each with what its rows are called."""
        keys = [n for n, column in enumerate(self.columns) if column.title == "#"]
        keys = keys or [n for n, column in enumerate(self.columns) if column.kind == "name"][:1]
        at_first = [n for n, column in enumerate(self.columns) if column.kind == "name" and n not in keys][:1]
        part = [*keys, *at_first]
        for n in [n for n in range(len(self.columns)) if n not in part]:
            # Whole names, where they leave half of the room to others.
            used = sum(min(self.width(m), max(self.least(m), width // 2)) + GAP for m in part)
            if len(part) > len(keys) and used + self.least(n) > width:
                yield self.of(sorted(part))
                part = list(keys)
            part.append(n)
        yield self.of(sorted(part))

    def table(self, width: int) -> Table:
        """The table, no wider than this where words allow it."""
        table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        sizes = [self.least(n) if c.kind == "text" else self.width(n) for n, c in enumerate(self.columns)]
        left = max(width - sum(sizes) - GAP * (len(sizes) - 1), 0)
        for n, column in enumerate(self.columns):
            number = column.kind == "number"
            more = min(left, self.width(n) - sizes[n])
            left -= more
            table.add_column(
                Text(printable(column.title), overflow="fold"),
                justify="right" if number else "left",
                width=min(sizes[n] + more, width),
                overflow="fold",
            )
        for row in self.rows:
            if row is None:
                table.add_section()
            else:
                table.add_row(*(Text("\n".join(lines), overflow="fold") for lines in row))
        return table


def _shared(paths: Sequence[Sequence[str]]) -> list[str]:
    """The components with which all paths begin."""
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return [parts[0] for parts in same]


def _told_apart(names: Iterable[str], most: int) -> dict[str, str]:
    """Names -> what is left of each where it is longer than ``most``: cut where they stay different, if any."""
    known = list(names)
    half = (most - 1) // 2
    cuts = sorted(range(most), key=lambda tail: abs(tail - half))
    found = ({name: _short(name, most, tail) for name in known} for tail in [*cuts, half])
    for short in found:
        if len(set(short.values())) == len(known):
            break
    return short


def _short(text: str, most: int, tail: int | None = None) -> str:
    """``text`` with its middle left out where it is longer than ``most``; ``tail``: how much of its end stays."""
    if cell_len(text) <= most:
        return text
    tail = (most - 1) // 2 if tail is None else tail
    return f"{text[: most - 1 - tail]}…{text[len(text) - tail :]}"


def aside(name: str, told: str, names: int, *, terminal: bool) -> str:
    """A row of a table whose other rows are not known yet: a name, and what there is to say of it.

    ``names``: columns of the longest name. On a terminal what is said stands beside the names and is broken between
    words; elsewhere it is one line, ``name: told``.
    """
    if not terminal:
        return f"{printable(name)}: {printable(told)}"
    width = Console().width
    names = min(names, max(width // 2, LEAST_NAME))
    lines = Text(printable(told)).wrap(Console(width=width), max(width - names - GAP, LEAST_NAME))
    first = _short(printable(name), names)
    starts = [first + " " * (names - cell_len(first)), *[" " * names] * (len(lines) - 1)]
    return "\n".join(
        f"{start}{' ' * GAP}{line.plain.rstrip()}".rstrip() for start, line in zip(starts, lines, strict=False)
    )


# --- where it is shown ----------------------------------------------------------------------------------


def shown(renderables: Iterable[RenderableType], *, terminal: bool = False) -> str:
    """What a command prints of them.

    On a terminal that has its width and its colours; in a file or a pipe every name stays whole and on one line, so
    that ``grep`` finds it, unless ``COLUMNS`` is exported.
    """
    parts = list(renderables)
    if not terminal:
        wide = os.environ.get("COLUMNS", "")
        return plain(parts, int(wide)) if wide.isdecimal() and int(wide) else unfolded(parts)
    console = Console(highlight=False)
    with console.capture() as capture:
        console.print(Group(*map(_unmarked, parts)))
    return capture.get()


def unfolded(renderables: Sequence[RenderableType]) -> str:
    """What rich prints where every name has room on one line."""
    return plain(renderables, max([WIDTH, *map(_natural_width, renderables)]))


def plain(renderables: Iterable[RenderableType], width: int) -> str:
    """What rich prints into a file of so many columns: no colour, no markup, no blanks at the ends of lines."""
    console = Console(
        file=io.StringIO(),
        width=width,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,  # which would show a cell of its own besides
        highlight=False,
        legacy_windows=False,
        markup=False,
    )
    with console.capture() as capture:
        for renderable in renderables:
            console.print(renderable)
    return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())


def _natural_width(renderable: RenderableType) -> int:
    """Columns that it takes if nothing is to be folded."""
    console = Console(width=10_000, color_system=None, force_terminal=False, force_jupyter=False, legacy_windows=False)
    return Measurement.get(console, console.options, _unmarked(renderable)).maximum


def _unmarked(renderable: RenderableType) -> RenderableType:
    return Text(renderable) if isinstance(renderable, str) else renderable
