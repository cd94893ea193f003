"""``dcafy inspect``: what there is to connect."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcafy import errors
from dcafy.cli.app import command
from dcafy.cli.configured import given_options, with_options
from dcafy.cli.options import InputSize, Model, Settings, example_input, settings_given
from dcafy.plan.options import Inserting, require_heeded
from dcafy.sources.options import FileOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dcafy.plan.blocks import Link
    from dcafy.plan.plan import Plan


@command("inspect", "dcafy inspect timm:seresnet50")
@with_options
def inspect_command(
    context: typer.Context,
    model: Model,
    inserting: Inserting,
    file: FileOptions,
    nodes: Annotated[bool, typer.Option("--nodes", help="Also list every node of each block with its role.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
    input_size: InputSize = None,
    settings: Settings = None,
) -> None:
    """Show the attention blocks of a network and how they will be connected. Changes nothing."""
    chosen, example = settings_given(settings), example_input(input_size)
    require_heeded(inserting, given_options(context), dashes=True)
    # What the user's code prints while it is imported must not end up in the document.
    with contextlib.redirect_stdout(sys.stderr):
        plan, network = _found(model, example, inserting, settings=chosen, **dataclasses.asdict(file))
        from dcafy.attention.inserted import hands_on
    if as_json:
        print(json.dumps({**plan_document(plan), **_state_document(network)}, indent=2))
    else:
        from dcafy.plan.tables import written
        from dcafy.runs.summary import of_network
        from dcafy.tables import shown

        terminal = sys.stdout.isatty()
        print(written(plan, nodes=nodes, terminal=terminal), end="")
        print(shown(of_network(network), terminal=terminal), end="")
    sys.stdout.flush()
    if not (plan.blocks or inserting.attention or hands_on(network)):
        raise errors.NoAttentionError(
            f"{model!r} has no attention blocks, so there is nothing to connect. Attention can be added first: "
            "dcafy convert MODEL --attention se -o DIR, or dcafy.convert(model, attention='se') in Python, or modules "
            "such as torchvision.ops.SqueezeExcitation in the network's own code."
        )


def _found(spec: str, example: torch.Tensor | None, inserting: Inserting, **how: Any) -> tuple[Plan, nn.Module]:
    """The plan for the model that ``spec`` names, under that name, and the model; of a connected one its own plan."""
    from dcafy.conversion import appraise
    from dcafy.emit.dca import recipes
    from dcafy.sources import open_model

    model = open_model(spec, on_meta=True, **how).model
    own = dict(recipes(model)).get("")
    if own is not None:
        return dataclasses.replace(own.plan, model=spec), model
    asked = {} if inserting.attention is None else {"inserting": inserting}
    try:
        plan = appraise(model, example_inputs=example, **asked)
    except (errors.TracingError, errors.InputError):
        if not any(parameter.is_meta for parameter in model.parameters()):
            raise
        # Where the course of the forward depends on values, as in detectors, it takes values to look.
        plan = appraise(open_model(spec, **how).model, example_inputs=example, **asked)
    return dataclasses.replace(plan, model=spec), model


def _state_document(network: nn.Module) -> dict[str, Any]:
    """What ``--json`` tells besides of a network that is connected or comes from a folder."""
    from dcafy.attention.inserted import handed_on
    from dcafy.emit.dca import connections, is_connected
    from dcafy.images.about import known
    from dcafy.records import written

    handed = [dataclasses.asdict(one) for one in handed_on(network)]
    document: dict[str, Any] = {"handed_on": handed} if handed else {}
    if is_connected(network):
        document["connected"] = {
            name: {"alpha": c.alpha.item(), "beta": c.beta.item(), "contribution": c.contribution()}
            for name, c in connections(network).items()
        }
    about = known(network)
    return document if about is None else {**document, "about": written(about)}


def plan_document(plan: Plan) -> dict[str, Any]:
    """What ``--json`` prints: the plan, with the matches that convert makes where nothing else is asked for."""
    document = plan.to_dict()
    for written, chain in zip(document["chains"], plan.chains, strict=True):
        written["links"] = [_link_document(plan, link) for link in chain.links]
    first = ("schema_version", "model", "blocks", "chains", "skipped")
    return {key: document[key] for key in (*first, *(key for key in document if key not in first))}


def _link_document(plan: Plan, link: Link) -> dict[str, Any]:
    from dcafy.plan.tables import link_matches

    channel, spatial = link_matches(plan, link)
    return {"source": link.source, "target": link.target, "channel_match": channel, "spatial_match": spatial}
