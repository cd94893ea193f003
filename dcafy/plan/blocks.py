"""The vocabulary of the project: what is found, and what is planned, as frozen data.

Everything here is plain names, numbers and tuples. Blocks are addressed by their ``name`` (a module
path); the fx node names they carry inform and do not address, because they shift with the set of
leaf modules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from dcafy.errors import PlanError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["AttentionBlock", "Chain", "Cost", "Dimension", "FusionKind", "Gate", "Link", "Plan", "Skipped"]

SCHEMA_VERSION = 1

Dimension = Literal["channel", "spatial"]
Gate = Literal["sigmoid", "hard_sigmoid", "softmax", "tanh", "clamp", "none"]
FusionKind = Literal["mul", "add"]

BOUNDED_GATES: frozenset[Gate] = frozenset({"sigmoid", "hard_sigmoid", "softmax", "tanh", "clamp"})
"""Gates whose T is multiplied by G before it is passed on (paper 3.1: T̃ = T ⊙ G)."""


@dataclass(frozen=True)
class AttentionBlock:
    """One attention block: extraction, transformation and fusion, by name.

    ``name``           dotted path of the innermost module that holds extraction and transformation,
                       made unique with ``#2``, ``#3``; ``root`` for the network's own forward
    ``dimension``      what the attention map varies over
    ``channels``       number of channels of G (1 or a few where ``dimension`` is ``spatial``)
    ``size``           height and width of G for a spatial block, ``None`` for a channel block
    ``gate``           what bounds the map T
    ``fusion_kind``    how T meets X
    ``extraction``, ``transformation``, ``fusion``   names of the deep graph's nodes in each role
    """

    name: str
    dimension: Dimension
    channels: int
    size: tuple[int, ...] | None
    gate: Gate
    fusion_kind: FusionKind
    extraction: tuple[str, ...]
    transformation: tuple[str, ...]
    fusion: tuple[str, ...]

    @property
    def bounded(self) -> bool:
        """Whether T is bounded, so that T ⊙ G is passed on in its place (paper 3.1)."""
        return self.gate in BOUNDED_GATES


@dataclass(frozen=True)
class Link:
    """A connection to be made from ``source`` to ``target``, both block names.

    A setting that is ``None`` takes what :func:`dcafy.convert` is given; one that is set beats it.
    """

    source: str
    target: str
    schema: str | None = None
    channel_match: str | None = None
    reduction: int | None = None
    min_hidden: int | None = None
    spatial_match: str | None = None


@dataclass(frozen=True)
class Chain:
    """Blocks of one dimension in the order data meets them, and the links between them."""

    dimension: Dimension
    blocks: tuple[str, ...]
    links: tuple[Link, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """Something that was seen and is not connected, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Cost:
    """What a topology adds to a model, with the options that :func:`dcafy.convert` has by default."""

    topology: str
    connections: int
    parameters: int


