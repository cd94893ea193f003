"""In which order units run, whose output reaches whom, and which of them make a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from dcafy.attention.units import Chosen
from dcafy.emit.relay import Call, Calls
from dcafy.errors import InputError
from dcafy.graph.evaluator import Evaluator, device_of
from dcafy.trace.lineage import Lineage, Mark, lineage


@dataclass(frozen=True)
class Order:
    """Who could hand a state on to whom.

    ``nearest``     unit, by path -> for each of its calls the last one before it whose output reaches it
    ``alike``       the same, among those of its own width
    ``stages``      unit -> the number of its stage: units of one width that reach one another
    ``classifier``  the path of the layer that classifies, which may hear the last unit, where there is one
    ``classes``     how many it tells apart
    """

    nearest: dict[str, Calls]
    alike: dict[str, Calls]
    stages: dict[str, int]
    classifier: str | None
    classes: int = 0


def order(model: nn.Module, chosen: Chosen) -> Order:
    """The order of the units in a run on their inputs; ``InputError`` where the model does not run on them."""
    units, last = chosen.units, chosen.classifier
    turns = {unit.path: unit.calls for unit in units}
    if last is not None:
        turns.setdefault(last, 1)
    marks = [_mark(path, turn, times) for path, times in turns.items() for turn in range(times)]
    seen = lineage(model, chosen.inputs, Evaluator(device_of(model)), tuple(marks), tuple(turns))
    if isinstance(seen, str):
        raise InputError(
            f"What the units of {type(model).__name__} hand on to each other is not known, as it did not run on the "
            f"example: {seen}. Pass example_inputs that it accepts."
        )
    width = {unit.path: unit.channels for unit in units}
    found = _Found(seen, turns)
    alike = found.calls(lambda one, other: width.get(one, 0) == width.get(other))
    classes = 0 if last is None else int(model.get_submodule(last).out_features)  # type: ignore[arg-type]
    return Order(found.calls(lambda one, other: True), alike, _stages(alike), last, classes)


def _name(call: Call) -> str:
    return f"{call[1]}:{call[0]}"


def _mark(path: str, turn: int, turns: int) -> Mark:
    return Mark(_name((path, turn)), path, path, turn, turn, (turns, turns))


@dataclass(frozen=True)
class _Found:
    seen: Lineage
    known: dict[str, int]

    def calls(self, fits: Callable[[str, str], bool]) -> dict[str, Calls]:
        return {
            path: Calls(tuple(self._heard(path, turn, fits) for turn in range(turns)), self._repeats(path))
            for path, turns in self.known.items()
        }

    def _repeats(self, path: str) -> bool:
        """Whether a run calls the unit more often than the recording has it: a part that runs for each image, say."""
        return self.seen.calls.get(path, 0) > self.known[path]

    def _heard(self, path: str, turn: int, fits: Callable[[str, str], bool]) -> Call | None:
        ran = [tuple(name.split(":", 1)) for name in self.seen.order]
        before = self.seen.reach.get(_name((path, turn)), set())
        for number, other in reversed(ran):
            if f"{number}:{other}" in before and other != path and fits(path, other) and self._together(path, other):
                return other, int(number)
        return None

    def _together(self, path: str, other: str) -> bool:
        """Whether each call of one goes with a call of the other."""
        if not self._repeats(path) and not self._repeats(other):
            return True
        return self.seen.calls.get(path) == self.seen.calls.get(other)


def _stages(alike: dict[str, Calls]) -> dict[str, int]:
    """One number for all that are joined by what they hear."""
    stage = {path: number for number, path in enumerate(alike)}
    for path, source in ((path, source) for path, calls in alike.items() for source in _sources(calls)):
        joined = {stage[path], stage[source]}
        stage = {name: min(joined) if number in joined else number for name, number in stage.items()}
    return stage


def _sources(calls: Calls) -> Iterator[str]:
    return (source[0] for source in calls.hears if source is not None)
