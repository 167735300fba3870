"""StoredTokenAuth with httpx, synchronous and asynchronous, and with requests, on every store."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import requests

from upstox_db_examples import (
    AsyncTokenStorage,
    InvalidInput,
    LoginInterrupted,
    LoginLimited,
    SdkLogin,
    Secret,
    SQLiteUpstoxStorage,
    StoredTokenAuth,
    TokenNotStored,
    TokenResult,
    TokenStorage,
)
from upstox_db_examples.local.upstox import Account, LocalUpstox
from upstox_db_examples.local.web import Answer, Shown, WebServer

from ..support.clocks import Clock
from ..support.leaks import shown_with_locals
from ..support.loops import BACKENDS, WAYS_TO_CANCEL, HeldLogin, at_once, drivers_seen_here, run
from ..support.processes import KEY, USER, Address, token_data
from ..support.project import run as run_code
from ..support.stores import held, opening

CROWD = 32
HERE = {"127.0.0.1"}
REFUSAL = {"status": "error", "errors": [{"errorCode": "UDAPI100050", "message": "Invalid token used to access API"}]}
Open = Callable[..., TokenStorage]


@pytest.fixture
def open_each(each_address: Address, upstox: LocalUpstox, account: Account, clock: Clock) -> Iterator[Open]:
    login = SdkLogin(account.credentials(), base_domain=upstox.base_domain)
    options = {"login": login, "clock": clock, "actor": "tests", **each_address.counting()}
    with opening(each_address.open, **options) as open_one:
        yield open_one


@pytest.fixture
def open_sqlite(tmp_path: Path, upstox: LocalUpstox, account: Account, clock: Clock) -> Iterator[Open]:
    login = SdkLogin(account.credentials(), base_domain=upstox.base_domain)
    options: dict[str, Any] = {"keys": KEY, "login": login, "clock": clock, "actor": "tests", "audit_reads": True}
    with opening(partial(SQLiteUpstoxStorage, tmp_path / "upstox.db"), **options) as open_one:
        yield open_one


@pytest.fixture
def store(open_sqlite: Open) -> TokenStorage:
    return open_sqlite(renew_pause=0.001)


class Sent(NamedTuple):
    status: int
    earlier: list[int]
    """The statuses of the answers before it."""


# Over http nothing is verified, and without certificates to read a client takes a hundredth of the time.
PLAIN: dict[str, Any] = {"verify": False, "trust_env": False}


def with_httpx(method: str, url: str, auth: Any) -> Sent:
    with httpx.Client(auth=auth, follow_redirects=True, **PLAIN) as client:
        answer = client.request(method, url)
    return Sent(answer.status_code, [each.status_code for each in answer.history])


def with_async_httpx(method: str, url: str, auth: Any, backend: str = "asyncio") -> Sent:
    async def main() -> Sent:
        async with httpx.AsyncClient(auth=auth, follow_redirects=True, **PLAIN) as client:
            answer = await client.request(method, url)
        return Sent(answer.status_code, [each.status_code for each in answer.history])

    return run(backend, main)


def with_requests(method: str, url: str, auth: Any) -> Sent:
    with requests.Session() as session:
        session.auth, session.trust_env = auth, False
        answer = session.request(method, url, timeout=10)
    return Sent(answer.status_code, [each.status_code for each in answer.history])


WAYS = (with_httpx, with_async_httpx, partial(with_async_httpx, backend="trio"), with_requests)
each_way = pytest.mark.parametrize("send", WAYS, ids=["httpx", "asyncio", "trio", "requests"])


def profile(upstox: LocalUpstox) -> str:
    return f"{upstox.base_domain.format(stage='api')}/v2/user/profile"


def order(upstox: LocalUpstox) -> str:
    return f"{upstox.base_domain.format(stage='api')}/v3/order/place"


def uses(store: TokenStorage) -> int:
    """Return how often a token was handed out by this store, by its own count."""
    return int(store.get_user_statistics(USER)["total_usage"])


# Every store


def test_a_crowd_whose_token_is_refused_makes_one_login_and_each_gets_its_answer(
    open_each: Open, upstox: LocalUpstox
) -> None:
    store = open_each(renew_pause=0.001)
    upstox.login_seconds = 0.3
    auth = StoredTokenAuth(store, USER, hosts=HERE)
    assert with_httpx("GET", profile(upstox), auth) == Sent(200, [])

    def in_threads(get: Callable[[str], httpx.Response | requests.Response]) -> None:
        upstox.kill_token(USER)
        together = threading.Barrier(CROWD)

        def one(_: int) -> tuple[int, int]:
            together.wait()
            answer = get(profile(upstox))
            return answer.status_code, len(answer.history)

        with ThreadPoolExecutor(CROWD) as threads:
            answers = list(threads.map(one, range(CROWD)))
        assert {status for status, _ in answers} == {200}
        assert sum(refused for _, refused in answers) > 1, "several must have been refused at once"

    async def in_tasks() -> None:
        upstox.kill_token(USER)
        async with httpx.AsyncClient(auth=auth, **PLAIN) as client:
            with drivers_seen_here() as seen:
                answers = await at_once(CROWD, partial(client.get, profile(upstox)))
        assert {answer.status_code for answer in answers} == {200}
        assert seen == set(), "the store must not be used in the event loop's thread"

    with httpx.Client(auth=auth, **PLAIN) as client:
        in_threads(client.get)
    assert upstox.logins() == 2
    in_threads(partial(requests.get, auth=auth, timeout=30))
    assert upstox.logins() == 3
    for number, backend in enumerate(BACKENDS):
        run(backend, in_tasks)
        assert upstox.logins() == 4 + number


def test_the_store_is_read_once_until_shortly_before_the_expiry(
    open_each: Open, upstox: LocalUpstox, clock: Clock
) -> None:
    store = open_each()
    auth = StoredTokenAuth(store, USER, hosts=HERE)
    store.store_token(USER)

    def get() -> None:
        with ThreadPoolExecutor(4) as threads:
            for sent in threads.map(lambda send: send("GET", profile(upstox), auth), WAYS):
                assert sent == Sent(200, [])

    get()
    clock.set(7, 3, 28)
    get()
    assert (uses(store), upstox.logins()) == (1, 1)
    clock.set(7, 3, 29, 30)
    get()
    assert (uses(store), upstox.logins()) == (2, 1), "in the last minute, the token is looked up again, and is the same"
    clock.set(7, 3, 30)
    get()
    assert upstox.logins() == 2


# What is sent again


@each_way
def test_get_and_head_are_sent_again_and_an_order_only_if_that_was_asked_for(
    store: TokenStorage, upstox: LocalUpstox, send: Any
) -> None:
    auth = StoredTokenAuth(store, USER, hosts=HERE)
    for number, method in enumerate(("GET", "HEAD"), 1):
        assert send(method, profile(upstox), auth) == Sent(200, [401] if number > 1 else [])
        assert upstox.logins() == number
        upstox.kill_token(USER)
    assert send("POST", order(upstox), auth) == Sent(401, [])
    assert (upstox.logins(), upstox.orders(USER)) == (3, 0), "the token was renewed, and the order not sent again"
    assert send("POST", order(upstox), auth) == Sent(200, [])
    upstox.kill_token(USER)
    assert send("POST", order(upstox), StoredTokenAuth(store, USER, hosts=HERE, repeat_orders=True)) == Sent(200, [401])
    assert (upstox.logins(), upstox.orders(USER)) == (4, 2)


def test_a_streamed_order_is_sent_again_whole_or_not_at_all(store: TokenStorage, upstox: LocalUpstox) -> None:
    auth = StoredTokenAuth(store, USER, hosts=HERE, repeat_orders=True)
    with httpx.Client(auth=auth, **PLAIN) as client, requests.Session() as session:
        session.auth = auth
        assert client.get(profile(upstox)).status_code == 200
        upstox.kill_token(USER)
        assert client.post(order(upstox), content=iter([b"{", b"}"]), headers={"Content-Length": "2"}).is_success
        upstox.kill_token(USER)
        answer = session.post(order(upstox), data=iter([b"{}"]), timeout=10, headers={"Connection": "close"})
        assert answer.status_code == 401
        assert session.post(order(upstox), data="{}", timeout=10).status_code == 200


@each_way
def test_a_token_that_is_refused_again_is_not_renewed_again(open_sqlite: Open, upstox: LocalUpstox, send: Any) -> None:
    store = open_sqlite()
    auth = StoredTokenAuth(store, USER, hosts=HERE)
    assert send("GET", profile(upstox), auth) == Sent(200, [])
    upstox.kill_token(USER)
    assert send("GET", profile(upstox), auth) == Sent(200, [401])
    upstox.kill_token(USER)
    with pytest.raises(LoginLimited, match="renewed less than 600 s ago") as caught:
        send("GET", profile(upstox), auth)
    assert caught.value.__notes__ == ["Upstox had answered 401 to the request, so nothing was done there."]
    assert str(held(store))[-20:] not in shown_with_locals(caught.value)
    assert upstox.logins() == 2


class Elsewhere:
    """A server whose answer a test decides. It remembers the tokens that it was sent."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.sent = answer, list[str]()
        self._server = WebServer(self._serve, "127.0.0.1")

    def _serve(self, _: str, shown: Shown) -> Answer:
        self.sent.append(shown["bearer"])
        return self.answer

    def url(self, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self._server.server_address[1]}/"

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()


