"""Keep a token that no database accepted in an encrypted file. Until the store is back, nothing else holds it."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .core.cipher import DEFAULT_KEY_FILE, Binding, KeyRing
from .core.errors import ConfigurationError, InvalidInput, StoreUnavailable
from .core.token import Secret

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
    keys = Path(os.environ.get("UPSTOX_DB_KEY_FILE") or DEFAULT_KEY_FILE).expanduser().parent
    name = f"unsaved-{user_id or 'token'}-{secrets.token_hex(4)}.token"
    why = ""
    for folder in (keys, Path(tempfile.gettempdir())):
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


def read_token_file(path: Path, ring: KeyRing) -> dict[str, Any]:
    """Read a file of `write_token_file` and return a response for `save_token`.

    Raises:
        InvalidInput: the file was not written by `write_token_file`.
        ConfigurationError: the file cannot be read.
        KeyUnavailable, TokenRefused: the ring lacks the key, or the file was changed.
    """
    try:
        lines = path.read_bytes()[:100_000].decode("ascii", errors="replace").splitlines()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}.") from error
    if len(lines) != 2 or lines[0] != FORMAT:
        raise InvalidInput(f"{path} is not a file that 'upstox-db login' wrote for a token.")
    response: dict[str, Any] = json.loads(ring.decrypt(lines[1], PLACE).reveal())
    return {**response, "access_token": Secret(response["access_token"])}
