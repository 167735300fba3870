"""Prometheus: how long each token lives, and how many logins and recent refusals each user had."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from upstox_db_examples import TokenStorage


class TokenCollector(Collector):
    """`REGISTRY.register(TokenCollector(store, ["AB1234"]))`. It reads records and no tokens, and needs no key.

    `upstox_refusals` is a gauge: a store keeps no total of refused logins, and its audit trail is cut off and cleaned.
    """

    def __init__(self, store: TokenStorage, user_ids: list[str]) -> None:
        self.store, self.user_ids = store, user_ids

    def collect(self) -> Iterator[Metric]:
        left = GaugeMetricFamily("upstox_token_seconds_to_live", "0 without a token", labels=["user"])
        logins = CounterMetricFamily(
            "upstox_logins", "Tokens stored, each from a login here or elsewhere", labels=["user"]
        )
        refusals = GaugeMetricFamily(
            "upstox_refusals", "Refused logins in the last 1000 audit entries", labels=["user"]
        )
        for user in self.user_ids:
            alive = [token["expires_at"] for token in self.store.get_token_history(user, 1) if token["is_active"]]
            seconds = sum((datetime.fromisoformat(end) - datetime.now(UTC)).total_seconds() for end in alive)
            left.add_metric([user], seconds)
            logins.add_metric([user], self.store.get_user_statistics(user)["total_tokens"])
            entries = self.store.get_audit_trail(user, limit=1000)
            refusals.add_metric([user], sum("LoginRefused" in str(entry["metadata"]) for entry in entries))
        yield from (left, logins, refusals)
