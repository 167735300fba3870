"""What the fork server imports, so that no process of a test has to: the drivers, the SDK, and modules with jobs.

Some of these packages import a module only when it is used. A process that is killed after 50 ms should not spend half
of them on imports.
"""

from __future__ import annotations

import gc

import dotenv
import pymongo.saslprep
import pymongo.synchronous.auth_aws
import pymongo.synchronous.auth_oidc
import upstox_totp._api.app_token

from upstox_db_examples import hybrid, mongodb, postgresql

from . import every_step, minimal, naive, processes

__all__ = [
    "dotenv",
    "every_step",
    "hybrid",
    "minimal",
    "mongodb",
    "naive",
    "postgresql",
    "processes",
    "pymongo",
    "upstox_totp",
]

# A collection in a forked process then leaves these hundred thousands of objects alone, and copies none of their pages.
gc.collect()
gc.freeze()
