"""What every store promises about history, statistics, the audit trail, cleanup and status."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC
from typing import Any

import pytest

from upstox_db_examples import (
    InvalidInput,
    TokenStorage,
)
from upstox_db_examples.core import store as storage

from ..support.clocks import Clock, ist
from ..support.processes import USER, token_data
from ..support.stores import OnAStore, OpenStore, living


class RecordContract(OnAStore):
    """The store counts uses, and keeps a record of changes and of ended tokens."""

    # History, statistics, audit, cleanup

    def test_history_is_the_newest_first_and_not_longer_than_asked(self, store: TokenStorage, clock: Clock) -> None:
        for _ in range(3):
            store.store_token()
            clock.advance(hours=1)
        history = store.get_token_history(USER, limit=2)
        assert [row["created_at"] for row in history] == [
            ist(6, 22).astimezone(UTC).isoformat(),
            ist(6, 21).astimezone(UTC).isoformat(),
        ]
        assert {"created_at", "expires_at", "is_active", "user_name", "email", "broker"} <= set(history[0])

    def test_history_calls_a_dead_token_inactive(self, store: TokenStorage, clock: Clock) -> None:
        store.store_token()
        clock.set(7, 3, 30)
        assert store.get_token_history(USER)[0]["is_active"] is False
        assert store.get_user_statistics(USER)["active_tokens"] == 0

    def test_each_use_is_counted_and_audited(self, counting: TokenStorage, clock: Clock) -> None:
        stored = counting.store_token()
        clock.advance(minutes=5)
        counts = [living(counting)["usage_count"] for _ in range(3)]
        assert counts == [1, 2, 3]
        statistics = counting.get_user_statistics(USER)
        assert statistics["total_usage"] == 3
        assert statistics["avg_usage_per_token"] == 3.0
        assert statistics["last_usage"] == clock.now.astimezone(UTC).isoformat()
        used = [entry for entry in counting.get_audit_trail(USER) if entry["action"] == "used"]
        assert [entry["token_id"] for entry in used] == [stored["token_id"]] * 3
        assert {entry["actor"] for entry in used} == {"tests"}

    def test_uses_from_many_threads_are_all_counted(self, counting: TokenStorage) -> None:
        counting.store_token()
        with ThreadPoolExecutor(8) as threads:
            results = list(threads.map(lambda _: living(counting), range(200)))
        assert sorted(result["usage_count"] for result in results) == list(range(1, 201))
        assert counting.get_user_statistics(USER)["total_usage"] == 200

    def test_the_audit_trail_tells_the_whole_story(self, store: TokenStorage, clock: Clock) -> None:
        first = store.store_token()
        clock.advance(hours=1)
        second = store.store_token()
        clock.advance(hours=1)
        store.revoke_token(USER)
        told = [(entry["action"], entry["token_id"]) for entry in reversed(store.get_audit_trail(USER))]
        assert [entry for entry in told if entry[0] not in ("login",)] == [
            ("created", first["token_id"]),
            ("deactivated", first["token_id"]),
            ("created", second["token_id"]),
            ("revoked", second["token_id"]),
        ]
        newest = store.get_audit_trail(USER, limit=1)
        assert len(newest) == 1
        assert newest[0]["performed_at"] == clock.now.astimezone(UTC).isoformat()
        assert {"action", "performed_at", "metadata", "user_id", "token_created", "actor"} <= set(newest[0])

    def test_cleanup_erases_dead_tokens_and_keeps_their_history(self, store: TokenStorage, clock: Clock) -> None:
        store.store_token()
        assert store.cleanup_expired_tokens() == 0
        clock.set(7, 3, 30)
        assert store.cleanup_expired_tokens() == 1
        assert store.cleanup_expired_tokens() == 0
        assert [row["access_token"] for row in self.raw_rows()] == [None]
        assert len(store.get_token_history(USER)) == 1
        assert store.get_audit_trail(USER)[0]["action"] == "expired"

    def test_old_audit_entries_are_deleted_and_the_counts_stay(self, counting: TokenStorage, clock: Clock) -> None:
        counting.store_token()
        for _ in range(3):
            living(counting)
        clock.advance(days=89)
        assert counting.cleanup_old_audit_entries() == 0
        clock.advance(days=2)
        counting.store_token()
        assert counting.cleanup_old_audit_entries() == 5, "one login entry, one created entry and three uses"
        assert counting.cleanup_old_audit_entries() == 0
        assert counting.get_user_statistics(USER)["total_usage"] == 3
        assert [entry["action"] for entry in counting.get_audit_trail(USER)] == ["created", "deactivated", "login"]
        assert counting.cleanup_old_audit_entries(days_to_keep=0) == 0

    @pytest.mark.parametrize("cleanup", ["cleanup_expired_tokens", "cleanup_old_audit_entries"])
    def test_a_cleanup_leaves_others_their_turn_after_each_batch(
        self, open_store: OpenStore, clock: Clock, monkeypatch: pytest.MonkeyPatch, cleanup: str
    ) -> None:
        login = lambda user_id: token_data(user_id or USER)  # noqa: E731
        cleaning, other = open_store(login=login), open_store(login=login)
        for number in range(7):
            other.store_token(f"CD{number:04}")
        clock.advance(days=100)
        other.store_token(USER)
        monkeypatch.setattr(storage, "ROWS_AT_ONCE", 2)
        step = "expire" if cleanup == "cleanup_expired_tokens" else "delete_entries"
        batch, turns = getattr(cleaning.backend, step), []

        def others_turn_and_batch(*arguments: Any) -> int:
            turns.append(living(other)["token"] == other.store_token(USER)["token"])
            return int(batch(*arguments))

        monkeypatch.setattr(cleaning.backend, step, others_turn_and_batch)
        assert getattr(cleaning, cleanup)() == (7 if step == "expire" else 14), "a cleanup must keep what is in use"
        assert len(turns) >= 4

    @pytest.mark.parametrize("days", [-1, 1.5, "90", None, True, 10**6])
    def test_an_odd_number_of_days_is_refused(self, store: TokenStorage, days: Any) -> None:
        with pytest.raises(InvalidInput, match="days_to_keep"):
            store.cleanup_old_audit_entries(days)

    def test_the_status_names_the_database_and_the_time(self, store: TokenStorage, clock: Clock) -> None:
        status = store.get_storage_status()
        assert status.pop("timestamp") == clock.now.astimezone(UTC).isoformat()
        status.pop("details", None)
        assert status
        assert set(status.values()) == {"healthy"}
        store.close()
        assert all(
            value.startswith("error: ")
            for key, value in store.get_storage_status().items()
            if key not in ("timestamp", "details")
        )
