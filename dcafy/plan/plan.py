"""A plan: what may be done with what was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcafy.display import Shown, natural_size
from dcafy.errors import PlanError
from dcafy.plan.blocks import Chain, Contents, Link, Skipped, hearing
from dcafy.records import Format, OtherVersion, Unknown, Wrong, read, written

if TYPE_CHECKING:
    from rich.console import RenderableType

FORMAT = Format("schema_version", 1)
"""The version of a plan as JSON."""


@dataclass(frozen=True, repr=False)
class Plan(Shown, Contents):
    """What was found in a network and what will be connected: immutable, printable, serialisable.

    ``blocks``     every attention block, in the order data meets them
    ``chains``     a forest: each block stands in exactly one chain, alone where nothing links to it
    ``skipped``    what was seen and will not be connected, with reasons
    ``islands``    paths of the submodules that were traced on their own (empty: the root was traced)
    ``model``      the model's name or class, for the reader
    ``costs``      what each topology would add, as far as it was asked for
    ``alone``      blocks whose connections were dropped, and which keep their α
    """

    def without(self, *names: str) -> Plan:
        """The plan with these blocks left unconnected; their successors hear their predecessors.

        >>> import dcafy, torchvision
        >>> plan = dcafy.inspect(torchvision.models.mobilenet_v3_small())
        >>> shorter = plan.without(plan.blocks[1].name)
        >>> len(plan.links) - len(shorter.links)
        1
        """
        dropped = {self.block(name).name for name in names}
        chains = tuple(_bridge(chain, dropped) for chain in self.chains)
        chains = tuple(chain for chain in chains if chain.blocks)
        left_out = tuple(Skipped(b.name, "left out with Plan.without") for b in self.blocks if b.name in dropped)
        alone = tuple(one for one in self.alone if one.name not in dropped)
        return dataclasses.replace(self, chains=chains, skipped=self.skipped + left_out, alone=alone)

    def replace_link(self, source: str, target: str, **settings: Any) -> Plan:
        """The plan with other settings on one link (``schema``, ``channel_match``, ``reduction``, ...)."""
        link = next((link for link in self.links if (link.source, link.target) == (source, target)), None)
        if link is None:
            raise PlanError(f"The plan has no link from {source!r} to {target!r}.")
        new = dataclasses.replace(link, **settings)
        return self.with_links(lambda one: new if one is link else one)

    def with_links(self, change: Callable[[Link], Link]) -> Plan:
        """The plan with every link changed."""
        chains = tuple(dataclasses.replace(c, links=tuple(map(change, c.links))) for c in self.chains)
        return dataclasses.replace(self, chains=chains)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data; ``Plan.from_dict`` gives the same plan back."""
        data = written(self)
        if not self.alone:  # which plans did not say before connections could be dropped
            del data["alone"]
        return FORMAT.stamped(data)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that ``to_dict`` described; ``PlanError`` where the data is not a plan."""
        try:
            plan: Plan = read(cls, FORMAT.opened(data))
        except OtherVersion as error:
            raise PlanError(
                f"This plan has {FORMAT.key} {error.version!r}; this dcafy reads {FORMAT.version}. "
                "Make the plan again with dcafy.inspect, or install the dcafy that wrote it."
            ) from error
        except (Wrong, Unknown, AttributeError) as error:
            raise PlanError(f"This is not a plan written by Plan.to_dict: {error}.") from error
        return plan

    def _headline(self) -> str:
        from dcafy.plan.tables import headline

        return f"{self.model or 'model'}: {headline(self)}"

    def _parts(self) -> Iterator[RenderableType]:
        from dcafy.plan.tables import plan_tables

        yield from plan_tables(self)

    def _body(self) -> Iterator[RenderableType]:
        from dcafy.plan.tables import plan_sheets

        yield from plan_sheets(self)

    def _picture(self) -> str:
        from dcafy.plan.drawing import draw

        return natural_size(draw(self).svg) if self.blocks else ""

    def _repr_svg_(self) -> str:
        from dcafy.plan.drawing import draw

        return draw(self).svg

    def _records(self) -> list[dict[str, Any]]:
        heard = hearing(self.links)
        rows = []
        for block in self.blocks:
            about = {name: getattr(block, name) for name in ("dimension", "channels", "size", "gate", "fusion_kind")}
            hears = ", ".join(link.source for link in heard.get(block.name, ()))
            rows.append({"block": block.name, **about, "hears": hears or None})
        return rows

    def __str__(self) -> str:
        from dcafy.plan.tables import as_text

        return as_text(self)


def _bridge(chain: Chain, dropped: set[str]) -> Chain:
    """The chain without the dropped blocks: who heard a dropped block hears what that block heard."""
    heard = hearing(chain.links)

    def sources(name: str) -> Iterator[str]:
        for link in heard.get(name, ()):
            if link.source in dropped:
                yield from sources(link.source) if link.source != name else ()
            else:
                yield link.source

    kept = {(link.source, link.target): link for link in chain.links}
    links = []
    for target in heard:
        if target not in dropped:
            new = Link("", target, mixing=heard[target][0].mixing, shares=heard[target][0].shares)
            links += [kept.get((s, target), dataclasses.replace(new, source=s)) for s in dict.fromkeys(sources(target))]
    return Chain(chain.dimension, tuple(b for b in chain.blocks if b not in dropped), tuple(links))
