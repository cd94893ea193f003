"""``dcafy export``: a network as a file that runs without dcafy."""

from __future__ import annotations

import contextlib
import dataclasses
import sys

from dcafy.cli.app import command
from dcafy.cli.configured import with_options
from dcafy.cli.options import Model, Settings, settings_given
from dcafy.export.options import ExportOptions
from dcafy.sources.options import FileOptions


@command("export", "dcafy export runs/flowers -o flowers.onnx")
@with_options
def export_command(
    model: Model,
    options: ExportOptions,
    file: FileOptions,
    settings: Settings = None,
) -> None:
    """Write a network as ONNX or as a program of torch.export, compared with it on real pictures."""
    given = settings_given(settings)
    with contextlib.redirect_stdout(sys.stderr):
        from dcafy.export.writing import export
        from dcafy.runs.using import silence, tell_random
        from dcafy.sources import open_model

        network = open_model(model, settings=given, **dataclasses.asdict(file)).model
        tell_random(network, model)
        if options.cut:
            silence(network, model)
        made = export(network, options, spec=model)
    parts = {"batch": made.open_batch, "size": made.open_size}
    opened, fixed = (" and ".join(name for name, yes in parts.items() if yes is want) for want in (True, False))
    shape = "; ".join([*([f"any {opened}"] if opened else ()), *([f"fixed {fixed}"] if fixed else ())])
    print(
        f"{made.file}: {shape}; within {made.difference:.1e} of the largest output on {made.images} pictures "
        f"({made.pictures})"
    )
