"""The commands of `upstox-db` that look at a store and change nothing: status, users, history, audit."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from .cli_common import (
    DONE,
    FIX_FIRST,
    TRY_AGAIN,
    OpenStore,
    command,
    duration,
    exists,
    known_user,
    list_users,
    table,
    user_or_only_one,
)
from .core.environment import read_variable
from .core.errors import KeyUnavailable, StoreUnavailable, TokenRefused

if TYPE_CHECKING:
    from .core.store import TokenStorage
    from .core.token import StoredToken


class Row(NamedTuple):
    """What `status` says about one user.

    Attributes:
        token: "works", "none", "in doubt" (a login is running, or ended without a known result), or "unreadable".
        expires_at, last_login: aware datetimes, UTC; `last_login` is when the newest token was stored.
        problem: why the token cannot be read, or why no program will log in by itself; None if there is nothing.
        exit_code: see `status`.
    """

    user_id: str
    token: str
    expires_at: datetime | None
    last_login: datetime | None
    problem: str | None
    exit_code: int


KINDS = ("refusal", "limit")


class Stop(NamedTuple):
    """Why no program on the store logs in by itself now, or why a token cannot be read."""

    text: str
    exit_code: int


IN_DOUBT = Stop(
    "A login that is running or broke off may have replaced this token. To ask Upstox, run: upstox-db token", TRY_AGAIN
)


class Stops(NamedTuple):
    """What stops logins of anybody (`others`), and of each user."""

    others: list[Stop]
    users: dict[str, Stop]


@command("status", "upstox-db status", "upstox-db status AB1234 --json", "upstox-db status || upstox-db login --keep")
@click.argument("users", metavar="[USER]...", nargs=-1)
@click.pass_context
def status(ctx: click.Context, users: tuple[str, ...]) -> None:
    """Show whether each user's token and each database works.

    For each user it shows whether a token works and until when, the last login, and what Upstox refused. The token
    itself is never shown, no use is counted, and Upstox is not asked. USER is an Upstox user id such as AB1234. The
    default is all users.

    The exit code is 0 if each database answers and each of these users has a working token. It is 1 if a database does
    not answer, or a login is due: the first one, too. It is 3 if somebody has to fix something first. A script must not
    log in then: five wrong PINs lock the account.
    """
    store: OpenStore = ctx.obj
    opened = store()
    health = opened.get_storage_status()
    details = health.get("details", {})
    codes = [TRY_AGAIN for value in health.values() if str(value).startswith("error")]
    rows: list[Row] | None = None  # None: they cannot be read now
    lines: list[str] = []
    others: list[Stop] = []
    try:
        named = [known_user(opened, user) for user in users] or list_users(opened)
        others, rows = look_at(store, opened, named)
        lines = [table([shown(store, row) for row in rows], COLUMNS), ""] if rows else ["No users yet.", ""]
        lines += [f"{row.user_id}: {row.problem}" for row in rows if row.problem]
        codes += [TRY_AGAIN, *(each.exit_code for each in others)] if not rows else []  # The first login is due.
    except StoreUnavailable as error:
        if not codes:
            raise
        others = [Stop(f"The users cannot be read: {error}", TRY_AGAIN)]
    lines += [each.text for each in others]
    lines += [f"{name}: {value}" for name, value in health.items() if name not in ("details", "timestamp")]
    waiting = details.get("redis", {}).get("uses_waiting")
    lines += [f"waiting uses: {waiting}"] if waiting is not None else []
    lines += [f"{name}: {each['warning']}" for name, each in details.items() if "warning" in each]
    data = {
        **health,
        "users": None if rows is None else [in_json(row) for row in rows],
        "problems": [each.text for each in others],
        "waiting_uses": waiting,
    }
    store.result("\n".join(lines), data)
    ctx.exit(max([DONE, *codes, *(row.exit_code for row in rows or ())]))


COLUMNS = ("user", "token", "until", "left", "last login")


def shown(store: OpenStore, row: Row) -> dict[str, str]:
    left = duration((row.expires_at - datetime.now(UTC)).total_seconds()) if row.expires_at else ""
    values = (row.user_id, row.token, store.time(row.expires_at), left, store.time(row.last_login))
    return dict(zip(COLUMNS, values, strict=True))


def in_json(row: Row) -> dict[str, Any]:
    until, last = (each and each.isoformat() for each in (row.expires_at, row.last_login))
    left = (row.expires_at - datetime.now(UTC)).total_seconds() if row.expires_at else 0
    return {**row._asdict(), "expires_at": until, "last_login": last, "seconds_left": max(0, int(left))}


def look_at(store: OpenStore, opened: TokenStorage, users: list[str]) -> tuple[list[Stop], list[Row]]:
    """Return what stops all logins or those of nobody known, and a row for each user."""
    now = opened.backend.context.now()
    newest = {user: opened.backend.find_newest(user) for user in users}
    # `KeyRing.default` would make a key, and no key that is made now can read anything.
    keys = has_keys()
    stops = what_stops_logins(store, opened, newest) if keys else Stops([], {})
    rows = []
    for user, token in newest.items():
        alive = token is not None and bool(token.ciphertext) and token.expires_at > now
        state, stop = ("works" if alive else "none"), stops.users.get(user)
        if token is not None and alive:
            unreadable = why_unreadable(opened, token) if keys else "There is no key here that could read the token."
            state = "unreadable" if unreadable else "in doubt" if token.in_doubt else state
            stop = Stop(unreadable, FIX_FIRST) if unreadable else stop or (IN_DOUBT if token.in_doubt else None)
        code = DONE if state == "works" else stop.exit_code if stop else TRY_AGAIN
        until, last = (token.expires_at if token and alive else None), (token.created_at if token else None)
        rows.append(Row(user, state, until, last, stop and stop.text, code))
    return stops.others, rows


def why_unreadable(opened: TokenStorage, token: StoredToken) -> str | None:
    try:
        opened.cipher.decrypt(token)
    except (KeyUnavailable, TokenRefused) as error:
        return str(error)
    return None


def has_keys() -> bool:
    """Return whether there is a key ring, without making one."""
    from .core.cipher import key_file

    return bool(read_variable("UPSTOX_DB_KEYS", any_character=True)) or exists(key_file())


def what_stops_logins(store: OpenStore, opened: TokenStorage, newest: dict[str, StoredToken | None]) -> Stops:
    """Return what keeps programs on this store from logging in by themselves: Upstox's refusals and limits."""
    from .core.notes import Notes, applicant_of, seconds_left

    login, ours = store.login, applicant_of(store.login, None)
    of_user = {user: {f"user {user.upper()}"} for user in newest}
    credentials = {ours.who: ours.credentials}
    for user, token in newest.items():
        if token and token.account:
            of_user[user].add(f"account {token.account}")
        own = login.user_id
        if own.upper() == user.upper() if own else hasattr(login, "user_ids"):
            his = applicant_of(login, user)
            of_user[user].add(his.who)
            credentials[his.who] = his.credentials
    everyone = {ours.who, *(who for each in of_user.values() for who in each)}
    now, notes = Notes(opened.backend, opened.cipher).read("limit", *(f"{w} {e}" for w in KINDS for e in everyone))

    def stop(kind: str, who: str = "", user: str = "") -> Stop | None:
        note = notes.get(f"{kind} {who}".strip())
        if note is None or (note["seconds"] is not None and seconds_left(note, now) <= 0):
            return None
        when = store.time(datetime.fromtimestamp(note["at"], UTC))
        if kind == "limit":
            left = duration(seconds_left(note, now))
            return Stop(f"Upstox set a limit at {when} ({note['code']}). No login for {left}.", TRY_AGAIN)
        if credentials.get(who) not in (None, note["credentials"]):
            return None  # The credentials have changed since, so the next program tries them.
        then = f"upstox-db login {user}".strip()
        return Stop(f"Upstox refused the login at {when} ({note['code']}). {note['why']} Then run: {then}", FIX_FIRST)

    found = {
        user: [each for who in sorted(whos) for kind in KINDS if (each := stop(kind, who, user))]
        for user, whos in of_user.items()
    }
    nobodys = not any(ours.who in whos for whos in of_user.values())
    general = [stop("limit"), *(stop(kind, ours.who) for kind in KINDS if nobodys)]
    return Stops([each for each in general if each], {user: each[0] for user, each in found.items() if each})


