"""Encryption at rest: AES-256-GCM, a key ring, and every ciphertext bound to its row.

A stored token reads `v2.<key id>.<base64url of nonce, ciphertext and tag>`. The row's user, the token's kind, its
expiry, its generation and the account that made it are authenticated with it, so that a ciphertext copied into another
user's row or another kind of store, or a row whose expiry or account was edited, is refused. Ciphertexts of earlier
programs begin with `v1.` and are bound to no account; they are still read.

What this does not do: whoever can write the database can put back a whole older row, or the same user's row of the
same generation and expiry from another database of that kind under the same keys. Python cannot wipe a token from
memory. Keep the keys where the database's backups are not.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import logging
import os
import shlex
import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from .errors import ConfigurationError, KeyUnavailable, TokenRefused
from .token import Secret

logger = logging.getLogger(__name__)

VERSION = "v2"  # what is written; READABLE is what is read
READABLE = ("v1", "v2")
KEY_BYTES = 32
NONCE_BYTES = 12
# Makes the URL-safe alphabet the ordinary one and the reverse, which `binascii` alone does not know.
_OTHER_ALPHABET = bytes.maketrans(b"-_+/", b"+/-_")
DEFAULT_KEY_FILE = "~/.config/upstox_db_examples/keys"


class Binding(NamedTuple):
    """What a ciphertext belongs to. `expires_at` counts in whole seconds; `kind` says what it is and where it lies."""

    user_id: str
    expires_at: datetime
    generation: int
    kind: str
    account: str | None = None

    def encoded(self, key_id: str, version: str = VERSION) -> bytes:
        """These values as the bytes that are authenticated."""
        user_id, expires_at, generation, kind, account = self
        # Only user id and account can hold a separator, so their length stands before them: no two bindings are the
        # same bytes.
        whose = f"{len(user_id)}:{user_id}"
        text = f"{version}|{kind}|{whose}|{key_id}|{int(expires_at.timestamp())}|{generation}"
        if version != "v1":
            text += "|-" if account is None else f"|{len(account)}:{account}"
        return text.encode()


class KeyRing:
    """The keys by which tokens are encrypted and read. The first one encrypts; all of them decrypt.

    Args:
        keys: 32 random bytes each (`KeyRing.new_key()`), the newest first. Not passphrases: those would need a
            slow key derivation, and a key file is the better answer.

    Raises:
        ConfigurationError: no key, or one that is not 32 bytes.
    """

    def __init__(self, *keys: bytes) -> None:
        if not keys or any(not isinstance(key, bytes) or len(key) != KEY_BYTES for key in keys):
            del keys  # A traceback that prints local variables must not show them.
            raise ConfigurationError(f"A key ring needs at least one key, each of {KEY_BYTES} random bytes.")
        self._ciphers = {_key_id(key): AESGCM(key) for key in keys}

    @property
    def key_ids(self) -> list[str]:
        """The ids of the keys, the encrypting one first. An id is a hash of its key: it can be shown."""
        return list(self._ciphers)

    @staticmethod
    def new_key() -> bytes:
        """32 bytes from the operating system's random source."""
        return os.urandom(KEY_BYTES)

    def encrypt(self, token: Secret, binding: Binding, version: str = VERSION) -> str:
        """The token as it may lie in a database.

        Args:
            version: an earlier one for a token that was read from a ciphertext of that version. Its account was not
                authenticated, and must not come to look as if it had been.
        """
        key_id, cipher = next(iter(self._ciphers.items()))
        nonce = os.urandom(NONCE_BYTES)
        sealed = nonce + cipher.encrypt(nonce, token.reveal().encode(), binding.encoded(key_id, version))
        return f"{version}.{key_id}.{base64.urlsafe_b64encode(sealed).decode()}"

    def decrypt(self, ciphertext: str, binding: Binding) -> Secret:
        """The token.

        Raises:
            KeyUnavailable: its key is not in this ring.
            TokenRefused: it does not belong to this binding, was changed, or was never encrypted.
        """
        version, _, rest = ciphertext.partition(".")
        key_id, _, encoded = rest.partition(".")
        if version not in READABLE or not encoded:
            raise TokenRefused("The stored token is not encrypted as it should be. Log in again with store_token().")
        if key_id not in self._ciphers:
            raise KeyUnavailable(key_id)
        try:
            # `binascii` and not `base64`, which does the same in twice the time: every read comes by here.
            text = encoded.encode().translate(_OTHER_ALPHABET)
            sealed = binascii.a2b_base64(text)
            # A loose decoder skips foreign characters: only the one canonical spelling is taken.
            if binascii.b2a_base64(sealed, newline=False) == text:
                nonce, body = sealed[:NONCE_BYTES], sealed[NONCE_BYTES:]
                return Secret(self._ciphers[key_id].decrypt(nonce, body, binding.encoded(key_id, version)).decode())
        except (InvalidTag, ValueError):  # binascii.Error is a ValueError.
            pass
        raise TokenRefused(
            f"The stored token of {binding.user_id} was changed or belongs to another row. Find out who wrote to "
            "the database, then log in again with store_token()."
        )

    @classmethod
    def from_text(cls, text: str, source: str) -> KeyRing:
        """Keys in base64, one a line or separated by commas, the encrypting one first."""
        with contextlib.suppress(binascii.Error, ValueError, ConfigurationError):
            return cls(*_decoded(text))
        del text  # A traceback that prints local variables must not show it.
        raise ConfigurationError(
            f"{source} holds no usable keys. Expected: one or more keys of {KEY_BYTES} random bytes in base64, "
            "separated by commas or line ends, the newest first."
        )

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> KeyRing:
        """The keys of a file that only its owner can read; made with one new key if it is not there.

        Raises:
            ConfigurationError: others can read it, or it holds no usable keys.
        """
        file = Path(path).expanduser()
        try:
            if not file.exists():
                _make_key_file(file)
            with file.open() as opened:
                if os.fstat(opened.fileno()).st_mode & 0o077:
                    raise ConfigurationError(
                        f"Others can read the key file {file}. Run: chmod 600 {shlex.quote(str(file))}"
                    )
                return cls.from_text(opened.read(), f"The key file {file}")
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise ConfigurationError(f"The key file {file} could not be read or made: {reason}.") from error

    @classmethod
    def default(cls) -> KeyRing:
        """From UPSTOX_DB_KEYS, else from the file UPSTOX_DB_KEY_FILE, by default ~/.config/upstox_db_examples/keys."""
        if os.environ.get("UPSTOX_DB_KEYS"):
            return cls.from_text(os.environ["UPSTOX_DB_KEYS"], "UPSTOX_DB_KEYS")
        return cls.from_file(os.environ.get("UPSTOX_DB_KEY_FILE") or DEFAULT_KEY_FILE)

    def __repr__(self) -> str:
        return f"KeyRing({', '.join(self._ciphers)})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("A key ring is not pickled. Make one in each process.")


KeySource = KeyRing | Callable[[], KeyRing]


def _decoded(text: str) -> list[bytes]:
    words = text.replace("-", "+").replace("_", "/").replace(",", " ").split()
    return [base64.b64decode(word, validate=True) for word in words]


def _key_id(key: bytes) -> str:
    # Derived and not chosen: two different keys can never go by the same name.
    return "k" + hashlib.sha256(b"upstox_db_examples key id" + key).hexdigest()[:8]


def _make_key_file(file: Path) -> None:
    """Make the file whole and private, or find that another process has.

    A temporary file has mode 0600 from its first moment, and a link fails where the name is taken: of two
    processes that come at once the slower one takes the other's key. Renaming would replace it.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
    try:
        with os.fdopen(descriptor, "wb") as temporary:
            temporary.write(base64.urlsafe_b64encode(KeyRing.new_key()) + b"\n")
            temporary.flush()
            os.fsync(temporary.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(name, file)
            logger.warning("Made a new key in %s. Back it up, apart from the database.", file)
    finally:
        Path(name).unlink()
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # A key that is lost in a power cut takes every token with it.
    finally:
        os.close(folder)
