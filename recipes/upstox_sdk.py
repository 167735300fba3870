"""Upstox's own `upstox-python-sdk` with the stored token. A token that Upstox refuses is renewed."""

from __future__ import annotations

from typing import Any

import upstox_client
from upstox_client.rest import ApiException

from upstox_db_examples import TokenStorage


class StoredTokenClient(upstox_client.ApiClient):
    """Upstox's client for one user: `upstox_client.UserApi(StoredTokenClient(store, "AB1234"))`.

    After a refusal, a GET is sent again. Anything else raises its 401 after the renewal: you decide
    whether an order is sent again. The SDK's `async_req=True` is not covered.
    """

    def __init__(self, store: TokenStorage, user_id: str, host: str | None = None) -> None:
        configuration = upstox_client.Configuration()
        if host:
            configuration.host = configuration.order_host = host
        configuration.access_token = store.get_or_create_token(user_id)["token"]
        self._store, self._user_id = store, user_id
        super().__init__(configuration)

    def call_api(self, resource_path: str, method: str, *args: Any, **kwargs: Any) -> Any:
        used = self.configuration.access_token
        try:
            return super().call_api(resource_path, method, *args, **kwargs)
        except ApiException as error:
            if error.status != 401 or "UDAPI100050" not in str(error.body):
                raise
            self.configuration.access_token = self._store.renew_token(self._user_id, used)["token"]
            if method != "GET":
                raise
        return super().call_api(resource_path, method, *args, **kwargs)
