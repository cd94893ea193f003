"""What each connection contributes: the ratio of paper 4.5, and what it is made of."""

from __future__ import annotations

from torch import nn

from dcafy.emit.connection import Connection
from dcafy.emit.dca import connections, link_of, recipes
from dcafy.plan.blocks import Contribution, Link
from dcafy.plan.plan import Plan


def contributions(model: nn.Module) -> tuple[Contribution, ...]:
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
    return tuple(_contribution(name, connection, links) for name, connection in made.items())


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
