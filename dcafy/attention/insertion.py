"""Attention where there was none: :func:`insert` puts it at the end of every residual unit.

::

    out = bn3(conv3(out))                out = se(bn3(conv3(out)))
    out += identity            ─▶        out += identity

Each unit runs a graph with its attention as a child, as an instance of a generated subclass of its class; the network
around it, its containers and every state-dict key stay as they were. What comes out is an ordinary network with
attention: :func:`dcafy.inspect` finds the blocks by dataflow like any others.
"""

from __future__ import annotations

import copy as copying
import dataclasses
from typing import Any, get_args

import torch
from torch import fx, nn

from dcafy.attention.kinds import ATTENTIONS, INSERTED, KIND, Insertion
from dcafy.attention.sk import SK
from dcafy.attention.starting import started
from dcafy.attention.units import Kernel, Unit, units
from dcafy.draws import OwnDraws
from dcafy.emit.dca import is_connected
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
    is connected by nature (``docs/family.md``), from unit to unit along each stage: ``mrla``, behind every unit. Then
    the result is connected already, as by :func:`dcafy.convert`; that connects other attention as well, where it
    inserts this one itself (``attention="mrla"``).
    ``reduction``: channels over the width of the attention's bottleneck, where it has one; ``None`` leaves that of
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
    if not ATTENTIONS[attention].by_nature:
        return host
    seen = survey(host, example_inputs)
    own = [chain for chain in seen.plan.chains if seen.plan.block(chain.blocks[0]).nature]
    others = (dataclasses.replace(chain, links=()) for chain in seen.plan.chains if chain not in own)
    plan = dataclasses.replace(seen.plan, chains=(*own, *others))
    plan = plan.with_links(lambda link: completed(link, Linking()))
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
    """What :func:`insert` gives, before anything is connected."""
    _check(attention, reduction, init)
    require_module(model)
    if is_connected(model):
        raise InputError("The model is connected already. Insert attention first, then convert the result.")
    chosen = units(model, where, example_inputs)
    host = own_copy(model) if copy else shared_copy(model)
    with OwnDraws():
        for unit in chosen:
            _attend(unit, host.get_submodule(unit.path), attention, reduction, init)
    before = getattr(model, INSERTED, ())
    host.__dict__[INSERTED] = (*before, Insertion(attention, reduction, where, init))
    return host


def _check(attention: str, reduction: int | None, init: str) -> None:
    if attention not in ATTENTIONS:
        raise UsageError(f"attention={attention!r} is not known. Use one of: {', '.join(sorted(ATTENTIONS))}.")
    if init not in get_args(Init):
        raise UsageError(f"init={init!r} is not known. Use one of: {', '.join(get_args(Init))}.")
    if reduction is None:
        if not ATTENTIONS[attention].without_bottleneck:
            able = ", ".join(name for name, kind in ATTENTIONS.items() if kind.without_bottleneck)
            raise UsageError(f"reduction=None leaves the bottleneck out, which {attention!r} cannot do; {able} can.")
    elif not isinstance(reduction, int) or isinstance(reduction, bool) or reduction < 1:
        raise UsageError(f"reduction must be a whole number of at least 1, not {reduction!r}.")
    if init == "identity" and ATTENTIONS[attention].obstacle:
        raise UsageError(
            f"{attention!r} cannot start as an exact no-op: {ATTENTIONS[attention].obstacle}. Use dcafy.insert(model, "
            f"{attention!r}, init='paper'), and expect other outputs until the network has been trained again."
        )


def _attend(unit: Unit, host: nn.Module, attention: str, reduction: int | None, init: Init) -> None:
    """Puts attention into ``host``, the module that ``unit`` describes."""
    reads: tuple[fx.Node, ...]
    if attention == "sk":
        if unit.kernel is None:
            raise InputError(
                f"{unit.path} has no convolution larger than 1x1 followed by batch norm and an activation, which "
                "selective kernels would give a second branch to. Leave it out with where=, or use another attention."
            )
        reads = (unit.kernel.input, unit.kernel.output)
        assert reduction is not None
        module: nn.Module = _selective(unit.kernel, host, reduction)
    else:
        end = unit.output if ATTENTIONS[attention].behind else unit.end
        if end is None:
            raise InputError(
                f"{unit.path} returns no map [N, C, H, W], behind which {attention!r} could go. Leave it out with "
                "where=."
            )
        reads = (end,)
        with torch.device(device_of(host)):
            module = ATTENTIONS[attention].build(unit.channels, reduction, init, unit.side)
    name = free_name(host, attention.replace("-", "_"))
    module.to(dtype=_dtype(host)).train(host.training)
    module.__dict__[KIND] = attention
    if refusal(host) is not None:
        _require_last(unit, host, reads)
        host.add_module(name, module)
        return
    folded = _folded(unit, reads)
    last = folded.image[reads[-1]]
    with folded.graph.inserting_after(last):
        call = folded.graph.call_module(name, tuple(folded.image[node] for node in reads))
    last.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
    folded.graph.lint()
    for node in folded.graph.nodes:
        node.meta = {}
    host.add_module(name, module)
    rewrite(
        host,
        Forward(rows_of(folded.graph), usual.reads(host, original_class(host)), needs=name, own=taken_forward(host)),
    )


def _require_last(unit: Unit, host: nn.Module, reads: tuple[fx.Node, ...]) -> None:
    """Nothing where attention can go in as one more child of ``host``, whose class cannot be changed."""
    last = next(reversed(host._modules), "")
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


def _selective(kernel: Kernel, host: nn.Module, reduction: int) -> SK:
    """SK whose second branch is the unit's convolution with twice its dilation, freshly initialised."""
    old = host.get_submodule(str(kernel.convolution.target))
    assert isinstance(old, nn.Conv2d)
    dilation = tuple(2 * d for d in old.dilation)
    padding: Any = old.padding
    if not isinstance(padding, str):
        # As much more padding as the larger reach takes, so that both branches' maps have one size.
        reach = zip(padding, old.dilation, old.kernel_size, strict=True)
        padding = tuple(p + d * (k - 1) // 2 for p, d, k in reach)
    with torch.device(device_of(host)):
        convolution = nn.Conv2d(
            old.in_channels,
            old.out_channels,
            old.kernel_size,  # type: ignore[arg-type]
            old.stride,  # type: ignore[arg-type]
            padding,
            dilation,  # type: ignore[arg-type]
            old.groups,
            old.bias is not None,
        )
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        second = nn.Sequential(convolution, *_norm_and_activation(kernel, host))
        return SK(old.out_channels, second, reduction)


def _norm_and_activation(kernel: Kernel, host: nn.Module) -> list[nn.Module]:
    norm = copying.deepcopy(host.get_submodule(str(kernel.norm.target)))
    assert isinstance(norm, nn.BatchNorm2d)
    norm.reset_parameters()
    if kernel.activation is None:
        return [norm]
    if kernel.activation.op == "call_module":
        return [norm, copying.deepcopy(host.get_submodule(str(kernel.activation.target)))]
    return [norm, nn.ReLU()]


def _dtype(host: nn.Module) -> torch.dtype:
    return next((p.dtype for p in host.parameters() if p.is_floating_point()), torch.get_default_dtype())
