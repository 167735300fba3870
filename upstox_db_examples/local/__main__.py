"""Start a local Upstox, so that `upstox-db` can be tried in another terminal without an account.

    python -m upstox_db_examples.local                  with a SQLite file
    python -m upstox_db_examples.local postgresql       with a server from a wheel, or the one of POSTGRES_URL

It prints `export` lines, and waits. Paste these lines into another terminal, and run `upstox-db token` there. Ctrl-C
ends the local Upstox and its servers, and removes the store and the key.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import tempfile
import threading
from pathlib import Path

import click

from ..core.checks import require_user_id
from ..core.errors import StorageError
from ..patterns import PATTERNS
from . import servers
from .upstox import LocalUpstox


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples
  python -m upstox_db_examples.local
  python -m upstox_db_examples.local hybrid --user CD5678
  python -m upstox_db_examples.local > local.env &       (then: . ./local.env)""",
)
@click.argument("pattern", metavar="[PATTERN]", type=click.Choice(list(PATTERNS)), default="sqlite")
@click.option("--user", metavar="USER", default="AB1234", show_default=True, help="The user id of the made-up account.")
def main(pattern: str, user: str) -> None:
    """Start a local Upstox with a made-up account, print `export` lines, and wait.

    PATTERN is sqlite (the default), pooled, postgresql, mongodb or hybrid. The last three start real servers. Paste the
    lines into another terminal, and try upstox-db there. Ctrl-C ends all of it, and removes the store and the key.

    If POSTGRES_URL, MONGODB_URL or REDIS_URL is set, that server is used, and what you store there stays.

    Unlike at Upstox, you can log in more than once in 30 seconds.
    """
    try:
        user = require_user_id(user)
    except StorageError as error:
        raise click.BadParameter(str(error), param_hint="--user") from None
    # By default these would leave the folder behind.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="upstox-local-")))
        upstox = stack.enter_context(LocalUpstox(totp_once=False, limits=False))
        try:
            address = start_store(pattern, folder, stack)
        except StorageError as error:
            raise click.ClickException(str(error)) from None
        variables = {
            **upstox.add_account(user).environ(),
            "UPSTOX_USER_ID": user,
            "UPSTOX_BASE_DOMAIN": upstox.base_domain,
            "UPSTOX_DB_STORE": address,
            "UPSTOX_DB_KEY_FILE": str(folder / "keys"),
        }
        for name, value in variables.items():
            click.echo(f"export {name}={shlex.quote(value)}")
        click.echo("The local Upstox is running. Ctrl-C ends it.", err=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


def start_store(pattern: str, folder: Path, stack: contextlib.ExitStack) -> str:
    """Start the servers of this pattern, and return the address of an empty store.

    Raises:
        ConfigurationError, StoreUnavailable: a server cannot be started here.
    """
    if pattern == "mongodb":
        return f"{stack.enter_context(servers.mongodb())}#upstox_local"
    if pattern in ("postgresql", "hybrid"):
        postgresql = stack.enter_context(servers.postgresql())
        return postgresql if pattern == "postgresql" else f"{stack.enter_context(servers.redis())} {postgresql}"
    scheme = "sqlite" if pattern == "sqlite" else "pooled"
    return f"{scheme}:///{folder}/upstox.db"


if __name__ == "__main__":
    main(prog_name="python -m upstox_db_examples.local")
