"""The submodule ``dca`` of a connected module: its connections, its ends of the wire, the recipe; and finding them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from dcafy import plots
from dcafy.amounts import fixed, percent
from dcafy.display import Brief, Shown
from dcafy.emit.connection import Connection
from dcafy.emit.ends import Ends
from dcafy.errors import InputError
from dcafy.plan.blocks import Link
from dcafy.plan.plan import Plan
from dcafy.tables import NONE, Column, Sheet
from dcafy.wording import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, repr=False)
class Recipe(Brief):
    """How a model was converted: enough to do it again.

    ``plan``      what was connected, with every link's settings filled in
    ``options``   the options of :func:`dcafy.convert`
    ``model``     ``torchvision:NAME`` or ``timm:NAME`` where known
    ``arguments`` what the network is built with besides the name
    ``inputs``    the example it was traced with, as :func:`dcafy.trace.inputs.as_data` writes it down
    """

    plan: Plan
    options: dict[str, Any]
    model: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    inputs: Any = None


@dataclass(frozen=True)
class Example:
    """Inputs to write a model's graph with; copies share them, also where tensors cannot be copied (in an export)."""

    inputs: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Example:
        return self


EXAMPLE = "dcafy_example"
"""Under which a root has the example that is not connected, and whose units hand a state on."""


def example_of(root: nn.Module) -> Example | None:
    """The inputs to write the graph of a root with that opens runs; ``None`` for any other module."""
    example = getattr(dca_of(root), "example", None) or root.__dict__.get(EXAMPLE)
    return example if isinstance(example, Example) else None


class Connections(nn.Module):
    """The submodule ``dca`` of a module that has no connection, or several."""

    def extra_repr(self) -> str:
        ends: Ends | None = self.__dict__.get("ends")
        told = () if ends is None else ends.told
        return f"tells {', '.join(dict.fromkeys(what.source for what in told))}" if told else ""


def dca_of(module: nn.Module) -> Any:
    """The ``dca`` of a module: a submodule where it holds connections, else beside them.

    A root that has something of its own under that name has ours under ``dca_``.
    """
    for name in ("dca", "dca_"):
        for held in (module._modules, module.__dict__):
            if is_ours(held.get(name)):
                return held[name]
    return None


def is_ours(dca: Any) -> bool:
    """Whether what a module has under ``dca`` is what a conversion put there."""
    return ends_of(dca) is not None or isinstance(getattr(dca, "recipe", None), Recipe)


def ends_of(dca: Any) -> Ends | None:
    """The ends of the wire that a ``dca`` keeps, if any."""
    ends = getattr(dca, "ends", None)
    return ends if isinstance(ends, Ends) else None


def connected_hosts(model: nn.Module) -> Iterator[tuple[str, nn.Module, Ends]]:
    """(path, module, its ends of the wire) of every module in ``model`` that hears or tells."""
    for path, module in model.named_modules():
        ends = ends_of(dca_of(module))
        if ends is not None:
            yield path, module, ends


def recipes(model: nn.Module) -> Iterator[tuple[str, Recipe]]:
    """(path, recipe) of every converted model in ``model``, itself among them."""
    for path, module in model.named_modules():
        recipe = getattr(dca_of(module), "recipe", None)
        if isinstance(recipe, Recipe):
            yield path, recipe


class ConnectionsByName(Shown, dict[str, Connection]):
    """The dictionary that :func:`connections` gives, which shows whom each hears, with α and β as they are now.

    ``hears``: name -> the block that is heard. ``blocks``: all blocks that were found, in the order data meets them.
    """

    def __init__(self, found: Mapping[str, Connection], hears: Mapping[str, str], blocks: Iterable[str] = ()) -> None:
        super().__init__(found)
        self.hears, self.blocks = dict(hears), tuple(blocks)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Name -> what is heard, α, β, the contribution ratio and the number of parameters, as JSON-ready data."""
        return {name: self._row(name) for name in self}

    def _row(self, name: str) -> dict[str, Any]:
        one, value = self[name], self[name].alpha
        known = not value.is_meta
        return {
            "hears": self.hears.get(name),
            "alpha": float(one.alpha.detach()) if known else None,
            "beta": float(one.beta.detach()) if known else None,
            "contribution": one.contribution() if known else None,
            "parameters": sum(parameter.numel() for parameter in one.parameters()),
        }

    def _records(self) -> list[dict[str, Any]]:
        return [{"block": name, **row} for name, row in self.to_dict().items()]

    def sheet(self, title: str = "") -> Sheet:
        """Whom each hears, α, β, and the contribution ratio (paper 4.5)."""
        return connection_sheet([tuple(row.values()) for row in self._records()], self.blocks, title)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The contribution ratio of each connection (paper Fig. 5; matplotlib)."""
        shares = [one.contribution() for one in self.values()]
        return plots.points(
            plots.axes(ax, height=1.2 + 0.3 * len(self)), list(self), {"ratio": (shares, None)}, x="|β| / (|α| + |β|)"
        )

    def _parts(self) -> Iterator[Sheet]:
        yield self.sheet("connections")

    def _headline(self) -> str:
        used = sum(1 for one in self.values() if not one.beta.is_meta and bool((one.beta != 0).any()))
        parameters = {id(p): p.numel() for one in self.values() for p in one.parameters()}
        return (
            f"{counted(len(self), 'connection')}, {used} with β other than 0, {sum(parameters.values()):,} parameters"
        )


