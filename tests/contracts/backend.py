"""What a backend promises to the life cycle and to the transfers, tested directly. See backend.py of the package."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest

from upstox_db_examples import KeyRing, LoginSuperseded, Secret, TokenStorage
from upstox_db_examples.core.token import StoredToken

from ..support.clocks import Clock
from ..support.processes import USER
from ..support.stores import OnAStore

OTHERS = ["CD0002", "CD0003", "CD0001"]


def made_up(store: TokenStorage, user_id: str, generation: int = 1, account: str | None = None) -> StoredToken:
    now = store.backend.context.now()
    token = StoredToken(user_id, "", "", generation, now, now + timedelta(hours=1), account=account)
    return store.cipher.replace_ciphertext(token, Secret(f"a token of {user_id}, number {generation}"))


class BackendContract(OnAStore):
    """Direct calls to the methods of a backend."""

    def test_a_second_token_of_a_generation_is_refused(self, store: TokenStorage) -> None:
        store.backend.insert(made_up(store, USER))
        again = made_up(store, USER)
        with pytest.raises(LoginSuperseded):
            store.backend.insert(again)
        (kept,) = store.backend.read_tokens(USER)
        assert kept.ciphertext not in ("", again.ciphertext)
        actions = [entry["action"] for entry in store.get_audit_trail(USER)]
        assert actions == ["created"], "a refused token leaves no audit entry"

    def test_the_end_of_a_token_is_audited_with_its_reason(self, store: TokenStorage, clock: Clock) -> None:
        for generation in (1, 2):
            token = made_up(store, USER, generation)
            clock.advance(seconds=1)
            store.backend.insert(token)
        (ended,) = [entry for entry in store.get_audit_trail(USER) if entry["action"] == "deactivated"]
        assert ended["metadata"] == {"reason": "new_token_generated"}
        assert ended["performed_at"] == token.created_at.isoformat()

    def test_a_ciphertext_that_changed_meanwhile_is_not_replaced(self, store: TokenStorage) -> None:
        store.backend.insert(made_up(store, USER))
        (old,) = store.backend.find_under_other_keys("another key", 10)
        assert store.backend.replace_ciphertexts([(old, replace(old, ciphertext=made_up(store, USER).ciphertext))]) == 1
        assert store.backend.replace_ciphertexts([(old, replace(old, ciphertext=made_up(store, USER).ciphertext))]) == 0
        store.backend.insert(made_up(store, USER, 2))
        newest = store.backend.read_tokens(USER)[-1].ciphertext
        assert store.backend.replace_ciphertexts([(old, replace(old, ciphertext=made_up(store, USER).ciphertext))]) == 0
        assert [token.ciphertext for token in store.backend.read_tokens(USER)] == ["", newest]

    def test_tokens_under_other_keys_come_page_by_page(self, store: TokenStorage) -> None:
        for user_id in ("CD3", "cd1", "CD1", "CD2", "AB-9"):
            store.backend.insert(made_up(store, user_id))
        found, after = [], None
        while page := store.backend.find_under_other_keys("another key", 2, after):
            after = page[-1].user_id
            found += [token.user_id for token in page]
        assert sorted(found) == ["AB-9", "CD1", "CD2", "CD3", "cd1"]

    def test_the_key_of_a_token_is_its_ciphertexts_own(self, store: TokenStorage) -> None:
        token = store.backend.insert(made_up(store, USER))
        own = token.ciphertext.split(".")[1]
        self.write_raw(self.raw_rows()[0]["id"], key_id="kwrong")
        assert store.keys_in_use() == {own: 1}
        assert [other.user_id for other in store.backend.find_under_other_keys("kwrong", 10)] == [USER]
        assert [other.user_id for other in store.backend.find_under_other_keys(own, 10)] == [USER]

    def test_no_more_tokens_are_given_than_asked_for(self, store: TokenStorage) -> None:
        for user_id in OTHERS:
            store.backend.insert(made_up(store, user_id))
        assert len(store.backend.find_under_other_keys("another key", 2)) == 2
        assert {token.user_id for token in store.backend.find_under_other_keys("another key", 10)} == set(OTHERS)
        assert store.backend.find_under_other_keys(next(iter(store.keys_in_use())), 10) == []

    def test_an_accounts_active_tokens_are_found_the_latest_first(self, store: TokenStorage, clock: Clock) -> None:
        for user_id in OTHERS:
            clock.advance(seconds=1)
            store.backend.insert(made_up(store, user_id, account="an account"))
        assert [token.user_id for token in store.backend.find_by_account("an account")] == OTHERS[::-1]
        assert [store.cipher.decrypt(token).reveal() for token in store.backend.find_by_account("an account")] == [
            f"a token of {user_id}, number 1" for user_id in OTHERS[::-1]
        ]
        store.backend.revoke(OTHERS[-1], store.backend.context.now())
        assert [token.user_id for token in store.backend.find_by_account("an account")] == OTHERS[1::-1]
        assert store.backend.find_by_account("another") == []

    def test_the_newest_token_is_known_after_its_end(self, store: TokenStorage) -> None:
        assert store.backend.find_newest(USER) is None
        issued = store.backend.context.now() - timedelta(minutes=5)
        for generation in (1, 2):
            store.backend.insert(replace(made_up(store, USER, generation), issued_at=issued))
        newest = store.backend.find_newest(USER)
        assert newest is not None
        assert (newest.user_id, newest.generation, newest.issued_at, newest.in_doubt) == (USER, 2, issued, False)
        assert store.cipher.decrypt(newest).reveal() == f"a token of {USER}, number 2"
        store.backend.revoke(USER, store.backend.context.now())
        ended = store.backend.find_newest(USER)
        assert ended is not None
        assert (ended.generation, ended.issued_at, ended.ciphertext) == (2, issued, "")
        assert store.get_user_statistics(USER)["total_usage"] == 0, "finding a token does not count as a use"

    def test_a_token_can_be_called_adopted(self, store: TokenStorage) -> None:
        store.backend.insert(made_up(store, USER), "adopted", {"fields_missing": ["poa"]})
        (entry,) = store.get_audit_trail(USER)
        assert (entry["action"], entry["metadata"]) == ("adopted", {"fields_missing": ["poa"]})

    # Marks

    def test_a_marked_token_is_found_while_its_login_holds_the_lock(
        self, store: TokenStorage, open_store: Callable[..., TokenStorage]
    ) -> None:
        other = open_store()
        store.backend.insert(made_up(store, USER))
        assert store.backend.find_in_doubt(USER) is None
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {"process": "p"})
            assert self.found(other), "the login is still running"
            assert not self.found(store, locked=True), "the caller holds the lock, so no other login is running"
            assert other.backend.find_newest(USER).in_doubt  # type: ignore[union-attr]
        assert not self.found(other), "the login has ended, and nobody knows how"
        assert not self.found(store)
        with store.backend.lock(USER):
            doubtful = store.backend.find_in_doubt(USER)
            assert doubtful is not None
            assert not self.found(other), "the process that holds the lock now is not that login"
            assert store.cipher.decrypt(doubtful).reveal() == f"a token of {USER}, number 1"
            store.backend.clear_doubt(replace(doubtful, generation=7))
            assert not self.found(store, locked=True), "the proof was about another token"
            store.backend.clear_doubt(doubtful)
            assert self.found(store, locked=True)
            assert store.backend.find_in_doubt(USER) is None
        assert self.found(other)
        (login,) = [entry for entry in store.get_audit_trail(USER) if entry["action"] == "login"]
        assert (login["metadata"], login["token_id"]) == ({"process": "p"}, None)

    def test_a_token_is_refused_while_a_later_one_is_active(self, store: TokenStorage) -> None:
        store.backend.insert(made_up(store, USER, 5))
        with pytest.raises(LoginSuperseded):
            store.backend.insert(made_up(store, USER, 3))
        assert [token.generation for token in store.backend.read_tokens(USER) if token.ciphertext] == [5]

    def test_a_login_that_made_no_token_takes_its_mark_away_and_no_earlier_one(self, store: TokenStorage) -> None:
        store.backend.insert(made_up(store, USER))
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})
            store.backend.end_login(USER, in_doubt=False)
        assert self.found(store)
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})  # ... and its process dies.
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})
            store.backend.end_login(USER, in_doubt=False)
        assert not self.found(store)
        with store.backend.lock(USER):
            store.backend.insert(made_up(store, USER, 2))
        assert self.found(store), "a new token is not in doubt"

    def test_a_login_that_may_have_made_a_token_leaves_its_mark_for_good(self, store: TokenStorage) -> None:
        store.backend.insert(made_up(store, USER))
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})
            store.backend.end_login(USER, in_doubt=True)
            assert not self.found(store), "the login is over, although its lock is still held"
        assert not self.found(store)

    def test_a_login_without_a_user_id_marks_everybody(
        self, store: TokenStorage, open_store: Callable[..., TokenStorage]
    ) -> None:
        other = open_store()
        for user_id in [USER, *OTHERS]:
            store.backend.insert(made_up(store, user_id))
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})
            with store.backend.lock("-account-x"):
                store.backend.begin_login(None, "-account-x", store.backend.context.now(), {})
            assert self.found(other), "its own login is still running"
            assert not any(self.found(other, user_id) for user_id in OTHERS)
            store.backend.end_login("-account-x", in_doubt=True, user_id=OTHERS[0])
            store.backend.end_login("-account-x", in_doubt=False)
            store.backend.end_login(USER, in_doubt=False)
        assert [self.found(store, user_id) for user_id in [USER, *OTHERS]] == [True, False, True, True]
        assert store.backend.find_in_doubt(USER) is store.backend.find_in_doubt(OTHERS[1]) is None

    @pytest.mark.parametrize("first", ["the named", "the nameless"])
    @pytest.mark.parametrize("ends", [True, False])
    def test_a_token_that_is_stored_while_a_login_without_a_user_id_runs_gets_its_mark(
        self, store: TokenStorage, open_store: Callable[..., TokenStorage], first: str, ends: bool
    ) -> None:
        nameless, now = open_store(), store.backend.context.now()
        with store.backend.lock(USER), nameless.backend.lock("-account-x"):
            if first == "the named":
                store.backend.begin_login(USER, USER, now, {})
            nameless.backend.begin_login(None, "-account-x", now, {})
            if first != "the named":
                store.backend.begin_login(USER, USER, now, {})
            assert store.backend.insert(made_up(store, USER)).in_doubt
            assert self.found(store), "the other login is still running"
            if ends:
                nameless.backend.end_login("-account-x", in_doubt=False)
        assert self.found(store) == ends, "if that login was killed, it may have replaced this token at Upstox"
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, now, {})
            assert not store.backend.insert(made_up(store, USER, 2)).in_doubt, "the other login ended before this one"
            assert not store.backend.insert(made_up(store, USER, 3), "adopted").in_doubt
        assert self.found(store)

    def test_a_failed_login_leaves_the_mark_of_the_login_without_a_user_id(
        self, store: TokenStorage, open_store: Callable[..., TokenStorage]
    ) -> None:
        nameless, now = open_store(), store.backend.context.now()
        store.backend.insert(made_up(store, USER))
        with store.backend.lock(USER), nameless.backend.lock("-account-x"):
            store.backend.begin_login(USER, USER, now, {})
            nameless.backend.begin_login(None, "-account-x", now, {})
            store.backend.end_login(USER, in_doubt=False)
            assert self.found(store), "the other login is still running"
            store.backend.clear_doubt(store.backend.find_in_doubt(USER))  # type: ignore[arg-type]
            assert store.backend.find_in_doubt(USER), "the other login may still replace the token"
        assert not self.found(store)

    def test_a_login_without_a_user_id_that_ends_leaves_the_mark_of_a_named_one(
        self, store: TokenStorage, open_store: Callable[..., TokenStorage]
    ) -> None:
        nameless, now = open_store(), store.backend.context.now()
        store.backend.insert(made_up(store, USER))
        with store.backend.lock(USER), nameless.backend.lock("-account-x"):
            nameless.backend.begin_login(None, "-account-x", now, {})
            store.backend.begin_login(USER, USER, now, {})
            nameless.backend.end_login("-account-x", in_doubt=False)
        assert not self.found(store), "the named login was killed"

    def test_a_login_without_a_user_id_of_unknown_end_puts_later_tokens_in_doubt(
        self, store: TokenStorage, open_store: Callable[..., TokenStorage]
    ) -> None:
        nameless, now = open_store(), store.backend.context.now()
        with store.backend.lock(USER), nameless.backend.lock("-account-x"):
            nameless.backend.begin_login(None, "-account-x", now, {})
            store.backend.begin_login(USER, USER, now, {})
            nameless.backend.end_login("-account-x", in_doubt=True)
            assert store.backend.insert(made_up(store, USER)).in_doubt
        assert not self.found(store)

    def test_logins_without_a_user_id_that_overlap_leave_no_mark(
        self, store: TokenStorage, open_store: Callable[..., TokenStorage]
    ) -> None:
        users = [f"CD{number:04}" for number in range(8)]
        for user_id in users:
            store.backend.insert(made_up(store, user_id))

        def mark_all(name: str) -> None:
            other = open_store()
            for _ in range(5):
                with other.backend.lock(name):
                    other.backend.begin_login(None, name, other.backend.context.now(), {})
                    other.backend.end_login(name, in_doubt=False)

        def store_new_ones() -> None:
            for generation in range(2, 7):
                store.backend.insert(made_up(store, users[0], generation))

        with ThreadPoolExecutor(5) as threads:
            storing = threads.submit(store_new_ones)
            list(threads.map(mark_all, [f"-account-{number}" for number in range(4)]))
            storing.result()
        assert [user_id for user_id in users if store.backend.find_in_doubt(user_id)] == []

    @pytest.mark.parametrize("ends", [True, False])
    def test_a_token_that_is_merged_while_a_login_without_a_user_id_runs_gets_its_mark(
        self, store: TokenStorage, open_store: Callable[..., TokenStorage], ends: bool
    ) -> None:
        nameless, now = open_store(), store.backend.context.now()
        store.backend.insert(made_up(store, OTHERS[0]))
        (token,) = store.backend.read_tokens(OTHERS[0])
        with nameless.backend.lock("-account-x"):
            nameless.backend.begin_login(None, "-account-x", now, {})
            with store.backend.lock(USER):
                store.backend.merge(USER, [replace(token, user_id=USER, in_doubt=False)], [])
            assert self.found(store), "that login is still running"
            if ends:
                nameless.backend.end_login("-account-x", in_doubt=False)
        assert self.found(store) == ends, "if that login was killed, it may have replaced this token at Upstox"
        with store.backend.lock(OTHERS[1]):
            store.backend.merge(OTHERS[1], [replace(token, user_id=OTHERS[1], in_doubt=False)], [])
        assert self.found(store, OTHERS[1]), "that login was over before this token came"

    def test_a_token_in_doubt_is_moved_as_such(self, store: TokenStorage) -> None:
        store.backend.insert(replace(made_up(store, USER), issued_at=store.backend.context.now()))
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})
            store.backend.end_login(USER, in_doubt=True)
        (token,) = store.backend.read_tokens(USER)
        assert (token.in_doubt, token.issued_at) == (True, store.backend.context.now())
        moved = replace(token, user_id=OTHERS[0])
        with store.backend.lock(OTHERS[0]):
            store.backend.merge(OTHERS[0], [moved], [])
        assert not self.found(store, OTHERS[0])
        (there,) = store.backend.read_tokens(OTHERS[0])
        assert there == moved

    # Notes

    def test_notes_are_kept_replaced_and_erased(self, store: TokenStorage) -> None:
        assert store.backend.read_notes(["one", "two"])[1] == {}
        store.backend.write_note("one", "first")
        store.backend.write_note("two", "second")
        store.backend.write_note("one", "third")
        assert store.backend.read_notes(["one", "three"])[1] == {"one": "third"}
        store.backend.erase_note("one")
        store.backend.erase_note("one")
        assert store.backend.read_notes(["one", "two"])[1] == {"two": "second"}

    def test_notes_are_timed_by_the_database(self, store: TokenStorage) -> None:
        before = time.time()
        told = store.backend.read_notes([])[0]
        assert before - 2 <= told <= time.time() + 2, "the database must time notes, not the store's clock"

    def test_logins_of_other_processes_are_told(self, store: TokenStorage, clock: Clock) -> None:
        begin = store.backend.context.now()
        for number in range(4):
            store.backend.begin_login(
                USER, USER, store.backend.context.now(), {"process": "mine" if number == 1 else "another"}
            )
            clock.advance(seconds=10)
        others = store.backend.logins_since(begin, "mine")
        assert others == [begin + timedelta(seconds=seconds) for seconds in (30, 20)]

    def test_everybody_with_tokens_or_entries_is_listed(self, store: TokenStorage) -> None:
        store.backend.record(None, "login", store.backend.context.now())
        store.backend.record(OTHERS[0], "login_failed", store.backend.context.now())
        store.backend.insert(made_up(store, USER))
        assert sorted(store.backend.list_users(), key=str) == [USER, OTHERS[0], None]
        assert store.backend.read_tokens(None) == store.backend.read_tokens(OTHERS[0]) == []

    def test_users_come_page_by_page_each_once_and_in_order(self, store: TokenStorage) -> None:
        names = ["AB-9", "CD1", "CD2", "CD3"]
        store.backend.insert(made_up(store, "CD1"))
        store.backend.insert(made_up(store, "CD3"))
        for user_id in (None, "AB-9", "CD2", "CD2", "CD2", "CD2", "CD3"):
            store.backend.record(user_id, "login_failed", store.backend.context.now())
        for limit in (1, 2, 3, 100):
            users, after = [], ""
            while page := store.backend.read_users(after, limit):
                assert len(page) <= limit
                after = page[-1]
                users += page
            assert users == names
        assert list(store.backend.each_user()) == [*names, None]

    @pytest.mark.parametrize("user_id", [USER, None])
    def test_entries_of_one_second_come_each_once_and_in_their_order(
        self, store: TokenStorage, user_id: str | None, clock: Clock
    ) -> None:
        for number in range(9):
            store.backend.record(user_id, "login_failed", store.backend.context.now(), {"number": number})
            clock.advance(seconds=int(number == 6))
        numbers, last = [], None
        while batch := store.backend.read_entries(user_id, last, 2):
            assert len(batch) <= 2
            numbers += [entry.metadata["number"] for entry in batch]
            last = batch[-1]
        assert numbers == list(range(9))

    def test_what_is_moved_has_no_id_of_this_store(self, store: TokenStorage) -> None:
        store.backend.insert(made_up(store, USER))
        (token,) = store.backend.read_tokens(USER)
        assert (token.token_id, token.source) == (None, None)
        assert store.cipher.decrypt(token).reveal() == f"a token of {USER}, number 1"

    def test_a_key_that_encrypts_nothing_is_not_counted(self, store: TokenStorage, keys: KeyRing) -> None:
        assert store.backend.count_keys() == {}
        store.backend.insert(made_up(store, USER))
        assert store.backend.count_keys() == {keys.key_ids[0]: 1}
        store.backend.revoke(USER, store.backend.context.now())
        assert store.backend.count_keys() == {}
