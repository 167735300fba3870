"""A request that carries the user's token, and renews it when Upstox refuses it. For httpx and for requests."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import ipaddress
import logging
import re
import threading
from collections.abc import AsyncGenerator, Collection, Generator
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from .core.checks import require_user_id
from .core.errors import InvalidInput, StorageError, TokenNotStored
from .core.forks import start_anew_in_children
from .core.refusals import Reply, code_and_message
from .core.store import TokenStorage
from .core.token import ExpiryPolicy, Secret
from .core.upstox_api import THIS_MACHINE
from .core.users import is_same_user

if TYPE_CHECKING:
    from httpx import Auth, Request
    from httpx import Response as HttpxResponse
    from requests import PreparedRequest, Response

    from .worker_threads import Lane
else:
    try:
        from httpx import Auth
    except ModuleNotFoundError:  # requests needs no base class.
        if importlib.util.find_spec("requests") is None:
            raise
        Auth = object

logger = logging.getLogger(__name__)

# Not every host of upstox.com: some of them, such as the forum, are other companies' servers.
UPSTOX_HOSTS = frozenset({"api.upstox.com", "api-v2.upstox.com", "api-hft.upstox.com"})
REFUSED = "UDAPI100050"
SHORTLY = timedelta(minutes=1)  # before its expiry, a token is looked up again


class _Held(NamedTuple):
    token: Secret
    until: datetime


class StoredTokenAuth(Auth):
    """Puts a user's token on each request to Upstox, and renews it when Upstox refuses it.

    It works with `httpx.Client`, `httpx.AsyncClient` and, as `session.auth`, with `requests.Session`.

    The store is read once, with `get_or_create_token`. This object then holds the token until a minute before it
    expires, or until Upstox refuses it: the answer 401 with the code UDAPI100050. After a refusal, `renew_token` is
    called once for all threads and tasks that use this object. GET and HEAD requests are sent again. (An answer to HEAD
    shows no code, so every 401 counts.) Any other request returns its 401 after the renewal. Order APIs give this code
    for other causes too, and you decide whether an order is sent again. Every other answer passes through unread.

    The token goes only to Upstox's hosts, and only over https. A request or a redirect to another host has no token,
    and a 401 from there renews nothing.

    With httpx, do not raise errors in a response hook (`event_hooks`): httpx calls it before this object sees the
    answer, so a 401 would renew nothing. Call `raise_for_status` after the request.

    If a login gives a token and the database then refuses it (`TokenNotStored`), this object holds that token and the
    requests go on. The log has a warning. An error would drop the only copy of the token, and each later request would
    log in again and kill the token before.

    Share one object between threads and tasks, because each object reads the store for itself. With
    `httpx.AsyncClient`, under asyncio or trio, the store runs on a worker thread. A request that is cancelled first
    finishes a login that has begun.

    Args:
        store: where the token is. If you have an `AsyncTokenStorage`, pass its `store`.
        user_id: the user whose token it is.
        hosts: the names of the hosts that get the token, in place of Upstox's. 127.0.0.1, ::1 and localhost need no
            https.
        repeat_orders: after a renewal, send requests of every method again. With requests, this leaves out a request
            whose body is a file or a generator.

    Raises:
        InvalidInput: the store, the user id or a host is unusable.
        StorageError: a request raises the errors of `get_or_create_token` and `renew_token`. Upstox has done nothing
            then: no request was sent, or the answer was 401, and a note in the error says so.

    Example:
        >>> import httpx
        >>> address = upstox.base_domain.format(stage="api")  # at Upstox: https://api.upstox.com
        >>> auth = StoredTokenAuth(storage, "AB1234", hosts={"127.0.0.1"})  # at Upstox: without hosts
        >>> with httpx.Client(auth=auth, base_url=address) as client:
        ...     client.get("/v2/user/profile").json()["data"]["user_id"]
        'AB1234'
    """

    def __init__(
        self,
        store: TokenStorage,
        user_id: str,
        *,
        hosts: Collection[str] = UPSTOX_HOSTS,
        repeat_orders: bool = False,
    ) -> None:
        if not isinstance(store, TokenStorage):
            raise InvalidInput("The first argument must be a store. An AsyncTokenStorage has one: pass its `store`.")
        if isinstance(hosts, str) or not (isinstance(hosts, Collection) and hosts and all(map(_is_host, hosts))):
            raise InvalidInput('hosts must be a list of names without scheme and port, such as ["api.upstox.com"].')
        self._store, self._user_id = store, require_user_id(user_id)
        self._hosts, self._repeat_orders = frozenset(host.lower() for host in hosts), repeat_orders
        self._held: _Held | None = None
        self._asked = 0  # how often the store was asked
        self._failure: StorageError | None = None  # the last time
        self.start_anew()
        start_anew_in_children(self)

    def start_anew(self) -> None:
        """Make the lock anew. A forked child calls this, because another thread may have held it in the parent."""
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._store!r}, {self._user_id!r})"

    # httpx

    def sync_auth_flow(self, request: Request) -> Generator[Request, HttpxResponse, None]:
        """Send the request with the token. httpx calls this."""
        if not self._is_upstox(request.url.scheme, request.url.host):
            yield request
            return
        if repeat := self._may_repeat(request.method):
            request.read()  # A body that is a stream could be sent only once.
        token = self._usable(None) or self._ask(None, self._asked)
        response = yield _with(token, request)
        if response.status_code == 401 and _carried(token, response.request):
            response.read()
            if _is_refusal(request.method, response.content):
                token = self._usable(token) or self._ask(token, self._asked)
                if repeat and _is_its_answer(request, response):
                    yield _with(token, request)

    async def async_auth_flow(self, request: Request) -> AsyncGenerator[Request, HttpxResponse]:
        """Send the request with the token. httpx calls this."""
        if not self._is_upstox(request.url.scheme, request.url.host):
            yield request
            return
        if repeat := self._may_repeat(request.method):
            await request.aread()
        token = self._usable(None) or await self._ask_on_a_thread(None)
        response = yield _with(token, request)
        if response.status_code == 401 and _carried(token, response.request):
            await response.aread()
            if _is_refusal(request.method, response.content):
                token = self._usable(token) or await self._ask_on_a_thread(token)
                if repeat and _is_its_answer(request, response):
                    yield _with(token, request)

    # requests

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        """Put the token on the request. requests calls this."""
        url = urlsplit(request.url or "")
        if self._is_upstox(str(url.scheme), str(url.hostname)):
            token = self._usable(None) or self._ask(None, self._asked)
            _with(token, request)
            request.register_hook("response", functools.partial(self._after, token))
        return request

    def _after(self, token: Secret, response: Response, **options: Any) -> Response:
        """Look at an answer. For a redirect, requests calls this for each of its requests."""
        request = response.request
        if response.status_code != 401 or not _carried(token, request):
            return response
        if not _is_refusal(request.method, response.content):
            return response
        token = self._usable(token) or self._ask(token, self._asked)
        if not self._may_repeat(request.method) or not isinstance(request.body, str | bytes | None):
            return response
        response.close()
        again = _with(token, request.copy())
        second = response.connection.send(again, **options)
        second.history.append(response)
        second.request = again
        return second

    # Both

    def _is_upstox(self, scheme: str, host: str) -> bool:
        if host.lower() not in self._hosts:
            return False
        if scheme == "https" or host in THIS_MACHINE:
            return True
        logger.warning("A request to %s carries no token, because it is not sent over https", host)
        return False

    def _may_repeat(self, method: str | None) -> bool:
        return self._repeat_orders or method in ("GET", "HEAD")

    def _usable(self, refused: Secret | None) -> Secret | None:
        """Return the token that is held, unless it is the refused one or expires soon."""
        held = self._held
        if held is None or (refused and held.token.reveal() == refused.reveal()):
            return None
        return held.token if self._now() < held.until else None

    def _ask(self, refused: Secret | None, asked: int) -> Secret:
        """Get a token from the store: another one than the refused one.

        Args:
            asked: how often the store had been asked when the caller came. If it was asked meanwhile and failed, the
                caller gets that error: with a server that is down, each of a crowd would wait for its own.
        """
        with self._lock:
            if token := self._usable(refused):
                return token
            if self._failure and self._asked != asked:
                error = copy.copy(self._failure)  # Each thread adds its own traceback and note.
                _note(error, refused)
                raise error
            self._failure = None
            self._asked += 1
            try:
                if refused:
                    result = self._store.renew_token(self._user_id, refused)
                else:
                    result = self._store.get_or_create_token(self._user_id)
            except TokenNotStored as error:
                if not is_same_user(error.user_id or "", self._user_id):
                    self._fail(error, refused)
                    raise
                # By Upstox's own rule, whatever the store's policy is.
                self._hold(error.token, ExpiryPolicy().expires_at(error.token, self._now()))
                cause = error.__cause__
                if isinstance(cause, BaseException) and not isinstance(cause, Exception):
                    raise  # Somebody pressed Ctrl-C meanwhile.
                logger.warning(
                    "A login gave a new token of %s, but it is not in the store. Requests carry it until Upstox "
                    "refuses it. The cause: %s",
                    self._user_id,
                    cause if isinstance(cause, StorageError) else type(cause).__name__,
                )
                return error.token
            except StorageError as error:
                self._fail(error, refused)
                raise
            self._hold(result.masked_token, datetime.fromisoformat(result["expires_at"]))
            return result.masked_token

    def _hold(self, token: Secret, expires: datetime) -> None:
        # A store returns a token even in its last minute, if a login would gain nothing.
        until = expires - SHORTLY
        self._held = _Held(token, until if self._now() < until else expires)

    def _fail(self, error: StorageError, refused: Secret | None) -> None:
        self._failure = copy.copy(error)
        _note(error, refused)

    def _now(self) -> datetime:
        return self._store.backend.context.now()

    async def _ask_on_a_thread(self, refused: Secret | None) -> Secret:
        return await self._lane.run(functools.partial(self._ask, refused, self._asked))

    @functools.cached_property
    def _lane(self) -> Lane:
        # One thread is enough, because only one may ask. Its package comes with httpx, and requests works without it.
        from .worker_threads import Lane

        return Lane(1)


def _with[R: Request | PreparedRequest](token: Secret, request: R) -> R:
    request.headers["Authorization"] = f"Bearer {token.reveal()}"
    return request


def _carried(token: Secret, request: Request | PreparedRequest) -> bool:
    """Return whether this request had the token: httpx and requests remove it when a redirect leads elsewhere."""
    return request.headers.get("Authorization") == f"Bearer {token.reveal()}"


def _is_its_answer(request: Request, response: HttpxResponse) -> bool:
    """Return whether the answer is to this request. A redirect may turn a POST, which was carried out, into a GET."""
    return response.request.method == request.method


def _is_refusal(method: str | None, body: bytes) -> bool:
    return method == "HEAD" or code_and_message(Reply(401, body).json())[0] == REFUSED


def _note(error: StorageError, refused: Secret | None) -> None:
    if refused:
        error.add_note("Upstox had answered 401 to the request, so nothing was done there.")


def _is_host(host: object) -> bool:
    """Return whether a request's URL can have this host. Any other name would keep the token from every request."""
    if not isinstance(host, str):
        return False
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    return re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", host, re.IGNORECASE | re.ASCII) is not None
