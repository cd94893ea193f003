"""``package.module:factory``: networks that the user's own code builds."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import logging
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dcafy.errors import UsageError
from dcafy.wording import nearest, one_line, short

log = logging.getLogger(__name__)

_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_factory(spec: str) -> bool:
    """Whether the spec has the form of ``package.module:factory``."""
    return _FACTORY.fullmatch(spec) is not None


def factory_takes(spec: str, argument: str) -> bool:
    """Whether the factory can be called with that argument."""
    try:
        parameters = inspect.signature(_resolved(spec)).parameters
    except (TypeError, ValueError):
        return False
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def call_factory(spec: str, settings: Mapping[str, Any]) -> nn.Module:
    """What the factory returns for these arguments; ``UsageError`` where that is no network."""
    module_name, _, path = spec.partition(":")
    call = f"{path}({', '.join(f'{key}={short(repr(value))}' for key, value in settings.items())})"
    log.warning("importing %s and calling %s: this runs its code", module_name, call)
    factory = _resolved(spec)
    if isinstance(factory, nn.Module):
        if settings:
            raise UsageError(
                f"{spec} is a finished {type(factory).__name__}: --set has no function to give arguments to."
            )
        return factory
    if not callable(factory):
        raise UsageError(f"{spec} is of type {type(factory).__name__}, not a function or class that builds a network.")
    try:
        with working_folder_importable():
            model = factory(**settings)
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"{module_name}: {call} failed with {type(error).__name__}: {one_line(error)}{_where(error)}. "
            "Its arguments are given as --set key=value."
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{module_name}: {call} returned {type(model).__name__}, not a torch.nn.Module.")
    return model


@contextlib.contextmanager
def working_folder_importable() -> Iterator[None]:
    """Inside it the current directory comes first on Python's path, as it does for ``python -m``."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


def _resolved(spec: str) -> Any:
    """The object that ``package.module:factory`` names, with its module imported."""
    module_name, _, path = spec.partition(":")
    try:
        with working_folder_importable():
            found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module_name}.".startswith(f"{missing}."):
            raise UsageError(
                f"There is no module {module_name!r} (looked in {str(Path.cwd())!r} and on Python's path). "
                f"{_as_imported(module_name, path)}"
            ) from error
        raise UsageError(
            f"Importing {module_name} failed with {type(error).__name__}: {one_line(error)}{_where(error)}."
        ) from error
    for name in path.split("."):
        if not hasattr(found, name):
            near = difflib.get_close_matches(name, [n for n in dir(found) if not n.startswith("_")], n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise UsageError(f"{module_name} has nothing named {path!r}.{hint}")
        found = getattr(found, name)
    return found


def _as_imported(module_name: str, path: str) -> str:
    """What to do about a module that is not there."""
    if module_name.endswith(".py"):
        return f"It is named as Python imports it, and not as a file: {module_name.removesuffix('.py')}:{path}"
    return f"Run from the folder that holds it, or install it.{nearest(module_name, ['torchvision', 'timm'])}"


def _where(error: BaseException) -> str:
    """`` (file:line)`` of the innermost frame: the user's own code, or what it called."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__ and "importlib" not in f.filename
    ]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
