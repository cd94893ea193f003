"""Module -> recording: the front door to the files beside it.

::

    module, inputs of a call ─▶ recorded ─▶ Recording ─▶ judged ─▶ Recording, true at other sizes ─▶ fold ─▶ graph
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from dcafy.errors import InputError
from dcafy.graph.copies import data_free_copy
from dcafy.graph.evaluator import Evaluator
from dcafy.trace.fold import CannotEnter
from dcafy.trace.recorder import Recorder
from dcafy.trace.recording import Observed, Recording
from dcafy.trace.witness import held
from dcafy.wording import reason_of

__all__ = ["Recordable", "judged", "recorded"]


@dataclass(frozen=True)
class Recordable:
    """What is recorded: a module on the inputs of one call, with its submodules at ``opaque`` kept whole."""

    module: nn.Module
    inputs: Observed
    evaluator: Evaluator
    opaque: frozenset[str] = frozenset()

    def recording(self, inputs: Observed) -> Recording:
        """The recording on these inputs, of a copy without data; raises whatever the module's forward raises."""
        return Recorder(self.evaluator, data_free_copy(self.module), inputs, self.opaque).record()


def recorded(recordable: Recordable) -> Recording:
    """The deep recording of the recordable, whose module is left as it is.

    Raises ``CannotEnter`` where its forward cannot be recorded, ``InputError`` where it cannot be copied.
    """
    with _reasons_told():
        return recordable.recording(recordable.inputs)


def judged(recordable: Recordable, recording: Recording) -> Recording:
    """The recordable's recording, with those decisions (``held``) that its graph has to check when it runs.

    Raises ``CannotEnter`` where a forward computes with the size of the example.
    """
    with _reasons_told():
        decisions = held(recording, recordable.evaluator, recordable.inputs, recordable.recording)
    return dataclasses.replace(recording, held=decisions)


@contextlib.contextmanager
def _reasons_told() -> Iterator[None]:
    try:
        yield
    except (InputError, CannotEnter):
        raise
    except Exception as error:  # a user's forward may fail in any way, at another size, too; the reason is told
        raise CannotEnter({"": reason_of(error)}) from error
