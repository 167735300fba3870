"""What every store promises, whatever its database. A test class inherits this, and a class that opens the store."""

from __future__ import annotations

from .backend import BackendContract
from .logins import LoginContract
from .one_login import OneLoginContract
from .records import RecordContract
from .refusals import RefusalContract
from .renewals import RenewalContract
from .secrets import SecretContract
from .tokens import TokenContract
from .watching import WatchContract


class StoreContract(
    TokenContract,
    OneLoginContract,
    LoginContract,
    RenewalContract,
    RefusalContract,
    SecretContract,
    RecordContract,
    WatchContract,
    BackendContract,
):
    """All promises that can be tested without a crowd, a kill or a failing server."""
