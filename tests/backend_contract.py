"""What a store owes to the life cycle and to the transfers, asked of it directly: see backend.py."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from upstox_db_examples import KeyRing, LoginSuperseded, Secret, TokenStorage
from upstox_db_examples.token import StoredToken

from .conftest import Clock
from .processes import USER

OTHERS = ["CD0002", "CD0003", "CD0001"]


def made_up(store: TokenStorage, user_id: str, generation: int = 1, account: str | None = None) -> StoredToken:
    now = store._now()
    token = StoredToken(user_id, "", "", generation, now, now + timedelta(hours=1), account=account)
    return store._encrypt(Secret(f"a token of {user_id}, number {generation}"), token)


class BackendContract:
    def test_a_second_token_of_a_generation_is_refused(self, store: TokenStorage) -> None:
        store._insert(made_up(store, USER))
        again = made_up(store, USER)
        with pytest.raises(LoginSuperseded):
            store._insert(again)
        (kept,) = store._tokens_of(USER)
        assert kept.ciphertext not in ("", again.ciphertext)
        actions = [entry["action"] for entry in store.get_audit_trail(USER)]
        assert actions == ["created"], "what is refused leaves no entry"

    def test_the_end_of_a_token_is_audited_with_its_reason(self, store: TokenStorage, clock: Clock) -> None:
        for generation in (1, 2):
            token = made_up(store, USER, generation)
            clock.advance(seconds=1)
            store._insert(token)
        (ended,) = [entry for entry in store.get_audit_trail(USER) if entry["action"] == "deactivated"]
        assert ended["metadata"] == {"reason": "new_token_generated"}
        assert ended["performed_at"] == token.created_at.isoformat()

    def test_a_ciphertext_that_changed_meanwhile_is_not_replaced(self, store: TokenStorage) -> None:
        store._insert(made_up(store, USER))
        (old,) = store._under_other_keys("another key", 10)
        assert store._replace_ciphertexts([(old, replace(old, ciphertext=made_up(store, USER).ciphertext))]) == 1
        assert store._replace_ciphertexts([(old, replace(old, ciphertext=made_up(store, USER).ciphertext))]) == 0
        store._insert(made_up(store, USER, 2))
        newest = store._tokens_of(USER)[-1].ciphertext
        assert store._replace_ciphertexts([(old, replace(old, ciphertext=made_up(store, USER).ciphertext))]) == 0
        assert [token.ciphertext for token in store._tokens_of(USER)] == ["", newest]

    def test_no_more_tokens_are_given_than_asked_for(self, store: TokenStorage) -> None:
        for user_id in OTHERS:
            store._insert(made_up(store, user_id))
        assert len(store._under_other_keys("another key", 2)) == 2
        assert {token.user_id for token in store._under_other_keys("another key", 10)} == set(OTHERS)
        assert store._under_other_keys(next(iter(store.keys_in_use())), 10) == []

    def test_an_account_is_whoever_it_logged_in_last(self, store: TokenStorage, clock: Clock) -> None:
        for user_id in OTHERS:
            clock.advance(seconds=1)
            store._insert(made_up(store, user_id, account="an account"))
        assert store._user_of_account("an account") == OTHERS[-1]
        assert store._user_of_account("another") is None

    def test_all_who_left_a_trace_are_users(self, store: TokenStorage) -> None:
        store._record(None, "login", store._now())
        store._record(OTHERS[0], "login_failed", store._now())
        store._insert(made_up(store, USER))
        assert sorted(store._users(), key=str) == [USER, OTHERS[0], None]
        assert store._tokens_of(None) == store._tokens_of(OTHERS[0]) == []

    @pytest.mark.parametrize("user_id", [USER, None])
    def test_entries_of_one_second_come_each_once_and_in_their_order(
        self, store: TokenStorage, user_id: str | None, clock: Clock
    ) -> None:
        for number in range(9):
            store._record(user_id, "login_failed", store._now(), {"number": number})
            clock.advance(seconds=int(number == 6))
        numbers, last = [], None
        while batch := store._entries_of(user_id, last, 2):
            assert len(batch) <= 2
            numbers += [entry.metadata["number"] for entry in batch]
            last = batch[-1]
        assert numbers == list(range(9))

    def test_what_is_moved_has_no_id_of_this_store(self, store: TokenStorage) -> None:
        store._insert(made_up(store, USER))
        (token,) = store._tokens_of(USER)
        assert (token.token_id, token.source) == (None, None)
        assert store._decrypt(token).reveal() == f"a token of {USER}, number 1"

    def test_a_key_that_encrypts_nothing_is_not_counted(self, store: TokenStorage, keys: KeyRing) -> None:
        assert store._count_keys() == {}
        store._insert(made_up(store, USER))
        assert store._count_keys() == {keys.key_ids[0]: 1}
        store._revoke(USER, store._now())
        assert store._count_keys() == {}
