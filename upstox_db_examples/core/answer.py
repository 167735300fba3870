"""Read the answer to a login: the token, its user, and the profile.

Only `access_token` and `user_id` are needed. Real answers differ from account to account: fields are missing, null or
new. A bad profile field must never cost a token, because the login has already killed the earlier one.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

from .checks import USER_ID
from .errors import LoginError, LoginInterrupted, LoginRefused
from .token import Secret, subject

TEXTS = ("user_name", "email", "broker", "user_type")
LISTS = ("products", "exchanges", "order_types")
FLAGS = ("poa", "ddpi", "is_active")
EXPECTED = ("user_id", *TEXTS, *LISTS, *FLAGS)

# Known fields outside the profile. They come from the answer itself, its envelope, the payload that Upstox sends to a
# notifier URL, and this package's own results.
NOT_PROFILE = {
    *("access_token", "extended_token"),
    *("success", "status", "data", "error", "errors"),
    *("client_id", "token_type", "expires_at", "issued_at", "message_type"),
    *("token", "token_id", "created_at", "usage_count", "last_used_at", "source", "metadata"),
}

MOST_NAMES = 20  # names of each kind in one audit entry
MOST_PARTS = 10_000  # parts of an odd answer that the search for a token looks at

# Not \w: it would also match letters of other alphabets, which are never part of a token.
_JWT = r"eyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+"
_LABELLED = re.compile(rf"access_token\W{{1,8}}({_JWT})")
_ANY = re.compile(rf"({_JWT})")
_EXTENDED = re.compile(r"extended_token\W{1,8}[\w.-]+")


class Minted(NamedTuple):
    """The result of a login: the wrapped token, and the profile as fields of `StoredToken`.

    Attributes:
        odd_fields: the names of unexpected fields, grouped by problem: "fields_missing", "fields_null",
            "fields_of_another_type", "fields_unknown". It holds no values, because it goes into the audit trail.
    """

    user_id: str
    token: Secret
    profile: dict[str, Any]
    odd_fields: dict[str, list[str]]


class LoginAnswer(Mapping[str, Any]):
    """Upstox's answer to a login. It reads like a dict, each field is also an attribute, and output masks its tokens.

    Earlier versions returned the SDK's AccessTokenData, so the fields have to be attributes. We no longer use that
    class: it refuses an answer that lacks a field, and then the token is lost.
    """

    __slots__ = ("_fields", "_method")

    def __init__(self, fields: Mapping[str, Any], method: str = "upstox_totp_sdk") -> None:
        self._fields = {
            name: Secret(value) if isinstance(value, str) and name.endswith("token") else value
            for name, value in fields.items()
        }
        self._method = method

    def __getitem__(self, name: str) -> Any:
        value = self._fields[name]
        return value.reveal() if isinstance(value, Secret) else value

    def __getattr__(self, name: str) -> Any:
        # A name that starts with an underscore is never a field. Without this check, a half-made copy, which has no
        # _fields yet, would look for it forever.
        if not name.startswith("_") and name in self._fields:
            return self[name]
        raise AttributeError(f"Upstox's answer has no field {name}.", name=name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __repr__(self) -> str:
        return f"LoginAnswer({without_tokens(repr(self._fields))})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("A login's answer cannot be pickled: anyone who reads the file would see its tokens.")


def read_answer(answer: object) -> Minted:
    """Read the token, its user and the profile from the answer to a login.

    Args:
        answer: a mapping (flat, or with the fields under "data"), the SDK's AccessTokenData or AccessTokenResponse, or
            any object with the attributes access_token and user_id.

    Raises:
        LoginInterrupted: the answer names no user, or has no token in the expected place. If it has a token elsewhere,
            `error.token` holds it.
        LoginRefused: this is not an answer at all, so the login must be fixed. The error may also carry a token.
    """
    read = _read(answer)
    del answer  # A traceback that prints local variables must not show it.
    if isinstance(read, LoginError):
        raise read
    return read


def fields_of(answer: object, depth: int = 3) -> dict[str, Any] | None:
    """Return the fields of an answer in any form, without the envelope; None if this is not an answer."""
    fields = _flat(answer)
    if fields is None or _token(fields.get("access_token")) or not depth:
        return fields
    inner = fields_of(fields.get("data"), depth - 1)
    return inner if inner and "access_token" in inner else fields


def find_token(answer: object, *, cut: bool = False) -> Secret | None:
    """Search an answer for something that looks like an access token. This never returns the extended token.

    Args:
        cut: the answer broke off, so a token at the very end may be incomplete and is ignored.
    """
    texts = list(_texts(answer))
    for pattern in (_LABELLED, _ANY):
        for text in texts:
            # A JWT in UTF-16 text that was read as UTF-8 has a NUL after each character.
            plain = _EXTENDED.sub("", text.replace("\0", ""))
            found = pattern.search(plain)
            if found and not (cut and found.end() == len(plain)):
                return Secret(found[1])
    return None


def without_tokens(text: str) -> str:
    """Remove anything that looks like a token from the text."""
    return re.sub(r"eyJ[\w.-]+", "…", text)


def _read(answer: object) -> Minted | LoginError:
    fields = fields_of(answer)
    if fields is None:
        return _no_answer(answer)
    token = _token(fields.get("access_token"))
    if token is None:
        return _attach_token(
            LoginInterrupted(
                "The login's answer has no text in access_token. Log in again. If that does not help, fix "
                "the login: it must return a mapping with access_token and user_id, or the SDK's AccessTokenData."
            ),
            find_token(answer),
            fields.get("user_id"),
        )
    user_id = (_user_id(fields.get("user_id")) or _user_id(subject(token)) or "").strip()
    if not user_id:
        return _attach_token(LoginInterrupted("The login gave a token but no usable user id."), token)
    profile: dict[str, Any] = {name: _text(fields.get(name)) for name in TEXTS}
    profile |= {name: _list(fields.get(name)) or [] for name in ("products", "exchanges")}
    method = answer._method if isinstance(answer, LoginAnswer) else "upstox_totp_sdk"
    profile["metadata"] = {
        "is_active_user": _flag(fields.get("is_active")),
        "generation_method": method,
    }
    return Minted(user_id, token, profile, _odd_fields(fields, token))


def _no_answer(answer: object) -> LoginError:
    says = (
        f"The login returned {type(answer).__name__}. It must return the SDK's AccessTokenData (the response's .data) "
        "or a mapping with access_token and user_id."
    )
    token = find_token(answer)
    # Text comes from a server, so the next answer may differ. Anything else comes from the login's own code.
    error = LoginInterrupted(says) if token and isinstance(answer, str | bytes) else LoginRefused(says)
    error.token_may_exist = True  # The login may have worked without returning the answer.
    return _attach_token(error, token)


def _attach_token(error: LoginError, token: Secret | None, named: object = None) -> LoginError:
    error.token_may_exist = True
    if token:
        error.token = token
        whose = (user for user in (named, subject(token)) if isinstance(user, str) and USER_ID.fullmatch(user))
        error.user_id = next(whose, None)
        error.args = (f"{error} The token is in this error: error.token.reveal().",)
    return error


def _flat(answer: object) -> dict[str, Any] | None:
    if isinstance(answer, Mapping):
        try:
            return {name: answer[name] for name in answer if isinstance(name, str)}
        except Exception:  # A custom mapping may fail in any way, and that must not cost a token.
            return {}
    own = [name for name in getattr(answer, "__dict__", ()) if isinstance(name, str) and not name.startswith("_")]
    fields = {}
    for name in dict.fromkeys([*own, *_names_to_ask_for(answer)]):
        try:
            fields[name] = getattr(answer, name)
        except Exception:  # noqa: S112 - A custom property may fail in any way. suppress() takes four times as long.
            continue
    if isinstance(answer, type) or not ("access_token" in fields or {"success", "data"} <= fields.keys()):
        return None
    return fields


def _names_to_ask_for(answer: object) -> Iterable[str]:
    """Return the names of fields that an object may have besides those in its `__dict__`."""
    kind = type(answer)
    if "__pydantic_fields__" not in kind.__dict__:
        return (*EXPECTED, *NOT_PROFILE)
    # A pydantic model has nothing else, and to ask it for each field that it lacks would take half the time of a login.
    of_class = _names_of_class(kind)  # type: ignore[arg-type]  # mypy does not know that classes can be hashed
    return [*(getattr(answer, "__pydantic_extra__", None) or ()), *of_class]


@functools.lru_cache(maxsize=64)
def _names_of_class(kind: type) -> tuple[str, ...]:
    return tuple(name for name in (*EXPECTED, *NOT_PROFILE) if any(name in each.__dict__ for each in kind.__mro__))


def _token(value: object) -> Secret | None:
    plain = (value.reveal() if isinstance(value, Secret) else value if isinstance(value, str) else "").strip()
    return Secret(plain) if plain else None


def _text(value: object) -> str | None:
    """Return the value if it is text that every database can store and that contains no token."""
    if not isinstance(value, str) or "\0" in value or _ANY.search(value):
        return None
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can express half a surrogate pair; UTF-8 cannot.
        return None
    return value


def _list(value: object) -> list[str] | None:
    if not isinstance(value, list | tuple) or any(_text(item) is None for item in value):
        return None
    return list(value)


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _user_id(value: object) -> str | None:
    return value if isinstance(value, str) and USER_ID.fullmatch(value.strip()) else None


# How to read each expected field. None means that its type is wrong.
_READ: dict[str, Callable[[object], object]] = {
    "user_id": _user_id,
    **dict.fromkeys(TEXTS, _text),
    **dict.fromkeys(LISTS, _list),
    **dict.fromkeys(FLAGS, _flag),
}


def _odd_fields(fields: Mapping[str, Any], token: Secret) -> dict[str, list[str]]:
    missing = [name for name in EXPECTED if name not in fields]
    null = [name for name in EXPECTED if name in fields and fields[name] is None]
    other = [name for name in EXPECTED if fields.get(name) is not None and _READ[name](fields[name]) is None]
    unknown = [name for name in fields if name not in EXPECTED and name not in NOT_PROFILE]
    kinds = {
        "fields_missing": missing,
        "fields_null": null,
        "fields_of_another_type": other,
        "fields_unknown": unknown,
    }
    return {kind: _mask_names(names, token) for kind, names in kinds.items() if names}


def _mask_names(names: list[str], token: Secret) -> list[str]:
    """Return the names that are safe to show, and one "…" for the rest. Names come from outside and can be anything."""
    plain = token.reveal()
    safe = [
        name
        for name in names
        if re.fullmatch(r"[A-Za-z0-9_.-]{1,40}", name) and "eyJ" not in name and not (len(name) >= 8 and name in plain)
    ]
    return safe[:MOST_NAMES] + ["…"] * (len(names) > len(safe[:MOST_NAMES]))


def _texts(answer: object) -> Iterator[str]:
    """Yield every text in an answer, access tokens first, except those under "extended_token"."""
    waiting: list[Any] = [answer]
    for _ in range(MOST_PARTS):
        if not waiting:
            return
        part = waiting.pop()
        if isinstance(part, Secret):
            yield part.reveal()
        elif isinstance(part, str):
            yield part
        elif isinstance(part, bytes | bytearray):
            yield bytes(part).decode(errors="replace")
        elif (fields := _flat(part)) is not None:
            first = [fields.pop("access_token", None)]
            fields.pop("extended_token", None)
            waiting += [*fields, *fields.values(), *first]
        elif isinstance(part, list | tuple | set | frozenset):
            waiting += part
        else:
            yield from _shown_by(part)


def _shown_by(part: object) -> Iterable[str]:
    """Return the texts of an object of an unknown class, such as an HTTP response's body or an exception's message."""
    texts = []
    for tell in (lambda: getattr(part, "text", None), lambda: str(part)):
        try:
            text = tell()
        except Exception:  # This is somebody else's code.
            text = None
        if isinstance(text, str):
            texts.append(text)
    return texts
