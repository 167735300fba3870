"""The guide's five usage blocks run unchanged, except for host, port and URL."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from upstox_db_examples.local.servers import MongoDBServer, RedisServer
from upstox_db_examples.local.upstox import Account, LocalUpstox

from ..support.project import run

GUIDE_USAGE_SQLITE = """
storage = SQLiteUpstoxStorage()

# Store new token
result = storage.store_token()
print(f"Stored token for user: {result['user_id']}")

# Get valid token
token_info = storage.get_valid_token(result['user_id'])
if token_info:
    print(f"Valid token found: {token_info['token'][:20]}...")

# Get history
history = storage.get_token_history(result['user_id'])
print(f"Token history: {len(history)} entries")
"""


GUIDE_USAGE_POSTGRESQL = """
storage = PostgreSQLUpstoxStorage("postgresql://user:password@localhost/upstox_db")

# Store token
result = storage.store_token()
print(f"Token stored with ID: {result['token_id']}")

# Get statistics
stats = storage.get_user_statistics(result['user_id'])
print(f"User statistics: {stats}")
"""

GUIDE_USAGE_POOLED = """
pooled_storage = PooledUpstoxStorage("upstox_pooled.db", pool_size=10)

# Batch token generation
user_ids = ["user1", "user2", "user3"]
results = pooled_storage.store_token_batch(user_ids)
print(f"Batch results: {results}")
"""


GUIDE_USAGE_MONGODB = """
storage = MongoUpstoxStorage("mongodb://localhost:27017/")

# Store token
result = storage.store_token()
print(f"Token stored: {result}")

# Get user dashboard
dashboard = storage.get_user_dashboard(result['user_id'])
print(f"User dashboard: {dashboard}")
"""

GUIDE_USAGE_HYBRID = """
storage = HybridUpstoxStorage(
    redis_config={"host": "localhost", "port": 6379, "db": 0},
    postgres_config="postgresql://user:password@localhost/upstox_db"
)

# Store token
result = storage.store_token()
print(f"Token stored in hybrid storage: {result}")

# Get storage status
status = storage.get_storage_status()
print(f"Storage status: {status}")
"""


def test_the_guides_usage_of_sqlite_runs_as_it_stands(tmp_path: Path) -> None:
    with LocalUpstox() as upstox:
        account: Account = upstox.add_account("AB1234")
        code = "from upstox_db_examples import SQLiteUpstoxStorage\n" + GUIDE_USAGE_SQLITE
        done = run(code, tmp_path, **account.environ(), UPSTOX_BASE_DOMAIN=upstox.base_domain)
    assert done.stderr == ""
    assert done.returncode == 0
    first, second, third = done.stdout.splitlines()
    assert first == "Stored token for user: AB1234"
    assert re.fullmatch(r"Valid token found: eyJ[\w-]{17}\.\.\.", second)
    assert third == "Token history: 1 entries"
    assert (tmp_path / "upstox.db").exists()


def test_the_guides_usage_of_postgresql_runs_as_it_stands_but_for_the_url(tmp_path: Path, postgres_url: str) -> None:
    with LocalUpstox() as upstox:
        environment = {**upstox.add_account("AB1234").environ(), "UPSTOX_BASE_DOMAIN": upstox.base_domain}
        usage = GUIDE_USAGE_POSTGRESQL.replace("postgresql://user:password@localhost/upstox_db", postgres_url)
        done = run("from upstox_db_examples import PostgreSQLUpstoxStorage\n" + usage, tmp_path, **environment)
    assert done.stderr == ""
    assert done.returncode == 0
    assert re.fullmatch(
        r"Token stored with ID: 1\nUser statistics: \{'total_tokens': 1, 'active_tokens': 1, 'total_usage': 0, .*\}\n",
        done.stdout,
    )


def test_the_guides_usage_of_the_pool_runs_as_it_stands(tmp_path: Path) -> None:
    with LocalUpstox() as upstox:
        one_account = {**upstox.add_account("user1").environ(), "UPSTOX_BASE_DOMAIN": upstox.base_domain}
        usage = "from upstox_db_examples import PooledUpstoxStorage\n" + GUIDE_USAGE_POOLED
        unknown = run(usage, tmp_path, **one_account)
        assert unknown.stdout.count("'success': False") == 3
        assert upstox.attempts() == 0, "one account's credentials must not be tried for three users"
        named = run(usage, tmp_path, **one_account, UPSTOX_USER_ID="user1")
        assert upstox.attempts() == upstox.logins("user1") == 1
    for done in (unknown, named):
        assert done.returncode == 0
        assert re.fullmatch(r"(\r|Accounts: .*|\n)*", done.stderr), "stderr has only the progress bar"
    assert re.fullmatch(
        r"Batch results: \[\{'user_id': 'user1', 'token_id': 1, 'success': True, .*\}, "
        r"\{'user_id': 'user2', 'success': False, .*\}, \{'user_id': 'user3', 'success': False, .*\}\]\n",
        named.stdout,
    )


def test_a_pool_needs_no_progress_bar(tmp_path: Path) -> None:
    code = "import sys; sys.modules['tqdm'] = sys.modules['tqdm.auto'] = None\n"
    code += "from upstox_db_examples import PooledUpstoxStorage as P; print(P('x.db').store_token_batch(['AB1234']))"
    assert "'success': False" in run(code, tmp_path).stdout


@pytest.mark.usefixtures("own_servers")  # The guide names no database, and the default one may be in use.
def test_the_guides_usage_of_mongodb_runs_as_it_stands_but_for_the_url(tmp_path: Path) -> None:
    with LocalUpstox() as upstox, MongoDBServer() as server:
        environment = {**upstox.add_account("AB1234").environ(), "UPSTOX_BASE_DOMAIN": upstox.base_domain}
        usage = GUIDE_USAGE_MONGODB.replace("mongodb://localhost:27017/", server.url)
        done = run("from upstox_db_examples import MongoUpstoxStorage\n" + usage, tmp_path, **environment)
    assert done.stderr == ""
    assert done.returncode == 0
    stored, dashboard = done.stdout.splitlines()
    assert re.match(r"Token stored: \{'token': eyJ0…\(\d+ chars\), 'user_id': 'AB1234', ", stored)
    assert re.match(r"User dashboard: \{'user_id': 'AB1234', 'statistics': \{'total_tokens': \d+, ", dashboard)
    assert "'active_token': {'exists': True, " in dashboard
    assert "eyJ0eX" not in done.stdout


@pytest.mark.usefixtures("own_servers")
def test_the_guides_usage_of_the_hybrid_runs_as_it_stands_but_for_host_port_and_url(
    tmp_path: Path, postgres_url: str
) -> None:
    with LocalUpstox() as upstox, RedisServer() as redis:
        environment = {**upstox.add_account("AB1234").environ(), "UPSTOX_BASE_DOMAIN": upstox.base_domain}
        parts = urlsplit(redis.url)
        usage = GUIDE_USAGE_HYBRID.replace("postgresql://user:password@localhost/upstox_db", postgres_url)
        usage = usage.replace('"port": 6379', f'"port": {parts.port}, "password": "{parts.password}"')
        done = run("from upstox_db_examples import HybridUpstoxStorage\n" + usage, tmp_path, **environment)
    assert done.stderr == ""
    assert done.returncode == 0
    stored, status = done.stdout.splitlines()
    assert re.fullmatch(r"Token stored in hybrid storage: \{'token': eyJ0…\(\d+ chars\), .*\}", stored)
    assert status.startswith("Storage status: {'redis': 'healthy', 'postgresql': 'healthy', ")
