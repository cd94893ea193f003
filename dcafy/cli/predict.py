"""``dcafy predict``: what a network sees in pictures."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import sys
from typing import Annotated

import typer

from dcafy import errors
from dcafy.cli.app import command
from dcafy.cli.bar import bar
from dcafy.cli.configured import with_options
from dcafy.cli.options import Model, Settings, settings_given
from dcafy.runs.options import PredictOptions
from dcafy.sources.options import FileOptions
from dcafy.wording import printable


@command("predict", "dcafy predict runs/flowers photographs --top 3")
@with_options
def predict_command(
    model: Model,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGES...", help="Pictures, and folders with pictures.", show_default=False)
    ],
    options: PredictOptions,
    file: FileOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
    as_table: Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")] = False,
    settings: Settings = None,
) -> None:
    """Tell what a network sees in pictures: classes with their probabilities, or boxes."""
    if as_json and as_table:
        raise errors.UsageError("--json and --csv are two ways to print the same. Choose one.")
    given = settings_given(settings)
    printed = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        from dcafy.runs.predicting import (
            Prediction,
            Unreadable,
            as_csv,
            csv_head,
            files_in,
            in_words,
            none_read,
            predictions,
        )
        from dcafy.runs.using import ready_for_use, require_task
        from dcafy.sources import open_model
        from dcafy.tables import aside

        files = files_in(images, follow_links=options.follow_links)
        network = open_model(model, settings=given, **dataclasses.asdict(file)).model
        network = ready_for_use(network, model, options)
        table = csv.writer(printed, lineterminator="\n")
        if as_table:
            task = require_task(network, model).task
        longest = max(len(printable(file)) for file in files)
        told: list[Prediction] = []
        unreadable: list[Unreadable] = []
        lines = printed.isatty() and not as_json  # they tell how far it is
        with bar("images", len(files), shown=not lines) as advance:
            for seen in predictions(network, files, options, spec=model):
                advance()
                if isinstance(seen, Unreadable):
                    unreadable.append(seen)
                    print(f"dcafy: cannot be read: {printable(f'{seen.file}: {seen.reason}')}", file=sys.stderr)
                    continue
                if as_table and not told:
                    table.writerow(csv_head(task))
                told.append(seen)
                if as_table:
                    table.writerows(as_csv(seen))
                elif not as_json:
                    print(aside(seen.file, in_words(seen), longest, terminal=printed.isatty()), file=printed)
    if not told:
        raise none_read(unreadable)
    if as_json:
        print(json.dumps([seen.to_dict() for seen in told], indent=2, allow_nan=False))
