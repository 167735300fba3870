"""Errors that travel: through a pickle, a copy, a task queue that keeps only their args."""

from __future__ import annotations

import copy
import pickle

import pytest

from upstox_db_examples import KeyUnavailable, LoginError, LoginLimited, Secret, StorageError, TokenNotStored
from upstox_db_examples.core import errors

TOKEN = Secret("eyJ0eXAiOiJKV1Qi" * 8)


def each_kind() -> list[StorageError]:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, StorageError)]
    plain = [kind("Do this.") for kind in kinds if kind not in (KeyUnavailable, TokenNotStored)]
    return [
        *plain,
        KeyUnavailable("kdeadbeef"),
        LoginError("Wait.", "UDAPI1"),
        LoginLimited("Wait.", "UDAPI2", 5.0, account_only=True),
    ]


@pytest.mark.parametrize("error", each_kind(), ids=lambda error: type(error).__name__)
def test_an_error_is_the_same_after_a_journey(error: StorageError) -> None:
    error.add_note("a note")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert vars(again) == vars(error)
    assert str(type(error)(*error.args)) == str(error), "a task queue does this"


def test_the_key_id_comes_along() -> None:
    error = KeyUnavailable("kdeadbeef")
    assert KeyUnavailable(*error.args).key_id == pickle.loads(pickle.dumps(error)).key_id == "kdeadbeef"


def test_a_token_stays_where_the_login_ran() -> None:
    error = TokenNotStored(TOKEN, "AB1234", StorageError("The disk is full."))
    pickled = pickle.dumps(error)
    assert TOKEN.reveal().encode() not in pickled
    again = pickle.loads(pickled)
    assert again.token is None
    assert again.user_id == "AB1234"
    assert str(again).startswith(str(error))
    assert "not in this copy" in str(again)
    assert copy.copy(error).token is copy.deepcopy(error).token is TOKEN
    assert str(TokenNotStored(*again.args)) == str(again)
