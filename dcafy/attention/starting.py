"""How a network is connected that may have inserted attention, which lets everything through at first."""

from __future__ import annotations

from torch import nn

from dcafy.attention.inserted import silent
from dcafy.draws import OwnDraws
from dcafy.emit.connect import connect
from dcafy.emit.dca import Recipe, connections, recipes, target_of
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
        if target_of(name) in starting:
            nn.init.constant_(connection.beta, START)
    return host


def unspoken(model: nn.Module) -> frozenset[str]:
    """Those of the connections of ``model`` whose messages have shown in nothing yet: β is 0, or T the same for all."""
    host = model.get_submodule(next((path for path, _ in recipes(model)), ""))
    own = connections(model)
    deaf = silent(host, map(target_of, own))
    return frozenset(name for name, one in own.items() if target_of(name) in deaf or one.beta.item() == 0)


def trained(model: nn.Module) -> tuple[str, ...]:
    """Those of the connections of ``model`` that are not as :func:`started` left them."""
    fresh = unspoken(model)
    own = connections(model).items()
    return tuple(n for n, one in own if n not in fresh or one.alpha.item() != 1 or one.beta.item() not in (0, START))
