"""What a plan holds: what was found and what is planned, as frozen data.

Everything here is plain names, numbers and tuples. Blocks are addressed by their ``name`` (a module
path); the fx node names they carry inform and do not address, because they shift with the set of
leaf modules.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Literal

from dcafy.display import Brief
from dcafy.errors import PlanError
from dcafy.plan.gates import GATES
from dcafy.plan.options import Dimension, Overrides
from dcafy.records import LATER, WRITTEN, one_of

FusionKind = Literal["mul", "add"]

Of = Literal["message", "context"]
"""What of a block is heard: T̃, or its G."""


@dataclass(frozen=True, repr=False)
class AttentionBlock(Brief):
    """One attention block: extraction, transformation and fusion, by name.

    ``name``           dotted path of the innermost module that holds extraction and transformation,
                       made unique with ``#2``, ``#3``; ``root`` for the network's own forward
    ``dimension``      what the attention map varies over
    ``channels``       number of channels of G (1 or a few where ``dimension`` is ``spatial``)
    ``size``           height and width of G for a spatial block, ``None`` for a channel block
    ``gate``           what bounds the map T: a name in :data:`dcafy.plan.gates.GATES`
    ``fusion_kind``    how T meets X
    ``extraction``, ``transformation``, ``fusion``   names of the deep graph's nodes in each role
    ``nature``         how it is connected by nature, whatever topology is asked for (inserted mrla); else ``None``
    """

    name: str
    dimension: Dimension
    channels: int
    size: tuple[int, ...] | None
    gate: Annotated[str, one_of(GATES)]
    fusion_kind: FusionKind
    extraction: tuple[str, ...]
    transformation: tuple[str, ...]
    fusion: tuple[str, ...]
    nature: str | None = field(default=None, metadata=LATER)

    @property
    def bounded(self) -> bool:
        """Whether T is bounded, so that T ⊙ G is passed on in its place (paper 3.1)."""
        return GATES[self.gate].bounded


@dataclass(frozen=True)
class _Ends:
    source: str
    target: str


@dataclass(frozen=True, repr=False)
class Link(Brief, Overrides, _Ends):
    """A connection to be made from ``source`` to ``target``, both block names; a block may hear itself, centred.

    A setting that is ``None`` takes what :func:`dcafy.convert` is given; one that is set beats it. ``mixing``: the
    topology that says how it is mixed with the others into its target, where they are not just added up. ``shares``:
    the block whose connection it is, too: what is made in each call of one part is connected alike, as the part has one
    set of weights for all of its calls.
    """

    mixing: str | None = field(default=None, metadata=LATER)
    shares: str | None = field(default=None, metadata=LATER)


def hearing(links: Iterable[Link]) -> dict[str, list[Link]]:
    """Block -> the links through which it hears others, in their order."""
    into: dict[str, list[Link]] = {}
    for link in links:
        into.setdefault(link.target, []).append(link)
    return into


@dataclass(frozen=True, repr=False)
class Chain(Brief):
    """Blocks of one dimension in the order data meets them, and the links between them."""

    dimension: Dimension
    blocks: tuple[str, ...]
    links: tuple[Link, ...] = field(default=(), metadata=WRITTEN)


@dataclass(frozen=True)
class Alone:
    """A block that hears nobody any more, and keeps the α that it has learned (:func:`dcafy.drop`): f is that of αG.

    ``schema``    the form of f that it had
    ``branched``  whether it has an α for each of its branches (SK)
    ``shares``    the block whose α it is, too, as of a link
    """

    name: str
    schema: str = "direct"
    branched: bool = False
    shares: str | None = field(default=None, metadata=LATER)


@dataclass(frozen=True)
class Skipped:
    """Something that was seen and is not connected, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Cost:
    """What a topology adds to a model, with the options that :func:`dcafy.convert` has by default.

    Or what attention adds that was put in: then ``topology`` says which, and ``connections`` is how many units have it.
    ``multiply_adds``: of convolutions and matrix products, for one image of the example.
    """

    topology: str
    connections: int
    parameters: int
    multiply_adds: int | None = field(default=None, metadata=LATER)


@dataclass(frozen=True)
class Contribution:
    """One connection of a connected model.

    ``name``        as in :func:`dcafy.connections`
    ``source``, ``target``   the block that is heard, and the block that hears
    ``dimension``   what their attention maps vary over
    ``alpha``, ``beta``      the learned weights of G and of what is heard
    ``ratio``       ``|β| / (|α| + |β|)``
    ``parameters``  how many parameters the connection has
    """

    name: str
    source: str
    target: str
    dimension: Dimension
    alpha: float
    beta: float
    ratio: float
    parameters: int


@dataclass(frozen=True, repr=False)
class Contents(Brief):
    """What a plan is made of; see :class:`dcafy.Plan`."""

    blocks: tuple[AttentionBlock, ...]
    chains: tuple[Chain, ...]
    skipped: tuple[Skipped, ...] = field(default=(), metadata=WRITTEN)
    islands: tuple[str, ...] = ()
    model: str = ""
    costs: tuple[Cost, ...] = ()
    alone: tuple[Alone, ...] = ()

    @property
    def links(self) -> tuple[Link, ...]:
        """All links of all chains, in chain order."""
        return tuple(link for chain in self.chains for link in chain.links)

    def block(self, name: str) -> AttentionBlock:
        """The block of that name; ``PlanError`` names the blocks there are."""
        for block in self.blocks:
            if block.name == name:
                return block
        known = ", ".join(b.name for b in self.blocks) or "none"
        raise PlanError(f"The plan has no block named {name!r}. Its blocks are: {known}.")
