"""``dcafy evaluate``: how good a network is on labelled images."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcafy import errors
from dcafy.cli.app import command
from dcafy.cli.bar import bar
from dcafy.cli.configured import with_options
from dcafy.cli.options import Model, Settings, settings_given
from dcafy.images.sources import forms
from dcafy.runs.options import EvaluateOptions
from dcafy.sources.options import FileOptions
from dcafy.wording import printable

if TYPE_CHECKING:
    from torch import nn

    from dcafy.runs.evaluating import Evaluation


@command("evaluate", "dcafy evaluate runs/flowers --data imagefolder:flowers")
@with_options
def evaluate_command(
    model: Model,
    options: EvaluateOptions,
    file: FileOptions,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="DATA",
            help=f"The images: {forms(explained=True)}; for a detector coco:IMAGES:ANNOTATIONS.json.  [default: what "
            "the network was trained on]",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="ORIGINAL", help="Another network, to compare with on the same images."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    settings: Settings = None,
) -> None:
    """Measure a network on labelled images: accuracy and loss, or COCO's precisions, class by class."""
    given = settings_given(settings)
    with contextlib.redirect_stdout(sys.stderr):
        from dcafy.images.about import known
        from dcafy.runs.evaluating import paired
        from dcafy.runs.summary import of_difference, of_evaluation
        from dcafy.runs.using import ready_for_use
        from dcafy.sources import open_model
        from dcafy.tables import shown

        network = open_model(model, settings=given, **dataclasses.asdict(file)).model
        about = known(network)
        trained = None if about is None else about.trained
        if data is None and trained is not None:
            if not trained.opened_unasked:
                raise errors.UsageError(
                    f"It was trained on {printable(trained.data)}, which may hold pickles. Name it, so that it is "
                    f"opened because you say so: --data {printable(trained.data)}"
                )
            data = trained.data
        if data is None:
            raise errors.UsageError("--data names no images. Write --data FOLDER, or --data digits to try.")
        network = ready_for_use(network, model, options)
        found = _measured(network, model, data, options)
        other = None
        if against is not None:
            how = dataclasses.asdict(file) if os.path.isfile(against) else {}
            original = open_model(against, **how).model
            uncut = dataclasses.replace(options, cut=False)
            other = _measured(ready_for_use(original, against, uncut), against, data, uncut)
    differences = {} if other is None else paired(found, other)
    if as_json:
        document: dict[str, Any] = {"model": model, "data": data, "cut": options.cut, **found.to_dict()}
        if other is not None:
            compared = {name: dataclasses.asdict(difference) for name, difference in differences.items()}
            document["against"] = {"model": against, **other.to_dict(), "differences": compared}
        print(json.dumps(document, indent=2, allow_nan=False))
        return
    parts = of_evaluation(found, printable(f"{model}{' without its connections' if options.cut else ''} on {data}"))
    if other is not None:
        parts += of_difference(found, other, differences, printable(str(against)))
    print(shown(parts, terminal=sys.stdout.isatty()), end="")


def _measured(network: nn.Module, spec: str, data: str, options: EvaluateOptions) -> Evaluation:
    from dcafy.runs.evaluating import evaluation

    with contextlib.ExitStack() as stack:
        advance: list[Any] = []

        def told(done: int, of: int) -> None:
            if not advance:
                advance.append(stack.enter_context(bar("batches", of)))
            advance[0]()

        found = evaluation(network, data, options, spec=spec, told=told)
    for name in found.skipped:
        print(f"dcafy: cannot be read: {printable(name)}", file=sys.stderr)
    return found
