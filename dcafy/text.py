"""Text from anywhere as a terminal may show it: on one line, printable, and short."""

from __future__ import annotations


def printable(name: str) -> str:
    """``name`` with everything that could steer a terminal written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)


def cell(text: str) -> str:
    """``text`` for a table of comma-separated values: printable, and nothing that a spreadsheet reckons.

    >>> cell("=HYPERLINK(0)"), cell("a cat")
    ("'=HYPERLINK(0)", 'a cat')
    """
    shown = printable(text)
    return f"'{shown}" if shown[:1] in _FORMULAS else shown


_FORMULAS = ("=", "+", "-", "@")
"""With what a formula begins."""


def short(text: str, most: int = 100) -> str:
    """``text`` on one line, printable, and cut in the middle where it is longer than ``most``.

    >>> short("a name" + 100 * "!", 20)
    'a name!!! ... !!!!!!'
    """
    if len(text) > 8 * most:  # of which no more than the ends is looked at
        text = text[: 4 * most] + text[-4 * most :]
    text = printable(" ".join(text.split()) if text.strip() else text)
    return text if len(text) <= most else f"{text[: most - most // 3 - 5]} ... {text[len(text) - most // 3 :]}"
