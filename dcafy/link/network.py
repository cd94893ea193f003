"""The regions of a model as one network: all its blocks in the order data meets them, and who could hear whom."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from dcafy.find.roles import Found
from dcafy.link.batches import other_batch
from dcafy.link.message import Message, Unlinkable, extents, mismatch
from dcafy.link.region import Region
from dcafy.link.sites import NoPlace
from dcafy.plan.blocks import Of


@dataclass(frozen=True)
class Network:
    """All regions of a model.

    ``order``    the names of the blocks, in the order data meets them
    ``earlier``  block name -> the earlier blocks of its dimension whose outputs reach it, nearest last
    ``repeats``  paths of regions and modules that a run calls any number of times, each time alike
    """

    regions: tuple[Region, ...]
    order: tuple[str, ...]
    earlier: dict[str, tuple[str, ...]]
    repeats: frozenset[str] = frozenset()

    def without(self, names: Collection[str]) -> Network:
        """The network in which these blocks are none."""
        earlier = {
            n: tuple(o for o in before if o not in names) for n, before in self.earlier.items() if n not in names
        }
        return dataclasses.replace(
            self,
            regions=tuple(region.without(names) for region in self.regions),
            order=tuple(name for name in self.order if name not in names),
            earlier={name: before for name, before in earlier.items() if before},
        )

    @functools.cached_property
    def _home(self) -> dict[str, Region]:
        return {block.name: region for region in self.regions for block in region.found}

    def region(self, name: str) -> Region:
        """The region that a block is in."""
        return self._home[name]

    def __getitem__(self, name: str) -> Found:
        return self._home[name][name]

    def __contains__(self, name: object) -> bool:
        return name in self._home

    @property
    def found(self) -> tuple[Found, ...]:
        """The blocks, in order."""
        return tuple(self[name] for name in self.order)

    def message(self, name: str, target: str = "", of: Of = "message") -> Message | Unlinkable:
        """What a block passes on to another, or why it cannot; to itself: its own G."""
        if name == target:
            own = self[name]
            return Message("map", extents(own), own.kinds, own.axis)
        return self._home[name].message(name, of)

    def nearest(self, target: str) -> tuple[str, ...]:
        """The earlier blocks that reach one, nearest last, those of its own kind of map behind all others.

        Behind these are those of its own batch: the others it could not hear.
        """
        kinds = self[target].kinds

        def alike(name: str) -> tuple[bool, bool]:
            return self._other_batch(name, target) is None, self[name].kinds[:1] == kinds[:1]

        return tuple(sorted(self.earlier.get(target, ()), key=alike))

    def _other_batch(self, source: str, target: str) -> str | None:
        """Why two blocks are not of the same samples, if they are not."""
        home, ours = self.region(source), self.region(target)
        theirs = home.batches[source]
        return other_batch(theirs if home is ours else theirs[:1], ours.batches[target])

    def obstacle(self, source: str, target: str, of: Of = "message") -> str | None:
        """Why ``target`` cannot hear what ``source`` passes on; ``None`` where it can."""
        found = self[target]
        frozen = self.region(target).recording.without_gradient
        if not found.block.nature and not frozen.isdisjoint(found.contexts):
            return "it runs where gradients are off (torch.no_grad), and its connection would never learn"
        message = self.message(source, target, of)
        if isinstance(message, Message) and message.kind == "context":  # T̃ has been given a place, or is none
            try:
                self.region(source).telling(source, of)
            except NoPlace as error:
                return error.reason
        if isinstance(message, Unlinkable):
            return str(message)
        return self._other_batch(source, target) or mismatch(message, self[target])

    def in_each_call(self, target: str, sources: tuple[str, ...]) -> tuple[Any, ...] | None:
        """What a block and those that it hears have in common in every call of the part that all of them are made in.

        ``None`` where they are not made in one call of a part that is called several times.
        """
        home, names = self.region(target), (target, *sources)
        if any(self.region(name) is not home for name in sources):
            return None
        around = home.around
        common = [call for call in around[target] if all(call in around[name] for name in sources)]
        part = next((call for call in common if len(home.sites.calls(call.path)) > 1), None)
        if part is None:
            return None
        inside = [name for name, calls in around.items() if part in calls]
        alike = [(around[name][0].path, self[name].block.dimension, extents(self[name])) for name in inside]
        places = tuple((alike[i], alike[:i].count(alike[i])) for i in (inside.index(name) for name in names))
        return home.path, part.path, places

    def apart(self, source: str, target: str) -> bool:
        """Whether two blocks lie in different regions, and the first is not known to reach the second."""
        return self.region(source) is not self.region(target) and source not in self.earlier.get(target, ())
