"""`upstox-db`: the stores from the shell, for scripts, cron and people."""

from __future__ import annotations

import importlib
from typing import Any

import click

from .cli_common import FIX_FIRST, GLOBAL, OpenStore, exit_code, log
from .cli_output import prepare_streams, print_error
from .core.errors import StorageError

# Which module has which command, in the order in which they are needed. A new command is one more line here, and a
# function with @command in its module. Modules are imported on first use, so that `token` does not wait for the others.
COMMANDS = {
    "token": "cli_logins",
    "login": "cli_logins",
    "renew": "cli_logins",
    "save": "cli_logins",
    "logout": "cli_logins",
    "watch": "cli_watch",
    "status": "cli_status",
    "users": "cli_status",
    "history": "cli_status",
    "audit": "cli_status",
    "doctor": "cli_doctor",
    "init": "cli_upkeep",
    "cleanup": "cli_upkeep",
    "rotate-keys": "cli_upkeep",
    "backup": "cli_transfer",
    "restore": "cli_transfer",
    "migrate": "cli_transfer",
    "copy": "cli_copy",
}

HELP = """STORE is one of

\b
{stores}
Put an address with a password into UPSTOX_DB_STORE: all users of a machine can read command lines.

\b
Examples
  TOKEN=$(upstox-db token) || exit
  upstox-db status --store upstox.db
  45 8 * * 1-5  . $HOME/upstox.env; upstox-db login --keep     (in a crontab)

\b
Exit codes
  0  done
  1  try again: a store or Upstox did not answer, a limit is not over, or
     there is no working token yet
  2  wrong usage: an unknown command or option, or an impossible value
  3  fix something first: credentials, a name, a path, a key or a server

\b
Try it without an account, in two terminals
  python -m upstox_db_examples.local    (then paste its export lines here)

\b
Complete commands and options with the Tab key
  eval "$(_UPSTOX_DB_COMPLETE=bash_source upstox-db)"     (in ~/.bashrc)
  eval "$(_UPSTOX_DB_COMPLETE=zsh_source upstox-db)"      (in ~/.zshrc)
  _UPSTOX_DB_COMPLETE=fish_source upstox-db | source      (for fish)
"""


class Commands(click.Group):
    """Import a command when it is called, and turn our own errors into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        prepare_streams()
        try:
            return super().invoke(ctx)
        except StorageError as error:
            print_error(f"{type(error).__name__}: {error}")
            ctx.exit(exit_code(error))
        except ModuleNotFoundError as error:
            print_error(str(error))
            ctx.exit(FIX_FIRST)

    def list_commands(self, _: click.Context) -> list[str]:
        """Return the commands in the order in which they are needed, not alphabetically."""
        return list(COMMANDS)

    def get_command(self, _: click.Context, cmd_name: str) -> click.Command | None:
        """Import this command. For an unknown name import all of them, so that click can suggest one."""
        for name in [cmd_name] if cmd_name in COMMANDS else COMMANDS:
            module = importlib.import_module(f".{COMMANDS[name]}", __package__)
            self.commands[name] = getattr(module, name.replace("-", "_"))
        return self.commands.get(cmd_name)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help's end. Only here the table of the stores is needed."""
        from .patterns import PATTERNS

        stores = "".join(f"  {each.address:<38} {each.what}\n" for each in PATTERNS.values())
        self.epilog = HELP.format(stores=stores)
        super().format_epilog(ctx, formatter)


@click.group(cls=Commands, params=list(GLOBAL), context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="upstox-db-examples")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Keep Upstox access tokens in a database: log in, read, look after them."""
    log(ctx, verbose=ctx.ensure_object(OpenStore).verbose)
