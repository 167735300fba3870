"""What `upstox-db` prints. Standard output may be closed, full, or unable to show a character.

A command that has stored a token must not end as if it had failed: cron would run it again, and that login would kill
the token.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys

import click

from .core.errors import ConfigurationError


def prepare_streams() -> None:
    """Make sure that no character is an error, and that no database gets the number of a closed stream."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # It gets the lowest free number, which is this one.
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def require_output() -> None:
    """Check that there is a standard output, for a command that must not log in for nothing.

    Raises:
        ConfigurationError: it is closed.
    """
    if sys.stdout is None:
        raise ConfigurationError("There is no standard output to print on, so nothing was done.")


def print_result(text: str) -> None:
    """Print what the command was called for.

    Raises:
        ConfigurationError: it cannot be printed.
    """
    require_output()
    try:
        click.echo(text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        # What is left in the buffer would fail again when the program ends, and change its exit code.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        return
    # Raise after the except block: the traceback of a failed print would hold the text, which may be a token.
    del text
    raise ConfigurationError(f"Standard output cannot be written ({reason}), so the result is not shown.")


def report(text: str) -> None:
    """Print what the command has done. It is done, so a closed or full standard output is only a warning."""
    try:
        print_result(text)
    except ConfigurationError as error:
        print_error(f"Done. {error}")


def print_error(text: str) -> None:
    """Print on standard error, if there is one."""
    with contextlib.suppress(OSError, ValueError):
        click.echo(text, err=True)


def on_terminal() -> bool:
    """Return whether a person may be watching standard error."""
    return sys.stderr is not None and sys.stderr.isatty()
