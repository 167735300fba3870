"""Upstox's own `upstox-python-sdk` with the stored token. A token that Upstox refuses is renewed."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import upstox_client
from upstox_client.rest import ApiException

from upstox_db_examples import TokenResult, TokenStorage

SHORTLY = timedelta(minutes=1)  # before its expiry, a token is looked up again


class StoredTokenClient(upstox_client.ApiClient):
    """Upstox's client for one user: `upstox_client.UserApi(StoredTokenClient(store, "AB1234"))`.

    The token is looked up again shortly before it expires, so a client may live for many days.
    After a refusal, a GET is sent again. Anything else raises its 401 after the renewal: you decide
    whether an order is sent again. The SDK's `async_req=True` is not covered.
    """

    def __init__(self, store: TokenStorage, user_id: str, host: str | None = None) -> None:
        configuration = upstox_client.Configuration()
        if host:
            configuration.host = configuration.order_host = host
        self._store, self._user_id = store, user_id
        super().__init__(configuration)
        self._use(store.get_or_create_token(user_id))

    def call_api(self, resource_path: str, method: str, *args: Any, **kwargs: Any) -> Any:
        if self._now() >= self._until:
            self._use(self._store.get_or_create_token(self._user_id))
        used = self.configuration.access_token
        try:
            return super().call_api(resource_path, method, *args, **kwargs)
        except ApiException as error:
            if error.status != 401 or "UDAPI100050" not in str(error.body):
                raise
            self._use(self._store.renew_token(self._user_id, used))
            if method != "GET":
                raise
        return super().call_api(resource_path, method, *args, **kwargs)

    def _now(self) -> datetime:
        return self._store.backend.context.now()

    def _use(self, result: TokenResult) -> None:
        self.configuration.access_token = result["token"]
        # The store keeps a token in its last minute, when a login would gain nothing.
        expires = datetime.fromisoformat(result["expires_at"])
        self._until = expires - SHORTLY if self._now() < expires - SHORTLY else expires
