"""The ``dcafy`` command, one module for each subcommand.

They read the command line and nothing more: what a command works with is imported when it runs, so that
``dcafy --help`` does not wait for torch.
"""

import importlib
import pkgutil

from dcafy.cli.app import app, main

__all__ = ["app", "main"]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)  # a command registers itself
