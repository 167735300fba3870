"""The made-up accounts of the local Upstox, and what it remembers about each."""

from __future__ import annotations

import hashlib
import string
import uuid
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any


@dataclass(frozen=True)
class Account:
    """A made-up account. Its repr shows nothing that identifies or opens it."""

    user_id: str
    user_name: str
    redirect_uri: str
    mobile: str = field(repr=False)
    pin: str = field(repr=False)
    totp_secret: str = field(repr=False)
    client_id: str = field(repr=False)
    client_secret: str = field(repr=False)
    email: str = field(repr=False)
    client_active: bool = True
    totp_login: bool = True  # whether the user has enabled TOTP, which the one-call login requires

    def credentials(self) -> dict[str, str]:
        """Return the arguments for `UpstoxTOTP(**...)`."""
        return {
            "username": self.mobile,
            "password": self.pin,
            "pin_code": self.pin,
            "totp_secret": self.totp_secret,
            "client_id": self.client_id,
            "client_secret": self.client_secret,
            "redirect_uri": self.redirect_uri,
        }

    def environ(self) -> dict[str, str]:
        """Return the same as the UPSTOX_* variables that the SDK reads."""
        return {f"UPSTOX_{name.upper()}": value for name, value in self.credentials().items()}

    def profile(self) -> dict[str, Any]:
        """Return what Upstox tells about the user, with every documented field."""
        who = {"email": self.email, "user_id": self.user_id, "user_name": self.user_name}
        what = {"broker": "UPSTOX", "user_type": "individual", "poa": False, "ddpi": False, "is_active": True}
        lists = {"exchanges": "NSE NFO BSE CDS BFO BCD", "products": "D CO I", "order_types": "MARKET LIMIT SL SL-M"}
        return who | what | {name: values.split() for name, values in lists.items()}


@dataclass
class User:
    """What Upstox remembers about the user of an account."""

    account: Account
    wrong_pins: int = 0
    used_totps: set[int] = field(default_factory=set)  # the 30-second steps whose code was used
    token: str | None = field(default=None, repr=False)
    expires: datetime = datetime.min  # noqa: DTZ901  # read only where there is a token
    extended_tokens: set[str] = field(default_factory=set, repr=False)


def make_up(user_id: str, overrides: dict[str, Any]) -> Account:
    """Make up an account. The same user id always gives the same account."""

    def made_up(what: str, alphabet: str, length: int) -> str:
        digest = hashlib.sha256(f"{user_id} {what}".encode()).digest()
        return "".join(alphabet[byte % len(alphabet)] for byte in digest[:length])

    made: dict[str, Any] = {
        "user_name": f"User {user_id}",
        "redirect_uri": "https://127.0.0.1/callback",
        "mobile": "5" + made_up("mobile", string.digits, 9),  # No mobile number in India begins with 5.
        "pin": made_up("pin", string.digits, 6),
        "totp_secret": made_up("totp_secret", string.ascii_uppercase + "234567", 32),
        "client_id": str(uuid.uuid5(uuid.NAMESPACE_OID, user_id)),
        "client_secret": made_up("client_secret", string.ascii_lowercase + string.digits, 10),
        "email": f"{user_id.lower()}@example.com",
    }
    return Account(user_id, **made | overrides)
