"""What every store promises, whatever its database. A store's tests inherit it, and a class that opens their store."""

from __future__ import annotations

from .backend import BackendContract
from .logins import LoginContract
from .one_login import OneLoginContract
from .records import RecordContract
from .refusals import RefusalContract
from .renewals import RenewalContract
from .secrets import SecretContract
from .tokens import TokenContract


class StoreContract(
    TokenContract,
    OneLoginContract,
    LoginContract,
    RenewalContract,
    RefusalContract,
    SecretContract,
    RecordContract,
    BackendContract,
):
    """All promises that need no crowd, no kill and no server that fails."""