@each_way
def test_a_redirect_elsewhere_carries_no_token_and_its_refusal_renews_nothing(
    store: TokenStorage, upstox: LocalUpstox, send: Any
) -> None:
    auth = StoredTokenAuth(store, USER, hosts=HERE)
    token = store.store_token(USER)["token"]
    for host in ("localhost", "127.0.0.1"):  # Another port is another place, too.
        with Elsewhere(Answer(REFUSAL, 401)) as there, Elsewhere(Answer("", 307, Location=there.url(host))) as here:
            assert send("GET", here.url(), auth) == Sent(401, [307])
            assert (here.sent, there.sent) == ([token], [""])
    with Elsewhere(Answer(REFUSAL, 401)) as there:
        assert send("GET", there.url("localhost"), auth) == Sent(401, []), "nor is it sent there directly"
        assert there.sent == [""]
    assert upstox.logins() == 1, "a request without the token says nothing about the token"


@each_way
def test_an_order_whose_redirect_is_refused_is_not_sent_again(
    store: TokenStorage, upstox: LocalUpstox, send: Any
) -> None:
    orders = []

    class Redirecting(Elsewhere):
        def _serve(self, route: str, shown: Shown) -> Answer:
            if route.startswith("POST"):
                orders.append(route)
                return Answer("", 303, Location=self.url())
            return super()._serve(route, shown)

    with Redirecting(Answer(REFUSAL, 401)) as here:
        assert send("POST", here.url(), StoredTokenAuth(store, USER, hosts=HERE, repeat_orders=True)).status == 401
    assert len(orders) == 1, "the redirect tells that it was carried out"
    assert upstox.logins() == 2