def connection_sheet(rows: Iterable[tuple[Any, ...]], blocks: Sequence[str], title: str = "") -> Sheet:
    """A table of connections: the name of each, whom it hears, α, β, the contribution ratio, its parameters.

    ``blocks``: of the plan, whose numbers it has.
    """
    numbers: dict[str, object] = {name: number for number, name in enumerate(blocks, start=1)}
    made: list[tuple[str, ...]] = []
    for name, source, *amounts, parameters in rows:
        alpha, beta, ratio = (
            NONE if value is None else write(value) for value, write in zip(amounts, _AMOUNTS, strict=True)
        )
        # A block that hears several has a name for each, which says whom.
        made.append((name, NONE if "<-" in name else source or NONE, alpha, beta, ratio, f"{parameters:,}"))
    numbers |= {row[0]: numbers.get(target_of(row[0]), "") for row in made}
    return Sheet(_CONNECTIONS, tuple(made), title, numbers)


_AMOUNTS: tuple[Callable[[float], str], ...] = (fixed, functools.partial(fixed, sign=True), percent)

_CONNECTIONS = (
    Column("receiving block", "name"),
    Column("hears", "row"),
    *(Column(title, "number") for title in ("α", "β", "contribution", "parameters")),
)


def connections(model: nn.Module) -> ConnectionsByName:
    """Name of the receiving block -> its :class:`Connection`, in the order data meets them.

    A block that hears several others has one under ``name<-source`` for each; a block with one map per branch (SK)
    has one under ``name[0]``, ``name[1]``, ... for each branch.

    It is a dictionary that shows itself: whom each hears, α, β, as a table and in a notebook.

    Raises ``InputError`` for a model that was not converted.
    """
    require_connected(model)
    found = {name: one for name, one in _by_name(model) if not _hears_nobody(one)}
    links = [link for _, recipe in recipes(model) for link in recipe.plan.links]
    order = {link.target: i for _, recipe in recipes(model) for i, link in enumerate(recipe.plan.links)}
    ordered = sorted(found.items(), key=lambda item: order.get(target_of(item[0]), 0))
    heard = {name: link_of(name, links).source for name, _ in ordered if links}  # a part of a model has no recipe
    blocks = (block.name for _, recipe in recipes(model) for block in recipe.plan.blocks)
    return ConnectionsByName(dict(ordered), heard, blocks)


def own_contexts(model: nn.Module) -> dict[str, Any]:
    """Name -> what is left of a connection that was dropped and keeps its α, named as connections are."""
    return {name: one for name, one in _by_name(model) if _hears_nobody(one)}


def _by_name(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for _, module, ends in connected_hosts(model):
        for name, address in ends.addresses:
            yield name, connection_at(dca_of(module), address)


def _hears_nobody(connection: Any) -> bool:
    return getattr(connection, "hears_nobody", False)


def link_of(name: str, links: Iterable[Link]) -> Link:
    """The link that the connection of that name is of; a block with one map per branch has several for each."""
    source, target = name.partition("<-")[2], target_of(name)
    return next(link for link in links if link.target == target and source in ("", link.source))


def target_of(name: str) -> str:
    """The block that hears through the connection of that name."""
    return re.sub(r"\[\d+\]$", "", name.partition("<-")[0])


def connection_at(dca: Any, address: str) -> Any:
    """The connection at a path below ``dca``, also where a wrapper (peft's) stands in its place."""
    return functools.reduce(getattr, address.split("."), dca) if address else dca


def is_connected(model: nn.Module) -> bool:
    """Whether anything in ``model`` is connected."""
    return next(connected_hosts(model), None) is not None


def require_connected(model: nn.Module) -> None:
    """Nothing for a model with connections; ``InputError`` for any other."""
    if not is_connected(model):
        if any(ends_of(module) is not None for module in model.modules()):
            raise InputError(
                f"{type(model).__name__} has no connections: its units hand a state on by themselves, which is a part "
                "of the network. dcafy.summary and dcafy.usage tell of it."
            )
        raise InputError(f"{type(model).__name__} has no connections: convert it first with dcafy.convert(model).")


def own_modules(model: nn.Module) -> set[int]:
    """The identities of all modules that the connections are made of."""
    return {id(part) for _, module, _ in connected_hosts(model) for part in module.dca.modules()}  # type: ignore[union-attr]


def require_recipe(model: nn.Module) -> Recipe:
    """The recipe of a converted model; ``InputError`` for any other, and for one that only has such a model inside."""
    require_connected(model)
    recipe: Recipe | None = getattr(dca_of(model), "recipe", None)
    if recipe is None:
        raise InputError(
            f"{type(model).__name__} is no converted model, but has one inside. Pass the very module that "
            "dcafy.convert returned."
        )
    return recipe


def scale_parameters(model: nn.Module) -> set[int]:
    """The identities of α and β of all connections; none where nothing is connected."""
    made = connections(model).values() if is_connected(model) else ()
    return {id(scale) for one in made for scale in (one.alpha, one.beta)}


def own_parameters(model: nn.Module) -> set[int]:
    """The identities of all parameters that the connections have."""
    return {id(p) for _, module, _ in connected_hosts(model) for p in dca_of(module).parameters()}
