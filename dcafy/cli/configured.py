"""A command's options, made from configurations."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, get_type_hints

import typer

from dcafy.choices import CHOICES
from dcafy.cli.help import completing
from dcafy.plan.options import check, meant


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with every parameter that is a configuration replaced by one option for each of its fields."""
    configurations: dict[str, type[Any]] = {}
    parameters = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind = parameter.annotation
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            configurations[parameter.name] = kind
            parameters += _options(kind)
        else:
            keyword_only = inspect.Parameter.KEYWORD_ONLY
            parameters.append(parameter.replace(annotation=kind, kind=keyword_only))

    @functools.wraps(command)
    def called(**given: Any) -> None:
        made = {}
        for name, kind in configurations.items():
            made[name] = kind(**{item.name: given.pop(item.name) for item in dataclasses.fields(kind)})
            check(made[name], CHOICES)
        command(**given, **made)

    del called.__dict__["__wrapped__"]
    called.__dict__["__signature__"] = inspect.Signature(parameters)
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


def _options(configuration: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(configuration)
    made = []
    for item in dataclasses.fields(configuration):
        choices = item.metadata["choices"] or CHOICES.get(item.name, ())
        others = item.metadata["names"]
        option = typer.Option(
            *((f"--{item.name.replace('_', '-')}", *others) if others else ()),
            callback=_in_any_case(choices) if choices else None,
            help=item.metadata["help"] + _explained(choices) + _told(item),
            metavar=item.metadata["metavar"] or ("|".join(choices) if choices else None),
            show_default=False,
            autocompletion=completing(choices),
        )
        kind: Any = hints[item.name]
        made.append(
            inspect.Parameter(
                item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=Annotated[kind, option]
            )
        )
    return made


def _in_any_case(choices: Collection[str]) -> Callable[[str | None], str | None]:
    """Value -> the choice that is meant, in whatever case it was written; others are told by who checks them."""

    def as_known(value: str | None) -> str | None:
        return meant(value, choices)  # type: ignore[no-any-return]

    return as_known


def _explained(choices: Collection[str]) -> str:
    """What each of the choices is, where their table says it."""
    rows = choices.items() if isinstance(choices, Mapping) else ()
    told = [f"{name}: {row.words}" for name, row in rows if hasattr(row, "words")]
    return f" {'; '.join(told)}." if told else ""


def _told(item: dataclasses.Field[Any]) -> str:
    """The default of an option, where there is one and its help does not tell it."""
    default, text = item.default, item.metadata["help"]
    if default in (None, "") or (isinstance(default, bool) and not default) or "[default" in text:
        return ""
    return f" [default: {f'{default:.4g}' if isinstance(default, float) else 'on' if default is True else default}]"


def given_options(context: typer.Context) -> dict[str, Any]:
    """The options that stand on the command line itself, with their values."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name: context.params[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}
