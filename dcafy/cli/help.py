"""How ``--help`` is laid out: in panels by topic, with an example that can be copied."""

from __future__ import annotations

import functools
import inspect
import logging
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

log = logging.getLogger("dcafy")

TOPICS: dict[str, tuple[str, ...]] = {
    "Data": (
        "data", "images", "part", "val_fraction", "image_size", "input_size", "val_resize", "strict", "download",
        "follow_links", "most",
    ),
    "Recipes and comparisons": ("task", "recipe", "compare", "against", "seeds", "plain", "backbone"),
    "The run": ("output", "resume", "overwrite", "keep", "config", "dry_run", "checkpoint_steps",
                "json_log", "track", "seed", "workers", "cpu"),
    "Optimization": (
        "epochs", "batch_size", "accumulate", "optimizer", "lr", "connection_lr", "scale_lr", "weight_decay", "decayed",
        "momentum", "nesterov", "clip_norm", "ema", "balance", "precision", "freeze_base", "freeze_base_epochs",
    ),
    "Schedule": ("schedule", "step_epochs", "milestones", "warmup_epochs", "warmup_steps", "warmup_from"),
    "Augmentation": ("augment", "crop_scale", "crop_ratio", "label_smoothing", "mixup", "cutmix"),
    "Connections": (
        "dimension", "topology", "schema", "message", "channel_match", "reduction", "min_hidden", "spatial_match",
        "usage_images", "verify", "cut",
    ),
    "Attention for networks that have none": ("attention", "attention_reduction", "where", "attention_init"),
    "What is told": ("nodes", "top", "threshold", "target", "as_json", "as_table", "text", "quiet"),
    "Files with weights": (
        "arch", "prefix", "ignore_head", "any_size", "trust_pickle", "base", "settings", "fixed",
    ),
}  # fmt: skip
"""Topic -> the options of it, by name, in the order of the panels."""

COMMANDS = {"Look": ("list", "inspect", "report"), "Change": ("convert", "finetune"),
            "Use": ("predict", "evaluate", "export")}  # fmt: skip
"""Topic -> the commands of it."""

_TOPIC_OF = {name: topic for topic, names in TOPICS.items() for name in names}
_REST = "Options"

Row = tuple[str, str]


NAMES, NARROW = 26, 72
"""Columns that names of options take, and the width below which what is said of them stands under them."""


def _panel(formatter: Any, title: str, rows: Iterable[Row]) -> None:
    """What is said of one topic, under a line with its name; no word is broken, nor an option at its hyphens."""
    found = list(rows)
    if not found:
        return
    _heading(formatter, title)
    names = min(max(len(name) for name, _ in found), NAMES)
    aside = formatter.width >= NARROW or names < NAMES // 2
    at = names + 4 if aside else 6
    for name, told in found:
        text = told.replace("  [", " [")
        lines = textwrap.wrap(text, formatter.width - at, break_on_hyphens=False, break_long_words=False)
        if aside and len(name) <= names:
            formatter.write(f"  {name:{names}}  {lines.pop(0) if lines else ''}".rstrip() + "\n")
        else:
            formatter.write("".join(f"  {line}\n" for line in _at_choices(name, formatter.width - 2)))
        formatter.write("".join(f"{' ' * at}{line}\n" for line in lines))


def _at_choices(name: str, width: int) -> list[str]:
    """An option with its choices, on several lines where it is wider than this."""
    lines = [""]
    for part in re.split(r"(?<=\|)", name):
        if len(lines[-1] + part) > width and lines[-1]:
            lines.append(" " * 6)
        lines[-1] += part
    return lines


def _heading(formatter: Any, title: str) -> None:
    formatter.write(f"\n─ {title} {'─' * max(formatter.width - len(title) - 3, 0)}\n")


def _options(command: Any, ctx: Any) -> Iterator[tuple[str, Row]]:
    """(topic, row) of every argument and option."""
    for parameter in command.get_params(ctx):
        row = parameter.get_help_record(ctx)
        if row is not None:
            argument = parameter.param_type_name == "argument"
            yield "Arguments" if argument else _TOPIC_OF.get(parameter.name, _REST), row


def _by_topic(formatter: Any, told: Iterable[tuple[str, Row]]) -> None:
    found: dict[str, list[Row]] = {}
    for topic, row in told:
        found.setdefault(topic, []).append(row)
    for topic in ("Arguments", *TOPICS, _REST):
        _panel(formatter, topic, found.get(topic, ()))


class Command(TyperCommand):
    """A command whose help stands in panels and ends with an example."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The arguments by their names alone, in brackets where they may be left out."""
        plainly = (piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx))
        return [piece.replace("[[", "[").replace("]]", "]").replace("......", "...") for piece in plainly]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _by_topic(formatter, _options(self, ctx))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _heading(formatter, "Example")
        formatter.write("".join(f"  {line}\n" for line in (self.epilog or "").splitlines()))


class Commands(TyperGroup):
    """The commands, in panels by what they are for."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        named = {name for names in COMMANDS.values() for name in names}
        rest = [name for name in self.list_commands(ctx) if name not in named]
        for topic, names in {**COMMANDS, "More": tuple(rest)}.items():
            found = ((name, self.get_command(ctx, name)) for name in names)
            _panel(formatter, topic, ((name, one.get_short_help_str(200)) for name, one in found if one is not None))
        _panel(formatter, _REST, (row for _, row in _options(self, ctx)))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _heading(formatter, "Example")
        formatter.write("  dcafy inspect torchvision:mobilenet_v3_small\n")
        super().format_epilog(ctx, formatter)


def _hush(wanted: bool) -> bool:
    """Has only warnings and errors told from here on, where that is wanted; bars ask :func:`is_quiet`."""
    if wanted:
        log.setLevel(logging.WARNING)
    return wanted


Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", callback=_hush, expose_value=False, help="Tell nothing but results, warnings and errors."
    ),
]
"""Taken by ``dcafy`` and by each command."""


def may_be_quiet(function: Callable[..., None]) -> Callable[..., None]:
    """``function``, as a command that takes ``--quiet``."""
    own = inspect.signature(function, eval_str=True)

    @functools.wraps(function)
    def called(quiet: bool = False, **given: Any) -> None:
        function(**given)

    del called.__dict__["__wrapped__"]
    quiet = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Quiet)
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own.parameters.values()]
    called.__dict__["__signature__"] = own.replace(parameters=[*parameters, quiet])
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in (*parameters, quiet)}
    return called


def is_quiet() -> bool:
    """Whether a command was asked to tell nothing but results, warnings and errors."""
    return not log.isEnabledFor(logging.INFO)


def completing(known: Iterable[str]) -> Any:
    """What a shell completes where one of these is asked for; ``None`` where anything may stand."""
    found = list(known)

    def completed(incomplete: str) -> list[str]:
        return [name for name in found if name.startswith(incomplete)]

    return completed if found else None
