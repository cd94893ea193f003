"""``dcafy convert``: a network connected, in a folder."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from dcafy import errors
from dcafy.cli.app import command
from dcafy.cli.configured import given_options, with_options
from dcafy.cli.options import InputSize, Model, Settings, example_input, settings_given
from dcafy.plan.options import Conversion, require_heeded
from dcafy.sources.options import FileOptions
from dcafy.wording import counted, printable, quoted


@command("convert", "dcafy convert torchvision:resnet50 --attention se -o se")
@with_options
def convert_command(
    context: typer.Context,
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.", show_default=False)
    ],
    conversion: Conversion,
    file: FileOptions,
    base: Annotated[
        bool, typer.Option("--base/--connections-only", help="Write all weights, or only what is new.")
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the model in a folder.  [default: refuse]")
    ] = False,
    verify: Annotated[bool, typer.Option(help="Run both networks and compare their outputs bit by bit.")] = True,
    input_size: InputSize = None,
    settings: Settings = None,
) -> None:
    """Connect the attention blocks of a network and save the result as a folder."""
    given, example = settings_given(settings), example_input(input_size)
    require_heeded(conversion, given_options(context), dashes=True)
    _require_free(output, overwrite)
    with contextlib.redirect_stdout(sys.stderr):
        from dcafy.checkpoint import save
        from dcafy.checkpoint.tensors import is_connection
        from dcafy.conversion import convert
        from dcafy.emit.dca import connections, is_connected
        from dcafy.runs.using import tell_random
        from dcafy.sources import open_model

        network = open_model(model, settings=given, **dataclasses.asdict(file)).model
        tell_random(network, model)
        before = sum(parameter.numel() for parameter in network.parameters())
        connected = convert(network, example_inputs=example, verify=verify, **conversion.said())
        save(connected, output, base=base)
    own = sum(p.numel() for name, p in connected.named_parameters() if is_connection(name))
    added = sum(p.numel() for p in connected.parameters()) - before - own
    made = len(connections(connected)) if is_connected(connected) else 0
    print(
        f"{counted(made, 'connection')} with {own:,} parameters"
        + (f", {conversion.attention} with {added:,}" if conversion.attention else "")
        + f", saved in {printable(str(output))}."
    )


def _require_free(output: Path, overwrite: bool) -> None:
    """Nothing where a model may be saved; ``UsageError`` where a run is, or a model that nobody said should go."""
    from dcafy.checkpoint.folder import MARKER, OF_A_RUN, set_aside_in

    shown = quoted(str(output), 200)
    if aside := set_aside_in(output):
        raise errors.UsageError(f"There is a run in {shown}.{aside} Or name another folder.")
    if any(os.path.lexists(output / name) for name in OF_A_RUN):
        raise errors.UsageError(f"There is a run in {shown}, whose model is no other's. Name another folder.")
    if os.path.lexists(output / MARKER) and not overwrite:
        raise errors.UsageError(
            f"There is a model in {shown} already. Name another folder, or add --overwrite to replace it."
        )
