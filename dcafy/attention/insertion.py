"""Attention where there was none: :func:`insert` puts it at the end of every residual unit.

::

    out = bn3(conv3(out))                out = se(bn3(conv3(out)))
    out += identity            ─▶        out += identity

Each unit runs a graph with its attention as a child, as an instance of a generated subclass of its class; the network
around it, its containers and every state-dict key stay as they were. What comes out is an ordinary network with
attention: :func:`dcafy.inspect` finds the blocks by dataflow like any others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from typing import Any, get_args

import torch
from torch import fx, nn

from dcafy.attention.inserted import insertions_of
from dcafy.attention.kinds import ATTENTIONS, INSERTED, KIND, Attention, Insertion
from dcafy.attention.order import order
from dcafy.attention.starting import started
from dcafy.attention.units import Chosen, Reads, Unit, units
from dcafy.draws import OwnDraws
from dcafy.emit.dca import is_connected
from dcafy.emit.relay import Calls, join
from dcafy.emit.wiring import completed
from dcafy.errors import InputError, UsageError
from dcafy.graph import usual
from dcafy.graph.copies import own_copy, shared_copy
from dcafy.graph.evaluator import device_of
from dcafy.graph.paths import free_name, joined
from dcafy.graph.rewritten import Forward, original_class, refusal, rewrite, taken_forward
from dcafy.graph.rows import rows_of
from dcafy.plan.options import Init, Linking
from dcafy.survey import survey
from dcafy.trace.accepted import require_module
from dcafy.trace.fold import CannotEnter, Folded, fold
from dcafy.wording import few, shown


def insert(
    model: nn.Module,
    attention: str,
    *,
    reduction: int | None = 16,
    where: str = "auto",
    init: Init = "identity",
    example_inputs: Any = None,
    copy: bool = True,
) -> nn.Module:
    """``model`` with attention in every residual unit: trainable, and by default computing exactly the same.

    ``attention``: ``se``, ``ge`` (θ⁻), ``ge-theta``, ``sk``, ``cbam``, ``bam``, ``gc``, ``sge`` or ``eca``; or one that
    hands a state on from unit to unit: ``dia`` (an LSTM cell for each stage) or ``rla`` (a recurrent map, which the
    units' first convolutions and the classifier see besides); or ``mrla``, whose units are blocks that hear one another
    by nature along each stage: the result is connected then, as by :func:`dcafy.convert`, and that connects what else
    there is where it inserts this one itself (``attention="mrla"``). ``docs/family.md`` has them.
    ``reduction``: channels over the width of the attention's bottleneck, where it has one; ``None`` or 0 leaves that of
    ``gc`` out (one 1x1 convolution in its place: the simplified non-local block).
    ``where``: ``auto`` finds residual and bottleneck units by their structure and puts attention at the end of
    the main branch, before the addition (``sk`` gives the unit's k x k convolution a second branch); a glob of module
    paths such as ``layer3.*`` takes the units among those, or puts it behind the outermost modules that match.
    ``init``: ``identity`` starts as an exact no-op, ``paper`` in the paper's own form.
    ``example_inputs``: a tensor, a tuple of positional inputs or a dict by name; guessed where absent.
    ``copy``: share nothing with ``model``; ``False`` shares its parameters and buffers.

    The new modules are children of their units under the attention's name (``layer1.0.se``; with an underscore
    where the unit uses that name already). Raises ``UsageError`` for an unknown option or an attention that
    cannot start as a no-op, ``InputError`` where there is no unit, ``TracingError`` where the model does not run.

    >>> import dcafy, torch, torchvision
    >>> model = torchvision.models.resnet18().eval()
    >>> with_se = dcafy.insert(model, "se").eval()
    >>> x = torch.rand(1, 3, 64, 64)
    >>> torch.equal(with_se(x), model(x)), len(dcafy.inspect(with_se).blocks)
    (True, 8)
    """
    host = put(model, attention, reduction=reduction, where=where, init=init, example_inputs=example_inputs, copy=copy)
    return _by_nature(host, example_inputs) if ATTENTIONS[attention].by_nature else host


def _by_nature(host: nn.Module, example_inputs: Any) -> nn.Module:
    """``host`` with its units connected that hear one another by nature, where there are several in a stage."""
    seen = survey(host, example_inputs)
    chains = (
        chain if seen.plan.block(chain.blocks[0]).nature else dataclasses.replace(chain, links=())
        for chain in seen.plan.chains
    )
    plan = dataclasses.replace(seen.plan, chains=tuple(chains)).with_links(lambda link: completed(link, Linking()))
    return started(host, seen, plan, Linking()) if plan.links else host


def put(
    model: nn.Module,
    attention: str,
    *,
    reduction: int | None = 16,
    where: str = "auto",
    init: Init = "identity",
    example_inputs: Any = None,
    copy: bool = True,
) -> nn.Module:
    """What :func:`insert` gives, before blocks are connected."""
    _check(attention, where, reduction, init)
    reduction = reduction or None
    require_module(model)
    if is_connected(model):
        raise InputError("The model is connected already. Insert attention first, then convert the result.")
    kind = ATTENTIONS[attention]
    chosen = units(model, where, example_inputs)
    made, calls = (None, {}) if kind.along is None else _along(model, kind, chosen, reduction, init)
    host = own_copy(model) if copy else shared_copy(model)
    with OwnDraws():
        for unit in chosen.units:
            inside = host.get_submodule(unit.path)
            if made is None:
                with _beside(inside):
                    _attend(unit, inside, attention, _made(kind, unit, inside, reduction, init))
            elif unit.path in made:
                _attend(unit, inside, attention, made[unit.path])
    if made is not None:
        for path in made.keys() - {unit.path for unit in chosen.units}:
            _behind(host.get_submodule(path), attention, made[path])
        relays: Any = {path: module.relay for path, module in made.items()}
        join(host, relays, calls, chosen.inputs.args)
    host.__dict__[INSERTED] = (*insertions_of(model), Insertion(attention, reduction, where, init))
    return host


def _check(attention: str, where: str, reduction: int | None, init: str) -> None:
    if not isinstance(attention, str) or attention not in ATTENTIONS:
        raise UsageError(f"attention={shown(attention)} is not known. Use one of: {', '.join(sorted(ATTENTIONS))}.")
    if not isinstance(where, str):
        raise UsageError(f"where should be 'auto' or a glob of module paths, not {shown(where)}.")
    if init not in get_args(Init):
        raise UsageError(f"init={init!r} is not known. Use one of: {', '.join(get_args(Init))}.")
    if reduction is None or (reduction == 0 and not isinstance(reduction, bool)):
        if not ATTENTIONS[attention].without_bottleneck:
            able = ", ".join(name for name, kind in ATTENTIONS.items() if kind.without_bottleneck)
            raise UsageError(
                f"A reduction of {reduction} leaves the bottleneck out, which {attention!r} cannot do; {able} can."
            )
    elif not isinstance(reduction, int) or isinstance(reduction, bool) or reduction < 1:
        raise UsageError(f"reduction must be a whole number of at least 1, not {reduction!r}.")
    if init == "identity" and ATTENTIONS[attention].obstacle:
        raise UsageError(
            f"{attention!r} cannot start as an exact no-op: {ATTENTIONS[attention].obstacle}. Use its paper's "
            "own form (init='paper' of dcafy.insert, attention_init='paper' of dcafy.convert, --attention-init paper), "
            "and expect other outputs until the network has been trained again."
        )


def _beside(module: nn.Module) -> contextlib.AbstractContextManager[object]:
    """Inside it new layers lie where the module does; nothing where they do anyway, as torch's way stands no Ctrl-C."""
    device = device_of(module)
    return contextlib.nullcontext() if device == torch.get_default_device() else device


def _made(kind: Attention, unit: Unit, host: nn.Module, reduction: int | None, init: Init) -> nn.Module:
    if kind.of_unit is not None:
        return kind.of_unit(unit, host, reduction, init)
    assert kind.build is not None
    return kind.build(unit.channels, reduction, init, unit.side)


def _along(
    model: nn.Module, kind: Attention, chosen: Chosen, reduction: int | None, init: Init
) -> tuple[dict[str, nn.Module], dict[str, Calls]]:
    """The modules of attention that hands a state on from unit to unit, and who hears whom."""
    assert kind.along is not None
    with OwnDraws(), _beside(model):
        made, calls = kind.along(chosen.units, order(model, chosen), reduction, init)
    if not made:
        raise InputError(
            f"No two units of {type(model).__name__} follow on one another, so that there is nobody to hand a state on "
            f"to: there are {few([unit.path for unit in chosen.units])}. Choose more of them with where=, or use "
            "another attention."
        )
    return made, calls


def _attend(unit: Unit, host: nn.Module, attention: str, module: nn.Module) -> None:
    """Puts attention into ``host``, the module that ``unit`` describes."""
    parts = ATTENTIONS[attention].reads(unit, module)
    name = _held(host, attention, module)
    if refusal(host) is not None:
        _require_last(unit, host, parts)
        host.add_module(name, module)
        return
    folded = _folded(unit, tuple(node for reads in parts.values() for node in reads))
    for part, reads in parts.items():
        last = folded.image[reads[-1]]
        with folded.graph.inserting_after(last):
            call = folded.graph.call_module(joined(name, part), tuple(folded.image[node] for node in reads))
        last.replace_all_uses_with(call, delete_user_cb=functools.partial(operator.is_not, call))
    folded.graph.lint()
    for node in folded.graph.nodes:
        node.meta = {}
    host.add_module(name, module)
    read = dataclasses.replace(usual.reads(host, original_class(host)), asked=unit.recording.asked.get("", ()))
    rewrite(host, Forward(rows_of(folded.graph), read, needs=name, own=taken_forward(host)))


def _behind(host: nn.Module, attention: str, module: nn.Module) -> None:
    """Has ``module`` see what a layer makes, and stand in its place."""
    name = _held(host, attention, module)
    host.add_module(name, module)
    rewrite(host, Forward(behind=functools.partial(_seen_by, name), needs=name, own=taken_forward(host)))


def _seen_by(name: str, host: nn.Module, output: Any) -> Any:
    return host._modules[name](output)  # type: ignore[misc]


def _held(host: nn.Module, attention: str, module: nn.Module) -> str:
    """The name under which ``host`` may have the module, which is made like it."""
    module.to(dtype=_dtype(host)).train(host.training)
    module.__dict__[KIND] = attention
    return free_name(host, attention.replace("-", "_"))


def _require_last(unit: Unit, host: nn.Module, parts: Reads) -> None:
    """Nothing where attention can go in as one more child of ``host``, whose class cannot be changed."""
    last = next(reversed(host._modules), "")
    reads = [node for nodes in parts.values() for node in nodes]
    end = reads[-1]
    call = next((call for call in unit.recording.calls_of.get(last, ()) if call.output is end), None)
    if len(reads) > 1 or (call is None and end.target != last) or not isinstance(host, nn.Sequential):
        raise InputError(f"{unit.path} cannot be given attention: {refusal(host)}. Leave it out with where=.")


def _folded(unit: Unit, needed: tuple[fx.Node, ...]) -> Folded:
    """The unit's graph, entered no further than the nodes that attention reads."""
    try:
        folded = fold(unit.recording, ())
        hidden = [node for node in needed if node not in folded.image]
        return fold(unit.recording, hidden) if hidden else folded
    except CannotEnter as error:
        where = joined(unit.path, error.path)
        raise InputError(f"{where} cannot be given attention: {error.reason}. Leave it out with where=.") from error


def _dtype(host: nn.Module) -> torch.dtype:
    return next((p.dtype for p in host.parameters() if p.is_floating_point()), torch.get_default_dtype())
