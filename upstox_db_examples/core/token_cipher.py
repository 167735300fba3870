"""Encrypts and decrypts the tokens of one store."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import NamedTuple

from .cipher import CIPHERTEXT_VERSION, READABLE_VERSIONS, Binding, KeyRing, KeySource
from .errors import ConfigurationError, KeyUnavailable, TokenRefused
from .token import Secret, StoredToken

logger = logging.getLogger(__name__)


class Encrypted(NamedTuple):
    """A ciphertext, and the id of the key that encrypted it."""

    ciphertext: str
    key_id: str


class TokenCipher:
    """The key ring of a store, and the kind of store that its ciphertexts are bound to.

    Args:
        keys: a key ring, or a callable that returns one; None for `KeyRing.default`.
        store_kind: see `Backend.store_kind`.
        in_use: returns the ids of the keys that the store's working tokens are under. If there are any, the default
            makes no new key.
    """

    def __init__(self, keys: KeySource | None, store_kind: str, in_use: Callable[[], Collection[str]] = tuple) -> None:
        self._keys, self._store_kind, self._in_use = keys, store_kind, in_use
        self._ring: KeyRing | None = None

    @property
    def ring(self) -> KeyRing:
        """The key ring. It is loaded on first use, because history, audit and cleanup need no key."""
        if (ring := self._ring) is None:
            ring = self._ring = self._load(self._in_use)
        return ring

    def ring_with(self, key_id: str) -> KeyRing:
        """Return the key ring, to read something that comes from outside the store and is under this key.

        Raises:
            KeyUnavailable: there is no key file. None is made.
        """
        if (ring := self._ring) is None:
            ring = self._ring = self._load(lambda: [key_id])
        return ring

    def ring_for_login(self, *, deliberate: bool) -> KeyRing:
        """Return the key ring before a login.

        Args:
            deliberate: somebody wants this login, whatever is stored. So a missing key file is made: it may be lost.
        """
        if (ring := self._ring) is None:
            ring = self._ring = self._load(tuple if deliberate else self._in_use)
        return ring

    def reload(self) -> None:
        """Load the key ring again before the next use: a long-running program picks up new keys here."""
        self._ring = None

    def with_fresh_keys(self) -> TokenCipher:
        """Load the key ring again, for others too, and return a cipher that keeps this ring."""
        ring = self._ring = self._load(self._in_use)
        return TokenCipher(ring, self._store_kind)

    def _load(self, needed: Callable[[], Collection[str]]) -> KeyRing:
        if self._keys is None:
            return KeyRing.default(needed)
        ring = self._keys() if callable(self._keys) else self._keys
        if isinstance(ring, KeyRing):
            return ring
        kind = type(ring).__name__
        del ring  # A traceback that prints local variables must not show a key.
        raise ConfigurationError(f"The callable given as keys must return a KeyRing, and not {kind}.")

    def bind(self, token: StoredToken, store_kind: str | None = None) -> Binding:
        """Return what the ciphertext of this token is bound to."""
        return Binding(token.user_id, token.expires_at, token.generation, store_kind or self._store_kind, token.account)

    def encrypt(self, secret: Secret, binding: Binding, version: str = CIPHERTEXT_VERSION) -> Encrypted:
        """Encrypt a token under the ring's first key."""
        ciphertext = self.ring.encrypt(secret, binding, version)
        # Not the ring's first key: another thread may have loaded other keys since.
        return Encrypted(ciphertext, ciphertext.split(".")[1])

    def replace_ciphertext(self, token: StoredToken, secret: Secret) -> StoredToken:
        """Return this token with the secret encrypted anew. A ciphertext of an earlier version keeps that version."""
        earlier = token.ciphertext.partition(".")[0]
        version = earlier if earlier in READABLE_VERSIONS else CIPHERTEXT_VERSION
        return replace(token, **self.encrypt(secret, self.bind(token), version)._asdict())

    def decrypt(self, token: StoredToken, store_kind: str | None = None) -> Secret:
        """Decrypt the token.

        Args:
            store_kind: the kind of the store that the token comes from, if that is another store.

        Raises:
            KeyUnavailable: the ring does not have the key.
            TokenRefused: the ciphertext does not belong to this row, was changed, or was never encrypted.
        """
        binding, ring = self.bind(token, store_kind), self.ring
        try:
            return ring.decrypt(token.ciphertext, binding)
        except KeyUnavailable as error:
            # A long-running program picks up a newly added key here.
            logger.info("Key %s is not in the key ring. Loading the keys again", error.key_id)
            try:
                self._ring = self._load(self._in_use)
            except Exception as failed:  # The ring at hand still reads the other tokens.
                logger.warning("The keys could not be loaded again (%s)", type(failed).__name__)
                raise error from failed
            return self.ring.decrypt(token.ciphertext, binding)

    def is_of(self, stored: StoredToken, token: Secret) -> bool:
        """Return whether this is the stored token. The comparison takes constant time."""
        if not stored.ciphertext:
            return False
        try:
            kept = self.decrypt(stored).reveal().encode()
        except (KeyUnavailable, TokenRefused):
            return False
        return hmac.compare_digest(kept, token.reveal().encode())
