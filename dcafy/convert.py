"""The whole path on one page: :func:`inspect` says what there is to connect, :func:`convert` connects it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from dcafy.blocks import Link, Plan
from dcafy.connected import Recipe
from dcafy.connection import CHANNEL_MATCHES, SCHEMAS, SPATIAL_MATCHES
from dcafy.emit import Settings, connect, connected_modules
from dcafy.errors import InputError, NoAttentionError, PlanError, UsageError, VerificationError
from dcafy.examples import real_inputs
from dcafy.survey import Survey, survey
from dcafy.trace.recorder import shared_copy

__all__ = ["convert", "inspect"]


def inspect(model: nn.Module, *, example_inputs: Any = None) -> Plan:
    """The attention blocks of ``model`` and the connections that :func:`convert` would make.

    ``example_inputs``: a tensor or a tuple of positional inputs; guessed where absent. The model is not
    changed, and not run on real data unless nothing else will do. A model without attention gives a plan
    without blocks.

    Raises ``InputError`` for what is no plain module or no usable example, ``TracingError`` where the
    network cannot be written down as a graph.

    >>> import dcafy, torchvision
    >>> plan = dcafy.inspect(torchvision.models.mobilenet_v3_small())
    >>> len(plan.blocks), len(plan.links)
    (9, 8)
    """
    return survey(model, example_inputs).plan


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
    copy: bool = True,
    verify: bool = True,
) -> fx.GraphModule:
    """``model`` with its attention blocks connected: a trainable ``GraphModule`` that computes the same.

    Every connection starts at α = 1, β = 0 (paper eq. 3), where its output is G itself.

    ``plan``: from :func:`inspect`, perhaps edited; a link's own settings beat the options given here.
    ``schema``: the form of f. ``channel_match``: ``fc2`` or ``fc1``, where widths differ (paper 3.3);
    ``reduction`` and ``min_hidden`` set the hidden width of ``fc2``. ``spatial_match``: ``avg``.
    ``copy``: share nothing with ``model``; ``False`` shares its parameters and buffers.
    ``verify``: run both in eval mode on the example and raise unless the outputs are bit-identical.

    Raises ``NoAttentionError`` where there is nothing to connect, ``PlanError`` for a plan that does not
    fit, ``VerificationError``, and what :func:`inspect` raises; ``model`` is as it was in every case.

    >>> import dcafy, torch, torchvision
    >>> model = torchvision.models.mobilenet_v3_small().eval()
    >>> connected = dcafy.convert(model)
    >>> x = torch.rand(1, 3, 224, 224)
    >>> torch.equal(connected(x), model(x))
    True
    """
    settings = _settings(schema, channel_match, reduction, min_hidden, spatial_match)
    known = survey(model, example_inputs)
    _refuse_connected(model)
    if verify and any(p.device.type == "meta" for p in model.parameters()):
        raise InputError("A model on the meta device computes nothing to compare. Pass verify=False.")
    chosen = _checked(known.plan if plan is None else plan, known)
    if not chosen.links:
        raise NoAttentionError(_nothing_to_connect(chosen))
    chosen = _with_settings(chosen, settings)
    with _preserved_rng(model):
        converted = _connected(model, known, chosen, settings, copy)
        if verify:
            _verify(model, converted, known.inputs)
    return converted  # type: ignore[return-value]


def _settings(schema: str, channel_match: str, reduction: int, min_hidden: int, spatial_match: str) -> Settings:
    for name, value, known in (
        ("schema", schema, SCHEMAS),
        ("channel_match", channel_match, CHANNEL_MATCHES),
        ("spatial_match", spatial_match, SPATIAL_MATCHES),
    ):
        if value not in known:
            raise UsageError(f"{name}={value!r} is not known. Use one of: {', '.join(sorted(known))}.")
    for name, number in (("reduction", reduction), ("min_hidden", min_hidden)):
        if not isinstance(number, int) or number < 1:
            raise UsageError(f"{name} must be a whole number of at least 1, not {number!r}.")
    return Settings(schema, channel_match, reduction, min_hidden, spatial_match)


def _refuse_connected(model: nn.Module) -> None:
    if any(True for _ in connected_modules(model)):
        raise InputError(
            "The model is connected already. Train it as it is, or take dcafy.revert(model) and convert that anew."
        )


def _checked(plan: Plan, known: Survey) -> Plan:
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
    heard = [link.target for link in plan.links]
    twice = next((name for name in heard if heard.count(name) > 1), None)
    if twice:
        raise PlanError(f"The plan has {heard.count(twice)} links into {twice!r}; a block hears one earlier block.")
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
        what = f"{plan.model or 'The model'} has {len(plan.blocks)} attention block(s), but none that follows another."
    skipped = "".join(f"\n  skipped {item.name}: {item.reason}" for item in plan.skipped)
    return (
        f"{what}{skipped}\nAttention can be added to a network before converting it: put a module such as "
        "torchvision.ops.SqueezeExcitation at the end of each residual branch, and train or load it."
    )


def _connected(model: nn.Module, known: Survey, plan: Plan, settings: Settings, copy: bool) -> nn.Module:
    import copy as copying

    host = copying.deepcopy(model) if copy else shared_copy(model)
    recipe = Recipe(plan, dataclasses.asdict(settings))
    for region in known.regions:
        links: tuple[Link, ...] = tuple(link for link in plan.links if link.target in region)
        if not links:
            continue
        module = connect(region, links, host.get_submodule(region.path), recipe)
        if not region.path:
            return module
        parent, _, name = region.path.rpartition(".")
        host.get_submodule(parent)._modules[name] = module
    return host


@contextmanager
def _preserved_rng(model: nn.Module) -> Iterator[None]:
    """Initialising the matching layers and running a model draw random numbers; nobody else notices."""
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        yield


def _verify(model: nn.Module, converted: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Raises unless both give bit-identical outputs in eval mode."""
    example = real_inputs(inputs, model)
    expected, actual = _output(model, example), _output(converted, example)
    for ours, theirs in zip(_tensors(actual), _tensors(expected), strict=True):
        if not torch.equal(ours, theirs) and not torch.equal(ours.nan_to_num(), theirs.nan_to_num()):
            raise VerificationError(
                f"The converted model differs from the original by up to {float((ours - theirs).abs().max()):.3g} "
                "on the example. If the model draws random numbers in eval mode, that is expected: "
                "pass verify=False. If not, please report it with the model's code."
            )


def _output(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        for module, _ in modes:
            module.training = False
        torch.manual_seed(0)
        with torch.no_grad():
            return model(*inputs)
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                if buffer.shape == before.shape and not torch.equal(buffer, before):
                    buffer.copy_(before)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in _tensors(item)]
    if isinstance(value, tuple | list):
        return [t for item in value for t in _tensors(item)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [t for f in dataclasses.fields(value) for t in _tensors(getattr(value, f.name))]
    return []

