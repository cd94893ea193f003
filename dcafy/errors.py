"""The one exception family of dcafy: every message says what was wrong and what to do next."""

from __future__ import annotations

from dcafy.text import short

__all__ = [
    "CheckpointError",
    "DcafyError",
    "InputError",
    "Interrupted",
    "NoAttentionError",
    "PlanError",
    "SourceError",
    "TracingError",
    "TrainingError",
    "UsageError",
    "VerificationError",
]


class DcafyError(Exception):
    """Every error that dcafy raises on purpose; catching it catches all of them.

    Its message is one short line, whatever names and values of the user's, or of a stranger's file, are in it.
    """

    _lines = False

    def __init__(self, message: str) -> None:
        lines = message.split("\n") if self._lines else [message]
        super().__init__("\n".join(line[: _indent(line)] + short(line, _MOST) for line in lines))


_MOST = 900
"""Characters that a line of a message may have."""


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


class UsageError(DcafyError):
    """An argument, an option or a model name is not one that dcafy knows."""


class InputError(DcafyError):
    """The model or the example input is of a kind that dcafy cannot work on."""


class TracingError(DcafyError):
    """The network, or the part of it that holds attention, could not be written down as a graph."""


class NoAttentionError(DcafyError):
    """There is nothing to connect: no attention block, or none that follows another; one reason a line."""

    _lines = True


class PlanError(DcafyError):
    """A plan does not fit the model, or asks for something that no connection can do."""


class VerificationError(DcafyError):
    """The converted model does not compute what the original did."""


class SourceError(DcafyError):
    """A file is unreadable, is not what its name says, or would have to run code to be opened."""


class CheckpointError(SourceError):
    """A folder written by :func:`dcafy.save` is damaged or does not fit the model."""


class TrainingError(DcafyError):
    """A training went wrong in a way that going on would not mend."""


class Interrupted(DcafyError):
    """A training was asked to stop by a signal, and has saved where it stands; ``signal`` is its number."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
