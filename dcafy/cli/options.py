"""Options that several subcommands share, and what their texts mean."""

from __future__ import annotations

import contextlib
import json
import math
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcafy import errors
from dcafy.records import shallow
from dcafy.wording import quoted

if TYPE_CHECKING:
    import torch

MODEL = (
    "torchvision:NAME[@WEIGHTS], timm:NAME[.TAG][@DEFAULT], package.module:factory (imports and runs that code), a "
    "file (.safetensors, .pt, .pth, ...), or a folder written by dcafy.save."
)
"""What names a network."""

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL, show_default=False)]
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


def settings_given(given: list[str] | None) -> dict[str, Any]:
    """``key=value`` options as arguments; ``UsageError`` where one has another form."""
    settings: dict[str, Any] = {}
    for option in given or []:
        key, equals, value = option.partition("=")
        if not equals or not key.isidentifier():
            raise errors.UsageError(
                f"--set {quoted(option)} is not of the form key=value, such as --set num_classes=10."
            )
        if key in settings:
            raise errors.UsageError(f"--set gives {key} twice.")
        settings[key] = _value(key, value)
    return settings


def _value(key: str, text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    except RecursionError:
        pass
    else:
        with contextlib.suppress(ValueError):
            return shallow(value)
    raise errors.UsageError(f"--set {key} has lists in lists without end. Give a plainer value.")


_MOST = 2**28
"""Numbers that an example on the command line may have: a gigabyte."""


def example_input(size: str | None) -> torch.Tensor | None:
    """An example input of that size, in a batch of two; ``UsageError`` where it is no size."""
    if size is None:
        return None
    is_size = re.fullmatch(r"[0-9]{1,9}(x[0-9]{1,9}){2,3}", size.lower()) is not None
    numbers = [int(number) for number in size.lower().split("x")] if is_size else [0]
    if min(numbers) == 0:
        raise errors.UsageError(
            f"--input-size {quoted(size)} is not channels x height x width, in pixels, such as 3x224x224."
        )
    if 2 * math.prod(numbers) > _MOST:
        raise errors.UsageError(
            f"--input-size {size} is larger than what can be looked at: two of them may have {_MOST:,} numbers. Name a "
            "smaller one."
        )
    import torch

    try:
        return torch.zeros(2, *numbers)
    except RuntimeError as error:
        raise errors.UsageError(f"--input-size {size!r} is larger than there is memory for.") from error
