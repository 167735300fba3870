"""PostgreSQL: crowds, kills, and a server that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from upstox_db_examples import (
    PostgreSQLUpstoxStorage,
    TokenStorage,
)
from upstox_db_examples.local.servers import PostgreSQLServer

from ..contracts.reliability import ReliabilityContract
from ..contracts.server import ServerContract
from ..support.postgresql import counting
from ..support.processes import Address
from ..support.stores import Counts


class TestPostgreSQLUnderCrowdsAndKills(ReliabilityContract):
    # Each of 32 processes has a connection of its pool and one for a lock. A server accepts a hundred of them.
    in_a_crowd = {"pool_size": 1, "timeout": 60.0}

    @pytest.fixture
    def address(self, postgres_url: str) -> Address:
        PostgreSQLUpstoxStorage(postgres_url).close()
        return Address("upstox_db_examples:PostgreSQLUpstoxStorage", (postgres_url,))

    @pytest.fixture
    def count(self, postgres_url: str) -> Iterator[Callable[[], Counts]]:
        with counting(postgres_url) as count:
            yield count


class TestAServerThatFails(ServerContract):
    kind, name = PostgreSQLServer, "postgresql"

    def connect(self, url: str, **options: Any) -> TokenStorage:
        return PostgreSQLUpstoxStorage(url, **options)
