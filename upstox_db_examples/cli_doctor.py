"""`upstox-db doctor`: check everything short of a login, and say what to fix."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import click

from .cli_common import DONE, FIX_FIRST, TRY_AGAIN, OpenStore, command, exists, exit_code
from .core.environment import read_variable
from .core.errors import LoginError, StorageError

OK, NOTE, LATER, FIX = "ok", "note", "try again", "fix"
CODES = {OK: DONE, NOTE: DONE, LATER: TRY_AGAIN, FIX: FIX_FIRST}

# Seconds. Upstox takes a code of the step before as well, so a clock that is further off makes logins fail.
ODD_CLOCK, WRONG_CLOCK = 3.0, 25.0
STEP = 30  # seconds for which a TOTP code is valid

OUR_VARIABLES = {
    *("USER_ID", "BASE_DOMAIN", "DEBUG", "DB_STORE", "DB_KEYS", "DB_KEY_FILE", "DB_ONE_CALL", "DB_TARGET"),
    *("DB_COMPLETE",),
}


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
        what: what was checked.
        verdict: OK; NOTE (fine, but worth knowing); LATER (try again); or FIX.
        text: what was found, and what to do.
    """

    what: str
    verdict: str
    text: str


@command("doctor", "upstox-db doctor", "upstox-db doctor --json")
@click.pass_context
def doctor(ctx: click.Context) -> None:
    """Check everything short of a login, and say what to fix.

    It checks the versions, the variables with the credentials, the TOTP secret, the key file, this machine's clock, the
    store, and what the store's servers say. No login is spent, and nothing is made. To see that the store can be
    written, it writes a note and erases it.

    The exit code is 0 if nothing has to be fixed. It is 1 if a server did not answer, and 3 if something has to be
    fixed first.
    """
    store: OpenStore = ctx.obj
    from .cli_doctor_stores import check_store

    found: list[Finding] = []
    for what, check in {**CHECKS, "store": check_store}.items():
        found += guarded(what, check, store)
    width = max(len(each.what) for each in found)
    lines = [f"{each.verdict:<9}  {each.what:<{width}}  {each.text}" for each in found]
    store.result("\n".join(lines), [each._asdict() for each in found])
    ctx.exit(max(CODES[each.verdict] for each in found))


def guarded(what: str, check: Callable[[OpenStore], Iterator[Finding]], store: OpenStore) -> Iterator[Finding]:
    """Make this check. An error of ours is its last finding, and the other checks go on."""
    try:
        for finding in check(store):
            what = finding.what
            yield finding
    except (StorageError, ModuleNotFoundError) as error:
        yield Finding(what, verdict_of(error), str(error))


def verdict_of(error: Exception) -> str:
    return LATER if exit_code(error) == TRY_AGAIN else FIX


def check_versions(_: OpenStore) -> Iterator[Finding]:
    shown, missing = [f"Python {platform.python_version()}"], []
    for name in ("upstox-db-examples", "upstox-totp", "cryptography", "click"):
        try:
            shown.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    yield Finding("versions", OK, ", ".join(shown))
    if missing:
        yield Finding("versions", FIX, f"Not installed: {', '.join(missing)}. Run: pip install {' '.join(missing)}")


def check_variables(store: OpenStore) -> Iterator[Finding]:
    """Check the credentials as a login would, and look for mistyped names of variables."""
    from .core.login import FIELDS
    from .core.upstox_api import checked_base_domain, is_this_machine

    names = {*OUR_VARIABLES, *(field.upper() for field in FIELDS)}
    if others := sorted(name for name in os.environ if name.startswith("UPSTOX_") and name[7:] not in names):
        yield Finding("variables", NOTE, f"Nothing here reads {', '.join(others)}. Is the name right?")
    try:
        base_domain, wrong = checked_base_domain(None), ""
    except LoginError as error:
        base_domain, wrong = "", str(error)
        yield Finding("variables", FIX, wrong)
    accounts: list[str | None] = [*getattr(store.login, "user_ids", [None])]
    for account in accounts:
        try:
            store.login.check(account)
        except LoginError as error:
            if str(error) == wrong:
                continue
            yield Finding("variables", FIX, f"{account}: {error}" if account else str(error))
        else:
            whose = account or store.login.user_id
            told = f"The credentials{f' of {whose}' if whose else ''} are complete and look right."
            yield Finding("variables", OK, told)
            if not whose:
                told = "Set UPSTOX_USER_ID as well: then a wrong account is noticed before a login is spent."
                yield Finding("variables", NOTE, told)
    if base_domain:
        where = urlsplit(base_domain.replace("{stage}", "api")).hostname
        local = ", which is on this machine" if is_this_machine(base_domain) else ""
        yield Finding("variables", NOTE, f"UPSTOX_BASE_DOMAIN sends logins to {where}{local}. For Upstox, unset it.")


