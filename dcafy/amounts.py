"""Numbers as people read them: one way for each kind, in every table, sentence and page."""

from __future__ import annotations


def fixed(value: float, digits: int = 4, *, sign: bool = False) -> str:
    """``value`` with so many digits after the point, and with its sign where that is asked for; nothing is below zero
    that is written as zero.

    >>> fixed(-0.00001), fixed(0.25, 2, sign=True)
    ('0.0000', '+0.25')
    """
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text if text.strip("+-0.") else f"{0.0:{'+' if sign else ''}.{digits}f}"


def percent(share: float) -> str:
    """A share of 1 in percent.

    >>> percent(0.98765)
    '98.8%'
    """
    return f"{fixed(100 * share, 1)}%"


def metric(name: str, value: float) -> str:
    """What was measured: a loss as it is, accuracies and precisions in percent."""
    return fixed(value) if name == "loss" else percent(value)


def points(change: float) -> str:
    """A change of a share, in percentage points and with its sign.

    >>> points(-0.0123)
    '-1.23'
    """
    return fixed(100 * change, 2, sign=True)


def operations(*gflops: float) -> tuple[str, list[str]]:
    """The unit in which these multiply-adds, in 1e9, are told beside each other, and the numbers.

    >>> operations(0.000896, 0.00091), operations(4.1)
    (('MFLOPs', ['0.896', '0.910']), ('GFLOPs', ['4.100']))
    """
    unit, scale = ("GFLOPs", 1.0) if max(gflops, default=0.0) >= 0.1 else ("MFLOPs", 1000.0)
    return unit, [fixed(scale * value, 3) for value in gflops]
