"""How a network is connected that may have inserted attention, which lets everything through at first."""

from __future__ import annotations

from torch import nn

from dcafy.attention.inserted import silent
from dcafy.draws import OwnDraws
from dcafy.emit.connect import connect
from dcafy.emit.dca import Recipe, connections
from dcafy.plan.options import Linking, Overrides
from dcafy.plan.plan import Plan
from dcafy.survey import Survey, uncollected
from dcafy.trace.inputs import as_data, probe

START = 0.5
"""β at the start where nothing of what is heard shows in T yet: with 0, two zeros in series would starve the match."""


def started(host: nn.Module, known: Survey, plan: Plan, options: Linking) -> nn.Module:
    """``host``, a copy of what is known, with the links of the plan, which have all their settings, connected."""
    starting = silent(host, {link.target for link in plan.links})
    with OwnDraws(), uncollected():
        recipe = Recipe(plan, options.overridden(Overrides()), inputs=as_data(known.inputs))
        connect(host, known.network, recipe, probe(known.inputs), whole=known.whole)
    for name, connection in connections(host).items():
        if name.partition("<-")[0].partition("[")[0] in starting:
            nn.init.constant_(connection.beta, START)
    return host
