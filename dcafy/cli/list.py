"""``dcafy list``: which networks of torchvision and timm have what attention."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from typing import Annotated

import typer

from dcafy import errors
from dcafy.cli.app import command
from dcafy.cli.bar import bar


@command("list", "dcafy list 'timm:*resnet*' --attention se")
def list_command(
    pattern: Annotated[
        str,
        typer.Argument(
            metavar="[GLOB]",
            help="Which networks: a pattern of names such as 'seresnet*' or 'torchvision:*'.  [default: all of them, "
            "which takes minutes]",
            show_default=False,
        ),
    ] = "*",
    attention: Annotated[
        str | None,
        typer.Option(
            "--attention",
            metavar="KIND",
            help="Only networks with this attention: se, eca, cbam, gc, ge, sk, bam, sge, or the name of its class.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """List the networks of torchvision and timm with the attention blocks that are found in them."""
    printed = sys.stdout
    found = []
    with contextlib.redirect_stdout(sys.stderr):
        from dcafy.sources.listing import listed, specs_that_match
        from dcafy.tables import aside

        specs = specs_that_match(pattern)
        longest = max(map(len, specs), default=0)
        with bar("networks", len(specs), shown=as_json or not printed.isatty()) as advance:
            for row in listed(specs, attention, advance):
                found.append(row)
                if not as_json:
                    has = ", ".join(f"{count} {kind}" for kind, count in row.attention.items())
                    what = f"could not be looked at: {row.failed}" if row.failed else has or "no attention"
                    print(aside(row.spec, what, longest, terminal=printed.isatty()), file=printed, flush=True)
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in found], indent=2))
    if not found:
        raise errors.NoAttentionError(f"None of {len(specs)} networks has the attention {attention!r}.")
