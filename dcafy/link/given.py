"""A user's plan, held against the model."""

from __future__ import annotations

from dcafy.errors import PlanError
from dcafy.link.network import Network
from dcafy.plan.plan import Plan


def checked(plan: Plan, found: Plan, network: Network) -> Plan:
    """``plan``, which the user gave, held against what was ``found``; ``PlanError`` says where it does not fit."""
    if not isinstance(plan, Plan):
        raise PlanError(
            f"plan must be a dcafy.Plan, not {type(plan).__name__}: take the one that "
            "dcafy.inspect(model) gives, or read a dict with dcafy.Plan.from_dict."
        )
    names = [block.name for block in found.blocks]
    for link in plan.links:
        for name in (link.source, link.target):
            if name not in names:
                raise PlanError(
                    f"The plan links {name!r}, which is no attention block of this model. "
                    f"Its blocks are: {', '.join(names) or 'none'}. Make the plan with dcafy.inspect(model)."
                )
        if names.index(link.source) > names.index(link.target):
            raise PlanError(f"The plan links {link.source!r} to {link.target!r}, which data meets before it.")
        if network.apart(link.source, link.target):
            raise PlanError(
                f"{link.source!r} and {link.target!r} lie in different islands, and what the first makes does not "
                "reach the second in a run."
            )
    for name in dict.fromkeys(name for link in plan.links for name in (link.source, link.target)):
        ours, theirs = found.block(name), next((b for b in plan.blocks if b.name == name), None)
        for fact in ("dimension", "channels", "gate", "fusion_kind") if theirs else ():
            if getattr(theirs, fact) != getattr(ours, fact):
                raise PlanError(
                    f"The plan was made for another network: its block {name!r} has {fact} {getattr(theirs, fact)!r}, "
                    f"this model's {getattr(ours, fact)!r}. Make the plan with dcafy.inspect(model)."
                    f"{_ONE_MAP if (ours.dimension, fact, getattr(theirs, fact)) == ('spatial', 'channels', 1) else ''}"
                )
    for one in plan.alone:
        if one.name not in names:
            raise PlanError(f"The plan has {one.name!r} hear nobody, which is no attention block of this model.")
        if any(link.target == one.name for link in plan.links):
            raise PlanError(f"The plan has {one.name!r} hear nobody and somebody. Leave one of them out.")
    if len({one.name for one in plan.alone}) < len(plan.alone):
        raise PlanError("The plan has a block hear nobody more than once. Leave all but one of them out.")
    heard = [(link.source, link.target) for link in plan.links]
    twice = next((pair for pair in heard if heard.count(pair) > 1), None)
    if twice:
        raise PlanError(f"The plan links {twice[0]!r} to {twice[1]!r} more than once.")
    return plan


_ONE_MAP = (
    " An earlier dcafy took the layer behind the pooling for G in spatial attention of few channels: if the plan is of "
    "such a one, convert the original network anew."
)