@command("users", "upstox-db users", "for user in $(upstox-db users); do upstox-db token $user --masked; done")
@click.pass_obj
def users(store: OpenStore) -> None:
    """List the users of the store, one on each line.

    It lists everyone who has ever had a token or an audit entry here.
    """
    found = list_users(store())
    if found or store.as_json:
        store.result("\n".join(found), found)


def limited(default: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    number = click.IntRange(1, 2_000_000_000)
    return click.option(
        "--limit", metavar="N", type=number, default=default, show_default=True, help="How many to show at most."
    )


@command("history", "upstox-db history", "upstox-db history AB1234 --limit 100 --json")
@click.argument("user", required=False)
@limited(10)
@click.pass_obj
def history(store: OpenStore, user: str | None, limit: int) -> None:
    """List a user's tokens, newest first.

    It shows when each token was made and when it expires, whether it is active and how often it was used, but never the
    token itself. USER is an Upstox user id such as AB1234. It may be left out if the store has only one.
    """
    opened = store()
    rows = opened.get_token_history(user_or_only_one(store, opened, user), limit)
    show_rows(store, rows, ("created_at", "expires_at", "is_active", "usage_count"))


@command("audit", "upstox-db audit", "upstox-db audit AB1234 --limit 1000 --json")
@click.argument("user", required=False)
@limited(50)
@click.pass_obj
def audit(store: OpenStore, user: str | None, limit: int) -> None:
    """List what was done to a user's tokens.

    It shows when, what and by whom, newest first. USER is an Upstox user id such as AB1234. It may be left out if the
    store has only one.
    """
    opened = store()
    rows = opened.get_audit_trail(user_or_only_one(store, opened, user), limit)
    show_rows(store, rows, ("performed_at", "action", "actor", "token_id"))


def show_rows(store: OpenStore, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    def cell(name: str, value: Any) -> str:
        return store.time(value) if name.endswith("_at") else "" if value is None else str(value)

    store.result(table([{name: cell(name, row[name]) for name in columns} for row in rows], columns), rows)
