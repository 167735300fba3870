"""Keep a token that no database accepted in an encrypted file. Until the store is back, nothing else holds it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .core.cipher import Binding, KeyRing, key_file
from .core.environment import expand_home
from .core.errors import ConfigurationError, InvalidInput, StorageError, StoreUnavailable
from .core.token import Secret
from .core.token_cipher import TokenCipher

FORMAT = "upstox_db_examples token, version 1"
PLACE = Binding("token file", datetime(1970, 1, 1, tzinfo=UTC), 0, "token file")


def write_token_file(token: Secret, user_id: str | None, ring: KeyRing) -> Path:
    """Write the token, encrypted under the ring's first key, into a new file of mode 0600.

    The file goes beside the key file, or into the temporary folder if that fails: the full disk may be the database's.

    Raises:
        StoreUnavailable: no file could be written anywhere.
    """
    response = {"access_token": token.reveal()} | ({"user_id": user_id} if user_id else {})
    sealed = ring.encrypt(Secret(json.dumps(response)), PLACE)
    del response  # A traceback that prints local variables must not show it.
    name = f"unsaved-{user_id or 'token'}-{secrets.token_hex(4)}.token"
    why = "there is no such folder"
    for folder in _folders():
        try:
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(f"{FORMAT}\n{sealed}\n")
                file.flush()
                os.fsync(file.fileno())
            return folder / name
        except OSError as error:
            why = error.strerror or type(error).__name__
            (folder / name).unlink(missing_ok=True)
    raise StoreUnavailable(f"The token could not be saved in a file beside the keys or in the temporary folder: {why}.")


def _folders() -> Iterator[Path]:
    with contextlib.suppress(StorageError):  # There may be no home folder, if the keys come from elsewhere.
        yield key_file().parent
    with contextlib.suppress(OSError):
        yield Path(tempfile.gettempdir())


def read_token_file(path: Path, cipher: TokenCipher) -> dict[str, Any]:
    """Read a file of `write_token_file` and return a response for `save_token`.

    Raises:
        InvalidInput: the file was not written by `write_token_file`.
        ConfigurationError: the file cannot be read.
        KeyUnavailable, TokenRefused: the key is missing, or the file was changed.
    """
    path = expand_home(path)
    try:
        # Reading a FIFO that nobody writes to would block for ever.
        content = path.read_bytes()[:100_000] if path.is_file() or not path.exists() else b""
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}.") from error
    lines = content.decode("ascii", errors="replace").splitlines()
    if len(lines) != 2 or lines[0] != FORMAT:
        raise InvalidInput(f"{path} is not a file that 'upstox-db login' wrote for a token.")
    sealed = lines[1]
    ring = cipher.ring_with(sealed.partition(".")[2].partition(".")[0])
    response: dict[str, Any] = json.loads(ring.decrypt(sealed, PLACE).reveal())
    return {**response, "access_token": Secret(response["access_token"])}
