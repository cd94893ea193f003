"""The ``dcafy`` command, one module for each subcommand.

They read the command line and nothing more: what a command works with is imported when it runs, so that
``dcafy --help`` does not wait for torch.
"""

from dcafy.cli import convert, finetune, inspect, report  # importing a command registers it
from dcafy.cli.app import app, main

__all__ = ["app", "convert", "finetune", "inspect", "main", "report"]
