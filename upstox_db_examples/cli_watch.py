"""The command of `upstox-db` that waits for new tokens: watch."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import click

from .cli_common import OpenStore, command, list_users, masked, stored_spelling, user_or_only_one
from .cli_output import print_error

if TYPE_CHECKING:
    from .core.token import TokenResult


@command("watch", "upstox-db watch AB1234", 'upstox-db watch AB1234 --exec "systemctl restart bot"')
@click.argument("user", required=False)
@click.option(
    "--exec",
    "to_run",
    metavar="COMMAND",
    help="Run COMMAND for each new token, with the token as the only line of its standard input.",
)
@click.option("--env", "variable", metavar="NAME", help="Also put the token into this variable of COMMAND.")
@click.pass_obj
def watch(store: OpenStore, user: str | None, to_run: str | None, variable: str | None) -> None:
    """Print a line for the present token and for each change.

    The token itself is masked. This never logs in, and runs until Ctrl-C. USER is an Upstox user id such as AB1234. The
    default is the store's only user, or the one of UPSTOX_USER_ID.

    COMMAND is a program and its arguments. No shell reads it. It does not run for the token that is there at the start,
    and not when a token has ended. If the token changes while COMMAND runs, it runs again afterwards. Ctrl-C goes to
    COMMAND too, and so does SIGTERM. Then upstox-db waits for its end, unless the signal comes again. Other programs of
    your account can read the environment of COMMAND, so leave out --env if COMMAND can read its standard input.
    """
    if variable is not None and to_run is None:
        raise click.UsageError("--env is for the command of --exec.")
    if variable is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        raise click.UsageError("--env takes the name of an environment variable.")
    arguments = words_of(to_run) if to_run is not None else []
    opened = store()
    user = user or (None if list_users(opened) else store.login.user_id)  # This user may not have logged in yet.
    user = (user and stored_spelling(opened, user)) or user or user_or_only_one(store, opened, None)
    # The command matters more than a standard output that nobody reads any more.
    show = store.report if arguments else store.result
    with contextlib.suppress(KeyboardInterrupt), opened.watch(user) as watching:
        for number, result in enumerate(watching):
            if result is None:
                show(f"{user}: no working token", {"user_id": user, "token": None})
                continue
            user = result["user_id"]
            show(store.describe(result), masked(result))
            if number and arguments:
                run(arguments, result, variable)


def words_of(text: str) -> list[str]:
    """Split a command into its program and arguments, as a shell does.

    Raises:
        UsageError: there is no such program.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise click.UsageError(f"--exec: {error}.") from None
    if not words or shutil.which(words[0]) is None:
        raise click.UsageError(f"--exec: there is no program {words[0] if words else ''!r} that can be run.")
    return words


def run(arguments: list[str], result: TokenResult, variable: str | None) -> None:
    """Run the command to its end. It may fail: the next token gets another try."""
    environment = {**os.environ, variable: result["token"]} if variable else None
    line = f"{result['token']}\n"
    try:
        running = subprocess.Popen(arguments, stdin=subprocess.PIPE, text=True, env=environment)  # noqa: S603 -- the user's
    except OSError as error:
        print_error(f"{arguments[0]} cannot be run: {error.strerror}.")
        return

    def stop(number: int, _frame: FrameType | None) -> NoReturn:
        running.send_signal(number)
        raise SystemExit(128 + number)  # as a shell reports it

    before = signal.signal(signal.SIGTERM, stop)
    try:
        running.communicate(line)
    except (KeyboardInterrupt, SystemExit):
        # Ctrl-C reached COMMAND as well, which may have orders to cancel. (Rejected: `subprocess.run`. It kills COMMAND
        # a quarter of a second later.) A second signal ends the wait.
        running.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if running.returncode:
        print_error(f"{arguments[0]} ended with {running.returncode}.")