@each_way
def test_every_other_answer_passes_through(store: TokenStorage, upstox: LocalUpstox, send: Any) -> None:
    other = {"status": "error", "errors": [{"errorCode": "UDAPI100067"}]}
    for answer in (Answer(REFUSAL, 403), Answer(other, 401), Answer("no JSON", 401), Answer(REFUSAL, 200)):
        with Elsewhere(answer) as there:
            assert send("GET", there.url(), StoredTokenAuth(store, USER, hosts=HERE)) == Sent(answer.status, [])
            assert len(there.sent) == 1
    assert upstox.logins() == 1


@pytest.mark.parametrize("status", [200, 403, 500])
def test_only_the_body_of_a_401_is_read(store: TokenStorage, status: int) -> None:
    auth = StoredTokenAuth(store, USER, hosts=HERE)

    async def with_async_client(url: str) -> None:
        async with (
            httpx.AsyncClient(auth=auth, **PLAIN) as client,
            client.stream("GET", url) as answer,
        ):
            assert (answer.status_code, answer.is_stream_consumed) == (status, False)

    with Elsewhere(Answer(REFUSAL, status)) as there:
        with httpx.Client(auth=auth, **PLAIN) as client, client.stream("GET", there.url()) as answer:
            assert (answer.status_code, answer.is_stream_consumed) == (status, False)
        run("asyncio", partial(with_async_client, there.url()))
        with requests.get(there.url(), auth=auth, stream=True, timeout=10) as response:
            assert (response.status_code, response.raw.tell()) == (status, 0)