def check_totp(store: OpenStore) -> Iterator[Finding]:
    """Check the TOTP secret, and say how old the present code is. A code can be used once."""
    age = int(time.time()) % STEP
    told = "The secrets are in the file of accounts." if store.accounts else f"The secret has {totp_bits()} bits."
    yield Finding("TOTP", OK, f"{told} The present code is {age} s old and is valid for {STEP - age} s more.")


def totp_bits() -> int:
    """Return how many bits the secret in the environment has.

    Raises:
        LoginRefused: it is missing, or is not a TOTP secret. The error does not show it.
    """
    from .core.credentials import TotpCredentials

    # The other two have their own check. This one shall speak of the secret only.
    secret = read_variable("UPSTOX_TOTP_SECRET", any_character=True)
    checked = TotpCredentials({"client_id": "any", "pin_code": "0000", "totp_secret": secret})
    return 5 * len(checked["totp_secret"].reveal().rstrip("=")) // 8 * 8


def check_keys(_: OpenStore) -> Iterator[Finding]:
    """Check the keys without making any."""
    from .core.cipher import KeyRing, key_file

    if read_variable("UPSTOX_DB_KEYS", any_character=True):
        ring, where = KeyRing.default(), "UPSTOX_DB_KEYS"
    else:
        where = str(key_file())
        if not exists(key_file()):
            told = "does not exist. The first login makes it. If other machines use the store, copy theirs."
            yield Finding("keys", NOTE, f"{where} {told}")
            return
        ring = KeyRing.from_file(key_file())
    others = f", and for older tokens {', '.join(ring.key_ids[1:])}" if len(ring.key_ids) > 1 else ""
    yield Finding("keys", OK, f"{where} has the key {ring.key_ids[0]}{others}. Keep a copy apart from the database.")


def check_clock(_: OpenStore) -> Iterator[Finding]:
    """Compare this machine's clock with the Date header of Upstox's answers."""
    from .core.upstox_api import checked_base_domain

    try:
        base_domain = checked_base_domain(None)
    except LoginError:  # The check of the variables has said what is wrong with it.
        yield Finding("clock", NOTE, "Not compared with Upstox's, because UPSTOX_BASE_DOMAIN is wrong.")
        return
    where = urlsplit((base_domain or "https://api.upstox.com").replace("{stage}", "api")).hostname
    ahead, lost = seconds_ahead(base_domain)
    if ahead is None:
        told = f"{where} did not tell the time ({lost}). Check the network, the proxy and the certificates."
        yield Finding("clock", LATER, told)
        return
    told = f"This machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} that of {where}"
    if abs(ahead) < ODD_CLOCK:
        yield Finding("clock", OK, f"This machine's clock agrees with that of {where}.")
    elif abs(ahead) < WRONG_CLOCK:
        yield Finding("clock", NOTE, f"{told}. Set it, for example with: timedatectl set-ntp true")
    else:
        told += ", so Upstox refuses TOTP codes, and tokens seem to die at the wrong time"
        yield Finding("clock", FIX, f"{told}. Set it, for example with: timedatectl set-ntp true")


def seconds_ahead(base_domain: str) -> tuple[float | None, str]:
    """Return how far this machine's clock is ahead of Upstox's, or None and why that is not known.

    The request is made as those of a login are, so it also shows that Upstox can be reached from here. It has no
    credentials: Upstox answers 401.
    """
    from email.utils import parsedate_to_datetime

    from curl_cffi import CurlOpt, Session

    from .core.upstox_api import REAL, is_this_machine

    options: dict[CurlOpt, Any] = {CurlOpt.NOPROXY: "*"} if is_this_machine(base_domain) else {}
    begin = time.time()
    try:
        with Session[Any](curl_options=options) as session:
            url = (base_domain or REAL).format(stage="api") + "/v2/user/profile"
            answer = session.get(url, timeout=10, allow_redirects=False)
        theirs = parsedate_to_datetime(str(answer.headers.get("date"))).timestamp()
    except Exception as error:  # curl_cffi's own, or a header that is no date
        return None, type(error).__name__
    # The header has whole seconds, so on average it is half a second older than the answer.
    return (begin + time.time()) / 2 - (theirs + 0.5), ""


CHECKS: dict[str, Callable[[OpenStore], Iterator[Finding]]] = {
    "versions": check_versions,
    "variables": check_variables,
    "TOTP": check_totp,
    "keys": check_keys,
    "clock": check_clock,
}
