"""The ``dcafy`` command itself: how every subcommand starts, tells its errors, and exits."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from dcafy import errors
from dcafy.cli.help import Command, Commands, Quiet, may_be_quiet
from dcafy.text import short
from dcafy.wording import quoted

OK, BUG, USAGE, NO_ATTENTION, UNSAFE, NOT_TRACEABLE, FAILED, INTERRUPTED, CLOSED_PIPE = 0, 1, 2, 3, 4, 5, 6, 130, 141

EXIT_CODES: dict[type[BaseException], int] = {
    errors.UsageError: USAGE,
    errors.InputError: USAGE,
    errors.PlanError: USAGE,
    errors.NoAttentionError: NO_ATTENTION,
    errors.SourceError: UNSAFE,
    errors.TracingError: NOT_TRACEABLE,
    errors.VerificationError: BUG,
    errors.TrainingError: FAILED,
    KeyboardInterrupt: INTERRUPTED,
    BrokenPipeError: CLOSED_PIPE,
}
"""What ended a command -> its exit code; a subclass has its base's. Anything else is a bug."""

ON_THE_COMMAND_LINE = {
    "example_inputs": " On the command line that is --input-size CxHxW.",
    "dcafy.convert(model, attention='se') does both": " On the command line that is --attention se.",
}
"""Words of an error that mean Python -> what the command has for them."""

_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What torch.distributed says where another process is there no more."""

log = logging.getLogger("dcafy")


def exit_code(error: BaseException) -> int:
    """The exit code for what ended a command."""
    if isinstance(error, errors.Interrupted):
        return 128 + error.signal  # as a shell counts what a signal ended
    return next((EXIT_CODES[cls] for cls in type(error).__mro__ if cls in EXIT_CODES), BUG)


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Inside it whatever ends a command becomes a message on stderr and an exit code."""
    try:
        yield
        sys.stdout.flush()
    except (typer.Exit, typer.Abort):
        raise
    except (KeyboardInterrupt, BrokenPipeError) as error:
        if isinstance(error, BrokenPipeError):
            # Python flushes stdout once more when it ends, and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(exit_code(error)) from None
    except errors.DcafyError as error:
        hints = [hint for words, hint in ON_THE_COMMAND_LINE.items() if words in str(error)]
        _complain(f"{error}{''.join(hints)}")
        raise typer.Exit(exit_code(error)) from None
    except OSError as error:
        if error.filename is None:
            raise
        _complain(f"{quoted(str(error.filename), 200)}: {error.strerror}. Name another file or folder.")
        raise typer.Exit(USAGE) from None
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            # A mistake on the command line, which typer explains; the help, raised without arguments, has many lines.
            if hasattr(error, "message") and type(error).__name__ != "NoArgsIsHelpError":
                error.message = short(str(error.message), 600)
            raise
        if os.environ.get("WORLD_SIZE", "1") != "1" and any(words in str(error) for words in _LOST):
            _complain("another process of this run has ended. What it says tells why.")
            raise typer.Exit(exit_code(error)) from None
        traceback.print_exc()
        _complain("this is a bug in dcafy. Please report it with the lines above and the command.")
        raise typer.Exit(exit_code(error)) from None


def _complain(message: str) -> None:
    _said(f"dcafy: error: {message}")


def _said(line: str) -> None:
    """A line on stderr; a terminal gets as many as it takes for its words to stay whole."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        line = "\n".join(textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False))
    print(line, file=sys.stderr)


class _ToStderr(logging.Handler):
    """What the package logs, one line each, on what is stderr at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        _said(f"dcafy: {short(record.getMessage(), 900)}")


class _Commands(Commands):
    """The commands, which share how errors are told and what they exit with."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        log.handlers, log.propagate = [_ToStderr()], False
        log.setLevel(logging.INFO)
        with _reported():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _reported():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def command(name: str, example: str, cls: type[Command] = Command) -> Callable[[Callable[..., None]], Any]:
    """Registers a command under ``name``; its help ends with ``example``, one or more lines that can be copied."""

    def registered(function: Callable[..., None]) -> Any:
        return app.command(name, cls=cls, epilog=example)(may_be_quiet(function))

    return registered


def main() -> None:
    """Run the ``dcafy`` command with the arguments of this process."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="dcafy")


def _version(wanted: bool) -> None:
    if wanted:
        from dcafy import __version__

        print(f"dcafy {__version__}")
        raise typer.Exit


@app.callback(
    epilog="Exit codes: 0 fine, 1 a bug in dcafy, 2 usage or unknown model, 3 no attention found, 4 unreadable or "
    "unsafe file, 5 not traceable, 6 a training that went wrong, 130 and 143 stopped by a signal."
)
def dcafy(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Connect the attention blocks of a trained network (DCANet)."""