def test_the_token_goes_to_upstoxs_hosts_over_https_only(store: TokenStorage) -> None:
    auth = StoredTokenAuth(store, USER)

    def carried(url: str) -> tuple[bool, bool]:
        flow = auth.sync_auth_flow(httpx.Request("GET", url))
        prepared = requests.Request("GET", url, auth=auth).prepare()
        return "Authorization" in next(flow).headers, "Authorization" in prepared.headers

    for url in ("https://api.upstox.com/v2/x", "https://API-HFT.upstox.com/v3/x", "https://api-v2.upstox.com:443/"):
        assert carried(url) == (True, True), url
    for url in (
        "http://api.upstox.com/",
        "https://upstox.com/",
        "https://community.upstox.com/",
        "https://api.upstox.com.example.com/",
        "https://api.upstox.com@example.com/",
        "https://example.com/?api.upstox.com",
        "http://127.0.0.1/",
    ):
        assert carried(url) == (False, False), url
    assert uses(store) == 0, "the store was read once, and that was a login"
    names = (
        "https://api.upstox.com",
        "127.0.0.1:8000",
        "",
        None,
        "[::1]",
        "*.upstox.com",
        "api.upstox.com.",
        " a",
        "a\n",
    )
    for wrong in (*([name] for name in names), "api.upstox.com", "localhost", [], None, 5, iter(HERE)):
        with pytest.raises(InvalidInput, match="names without scheme and port"):
            StoredTokenAuth(store, USER, hosts=wrong)  # type: ignore[arg-type]
    StoredTokenAuth(store, USER, hosts=["::1", "LOCALHOST", "my_host"])
    with pytest.raises(InvalidInput, match="user id"):
        StoredTokenAuth(store, "")
    with pytest.raises(InvalidInput, match="pass its `store`"):
        StoredTokenAuth(AsyncTokenStorage(store), USER)  # type: ignore[arg-type]
    assert repr(auth) == f"StoredTokenAuth({store!r}, '{USER}')"


# When the store or the login fails


def test_a_crowd_that_waits_for_a_failing_login_shares_its_failure(open_sqlite: Open, upstox: LocalUpstox) -> None:
    store, tries = open_sqlite(), []
    together = threading.Barrier(CROWD)

    def fails(user_id: str | None) -> object:
        tries.append(user_id)
        time.sleep(1)
        raise LoginInterrupted("Upstox could not be reached.")

    store.login = fails
    auth = StoredTokenAuth(store, USER, hosts=HERE)

    def one(_: int) -> None:
        together.wait()
        with pytest.raises(LoginInterrupted):
            client.get(profile(upstox))

    with httpx.Client(auth=auth, **PLAIN) as client, ThreadPoolExecutor(CROWD) as threads:
        list(threads.map(one, range(CROWD)))
    assert len(tries) <= 2, "those who came during the first try share the second"

    async def main() -> None:
        async with httpx.AsyncClient(auth=auth, **PLAIN) as client:

            async def get() -> None:
                with pytest.raises(LoginInterrupted):
                    await client.get(profile(upstox))

            await at_once(CROWD, get)

    tries.clear()
    run("asyncio", main)
    assert len(tries) <= 2


@pytest.mark.parametrize(("backend", "cancel"), WAYS_TO_CANCEL)
def test_a_cancelled_request_finishes_a_login_that_has_begun(
    store: TokenStorage, upstox: LocalUpstox, backend: str, cancel: Any
) -> None:
    holding = HeldLogin(upstox)

    async def main() -> None:
        auth = StoredTokenAuth(store, USER, hosts=HERE)
        async with httpx.AsyncClient(auth=auth, **PLAIN) as client:

            async def get() -> None:
                await client.get(profile(upstox))

            await cancel(get, holding.go_soon)
            assert upstox.is_living(str(held(store)))
            assert (await client.get(profile(upstox))).status_code == 200

    run(backend, main)
    assert upstox.logins() == 1


TAKES_NO_TOKEN = (
    "CREATE TRIGGER takes_no_token BEFORE INSERT ON upstox_tokens BEGIN SELECT RAISE(ABORT, 'no room'); END"
)


