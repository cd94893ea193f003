"""One run on the example: in which order marked modules are called, and whose output reaches whose input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from dcafy.graph.evaluator import Evaluator
from dcafy.graph.nodes import tensors_in
from dcafy.threads import OwnThread
from dcafy.trace.islands import ran
from dcafy.trace.recording import Observed


@dataclass(frozen=True)
class Mark:
    """Something that reads what one module is given and makes what another returns; ``turn``: in which of their calls.

    A module is called by its path; ``turns``: how many calls of it are told apart, after which they begin anew.
    """

    name: str
    reads: str
    makes: str
    reads_turn: int = 0
    makes_turn: int = 0
    turns: tuple[int, int] = (1, 1)


@dataclass
class Lineage:
    """``order``: the marks, as they read; ``reach``: mark -> those it reads; ``calls``: path -> how often."""

    order: list[str] = field(default_factory=list)
    reach: dict[str, set[str]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)


def lineage(
    module: nn.Module, inputs: Observed, evaluator: Evaluator, marks: tuple[Mark, ...], counted: tuple[str, ...]
) -> Lineage | str:
    """What one run says of the ``marks``, and how often the modules at ``counted`` were called; or why there was none.

    It follows data through everything that torch computes, also where no gradient goes.
    """

    def watched(twin: nn.Module, run: Callable[[], Any]) -> Lineage:
        found = Lineage()
        bits = {mark.name: 1 << i for i, mark in enumerate(marks)}
        with _Followed() as followed:
            handles = []
            for path, inner in twin.named_modules():
                reading = [mark for mark in marks if mark.reads == path]
                making = [mark for mark in marks if mark.makes == path]
                if reading or making or path in counted:
                    handles.append(
                        inner.register_forward_pre_hook(_reads(path, reading, found, followed, marks), with_kwargs=True)
                    )
                    handles.append(inner.register_forward_hook(_makes(path, making, bits, followed)))
            try:
                run()
            finally:
                for handle in handles:
                    handle.remove()
        return found

    return ran(module, inputs, evaluator, watched)


def _reads(
    path: str, reading: list[Mark], found: Lineage, followed: _Followed, marks: tuple[Mark, ...]
) -> Callable[..., None]:
    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        turn = found.calls.get(path, 0)
        found.calls[path] = turn + 1
        behind = followed.behind((args, kwargs))
        for mark in reading:
            if turn % mark.turns[0] == mark.reads_turn:
                if mark.name not in found.reach:
                    found.order.append(mark.name)
                    found.reach[mark.name] = set()
                found.reach[mark.name] |= {other.name for i, other in enumerate(marks) if behind >> i & 1}

    return before


def _makes(path: str, making: list[Mark], bits: dict[str, int], followed: _Followed) -> Callable[..., None]:
    turns = [0]

    def after(_: nn.Module, args: Any, output: Any) -> None:
        turn, turns[0] = turns[0], turns[0] + 1
        for mark in making:
            if turn % mark.turns[1] == mark.makes_turn:
                followed.mark(output, bits[mark.name])

    return after


class _Followed(OwnThread, TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside it every tensor knows the marks behind it, one bit for each."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._behind: Any = WeakIdKeyDictionary()

    def behind(self, value: Any) -> int:
        """The marks behind any of the tensors in ``value``."""
        found = 0
        for tensor in tensors_in(value):
            found |= self._behind.get(tensor, 0)
        return found

    def mark(self, value: Any, marks: int) -> None:
        """Notes that ``marks`` are behind every tensor in ``value``, and behind what it is a view of."""
        for tensor in tensors_in(value):
            viewed: Tensor | None = tensor
            while viewed is not None:
                self._behind[viewed] = self._behind.get(viewed, 0) | marks
                viewed = viewed._base

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        marks = self.behind((args, kwargs))
        output = func(*args, **kwargs)
        if marks:
            for tensor in tensors_in(output):
                self._behind[tensor] = self._behind.get(tensor, 0) | marks
            written = [i for i, argument in enumerate(func._schema.arguments) if _is_written(argument)]
            self.mark([args[i] for i in written if i < len(args)], marks)
        return output


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)
