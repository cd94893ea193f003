"""Module -> recording: the front door to the files beside it.

::

    module, inputs of a call ─▶ recorded ─▶ Recording ─▶ judged ─▶ Recording, true at other sizes ─▶ fold ─▶ graph
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn

from dcafy.errors import InputError
from dcafy.graph.copies import data_free_copy
from dcafy.graph.evaluator import Evaluator
from dcafy.trace.fold import CannotEnter
from dcafy.trace.recorder import Connections, Recorder
from dcafy.trace.recording import Observed, Recording
from dcafy.trace.witness import held
from dcafy.wording import reason_of

__all__ = ["Recordable", "judged", "recorded"]


@dataclass(frozen=True)
class Recordable:
    """What is recorded: a module on the inputs of one call, with its submodules at ``opaque`` kept whole.

    ``connections``: in a connected module, whether they are ``kept`` as they stand in its code, each hearing what comes
    by the wire; or messages are edges of the graph, and connections are ``called`` or ``entered``.
    """

    module: nn.Module
    inputs: Observed
    evaluator: Evaluator
    opaque: frozenset[str] = frozenset()
    connections: Connections = "kept"

    def recording(self, inputs: Observed) -> Recording:
        """The recording on these inputs, of a copy without data; raises whatever the module's forward raises."""
        twin = data_free_copy(self.module)
        return Recorder(self.evaluator, twin, self.module, inputs, self.opaque, self.connections).record()


def recorded(recordable: Recordable) -> Recording:
    """The deep recording of the recordable, whose module is left as it is.

    Raises ``CannotEnter`` where its forward cannot be recorded, ``InputError`` where it cannot be copied.
    """
    with _reasons_told():
        return recordable.recording(recordable.inputs)


def judged(recordable: Recordable, recording: Recording, only: Collection[str] | None = None) -> Recording:
    """The recordable's recording, with those decisions (``held``) that its graph has to check when it runs.

    ``only``: the paths of the modules whose own forwards count; the others' stay the user's. Raises ``CannotEnter``
    where a forward computes with the size of the example.
    """
    with _reasons_told():
        decisions = held(recording, recordable.evaluator, recordable.inputs, recordable.recording, only)
    return dataclasses.replace(recording, held=decisions) if decisions else recording


@contextlib.contextmanager
def _reasons_told() -> Iterator[None]:
    try:
        yield
    except (InputError, CannotEnter):
        raise
    except Exception as error:  # a user's forward may fail in any way, at another size, too; the reason is told
        raise CannotEnter({"": reason_of(error)}) from error
