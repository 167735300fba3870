"""The commands of `upstox-db` that deal with a working token: token, login, renew, save, logout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from .cli_common import (
    NoLivingToken,
    OpenStore,
    command,
    known_user,
    list_users,
    masked,
    name_users,
    stored_spelling,
)
from .cli_output import print_error, require_output
from .core.environment import expand_home, strip_invisible
from .core.errors import (
    ConfigurationError,
    DatabaseMissing,
    InvalidInput,
    LoginRefused,
    LoginSuperseded,
    StorageError,
    TokenNotStored,
)

if TYPE_CHECKING:
    from .core.store import TokenStorage
    from .core.token import TokenResult


@command("token", "TOKEN=$(upstox-db token) || exit", "upstox-db token AB1234 --masked --no-login")
@click.argument("user", required=False)
@click.option("--masked", "mask", is_flag=True, help="Print whose token it is and when it expires, but not the token.")
@click.option("--no-login", is_flag=True, help="Never log in: if there is no working token, end with exit code 1.")
@click.pass_obj
def token(store: OpenStore, user: str | None, mask: bool, no_login: bool) -> None:
    """Print the working token; log in if there is none.

    Nothing else is printed, so a script can use the output. USER is an Upstox user id such as AB1234. The default is
    the account of the credentials.
    """
    require_output()
    if no_login:
        show(store, stored_token(store, user), mask)
        return
    opened = open_for(store, user)
    try:
        result = opened.get_or_create_token(user)
    except TokenNotStored as error:
        if mask:
            rescue(opened, error)
        print_unsaved(store, opened, error)
    else:
        show(store, result, mask)


@command("login", "upstox-db login --keep", "upstox-db --accounts accounts.toml login AB1234")
@click.argument("user", required=False)
@click.option("--keep", is_flag=True, help="Do not log in if the stored token still works, or after a refusal.")
@click.pass_obj
def login(store: OpenStore, user: str | None, keep: bool) -> None:
    """Log in and keep the new token.

    This kills the user's earlier token. USER is an Upstox user id such as AB1234. The default is the account of the
    credentials. If the store does not accept the token, it goes into an encrypted file; see upstox-db save.
    """
    if keep:
        opened = open_for(store, user)
    else:
        store.login.check(user)
        opened = store(new=True)
    try:
        result = opened.get_or_create_token(user) if keep else opened.store_token(user)
    except StorageError as error:
        rescue(opened, error)
    else:
        store.report(store.describe(result), masked(result))


@command("renew", 'TOKEN=$(printf %s "$TOKEN" | upstox-db renew AB1234) || exit')
@click.argument("user")
@click.pass_obj
def renew(store: OpenStore, user: str) -> None:
    """Print a token other than the refused one.

    Pass the refused token (401, UDAPI100050) on standard input. If a newer one is stored, it is printed; otherwise this
    logs in. USER is an Upstox user id such as AB1234.
    """
    refused = "" if sys.stdin is None or sys.stdin.isatty() else strip_invisible(sys.stdin.read(10_000))
    if not refused:
        raise InvalidInput('Pass the refused token on standard input: printf %s "$TOKEN" | upstox-db renew USER')
    require_output()
    opened = store()
    try:
        result = opened.renew_token(user, refused)
    except TokenNotStored as error:
        print_unsaved(store, opened, error)
    else:
        show(store, result, mask=False)


@command("save", "upstox-db save ~/.config/upstox_db_examples/unsaved-AB1234-1f2e3d4c.token")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--verify", is_flag=True, help="First ask Upstox whether the token works.")
@click.pass_obj
def save(store: OpenStore, file: Path, verify: bool) -> None:
    """Store the token that login left in a FILE.

    Then the file is removed. If the store has a token that Upstox issued later, that one stays.
    """
    from .token_file import read_token_file

    opened, file = store(new=True), expand_home(file)
    result = opened.save_token(read_token_file(file, opened.cipher), verify=verify)
    store.report(store.describe(result), masked(result))
    try:
        file.unlink()
    except OSError as error:  # The token is stored. Cron would take a failure for a token that is not.
        print_error(f"Done, but {file} cannot be removed: {error.strerror}. Delete it yourself.")


@command("logout", "upstox-db logout AB1234")
@click.argument("user")
@click.pass_obj
def logout(store: OpenStore, user: str) -> None:
    """End a user's token, at Upstox and here.

    Use this for a token that has leaked.

    USER is an Upstox user id such as AB1234.
    """
    opened = store()
    user = known_user(opened, user)
    ended = opened.log_out(user)
    told = "logged out at Upstox" if ended else "no token was stored, or it had already ended"
    store.report(f"{user}: {told}.", {"user_id": user, "ended": ended})


def show(store: OpenStore, result: TokenResult, mask: bool) -> None:
    """Print a token, or whose it is and how long it lives."""
    if mask:
        store.result(store.describe(result), masked(result))
    else:
        store.result(result["token"], dict(result))


def stored_token(store: OpenStore, user: str | None) -> TokenResult:
    """Return the working token that is stored.

    Raises:
        NoLivingToken: there is none now.
        InvalidInput: the store does not know this user, or nobody says whose token is wanted. That a store has only
            one user does not say it: whoever can delete its other rows would choose the account that a program trades
            with.
    """
    from .core.settings import Settings
    from .core.users import Users, is_same_user

    opened = store()
    user = user or Users(opened.backend, opened.cipher, Settings("", {"login": store.login})).guess(last=False)
    if user is None:
        raise InvalidInput(
            "Name the user, or set UPSTOX_USER_ID: there are no credentials here that tell whose token is wanted. "
            + name_users(list_users(opened))
        )
    if found := opened.get_valid_token(user):
        return found
    # The account of the credentials is no mistyped name: its first login is still to come.
    is_own = is_same_user(user, store.login.user_id or "")
    user = stored_spelling(opened, user) or (user if is_own else known_user(opened, user))
    newest = opened.backend.find_newest(user)
    if newest and newest.in_doubt:
        why = "A login that is running or broke off may have replaced it. Without --no-login, Upstox is asked."
    else:
        why = "Log in with upstox-db token, or wait until another program has done so."
    raise NoLivingToken(f"{user} has no token that is known to work. {why}")


def open_for(store: OpenStore, user: str | None) -> TokenStorage:
    """Open the store to get this user's token from it.

    If a user is known, a token may already be stored, and then no credentials are needed. But credentials that cannot
    be right must not create a database for nothing.
    """
    try:
        store.login.check(user)
        return store(new=True)
    except LoginRefused as refused:
        if not (user or store.login.user_id):
            raise
        try:
            return store(new=False)
        except DatabaseMissing:
            raise refused from None


def rescue(store: TokenStorage, error: StorageError) -> NoReturn:
    """Write the token in this error to a file, and raise the error with the file's name.

    Raises:
        StorageError: always.
    """
    if error.token is None or isinstance(error, LoginSuperseded):  # The store has a later token.
        raise error
    from .token_file import write_token_file

    file = write_token_file(error.token, error.user_id, store.cipher.ring)
    reason = error.__cause__ if isinstance(error, TokenNotStored) else error
    whose = error.user_id or "an unnamed user"
    error.args = (
        f"Logged in as {whose}, but the token could not be stored: {reason} It is in {file}, encrypted with the "
        f"store's key. Once that is fixed, run: upstox-db save {file}",
    )
    raise error


def print_unsaved(store: OpenStore, opened: TokenStorage, error: TokenNotStored) -> None:
    """Print the unsaved token. It works, nobody else has it, and a script that waits for a token can use it."""
    try:
        store.result(error.token.reveal(), {"token": error.token.reveal(), "user_id": error.user_id})
    except ConfigurationError:
        rescue(opened, error)
    print_error(f"The token was not stored, so the next call will log in again: {error.__cause__}")
