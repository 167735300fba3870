"""MongoDB as a replica set of three, under a steady load, while its primary is killed."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pymongo
import pytest
from pymongo.collection import Collection
from pymongo.errors import PyMongoError

from upstox_db_examples import KeyRing, MongoUpstoxStorage, StorageError, StoreUnavailable
from upstox_db_examples.core import listener
from upstox_db_examples.local.servers import MongoDBServer

from ..support.databases import notes
from ..support.processes import made_up_login, wait_until
from ..support.stores import held
from ..support.watching import following

PASSWORD = "the key that all members share"
ELECTION_SECONDS = 2
PAUSE = 0.02  # seconds between two calls of a thread: a steady load, and time for the other tests


class Member(MongoDBServer):
    """A member of a set of three. It does not create a set of its own, and does not wait to become its primary."""

    def _password(self) -> str:
        return PASSWORD.replace(" ", "")

    def _is_ready(self) -> bool:
        with contextlib.suppress(PyMongoError), self.direct() as client:
            return bool(client.admin.command("hello")["ok"])
        return False

    def direct(self, seconds: float = 1) -> pymongo.MongoClient[Any]:
        return pymongo.MongoClient("127.0.0.1", self.port, directConnection=True, timeoutMS=1000 * seconds)

    def fetch_nothing_more(self) -> None:
        """Replicate no write of the primary that comes from now on."""
        self._set_failpoint("alwaysOn")

    def fetch_again(self) -> None:
        self._set_failpoint("off")

    def _set_failpoint(self, mode: str) -> None:
        login: Any = {"username": "root", "password": self._password(), "directConnection": True}
        with pymongo.MongoClient[Any]("127.0.0.1", self.port, **login) as client:
            client.admin.command("configureFailPoint", "stopReplProducer", mode=mode)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def is_primary(self) -> bool:
        with contextlib.suppress(PyMongoError), self.direct() as client:
            return bool(client.admin.command("hello")["isWritablePrimary"])
        return False


@pytest.fixture(scope="module")
def members() -> Iterator[list[Member]]:
    with contextlib.ExitStack() as stack:
        members = [stack.enter_context(Member(settings={"enableTestCommands": "1"})) for _ in range(3)]
        config = {
            "_id": "rs0",
            "members": [{"_id": number, "host": each.host} for number, each in enumerate(members)],
            "settings": {"electionTimeoutMillis": ELECTION_SECONDS * 1000},
        }
        with members[0].direct(seconds=30) as client:
            client.admin.command("replSetInitiate", config)
        with primary(members).direct(seconds=30) as client:
            everywhere = {"w": len(members)}  # A test logs in to each member.
            client.admin.command(
                "createUser", "root", pwd=members[0]._password(), roles=["root"], writeConcern=everywhere
            )
        yield members


def primary(members: list[Member]) -> Member:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for each in members:
            if each.is_primary():
                return each
        time.sleep(0.1)
    raise AssertionError("no member became the primary")


@pytest.fixture
def url(members: list[Member]) -> str:
    hosts = ",".join(each.host for each in members)
    return f"mongodb://root:{members[0]._password()}@{hosts}/?replicaSet=rs0&authSource=admin"


@pytest.mark.usefixtures("own_servers")
@pytest.mark.slow
def test_a_lease_that_only_a_dead_primary_knew_begins_no_login(members: list[Member], url: str, keys: KeyRing) -> None:
    user_id = "EF0001"
    options: Any = {"keys": keys, "login": made_up_login, "timeout": 15}
    with MongoUpstoxStorage(url, **options) as cut_off, MongoUpstoxStorage(url, **options) as other:
        cut_off.store_token(user_id)
        now = cut_off.backend.context.now()
        killed = primary(members)
        secondaries = [each for each in members if each is not killed]
        for each in secondaries:
            each.fetch_nothing_more()
        with cut_off.backend.lock(user_id):  # The primary takes this alone: a lease is not waited for ...
            killed.kill()
            primary(secondaries)
            for each in secondaries:
                each.fetch_again()
            with other.backend.lock(user_id):  # ... so the next primary gives it to somebody else ...
                other.backend.begin_login(user_id, user_id, now, {})
                with pytest.raises(StoreUnavailable, match="another caller took over"):
                    cut_off.backend.begin_login(user_id, user_id, now, {})  # ... and this finds out before the login.
                other.backend.end_login(user_id, in_doubt=False)
        killed.start()
        assert [entry["action"] for entry in other.get_audit_trail(user_id)] == ["login", "created", "login"]


@pytest.mark.usefixtures("own_servers")
@pytest.mark.slow
@pytest.mark.parametrize("has_lease", [True, False])
def test_a_primary_that_dies_while_a_login_begins_takes_nothing_of_it_with_it(
    members: list[Member], url: str, keys: KeyRing, monkeypatch: pytest.MonkeyPatch, has_lease: bool
) -> None:
    user_id = f"EF000{2 + has_lease}"
    options: Any = {"keys": keys, "login": made_up_login, "timeout": 15}
    with ExitStack() as stack:
        cut_off, other = (stack.enter_context(MongoUpstoxStorage(url, **options)) for _ in range(2))
        cut_off.store_token(user_id)
        now, mark = cut_off.backend.context.now(), Collection.update_one
        killed = primary(members)
        secondaries = [each for each in members if each is not killed]

        def lose_the_primary(self: Collection[Any], *arguments: Any, **more: Any) -> Any:
            if self.name == "active_tokens":
                monkeypatch.setattr(Collection, "update_one", mark)
                killed.kill()
                primary(secondaries)
                for each in secondaries:
                    each.fetch_again()
                if not has_lease:  # So the new primary gives it to somebody else.
                    stack.enter_context(other.backend.lock(user_id))
                    other.backend.begin_login(user_id, user_id, now, {})
            return mark(self, *arguments, **more)

        if not has_lease:
            for each in secondaries:
                each.fetch_nothing_more()
        with cut_off.backend.lock(user_id):
            if has_lease:
                cut_off.backend.write_note("a later write", "takes the lease along")
                for each in secondaries:
                    each.fetch_nothing_more()
            monkeypatch.setattr(Collection, "update_one", lose_the_primary)
            if has_lease:
                cut_off.backend.begin_login(user_id, user_id, now, {})
            else:
                with pytest.raises(StoreUnavailable, match="another caller took over"):
                    cut_off.backend.begin_login(user_id, user_id, now, {})
            # One login runs, and the store knows of it. Where both marked the token, it is held back meanwhile.
            assert [entry["action"] for entry in other.get_audit_trail(user_id)] == ["login", "created", "login"]
            assert other.backend.find_in_doubt(user_id) is not None
            assert bool(held(other, user_id)) is has_lease
        killed.start()


@pytest.mark.usefixtures("own_servers")
@pytest.mark.slow
def test_no_login_begins_before_a_majority_knows_of_it(members: list[Member], url: str, keys: KeyRing) -> None:
    first = primary(members)
    secondaries = [each for each in members if each is not first]
    options: Any = {"keys": keys, "login": made_up_login}
    with (
        MongoUpstoxStorage(url, timeout=15, **options) as store,
        MongoUpstoxStorage(url, timeout=1, **options) as hasty,
    ):
        store.store_token("EF0004")
        now = store.backend.context.now()
        for each in secondaries:
            each.fetch_nothing_more()
        try:
            for user_id in ("EF0004", "EF0005"):  # EF0005 has no token that could get a mark.
                with pytest.raises(StoreUnavailable), hasty.backend.lock(user_id):
                    hasty.backend.begin_login(user_id, user_id, now, {})
        finally:
            for each in secondaries:
                each.fetch_again()


@pytest.mark.usefixtures("own_servers")
@pytest.mark.slow
def test_a_killed_primary_loses_nothing_that_was_acknowledged(
    members: list[Member], url: str, keys: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = ["CD0001", "CD0002", "CD0003"]
    acknowledged: dict[str, list[str]] = {user_id: [] for user_id in users}
    stalls: list[float] = []
    stale = errors = reads = 0
    stop = threading.Event()

    def keep_storing(user_id: str) -> None:
        nonlocal errors
        while not stop.wait(PAUSE):
            begin = time.monotonic()
            try:
                acknowledged[user_id].append(store.store_token(user_id)["token_id"])
            except StorageError:
                errors += 1
            stalls.append(time.monotonic() - begin)

    def keep_reading(user_id: str) -> None:
        nonlocal stale, errors, reads
        while not stop.wait(PAUSE):
            known = len(acknowledged[user_id])
            begin = time.monotonic()
            try:
                result = store.get_valid_token(user_id)
            except StorageError:
                errors += 1
            else:
                # A read must return the last token that was acknowledged before it, or a later one.
                reads += 1
                earlier = acknowledged[user_id][: known - 1] if known else []
                stale += known > 0 and (result is None or result["token_id"] in earlier)
            stalls.append(time.monotonic() - begin)

    monkeypatch.setattr(listener, "POLL", 1000)  # The new primary has to tell.
    with MongoUpstoxStorage(url, keys=keys, login=made_up_login, timeout=15) as store, ExitStack() as watches:
        all_followed = {user_id: watches.enter_context(following(store, user_id)) for user_id in users}
        with ThreadPoolExecutor(6) as threads:
            running = [threads.submit(job, user_id) for user_id in users for job in (keep_storing, keep_reading)]
            try:
                for _ in range(2):
                    time.sleep(2)
                    killed = primary(members)
                    killed.kill()
                    primary([each for each in members if each is not killed])
                    time.sleep(2)
                    killed.start()
                time.sleep(2)
            finally:
                stop.set()
            for each in running:
                each.result()
        for user_id, followed in all_followed.items():
            newest = held(store, user_id)
            wait_until(lambda followed=followed, newest=newest: followed.token() == newest)  # type: ignore[misc]
            history = {row["token_id"]: row for row in store.get_token_history(user_id, limit=100_000)}
            assert set(acknowledged[user_id]) <= set(history), "an acknowledged token is lost"
            (active,) = [token_id for token_id, row in history.items() if row["is_active"]]
            newest_first = list(history)
            assert newest_first.index(active) <= newest_first.index(acknowledged[user_id][-1])
        with pymongo.MongoClient[Any](url) as client:
            assert client.upstox_db.active_tokens.count_documents({"_id": {"$in": users}}) == len(users)
    assert stale == 0
    assert min(map(len, acknowledged.values())) > 20
    assert max(stalls) < 15
    stored = sum(map(len, acknowledged.values()))
    notes.append(
        f"MongoDB, the primary killed twice under load: longest stall {max(stalls):.1f} s, {errors} errors; "
        f"{stored} stored, {reads} read, none lost"
    )
