"""The ``dcafy`` command.

This module reads the command line and nothing more: what a command works with is imported when it
runs, so that ``dcafy --help`` does not wait for torch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from dcafy import errors

if TYPE_CHECKING:
    import torch

    from dcafy.blocks import Link, Plan

__all__ = ["app", "main"]

OK, BUG, USAGE, NO_ATTENTION, UNSAFE, NOT_TRACEABLE, INTERRUPTED, CLOSED_PIPE = 0, 1, 2, 3, 4, 5, 130, 141

EXIT_CODES: dict[type[BaseException], int] = {
    errors.UsageError: USAGE,
    errors.InputError: USAGE,
    errors.PlanError: USAGE,
    errors.NoAttentionError: NO_ATTENTION,
    errors.SourceError: UNSAFE,
    errors.TracingError: NOT_TRACEABLE,
    errors.VerificationError: BUG,
    KeyboardInterrupt: INTERRUPTED,
    BrokenPipeError: CLOSED_PIPE,
}
"""What ended a command -> its exit code; a subclass has its base's. Anything else is a bug."""

log = logging.getLogger("dcafy")


def exit_code(error: BaseException) -> int:
    """The exit code for what ended a command."""
    return next((EXIT_CODES[cls] for cls in type(error).__mro__ if cls in EXIT_CODES), BUG)


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Inside it whatever ends a command becomes a message on stderr and an exit code."""
    try:
        yield
        sys.stdout.flush()
    except (typer.Exit, typer.Abort):
        raise
    except (KeyboardInterrupt, BrokenPipeError) as error:
        if isinstance(error, BrokenPipeError):
            # Python flushes stdout once more when it ends, and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(exit_code(error)) from None
    except errors.DcafyError as error:
        translated = " On the command line that is --input-size CxHxW." if "example_inputs" in str(error) else ""
        _complain(f"{error}{translated}")
        raise typer.Exit(exit_code(error)) from None
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            raise  # a mistake on the command line, which typer explains
        traceback.print_exc()
        _complain("this is a bug in dcafy. Please report it with the lines above and the command.")
        raise typer.Exit(exit_code(error)) from None


def _complain(message: str) -> None:
    print(f"dcafy: error: {message}", file=sys.stderr)


class _ToStderr(logging.Handler):
    """What the package logs, one line each, on what is stderr at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"dcafy: {record.getMessage()}", file=sys.stderr)


class _Commands(TyperGroup):
    """The commands, which share how errors are told and what they exit with."""

    def invoke(self, ctx: Any) -> Any:
        with _reported():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the ``dcafy`` command with the arguments of this process."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="dcafy")


def _version(wanted: bool) -> None:
    if wanted:
        from dcafy import __version__

        print(f"dcafy {__version__}")
        raise typer.Exit


