"""Encryption at rest with AES-256-GCM and a key ring. Every ciphertext is bound to its row.

A stored token reads `v2.<key id>.<base64url of nonce, ciphertext and tag>`. The cipher also authenticates the user,
kind, expiry, generation and account of the row. So it refuses a ciphertext that was copied into another user's row or
another kind of store, and a row whose expiry or account was edited. Ciphertexts of earlier versions begin with `v1.`
and are bound to no account; they can still be read.

The limits: anyone who can write to the database can put back a whole older row, or the same user's row with the same
generation and expiry from another database of that kind under the same keys. Python cannot wipe a token from memory.
Keep the keys away from the database's backups.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Collection
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from .environment import clean, expand_home, read_variable
from .errors import ConfigurationError, KeyUnavailable, TokenRefused
from .secret_files import read_secret_file
from .token import Secret

logger = logging.getLogger(__name__)

CIPHERTEXT_VERSION = "v2"  # new ciphertexts have this version; READABLE_VERSIONS lists those that can be read
READABLE_VERSIONS = ("v1", "v2")
KEY_BYTES = 32
NONCE_BYTES = 12
# Translates between the URL-safe and the ordinary alphabet, in both directions. `binascii` knows only the ordinary one.
_OTHER_ALPHABET = bytes.maketrans(b"-_+/", b"+/-_")
DEFAULT_KEY_FILE = "~/.config/upstox_db_examples/keys"


class Binding(NamedTuple):
    """The row that a ciphertext belongs to. `expires_at` counts in whole seconds; `kind` says what it is and where."""

    user_id: str
    expires_at: datetime
    generation: int
    kind: str
    account: str | None = None

    def encode(self, key_id: str, version: str = CIPHERTEXT_VERSION) -> bytes:
        """Return these values as the bytes to authenticate."""
        user_id, expires_at, generation, kind, account = self
        # Only the user id and the account can contain a separator. They get a length prefix, so that no two bindings
        # have the same bytes.
        whose = f"{len(user_id)}:{user_id}"
        text = f"{version}|{kind}|{whose}|{key_id}|{int(expires_at.timestamp())}|{generation}"
        if version != "v1":
            text += "|-" if account is None else f"|{len(account)}:{account}"
        return text.encode()


class KeyRing:
    """The keys for tokens. The first one encrypts; all of them decrypt.

    Args:
        keys: 32 random bytes each (`KeyRing.new_key()`), newest first. Passphrases were rejected: they would need a
            slow key derivation, and a key file is the better answer.

    Raises:
        ConfigurationError: there is no key, or a key is not 32 bytes long.

    Example:
        >>> old, new = KeyRing.new_key(), KeyRing.new_key()
        >>> with SQLiteUpstoxStorage("mine.db", keys=KeyRing(old)) as mine:
        ...     result = mine.get_or_create_token("AB1234")
        >>> with SQLiteUpstoxStorage("mine.db", keys=KeyRing(new, old)) as mine:  # the first one encrypts
        ...     mine.rotate_keys()
        1
    """

    def __init__(self, *keys: bytes) -> None:
        if not keys or any(not isinstance(key, bytes) or len(key) != KEY_BYTES for key in keys):
            del keys  # A traceback that prints local variables must not show them.
            raise ConfigurationError(f"A key ring needs at least one key, and each must be {KEY_BYTES} random bytes.")
        self._ciphers = {_key_id(key): AESGCM(key) for key in keys}

    @property
    def key_ids(self) -> list[str]:
        """The key ids; the encrypting key comes first. An id is a hash of the key, so it is safe to show."""
        return list(self._ciphers)

    @staticmethod
    def new_key() -> bytes:
        """Return 32 bytes from the operating system's random source."""
        return os.urandom(KEY_BYTES)

    def encrypt(self, token: Secret, binding: Binding, version: str = CIPHERTEXT_VERSION) -> str:
        """Return the ciphertext of the token, ready to be stored.

        Args:
            version: keep the earlier version for a token that was read from such a ciphertext. Its account was not
                authenticated and must not look as if it had been.
        """
        key_id, cipher = next(iter(self._ciphers.items()))
        nonce = os.urandom(NONCE_BYTES)
        sealed = nonce + cipher.encrypt(nonce, token.reveal().encode(), binding.encode(key_id, version))
        return f"{version}.{key_id}.{base64.urlsafe_b64encode(sealed).decode()}"

    def decrypt(self, ciphertext: str, binding: Binding) -> Secret:
        """Return the token.

        Raises:
            KeyUnavailable: the ring does not have the key.
            TokenRefused: the ciphertext does not belong to this binding, was changed, or was never encrypted.
        """
        version, _, rest = ciphertext.partition(".")
        key_id, _, encode = rest.partition(".")
        if version not in READABLE_VERSIONS or not encode:
            raise TokenRefused(
                "The stored token is not properly encrypted. Log in again with 'upstox-db login' or store_token()."
            )
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            raise KeyUnavailable(key_id)
        try:
            # `binascii` takes half the time of `base64` for the same work, and every read comes through here.
            text = encode.encode().translate(_OTHER_ALPHABET)
            sealed = binascii.a2b_base64(text, strict_mode=True)
            # Accept only the one canonical spelling: the last characters can have bits that the decoder ignores.
            if binascii.b2a_base64(sealed[-(len(sealed) % 3 or 3) :], newline=False) == text[-4:]:
                plain = cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], binding.encode(key_id, version))
                return Secret(plain.decode())
        except (InvalidTag, ValueError):  # binascii.Error is a ValueError.
            pass
        raise TokenRefused(
            f"The stored token of {binding.user_id} was changed or belongs to another row. Find out who wrote to "
            "the database, then log in again with 'upstox-db login' or store_token()."
        )

    @classmethod
    def from_text(cls, text: str, source: str) -> KeyRing:
        """Read base64 keys, one per line or separated by commas. The encrypting key comes first."""
        with contextlib.suppress(binascii.Error, ValueError, ConfigurationError):
            return cls(*_decode_keys(text))
        del text  # A traceback that prints local variables must not show it.
        raise ConfigurationError(
            f"{source} holds no usable keys. It must hold one or more keys of {KEY_BYTES} random bytes in base64, "
            "separated by commas or newlines, the newest first."
        )

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> KeyRing:
        """Read the keys from a file that only its owner can read. A missing file is created with one new key.

        Raises:
            ConfigurationError: others can read the file, or it holds no usable keys.
        """
        file, failed = expand_home(path), "could not be read or made"
        try:
            if not file.exists():
                _make_key_file(file)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise ConfigurationError(f"The key file {file} {failed}: {reason}.") from error
        return cls.from_text(read_secret_file(file, "the key file", failed).reveal(), f"The key file {file}")

    @classmethod
    def default(cls, needed: Callable[[], Collection[str]] = tuple) -> KeyRing:
        """Read UPSTOX_DB_KEYS, or otherwise the file UPSTOX_DB_KEY_FILE (~/.config/upstox_db_examples/keys).

        Args:
            needed: returns the ids of the keys that the file should hold. If there are any, a missing file is not
                created, because a new key could read nothing of what is stored.

        Raises:
            ConfigurationError: as for `from_file`.
            KeyUnavailable: there is no such file, and keys are needed.
        """
        keys = Secret(read_variable("UPSTOX_DB_KEYS", any_character=True))
        if keys.reveal():
            return cls.from_text(keys.reveal(), "UPSTOX_DB_KEYS")
        file = key_file()
        # Look twice: another process may have made the file and stored a token in between.
        if _is_missing(file) and (key_ids := needed()) and _is_missing(file):
            raise _key_file_is_missing(file, *key_ids)
        return cls.from_file(file)

    def __repr__(self) -> str:
        return f"KeyRing({', '.join(self._ciphers)})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("A key ring cannot be pickled. Make one in each process.")