@dataclass(frozen=True)
class Plan:
    """What was found in a network and what will be connected: immutable, printable, serialisable.

    ``blocks``     every attention block, in the order data meets them
    ``chains``     a forest: each block stands in exactly one chain, alone where nothing links to it
    ``skipped``    what was seen and will not be connected, with reasons
    ``islands``    paths of the submodules that were traced on their own (empty: the root was traced)
    ``model``      the model's name or class, for the reader
    ``costs``      what each topology would add, as far as it was asked for
    """

    blocks: tuple[AttentionBlock, ...]
    chains: tuple[Chain, ...]
    skipped: tuple[Skipped, ...] = ()
    islands: tuple[str, ...] = ()
    model: str = ""
    costs: tuple[Cost, ...] = ()

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
        return dataclasses.replace(self, chains=chains, skipped=self.skipped + left_out)

    def replace_link(self, source: str, target: str, **settings: Any) -> Plan:
        """The plan with other settings on one link (``schema``, ``channel_match``, ``reduction``, ...)."""
        if not any((link.source, link.target) == (source, target) for link in self.links):
            raise PlanError(f"The plan has no link from {source!r} to {target!r}.")
        chains = tuple(
            dataclasses.replace(
                chain,
                links=tuple(
                    dataclasses.replace(link, **settings) if (link.source, link.target) == (source, target) else link
                    for link in chain.links
                ),
            )
            for chain in self.chains
        )
        return dataclasses.replace(self, chains=chains)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data; ``Plan.from_dict`` gives the same plan back."""
        data: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        return cast("dict[str, Any]", _lists(data))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that ``to_dict`` described; ``PlanError`` where the data is not a plan."""
        if data.get("schema_version") != SCHEMA_VERSION:
            raise PlanError(
                f"This plan has schema_version {data.get('schema_version')!r}; this dcafy reads {SCHEMA_VERSION}. "
                "Make the plan again with dcafy.inspect, or install the dcafy that wrote it."
            )
        try:
            return cls(
                blocks=tuple(_record(AttentionBlock, row) for row in data["blocks"]),
                chains=tuple(
                    Chain(
                        dimension=_one_of(row["dimension"], Dimension),
                        blocks=tuple(_text(name) for name in row["blocks"]),
                        links=tuple(_record(Link, link) for link in row["links"]),
                    )
                    for row in data["chains"]
                ),
                skipped=tuple(_record(Skipped, row) for row in data["skipped"]),
                islands=tuple(_text(path) for path in data.get("islands", ())),
                model=_text(data.get("model", "")),
                costs=tuple(_record(Cost, row) for row in data.get("costs", ())),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"This is not a plan written by Plan.to_dict: {error}.") from error

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from dcafy.plan.tables import plan_tables

        yield from plan_tables(self)

    def _repr_svg_(self) -> str:
        from dcafy.plan.drawing import draw

        return draw(self).svg

    def __str__(self) -> str:
        from dcafy.plan.tables import as_text

        return as_text(self)


def _bridge(chain: Chain, dropped: set[str]) -> Chain:
    """The chain without the dropped blocks: who heard a dropped block hears what that block heard."""
    heard: dict[str, list[str]] = {}
    for link in chain.links:
        heard.setdefault(link.target, []).append(link.source)

    def sources(name: str) -> Iterator[str]:
        for source in heard.get(name, ()):
            if source in dropped:
                yield from sources(source)
            else:
                yield source

    kept = {(link.source, link.target): link for link in chain.links}
    links = []
    for target in dict.fromkeys(link.target for link in chain.links):
        if target in dropped:
            continue
        links += [kept.get((s, target), Link(s, target)) for s in dict.fromkeys(sources(target))]
    return Chain(chain.dimension, tuple(b for b in chain.blocks if b not in dropped), tuple(links))


def _lists(value: Any) -> Any:
    """``value`` with tuples as lists, as JSON would give it back."""
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_lists(item) for item in value]
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a name, got {value!r}")
    return value


def _one_of(value: object, choices: Any) -> Any:
    if value not in get_args(choices):
        raise ValueError(f"{value!r} is not one of {', '.join(get_args(choices))}")
    return value


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"expected a list of names, got {value!r}")
    return tuple(_text(item) for item in value)


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"expected a whole number, got {value!r}")
    return value


def _optional(reader: Any) -> Any:
    return lambda value: None if value is None else reader(value)


_READERS: dict[str, Any] = {
    "str": _text,
    "int": _integer,
    "str | None": _optional(_text),
    "int | None": _optional(_integer),
    "tuple[str, ...]": _names,
    "tuple[int, ...] | None": _optional(lambda value: tuple(_integer(item) for item in value)),
    "Dimension": lambda value: _one_of(value, Dimension),
    "Gate": lambda value: _one_of(value, Gate),
    "FusionKind": lambda value: _one_of(value, FusionKind),
}
"""How a field of each declared type is read from JSON data; the check is the field's annotation."""


def _record(cls: type[Any], row: Mapping[str, Any]) -> Any:
    """One dataclass from a row of data, every field checked against its declared type."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = set(row) - set(fields)
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {sorted(unknown)[0]!r}")
    return cls(**{name: _READERS[str(fields[name].type)](value) for name, value in row.items()})
