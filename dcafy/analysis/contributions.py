"""What each connection contributes: the ratio of paper 4.5, and what it is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from dcafy import plots
from dcafy.display import Shown
from dcafy.emit.connection import Connection
from dcafy.emit.dca import connection_sheet, connections, link_of, recipes
from dcafy.plan.blocks import Contribution, Link
from dcafy.plan.plan import Plan
from dcafy.tables import Sheet
from dcafy.wording import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Contributions(Shown, tuple[Contribution, ...]):
    """What the connections contribute, in the order data meets them: a tuple that shows itself."""

    blocks: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Connection -> its contribution, as JSON-ready data."""
        return {one.name: dataclasses.asdict(one) for one in self}

    def plot(self, ax: Axes | None = None) -> Axes:
        """The contribution ratio of each connection (paper Fig. 5; matplotlib)."""
        chosen = plots.axes(ax, height=1.2 + 0.3 * len(self))
        named = [one.name for one in self]
        return plots.points(chosen, named, {"ratio": ([one.ratio for one in self], None)}, x="|β| / (|α| + |β|)")

    def _records(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(one) for one in self]

    def _headline(self) -> str:
        used = sum(one.beta != 0 for one in self)
        return f"{counted(len(self), 'connection')}, {used} with β other than 0"

    def _parts(self) -> Iterator[Sheet]:
        yield connection_sheet(
            [(one.name, one.source, one.alpha, one.beta, one.ratio, one.parameters) for one in self],
            self.blocks,
            "contributions",
        )


def contributions(model: nn.Module) -> Contributions:
    """α, β and the contribution ratio of every connection, in the order data meets them (paper 4.5, Fig. 5).

    Raises ``InputError`` for a model that was not converted.

    >>> import dcafy, dcafy.analysis, torchvision
    >>> connected = dcafy.convert(torchvision.models.mobilenet_v3_small(), verify=False)
    >>> first = dcafy.analysis.contributions(connected)[0]
    >>> first.source, first.target, first.alpha, first.ratio
    ('features.1.block.1', 'features.4.block.2', 1.0, 0.0)
    """
    made = connections(model)
    links = recorded_plan(model).links
    found = Contributions(_contribution(name, connection, links) for name, connection in made.items())
    found.blocks = made.blocks
    return found


def recorded_plan(model: nn.Module) -> Plan:
    """The plan that a connected model was converted with."""
    connections(model)  # says so where it is none
    return next(recipe.plan for _, recipe in recipes(model))


def _contribution(name: str, connection: Connection, links: tuple[Link, ...]) -> Contribution:
    link = link_of(name, links)
    return Contribution(
        name,
        link.source,
        link.target,
        connection.dimension,
        float(connection.alpha.detach()),
        float(connection.beta.detach()),
        connection.contribution(),
        sum(parameter.numel() for parameter in connection.parameters()),
    )