@app.callback(
    epilog="Exit codes: 0 fine, 1 a bug in dcafy, 2 usage or unknown model, 3 no attention found, 4 unreadable or "
    "unsafe file, 5 not traceable."
)
def dcafy(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Connect the attention blocks of a trained network (DCANet)."""
    log.handlers, log.propagate = [_ToStderr()], False
    log.setLevel(logging.INFO)


# --- options that several commands share ------------------------------------------------------------

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="torchvision:NAME[@WEIGHTS], timm:NAME[.TAG][@DEFAULT], package.module:factory (imports and runs that "
        "code), a file (.safetensors, .pt, .pth, ...), or a folder written by dcafy.save.",
        show_default=False,
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(
        "--arch",
        metavar="SPEC",
        help="What the weights in a file belong to: torchvision:NAME, timm:NAME or package.module:factory. Without "
        "it, dcafy names the architectures that fit.",
        show_default=False,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="An argument for the factory or architecture, read as JSON where it is JSON and as text otherwise. May "
        "be given several times.",
        show_default=False,
    ),
]
TrustPickle = Annotated[
    bool,
    typer.Option(
        "--trust-pickle",
        help="Open a pickle that wants more than tensors and known network classes. This runs code that the file "
        "chooses.  [default: refuse]",
    ),
]
InputSize = Annotated[
    str | None,
    typer.Option(
        "--input-size",
        metavar="CxHxW",
        help="Channels, height and width in pixels of the input to look with, such as 3x224x224.  [default: the "
        "model's own, else 224 pixels and other usual sizes]",
        show_default=False,
    ),
]


def _settings(given: list[str] | None) -> dict[str, Any]:
    """``key=value`` options as arguments; ``UsageError`` where one has another form."""
    settings: dict[str, Any] = {}
    for option in given or []:
        key, equals, value = option.partition("=")
        if not equals or not key.isidentifier():
            raise errors.UsageError(f"--set {option!r} is not of the form key=value, such as --set num_classes=10.")
        if key in settings:
            raise errors.UsageError(f"--set gives {key} twice.")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return settings


def _example(size: str | None) -> torch.Tensor | None:
    """An example input of that size, in a batch of two; ``UsageError`` where it is no size."""
    if size is None:
        return None
    numbers = (
        [int(number) for number in size.lower().split("x")] if re.fullmatch(r"\d+(x\d+){2,3}", size.lower()) else []
    )
    if not numbers or min(numbers) == 0:
        raise errors.UsageError(
            f"--input-size {size!r} is not channels x height x width, in pixels, such as 3x224x224."
        )
    import torch

    return torch.zeros(2, *numbers)


# --- the commands -----------------------------------------------------------------------------------


@app.command("inspect")
def inspect_command(
    model: Model,
    nodes: Annotated[bool, typer.Option("--nodes", help="Also list every node of each block with its role.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
    input_size: InputSize = None,
    arch: Arch = None,
    settings: Settings = None,
    trust_pickle: TrustPickle = False,
) -> None:
    """Show the attention blocks of a network and how they will be connected. Changes nothing."""
    chosen, example = _settings(settings), _example(input_size)
    # What the user's code prints while it is imported must not end up in the document.
    with contextlib.redirect_stdout(sys.stderr):
        plan = _found(model, example, arch=arch, settings=chosen, trust_pickle=trust_pickle)
    if as_json:
        print(json.dumps(plan_document(plan), indent=2))
    else:
        from dcafy.tables import written

        print(written(plan, nodes=nodes, terminal=sys.stdout.isatty()), end="")
    sys.stdout.flush()
    if not plan.blocks:
        raise errors.NoAttentionError(
            f"{model!r} has no attention blocks, so there is nothing to connect. Attention can be added first: "
            "dcafy convert MODEL --attention se -o DIR, or dcafy.convert(model, attention='se') in Python, or modules "
            "such as torchvision.ops.SqueezeExcitation in the network's own code."
        )


@app.command("convert")
def convert_command(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.", show_default=False)
    ],
    attention: Annotated[
        str | None,
        typer.Option(
            help="Put this attention into the network's residual units first: se, ge-theta, cbam, bam, gc, sge or eca.",
            show_default=False,
        ),
    ] = None,
    attention_reduction: Annotated[
        int, typer.Option(help="Channels over the width of the inserted attention's bottleneck.")
    ] = 16,
    schema: Annotated[str, typer.Option(help="How a block's own context and what it hears are joined.")] = "direct",
    channel_match: Annotated[str, typer.Option(help="The layers that match widths: fc1 or fc2.")] = "fc2",
    reduction: Annotated[int, typer.Option(help="A block's channels over the hidden width of fc2.")] = 16,
    min_hidden: Annotated[int, typer.Option(help="The least hidden width of fc2, in channels.")] = 8,
    spatial_match: Annotated[str, typer.Option(help="What shrinks maps: avg, max or conv.")] = "avg",
    dimension: Annotated[str, typer.Option(help="What is connected: channel, spatial or all.")] = "all",
    topology: Annotated[str, typer.Option(help="Who hears whom: chain or dense.")] = "chain",
    base: Annotated[
        bool, typer.Option("--base/--connections-only", help="Write all weights, or only the connections'.")
    ] = True,
    verify: Annotated[bool, typer.Option(help="Run both networks and compare their outputs bit by bit.")] = True,
    input_size: InputSize = None,
    arch: Arch = None,
    settings: Settings = None,
    trust_pickle: TrustPickle = False,
) -> None:
    """Connect the attention blocks of a network and save the result as a folder."""
    given, example = _settings(settings), _example(input_size)
    with contextlib.redirect_stdout(sys.stderr):
        from dcafy.checkpoint import save
        from dcafy.convert import convert
        from dcafy.emit import connections
        from dcafy.sources import open_model

        network = open_model(model, arch=arch, settings=given, trust_pickle=trust_pickle).model
        before = sum(parameter.numel() for parameter in network.parameters())
        connected = convert(
            network,
            example_inputs=example,
            schema=schema,
            channel_match=channel_match,
            reduction=reduction,
            min_hidden=min_hidden,
            spatial_match=spatial_match,
            dimension=dimension,
            topology=topology,
            attention=attention,
            attention_reduction=attention_reduction,
            verify=verify,
        )
        save(connected, output, base=base)
    own = sum(p.numel() for name, p in connected.named_parameters() if "dca" in name.split("."))
    added = sum(p.numel() for p in connected.parameters()) - before - own
    print(
        f"{len(connections(connected))} connections with {own:,} parameters"
        + (f", {attention} with {added:,}" if attention else "")
        + f", saved in {output}."
    )


def _found(spec: str, example: torch.Tensor | None, **how: Any) -> Plan:
    """The plan for the model that ``spec`` names, under that name."""
    import dataclasses

    from dcafy.sources import open_model

    model = open_model(spec, on_meta=True, **how).model
    from dcafy.convert import appraise

    try:
        plan = appraise(model, example_inputs=example)
    except (errors.TracingError, errors.InputError):
        if not any(parameter.is_meta for parameter in model.parameters()):
            raise
        # Where the course of the forward depends on values, as in detectors, it takes values to look.
        plan = appraise(open_model(spec, **how).model, example_inputs=example)
    return dataclasses.replace(plan, model=spec)


def plan_document(plan: Plan) -> dict[str, Any]:
    """What ``--json`` prints: the plan, with the matches that convert makes where nothing else is asked for."""
    document = plan.to_dict()
    for written, chain in zip(document["chains"], plan.chains, strict=True):
        written["links"] = [_link_document(plan, link) for link in chain.links]
    first = ("schema_version", "model", "blocks", "chains", "skipped")
    return {key: document[key] for key in (*first, *(key for key in document if key not in first))}


def _link_document(plan: Plan, link: Link) -> dict[str, Any]:
    from dcafy.tables import link_matches

    channel, spatial = link_matches(plan, link)
    return {"source": link.source, "target": link.target, "channel_match": channel, "spatial_match": spatial}
