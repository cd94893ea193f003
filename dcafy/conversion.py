"""The whole path on one page: :func:`inspect` says what there is to connect, :func:`convert` connects it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from dcafy.attention.insertion import insert
from dcafy.emit.connect import connect, connected_modules
from dcafy.emit.connection import INEXACT_SCHEMAS
from dcafy.emit.verify import tell_drift, verify_outputs
from dcafy.errors import InputError, NoAttentionError, PlanError
from dcafy.graph.copies import own_copy, shared_copy
from dcafy.graph.emitted import Recipe
from dcafy.link.topology import cost, costs, shaped
from dcafy.plan.blocks import Link, Plan
from dcafy.plan.options import Conversion
from dcafy.settings import Settings
from dcafy.survey import Survey, survey
from dcafy.trace.inputs import as_data

log = logging.getLogger("dcafy")

__all__ = ["appraise", "convert", "inspect"]


def inspect(model: nn.Module, *, example_inputs: Any = None) -> Plan:
    """The attention blocks of ``model`` and the connections that :func:`convert` would make.

    ``example_inputs``: a tensor, a tuple of positional inputs, or a dict of inputs by the names that the forward has
    for them; guessed where absent. The model is not changed, and not run on real data unless nothing else will do. A
    model without attention gives a plan without blocks.

    Raises ``InputError`` for what is no plain module or no usable example, ``TracingError`` where the
    network cannot be written down as a graph.

    >>> import dcafy, torchvision
    >>> plan = dcafy.inspect(torchvision.models.mobilenet_v3_small())
    >>> len(plan.blocks), len(plan.links)
    (9, 8)
    """
    return survey(model, example_inputs).plan


def appraise(model: nn.Module, *, example_inputs: Any = None) -> Plan:
    """The plan of :func:`inspect`, with what each topology would add to the model (``plan.costs``)."""
    known = survey(model, example_inputs)
    return dataclasses.replace(known.plan, costs=costs(known.plan, known, Settings()))


def convert(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    plan: Plan | None = None,
    schema: str = "direct",
    channel_match: str = "fc2",
    reduction: int = 16,
    min_hidden: int = 8,
    spatial_match: str = "avg",
    dimension: str = "all",
    topology: str = "chain",
    attention: str | None = None,
    attention_reduction: int = 16,
    copy: bool = True,
    verify: bool = True,
) -> fx.GraphModule:
    """``model`` with its attention blocks connected: a trainable ``GraphModule`` that computes the same.

    Every connection starts at α = 1, β = 0 (paper eq. 3), where its output is G itself.

    ``plan``: from :func:`inspect`, perhaps edited; a link's own settings beat the options given here.
    ``schema``: the form of f: ``direct``, ``weighted`` or ``softmax`` (paper 3.2).
    ``channel_match``: ``fc2`` or ``fc1``, where widths differ (paper 3.3); ``reduction`` and ``min_hidden`` set the
    hidden width of ``fc2``. ``spatial_match``: ``avg``, ``max`` or ``conv``, where sizes differ.
    ``dimension``: ``channel``, ``spatial`` or ``all`` (paper 4.2: DCA-C, DCA-S, DCA-All).
    ``topology``: ``chain``, or ``dense`` where each block hears all earlier ones that reach it.
    ``attention``: a network without attention is given this one first, as :func:`dcafy.insert` does it, with
    ``attention_reduction`` for its bottleneck.
    ``copy``: share nothing with ``model``; ``False`` shares its parameters and buffers.
    ``verify``: run both in eval mode on the example and raise unless the outputs are bit-identical. ``softmax`` is
    not the identity at the start: a warning tells how far the outputs have moved.

    Raises ``NoAttentionError`` where there is nothing to connect, ``PlanError`` for a plan that does not
    fit, ``VerificationError``, and what :func:`inspect` raises; ``model`` is as it was in every case.

    >>> import dcafy, torch, torchvision
    >>> model = torchvision.models.mobilenet_v3_small().eval()
    >>> connected = dcafy.convert(model)
    >>> x = torch.rand(1, 3, 224, 224)
    >>> torch.equal(connected(x), model(x))
    True
    """
    settings = Settings(schema, channel_match, reduction, min_hidden, spatial_match)
    settings.check()
    original = model
    if attention is not None:
        model = insert(model, attention, reduction=attention_reduction, example_inputs=example_inputs, copy=copy)
        copy = False  # it is a copy already
    known = survey(model, example_inputs)
    _refuse_connected(model)
    if verify and any(p.device.type == "meta" for p in model.parameters()):
        raise InputError("A model on the meta device computes nothing to compare. Pass verify=False.")
    chosen = _checked(known.plan if plan is None else plan, known)
    chosen = shaped(chosen, known, dimension=dimension, topology=topology)
    if not chosen.links:
        raise NoAttentionError(_nothing_to_connect(chosen))
    chosen = _with_settings(chosen, settings)
    if log.isEnabledFor(logging.INFO):
        price = cost(topology, chosen, known, settings)
        log.info("%s: %d connections with %s new parameters", topology, price.connections, f"{price.parameters:,}")
    with _preserved_rng(model):
        converted = _connected(model, known, chosen, settings, copy)
        inexact = sorted({str(link.schema) for link in chosen.links} & INEXACT_SCHEMAS)
        if inexact:
            tell_drift(inexact[0], original, converted, known.inputs if verify else None)
        elif verify:
            verify_outputs(original, converted, known.inputs)
    return converted  # type: ignore[return-value]


def converted_as(
    model: nn.Module, conversion: Conversion, *, example_inputs: Any = None, verify: bool = True, copy: bool = True
) -> fx.GraphModule:
    """:func:`convert` with its options, and those of :func:`dcafy.insert`, as one value."""
    chosen = dataclasses.asdict(conversion)
    insertion = {name: chosen.pop(name) for name in ("attention", "attention_reduction", "where", "init")}
    if insertion["attention"] is not None:
        name, reduction, where, init = insertion.values()
        model = insert(
            model, name, reduction=reduction, where=where, init=init, example_inputs=example_inputs, copy=copy
        )
        copy = False  # it is a copy already
    return convert(model, example_inputs=example_inputs, copy=copy, verify=verify, **chosen)


def _refuse_connected(model: nn.Module) -> None:
    if any(True for _ in connected_modules(model)):
        raise InputError(
            "The model is connected already. Train it as it is, or take dcafy.revert(model) and convert that anew."
        )


def _checked(plan: Plan, known: Survey) -> Plan:
    if not isinstance(plan, Plan):
        raise PlanError(
            f"plan must be a dcafy.Plan, not {type(plan).__name__}: take the one that "
            "dcafy.inspect(model) gives, or read a dict with dcafy.Plan.from_dict."
        )
    names = [block.name for block in known.plan.blocks]
    for link in plan.links:
        for name in (link.source, link.target):
            if name not in names:
                raise PlanError(
                    f"The plan links {name!r}, which is no attention block of this model. "
                    f"Its blocks are: {', '.join(names) or 'none'}. Make the plan with dcafy.inspect(model)."
                )
        if names.index(link.source) >= names.index(link.target):
            raise PlanError(f"The plan links {link.source!r} to {link.target!r}, which data meets before it.")
        if not any(link.source in region and link.target in region for region in known.regions):
            raise PlanError(f"{link.source!r} and {link.target!r} lie in different islands, which share no graph.")
    for name in dict.fromkeys(name for link in plan.links for name in (link.source, link.target)):
        ours, theirs = known.plan.block(name), next((b for b in plan.blocks if b.name == name), None)
        for fact in ("dimension", "channels", "gate", "fusion_kind") if theirs else ():
            if getattr(theirs, fact) != getattr(ours, fact):
                raise PlanError(
                    f"The plan was made for another network: its block {name!r} has {fact} {getattr(theirs, fact)!r}, "
                    f"this model's {getattr(ours, fact)!r}. Make the plan with dcafy.inspect(model)."
                )
    heard = [(link.source, link.target) for link in plan.links]
    twice = next((pair for pair in heard if heard.count(pair) > 1), None)
    if twice:
        raise PlanError(f"The plan links {twice[0]!r} to {twice[1]!r} more than once.")
    return plan


def _with_settings(plan: Plan, settings: Settings) -> Plan:
    chains = tuple(
        dataclasses.replace(chain, links=tuple(settings.complete(link) for link in chain.links))
        for chain in plan.chains
    )
    return dataclasses.replace(plan, chains=chains)


def _nothing_to_connect(plan: Plan) -> str:
    if not plan.blocks:
        what = f"{plan.model or 'The model'} has no attention block that could be connected."
    else:
        names = _few([block.name for block in plan.blocks])
        what = f"{plan.model or 'The model'} has attention ({names}), but no block that could hear an earlier one."
    reasons: dict[str, list[str]] = {}
    for item in plan.skipped:
        reasons.setdefault(item.reason, []).append(item.name)
    skipped = "".join(f"\n  skipped {_few(names)}: {reason}" for reason, names in reasons.items())
    return (
        f"{what}{skipped}\nAttention can be added to a network before converting it: dcafy.insert(model, 'se') puts it "
        "at the end of each residual branch, and dcafy.convert(model, attention='se') does both."
    )


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _connected(model: nn.Module, known: Survey, plan: Plan, settings: Settings, copy: bool) -> nn.Module:
    host = own_copy(model) if copy else shared_copy(model)
    recipe = Recipe(plan, dataclasses.asdict(settings), inputs=as_data(known.inputs))
    for region in known.regions:
        links: tuple[Link, ...] = tuple(link for link in plan.links if link.target in region)
        if not links:
            continue
        module = connect(region, links, host.get_submodule(region.path), recipe)
        if not region.path:
            host = module  # it has the modules of the one it was made of, those of islands among them
            continue
        parent, _, name = region.path.rpartition(".")
        host.get_submodule(parent)._modules[name] = module
    return host


@contextmanager
def _preserved_rng(model: nn.Module) -> Iterator[None]:
    """Initialising the matching layers and running a model draw random numbers; nobody else notices."""
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        yield
