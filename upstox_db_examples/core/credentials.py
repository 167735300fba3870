"""The credentials of a login, checked before they cost a request."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from typing import ClassVar, Self
from urllib.parse import urlsplit

from .answer import without_tokens
from .environment import has_control_characters, read_variable, strip_invisible
from .errors import LoginRefused
from .token import Secret

FIELDS = ("username", "password", "pin_code", "totp_secret", "client_id", "client_secret", "redirect_uri")
TOTP_FIELDS = ("client_id", "pin_code", "totp_secret")
SHORTEST_TOTP_SECRET = 112  # bits; the SDK refuses a shorter one only after an OTP request was spent


class Credentials:
    """The credentials that the SDK's login takes. Their values never show in output.

    Args:
        values: a mapping with the SDK's names as keys: username (the mobile number), password, pin_code, totp_secret,
            client_id, client_secret, redirect_uri.

    Raises:
        LoginRefused: a value is missing or cannot be right. The error names the field and does not show the value.
    """

    fields: ClassVar[tuple[str, ...]] = FIELDS
    kind: ClassVar[str] = "sdk"

    def __init__(self, values: Mapping[str, str | Secret]) -> None:
        values = wrap_credentials(values)
        if unknown := sorted(set(values) - set(self.fields)):
            raise LoginRefused(f"Unknown credentials: {', '.join(unknown)}. The known ones: {', '.join(self.fields)}.")
        self._values = {name: as_secret(values.get(name, "")) for name in self.fields}
        if problems := self._missing() or self._unreadable() or self._problems():
            raise LoginRefused(f"The login cannot work, so no request was made: {'; '.join(problems)}.")

    @classmethod
    def from_environment(cls) -> Self:
        """Read UPSTOX_CLIENT_ID, UPSTOX_PIN_CODE and so on: one variable for each field."""
        return cls({name: read_variable(f"UPSTOX_{name.upper()}", any_character=True) for name in cls.fields})

    def __getitem__(self, name: str) -> Secret:
        return self._values[name]

    def reveal_all(self) -> dict[str, str]:
        """Return the plain values, as the SDK's client takes them."""
        return {name: secret.reveal() for name, secret in self._values.items()}

    def fingerprint(self) -> str:
        """Return a stable name for the account. Nobody can guess the mobile number from it: the client id is random."""
        plain = f"{self._values['client_id'].reveal()}/{self._values['username'].reveal()}"
        return hashlib.sha256(plain.encode()).hexdigest()[:16]

    def digest(self) -> str:
        """Return a hash that changes whenever any of the credentials changes.

        Keep it encrypted: the PIN has few digits, so anyone who knows the rest could guess the PIN from the hash.
        """
        digest = hashlib.sha256()
        for text in (self.kind, *(self._values[name].reveal() for name in self.fields)):
            # Each value gets a length prefix, so that no two sets of values have the same bytes.
            digest.update(len(text.encode()).to_bytes(8, "big") + text.encode())
        return digest.hexdigest()

    def redact(self, text: str) -> str:
        """Remove these values, and anything that looks like a token, from the text."""
        for secret in self._values.values():
            plain = secret.reveal()
            # The SDK sends the PIN in base64, so an answer may repeat it that way.
            for form in (plain, base64.b64encode(plain.encode()).decode()):
                text = text.replace(form, "…")
        return without_tokens(text)

    def _problems(self) -> list[str]:
        plain, problems = self.reveal_all(), self._problems_of_pin_and_totp()
        if not re.fullmatch(r"[0-9]{10}", plain["username"]):
            problems.insert(0, "username is not a mobile number of 10 digits")
        if not _is_url(plain["redirect_uri"]):
            problems.append("redirect_uri is not a URL")
        # The SDK puts these three into a form without encoding them, so special characters would send a wrong value.
        problems += [
            f"{name} contains a space, &, +, % or a character that is not ASCII, which the SDK does not send correctly"
            for name in ("client_id", "client_secret", "redirect_uri")
            if re.search(r"[^!-~]|[&+%]", plain[name])
        ]
        return problems

    def _missing(self) -> list[str]:
        missing = [f"UPSTOX_{name.upper()} ({name})" for name in self.fields if not self._values[name].reveal()]
        return [f"{', '.join(missing)} not set"] if missing else []

    def _unreadable(self) -> list[str]:
        wrong = [name for name, secret in self._values.items() if has_control_characters(secret.reveal())]
        return [f"{', '.join(wrong)} holds a line break or another character that cannot be right"] if wrong else []

    def _problems_of_pin_and_totp(self) -> list[str]:
        plain, problems = self.reveal_all(), []
        if not re.fullmatch(r"[0-9]{4,8}", plain["pin_code"]):
            problems.append("pin_code is not 4 to 8 digits")
        try:
            padding = "=" * (-len(plain["totp_secret"]) % 8)
            bits = 8 * len(base64.b32decode(plain["totp_secret"] + padding, casefold=True))
        except ValueError:  # It is not base32, or not even ASCII.
            problems.append("totp_secret is not base32: use only A-Z and 2-7, without spaces")
        else:
            if bits < SHORTEST_TOTP_SECRET:
                problems.append(f"totp_secret is cut off: it has {bits} bits and needs at least {SHORTEST_TOTP_SECRET}")
        return problems


class TotpCredentials(Credentials):
    """The credentials that the one-call login takes: client_id, pin_code, totp_secret."""

    fields = TOTP_FIELDS
    kind = "totp"

    def fingerprint(self) -> str:
        """Return a stable name for the app. It never equals one of `Credentials`, which hashes other values."""
        return "totp-" + hashlib.sha256(self._values["client_id"].reveal().encode()).hexdigest()[:16]

    def _problems(self) -> list[str]:
        problems = self._problems_of_pin_and_totp()
        if not re.fullmatch(r"[!-~]+", self._values["client_id"].reveal()):
            problems.append("client_id does not fit into a header: use only ASCII without spaces")
        return problems


def wrap_credentials(values: object) -> dict[str, str | Secret]:
    """Wrap each value in a Secret. Callers overwrite their own variable, so that a traceback shows no value."""
    return {str(name): as_secret(value) for name, value in values.items()} if isinstance(values, Mapping) else {}


def as_secret(value: object) -> Secret:
    return value if isinstance(value, Secret) else Secret(strip_invisible(str(value)))


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # An odd host or port. The error would show it.
        return False