@each_way
def test_a_token_that_the_store_did_not_take_is_held_and_used(
    open_sqlite: Open, tmp_path: Path, upstox: LocalUpstox, send: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_sqlite(renew_pause=0.001)
    auth = StoredTokenAuth(store, USER, hosts=HERE)
    with contextlib.closing(sqlite3.connect(tmp_path / "upstox.db")) as conn:
        conn.execute(TAKES_NO_TOKEN)
        assert [send("GET", profile(upstox), auth) for _ in range(3)] == [Sent(200, [])] * 3
        assert (upstox.logins(), held(store)) == (1, None)
        upstox.kill_token(USER)
        assert [send("GET", profile(upstox), auth) for _ in range(2)] == [Sent(200, [401]), Sent(200, [])]
        assert (upstox.logins(), held(store)) == (2, None)
        conn.execute("DROP TRIGGER takes_no_token")
    upstox.kill_token(USER)
    assert send("GET", profile(upstox), auth) == Sent(200, [401])
    assert upstox.logins() == 3
    assert upstox.is_living(str(held(store)))
    warnings = [each.getMessage() for each in caplog.records if "not in the store" in each.getMessage()]
    assert len(warnings) == 2
    assert "eyJ" not in caplog.text


def test_a_held_token_that_is_not_in_the_store_is_dropped_before_it_expires(
    open_sqlite: Open, tmp_path: Path, upstox: LocalUpstox, clock: Clock
) -> None:
    auth = StoredTokenAuth(open_sqlite(), USER, hosts=HERE)
    with contextlib.closing(sqlite3.connect(tmp_path / "upstox.db")) as conn:
        conn.execute(TAKES_NO_TOKEN)
        assert with_httpx("GET", profile(upstox), auth) == Sent(200, [])
        clock.now += timedelta(days=1)
        upstox.move_clock(timedelta(days=1))
        assert with_httpx("POST", order(upstox), auth) == Sent(200, [])
    assert upstox.logins() == 2


def test_another_users_token_is_not_used_and_ctrl_c_is_not_swallowed(
    open_sqlite: Open, tmp_path: Path, upstox: LocalUpstox
) -> None:
    class Interrupted(SQLiteUpstoxStorage):
        calls = 0

        def get_or_create_token(self, user_id: str | None = None) -> TokenResult:
            self.calls += 1
            raise TokenNotStored(token, user_id) from KeyboardInterrupt()

    token = Secret(open_sqlite().store_token(USER)["token"])
    with Interrupted(tmp_path / "interrupted.db") as store:
        auth = StoredTokenAuth(store, USER, hosts=HERE)
        with pytest.raises(TokenNotStored):
            with_httpx("GET", profile(upstox), auth)
        assert with_httpx("GET", profile(upstox), auth) == Sent(200, [])
        assert store.calls == 1, "the token is held all the same"
    with contextlib.closing(sqlite3.connect(tmp_path / "upstox.db")) as conn:
        conn.execute(TAKES_NO_TOKEN)
        other = open_sqlite(login=lambda _: token_data("CD5678", "eyJ0eXAi" + "x" * 60))
        with pytest.raises(TokenNotStored) as caught:
            with_httpx("GET", profile(upstox), StoredTokenAuth(other, "EF9012", hosts=HERE))
        assert caught.value.user_id == "CD5678"


# Where the packages are missing


@pytest.mark.parametrize(
    ("name", "missing", "told"),
    [
        ("AsyncTokenStorage", ["anyio"], "anyio. In a clone of this project, run: pip install '.[async]'"),
        (
            "StoredTokenAuth",
            ["httpx", "requests"],
            "httpx or requests. In a clone of this project, run: pip install '.[httpx]' or pip install '.[requests]'",
        ),
    ],
)
def test_a_missing_package_is_named_with_what_to_install(
    tmp_path: Path, name: str, missing: list[str], told: str
) -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({missing}))\nfrom upstox_db_examples import {name}"
    done = run_code(code, tmp_path)
    assert done.stderr.splitlines()[-1] == f"ModuleNotFoundError: {name} needs {told}"


def test_requests_alone_is_enough(tmp_path: Path, upstox: LocalUpstox, account: Account) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['httpx', 'anyio']))\n"
        "import requests, upstox_db_examples as u\n"
        "with u.SQLiteUpstoxStorage('x.db') as store:\n"
        f"    auth = u.StoredTokenAuth(store, {USER!r}, hosts=['127.0.0.1'])\n"
        f"    print(requests.get({profile(upstox)!r}, auth=auth, timeout=10).status_code)"
    )
    done = run_code(code, tmp_path, **account.environ(), UPSTOX_BASE_DOMAIN=upstox.base_domain)
    assert (done.returncode, done.stdout.strip()) == (0, "200")