KeySource = KeyRing | Callable[[], KeyRing]


def key_file() -> Path:
    """Return where the key file is: UPSTOX_DB_KEY_FILE, or otherwise the default."""
    return expand_home(read_variable("UPSTOX_DB_KEY_FILE") or DEFAULT_KEY_FILE)


def _decode_keys(text: str) -> list[bytes]:
    words = text.replace("-", "+").replace("_", "/").replace(",", " ").split()
    return [base64.b64decode(clean(word), validate=True) for word in words]


def _key_id(key: bytes) -> str:
    # The id is derived and not chosen, so two different keys never share a name.
    return "k" + hashlib.sha256(b"upstox_db_examples key id" + key).hexdigest()[:8]


def _is_missing(file: Path) -> bool:
    try:
        file.stat()
    except FileNotFoundError:
        return True
    except OSError:
        pass  # `from_file` says what is wrong with it.
    return False


def _key_file_is_missing(file: Path, key_id: str, *others: str) -> KeyUnavailable:
    more = f", and under {', '.join(others)}" if others else ""
    return KeyUnavailable(
        f"There is no key file {file}. Tokens are stored under the key {key_id}, which it should hold{more}. Put the "
        "file back, or set UPSTOX_DB_KEYS. No new key was made, because it could not read them. If the key is lost, "
        "'upstox-db login' or store_token() makes a new one and logs in."
    )


def _make_key_file(file: Path) -> None:
    """Create the key file whole and private, unless another process has created it first.

    A temporary file has mode 0600 from the start, and a link fails if the name is taken. So of two processes that
    start at once, the slower one uses the other's key. A rename would replace that key.
    """
    import tempfile  # Only here: most programs never make a key.

    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
    try:
        with os.fdopen(descriptor, "wb") as temporary:
            temporary.write(base64.urlsafe_b64encode(KeyRing.new_key()) + b"\n")
            temporary.flush()
            os.fsync(temporary.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(name, file)
            logger.warning("Made a new key in %s. Back it up, and keep the backup apart from the database.", file)
    finally:
        Path(name).unlink()
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # If a power cut loses the key, every token is lost with it.
    finally:
        os.close(folder)
