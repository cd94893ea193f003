"""The one exception family of dcafy: every message says what was wrong and what to do next."""

from __future__ import annotations

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


def printable(name: str) -> str:
    """``name`` with everything that could steer a terminal written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)


_LONGEST = 2000
"""Characters of a message: what was wrong and what to do, however long the names in it are."""


class DcafyError(Exception):
    """Every error that dcafy raises on purpose; catching it catches all of them.

    Its message is one printable line of bounded length, whatever names and texts it quotes.
    """

    def __init__(self, message: str = "") -> None:
        told = self._on_one_line(message)
        super().__init__(told if len(told) <= _LONGEST else f"{told[: _LONGEST - 605]} ... {told[-600:]}")

    def _on_one_line(self, message: str) -> str:
        return printable(" ".join(message.splitlines()))


class UsageError(DcafyError):
    """An argument, an option or a model name is not one that dcafy knows."""


class InputError(DcafyError):
    """The model or the example input is of a kind that dcafy cannot work on."""


class TracingError(DcafyError):
    """The network, or the part of it that holds attention, could not be written down as a graph."""


class NoAttentionError(DcafyError):
    """There is nothing to connect: no attention block, or none that follows another.

    Its message has one line for each block that was found and is not connected.
    """

    def _on_one_line(self, message: str) -> str:
        return "\n".join(map(printable, message.split("\n")))


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
