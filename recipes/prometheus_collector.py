"""Prometheus: how long each token lives, and how many logins and refusals each user had."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from upstox_db_examples import TokenStorage


class TokenCollector(Collector):
    """`REGISTRY.register(TokenCollector(store, ["AB1234"]))`. It reads records and no tokens, and needs no key."""

    def __init__(self, store: TokenStorage, user_ids: list[str]) -> None:
        self.store, self.user_ids = store, user_ids

    def collect(self) -> Iterator[Metric]:
        left = GaugeMetricFamily("upstox_token_seconds_to_live", "0 without a token", labels=["user"])
        logins = CounterMetricFamily("upstox_logins", "Tokens that a login made", labels=["user"])
        refusals = CounterMetricFamily("upstox_refusals", "Logins that Upstox refused", labels=["user"])
        for user in self.user_ids:
            alive = [token["expires_at"] for token in self.store.get_token_history(user, 1) if token["is_active"]]
            seconds = sum((datetime.fromisoformat(end) - datetime.now(UTC)).total_seconds() for end in alive)
            left.add_metric([user], seconds)
            entries = self.store.get_audit_trail(user, limit=1000)
            logins.add_metric([user], sum(entry["action"] == "created" for entry in entries))
            refusals.add_metric([user], sum("LoginRefused" in str(entry["metadata"]) for entry in entries))
        yield from (left, logins, refusals)
