"""A server whose certificate has expired."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest

from upstox_db_examples.local import certificates, servers

EXPIRED = timedelta(seconds=-1)
SOON = timedelta(seconds=4)


@contextmanager
def expired_certificates(valid_for: timedelta = EXPIRED) -> Iterator[None]:
    """Give the servers that start during this block a certificate that has expired, or one that soon will have."""
    with pytest.MonkeyPatch.context() as patch:
        make = certificates.make_certificates
        patch.setattr(servers, "make_certificates", lambda folder: make(folder, valid_for))
        yield
