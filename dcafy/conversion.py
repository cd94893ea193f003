"""The whole path on one page: :func:`inspect` says what there is to connect, :func:`convert` connects it."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

from torch import fx, nn

from dcafy.attention.inserted import hands_on, inserted
from dcafy.attention.insertion import put
from dcafy.attention.kinds import KIND
from dcafy.attention.starting import started
from dcafy.choices import CHOICES
from dcafy.converted import apart_by_nature, take_over
from dcafy.draws import OwnDraws
from dcafy.emit.dca import is_connected
from dcafy.emit.schemas import SCHEMAS
from dcafy.emit.verify import tell_drift, verify_outputs
from dcafy.emit.wiring import completed, cost, costs
from dcafy.errors import InputError, NoAttentionError
from dcafy.graph.copies import data_free_copy, own_copy, shared_copy
from dcafy.graph.counting import multiply_adds
from dcafy.graph.nodes import mapped_tensors
from dcafy.link.given import checked
from dcafy.link.sharing import settled
from dcafy.link.topology import shaped
from dcafy.plan.blocks import Cost
from dcafy.plan.options import Conversion, Inserting, check, require_heeded, takes
from dcafy.plan.plan import Plan
from dcafy.survey import survey, uncollected
from dcafy.trace.accepted import require_module
from dcafy.trace.inputs import probe
from dcafy.wording import few, nearest

log = logging.getLogger("dcafy")


def inspect(model: nn.Module, *, example_inputs: Any = None) -> Plan:
    """The attention blocks of ``model`` and the connections that :func:`convert` would make.

    ``example_inputs``: a tensor, a tuple of positional inputs, or a dict or named tuple of inputs by the names that the
    forward has for them (any other named tuple is one input); guessed where absent. The model is not changed, and not
    run on real data unless nothing else will do. A model without attention gives a plan without blocks.

    Raises ``InputError`` for what is no plain module or no usable example, ``TracingError`` where the
    network cannot be written down as a graph.

    >>> import dcafy, torchvision
    >>> plan = dcafy.inspect(torchvision.models.mobilenet_v3_small())
    >>> len(plan.blocks), len(plan.links)
    (9, 8)
    """
    return survey(model, example_inputs).plan


def appraise(model: nn.Module, *, example_inputs: Any = None, inserting: Inserting | None = None) -> Plan:
    """The plan of :func:`inspect`, with what each topology would add to the model (``plan.costs``).

    ``inserting``: with this attention in it, whose own cost comes first.
    """
    given, model = model, with_attention(model, inserting or Inserting(), example_inputs=example_inputs)
    known = survey(model, example_inputs)
    others = costs(known.plan, known.network, Conversion()) if known.plan.blocks else ()
    own = () if model is given else (_cost_of_attention(given, model, known.inputs),)
    return dataclasses.replace(known.plan, costs=(*own, *others))


def _cost_of_attention(given: nn.Module, model: nn.Module, inputs: tuple[Any, ...]) -> Cost:
    """What attention adds that was put into a copy of ``given``, for one image of the example."""
    own = [module for _, module in inserted(model)]
    parameters = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in given.parameters())
    one = mapped_tensors(probe(inputs), lambda value: value[:1])
    before, after = (multiply_adds(functools.partial(data_free_copy(network), *one)) for network in (given, model))
    return Cost(f"{own[0].__dict__[KIND]} (attention)", len(own), parameters, after - before)


@takes(Conversion, CHOICES)
def convert(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    plan: Plan | None = None,
    copy: bool = True,
    verify: bool = True,
    **options: Any,
) -> fx.GraphModule:
    """``model`` with its attention blocks connected: trainable, of the same class, and computing the same.

    The result is an ``fx.GraphModule`` besides, where one graph of the whole can be written: its ``graph`` is the whole
    connected network. Messages pass by a wire (``docs/in_place.md``); parts of the result compute connected, too.

    Every connection starts at α = 1, β = 0 (paper eq. 3), where its output is G itself. Behind attention that was
    inserted as a no-op, and not trained since, β starts at 0.5: its T is the same whatever it hears.

    ``plan``: from :func:`inspect`, perhaps edited; a link's own settings beat the options given here.
    ``schema``: the form of f: ``direct``, ``weighted`` or ``softmax`` (paper 3.2), or ``normalised``, which ends with a
    norm and a ReLU, as the code does that was published with the paper.
    ``message``: ``plain``, or ``centred`` where what is the same for every image is taken out of what is heard.
    ``channel_match``: ``fc2`` or ``fc1``, where widths differ (paper 3.3); ``reduction`` and ``min_hidden`` set the
    hidden width of ``fc2``. ``spatial_match``: ``avg``, ``max`` or ``conv``, where sizes differ.
    ``dimension``: ``channel``, ``spatial`` or ``all`` (paper 4.2: DCA-C, DCA-S, DCA-All).
    ``topology``: ``chain``; ``dense`` where each block hears all earlier ones that reach it; ``tree`` where the n-th
    hears the (n - 2^j)-th for every 2^j that divides n (paper section 5); ``own`` where each hears itself, centred.
    ``attention``: a network without attention is given this one first, as :func:`dcafy.insert` does it, with
    ``attention_reduction`` for its bottleneck (``None`` or 0: none, with ``gc``), ``where``, and ``attention_init`` for
    its ``init``. With one that hands a state on by itself (``rla``, ``dia``) there may be no block to connect: the
    result is then what :func:`dcafy.insert` gives. Blocks that are connected by nature (``mrla``) stay so.
    ``copy``: share nothing with ``model``; ``False`` shares its parameters and buffers.
    ``verify``: run both in eval mode on the example and raise unless the outputs are bit-identical. ``softmax`` and
    ``normalised`` are not the identity at the start, nor is attention in its paper's own form: a warning tells how far
    the outputs have moved.

    Raises ``NoAttentionError`` where there is nothing to connect, ``PlanError`` for a plan that does not
    fit, ``VerificationError``, and what :func:`inspect` raises; ``model`` is as it was in every case.

    >>> import dcafy, torch, torchvision
    >>> model = torchvision.models.mobilenet_v3_small().eval()
    >>> connected = dcafy.convert(model)
    >>> x = torch.rand(1, 3, 224, 224)
    >>> torch.equal(connected(x), model(x))
    True
    """
    known = [*vars(Conversion())]
    for name in (name for name in options if name not in known):
        raise TypeError(f"convert() got an unexpected keyword argument {name!r}.{nearest(name, known)}")
    conversion = Conversion(**options)
    check(conversion, CHOICES, dashes=False)
    if len(options) < len(known):  # a whole Conversion has all of them, whatever was meant
        require_heeded(conversion, options, dashes=False)
    require_module(model)
    given = model
    model, natures = apart_by_nature(given, copy=copy)
    model = with_attention(model, conversion, example_inputs=example_inputs, copy=copy)
    seen = survey(model, example_inputs)
    if is_connected(model):
        raise InputError(
            "The model is connected already. Train it as it is, or take dcafy.revert(model) and convert that anew."
        )
    if verify and any(p.device.type == "meta" for p in model.parameters()):
        raise InputError("A model on the meta device computes nothing to compare. Pass verify=False.")
    moved: list[str] = []
    if conversion.attention is not None and conversion.attention_init == "paper":
        moved.append(f"{conversion.attention!r} in its paper's own form")
    check_outputs = functools.partial(verify_outputs, model if moved else given, inputs=seen.inputs, copied=copy)
    chosen = checked(seen.plan if plan is None else plan, seen.plan, seen.network)
    chosen = shaped(chosen, seen.network, dimension=conversion.dimension, topology=conversion.topology)
    if not chosen.links and not chosen.alone:
        if model is given or not hands_on(model):
            raise NoAttentionError(_nothing_to_connect(model, chosen, seen.lost))
        if moved:
            tell_drift(moved, given, model, seen.inputs if verify else None)
        elif verify:
            check_outputs(model)
        return model  # type: ignore[return-value]
    chosen = settled(chosen.with_links(lambda link: completed(link, conversion)), seen.network)
    if log.isEnabledFor(logging.INFO):
        price = cost(conversion.topology, chosen, seen.network, conversion)
        log.info(
            "%s: %d connections with %s new parameters", price.topology, price.connections, f"{price.parameters:,}"
        )
    with OwnDraws(), uncollected():
        own = own_copy(model) if copy and model is given else shared_copy(model)  # attention is put into a copy already
        converted = started(own, seen, chosen, conversion)
        take_over(converted, natures)
        inexact = sorted({str(link.schema) for link in chosen.links if not SCHEMAS[str(link.schema)].exact})
        if verify and not inexact:
            check_outputs(converted)
        moved = [*(f"The schema {schema!r}" for schema in inexact), *moved]
        if moved:
            tell_drift(moved, given, converted, seen.inputs if verify else None)
    return converted  # type: ignore[return-value]


def with_attention(model: nn.Module, options: Inserting, *, example_inputs: Any = None, copy: bool = True) -> nn.Module:
    """``model`` with the attention that the options ask for (:func:`dcafy.insert`); itself where they ask for none."""
    if options.attention is None:
        return model
    return put(
        model,
        options.attention,
        reduction=options.attention_reduction,
        where=options.where,
        init=options.attention_init,  # type: ignore[arg-type]
        example_inputs=example_inputs,
        copy=copy,
    )


def _nothing_to_connect(network: nn.Module, plan: Plan, lost: tuple[str, ...]) -> str:
    model, found = plan.model or "The model", [*(block.name for block in plan.blocks), *lost]
    if hands_on(network):
        return (
            f"{type(network).__name__} has no attention block that could be connected, and needs none: what was put in "
            "hands a state on from unit to unit. Train it as it is."
        )
    if not found:
        what = f"{model} has no attention block that could be connected."
    else:
        what = f"{model} has attention ({few(found)}), but no block that could hear an earlier one."
    reasons: dict[str, list[str]] = {}
    for item in plan.skipped:
        reasons.setdefault(item.reason, []).append(item.name)
    skipped = "".join(f"\n  skipped {few(names)}: {reason}" for reason, names in reasons.items())
    if len(found) > 1 and not skipped:
        return (
            f"{what} The G of each is pooled of something that no other block's output reaches: they lie beside one "
            "another and not one behind the other."
        )
    if len(found) > 1:  # a second attention beside the one that is there would be of no help
        return (
            f"{what}{skipped}\nWhat was skipped says what stands between them: change the forward that it names, or "
            "pass example_inputs with which it goes another way."
        )
    return (
        f"{what}{skipped}\nAttention can be added to a network before converting it: dcafy.insert(model, 'se') puts it "
        "at the end of each residual branch, and dcafy.convert(model, attention='se') does both."
    )
