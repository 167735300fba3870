"""What stores need from a login besides the login itself: its account, its credentials, and the owner of a token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from upstox_db_examples import Accounts, LoginInterrupted, LoginRefused, SdkLogin, Secret, TotpLogin
from upstox_db_examples.core.credentials import Credentials
from upstox_db_examples.core.login import FIELDS, TOTP_FIELDS, log_out, owner_of, read_answer
from upstox_db_examples.local.upstox import Account, LocalUpstox
from upstox_db_examples.local.web import Answer, Shown, WebServer

from ..support.leaks import shown_with_locals

USER = "AB1234"


def totp_table(account: Account) -> dict[str, str]:
    return {name: value for name, value in account.credentials().items() if name in TOTP_FIELDS}


@pytest.fixture
def other(upstox: LocalUpstox) -> Account:
    return upstox.add_account("XY9999")


@pytest.fixture
def sdk(upstox: LocalUpstox, account: Account) -> SdkLogin:
    return SdkLogin(account.credentials(), base_domain=upstox.base_domain)


@pytest.fixture
def mixed(upstox: LocalUpstox, account: Account, other: Account) -> Accounts:
    return Accounts({USER: account.credentials(), "XY9999": totp_table(other)}, base_domain=upstox.base_domain, pause=0)


class TestAccounts:
    def test_mix_both_kinds_of_login(self, mixed: Accounts, upstox: LocalUpstox) -> None:
        for user in (USER, "XY9999"):
            minted = read_answer(mixed(user))
            assert minted.user_id == user
            assert upstox.is_living(minted.token.reveal())
        methods = [read_answer(mixed(user)).profile["metadata"]["generation_method"] for user in (USER,)]
        assert methods == ["upstox_totp_sdk"]

    def test_find_a_user_without_regard_to_case(self, mixed: Accounts, account: Account) -> None:
        assert read_answer(mixed("ab1234")).user_id == USER
        assert mixed.account_of("ab1234") == mixed.account_of(USER)
        lower = Accounts({"ab1234": account.credentials()})
        lower.check("AB1234")
        assert lower.user_id == "ab1234"

    def test_that_differ_only_in_case_are_refused(self, account: Account) -> None:
        with pytest.raises(LoginRefused, match="twice"):
            Accounts({USER: account.credentials(), "ab1234": account.credentials()})

    def test_take_ready_logins(self, sdk: SdkLogin, account: Account, upstox: LocalUpstox) -> None:
        asked: list[str | None] = []

        def own(user_id: str | None) -> dict[str, str]:
            asked.append(user_id)
            return {"access_token": "opaque", "user_id": "CD0000"}

        accounts = Accounts({USER: sdk, "CD0000": own})
        assert read_answer(accounts(USER)).user_id == USER
        assert read_answer(accounts("cd0000")).user_id == "CD0000"
        assert asked == ["CD0000"]
        assert accounts.account_of(USER) == sdk.account
        assert (accounts.account_of("CD0000"), accounts.credentials_digest("CD0000")) == (None, None)
        accounts.check("CD0000")
        living = SdkLogin(account.credentials(), base_domain=upstox.base_domain)().access_token
        assert accounts.owner_of(Secret(living)) == USER, "it asks the Upstox of that login"

    @pytest.mark.parametrize("value", ["text", 7, None, SdkLogin])
    def test_of_no_known_kind_are_refused(self, value: Any) -> None:
        with pytest.raises(LoginRefused, match=r"AB1234: .*neither"):
            Accounts({USER: value})

    def test_with_a_login_of_another_user_are_refused(self, account: Account) -> None:
        with pytest.raises(LoginRefused, match=r"XY9999: .*AB1234"):
            Accounts({"XY9999": SdkLogin(account.credentials(), user_id=USER)})

    def test_have_one_account_only_if_there_is_one(self, mixed: Accounts, account: Account) -> None:
        assert (mixed.account, mixed.user_id, mixed.credentials_digest(None)) == (None, None, None)
        single = Accounts({USER: account.credentials()})
        assert single.account == SdkLogin(account.credentials()).account

    def test_say_at_once_whom_they_do_not_know(self, mixed: Accounts, upstox: LocalUpstox) -> None:
        mixed.check(USER)
        for unknown in ("ZZ0000", None):
            with pytest.raises(LoginRefused, match="The known ones: AB1234, XY9999"):
                mixed.check(unknown)
        assert upstox.attempts() == 0


class TestTheAccountOfALogin:
    def test_is_what_stores_have_already_written_down(self) -> None:
        values = {**dict.fromkeys(FIELDS, "x"), "username": "5123456789", "pin_code": "1234", "client_id": "an-app"}
        login = SdkLogin(values | {"totp_secret": "A" * 32, "redirect_uri": "https://x.example"})
        assert login.account == login.account_of("anybody") == "6b90ef3dd67e498d"

    def test_is_another_one_for_each_kind_of_login(self, account: Account, other: Account) -> None:
        sdk, totp = SdkLogin(account.credentials()), TotpLogin(totp_table(account))
        names = {sdk.account, totp.account, TotpLogin(totp_table(other)).account}
        assert len(names) == 3
        assert None not in names
        assert account.client_id not in str(names)

    def test_is_not_known_without_credentials(self) -> None:
        for login in (SdkLogin(), TotpLogin()):
            assert (login.account, login.account_of(USER), login.credentials_digest(USER)) == (None, None, None)


class TestTheDigestOfCredentials:
    @pytest.mark.parametrize("field", FIELDS)
    def test_changes_with_each_of_them(self, account: Account, field: str) -> None:
        changed = {
            "username": "5000000000",
            "pin_code": "000001",
            "totp_secret": "B" * 32,
            "redirect_uri": "https://elsewhere.example",
        }.get(field, "changed")
        values = account.credentials()
        digests = {SdkLogin(given).credentials_digest(USER) for given in (values, values | {field: changed}, values)}
        assert len(digests) == 2
        if field in TOTP_FIELDS:
            table = totp_table(account)
            assert len({TotpLogin(given).credentials_digest(USER) for given in (table, table | {field: changed})}) == 2

    def test_is_not_the_same_for_values_that_only_run_together_alike(self, account: Account) -> None:
        values = account.credentials()
        one = Credentials(values | {"client_id": "ab", "client_secret": "c"}).digest()
        two = Credentials(values | {"client_id": "a", "client_secret": "bc"}).digest()
        assert one != two

    def test_is_each_users_own(self, mixed: Accounts, account: Account, other: Account) -> None:
        assert mixed.credentials_digest(USER) == SdkLogin(account.credentials()).credentials_digest(USER)
        assert mixed.credentials_digest("xy9999") == TotpLogin(totp_table(other)).credentials_digest(None)
        assert mixed.credentials_digest("ZZ0000") is None


class TestACheck:
    def test_says_without_a_request_that_a_login_cannot_work(self, upstox: LocalUpstox, account: Account) -> None:
        with pytest.raises(LoginRefused, match="UPSTOX_USERNAME"):
            SdkLogin().check(USER)
        with pytest.raises(LoginRefused, match="UPSTOX_CLIENT_ID"):
            TotpLogin().check(USER)
        with pytest.raises(LoginRefused, match="belong to AB1234, not XY9999"):
            SdkLogin(account.credentials(), user_id=USER).check("XY9999")
        with pytest.raises(LoginRefused, match="must be https"):
            SdkLogin(account.credentials(), base_domain="http://elsewhere.example/{stage}").check(USER)
        SdkLogin(account.credentials(), user_id=USER, base_domain=upstox.base_domain).check("ab1234")
        assert upstox.attempts() == 0


class TestTheOwnerOfAToken:
    def test_is_told_by_upstox_as_long_as_the_token_lives(
        self, sdk: SdkLogin, mixed: Accounts, upstox: LocalUpstox, account: Account
    ) -> None:
        token = Secret(sdk().access_token)
        totp = TotpLogin(totp_table(account), base_domain=upstox.base_domain)
        assert sdk.owner_of(token) == totp.owner_of(token) == mixed.owner_of(token) == USER
        assert owner_of(token, upstox.base_domain) == USER
        upstox.kill_token(USER)
        assert sdk.owner_of(token) is None
        assert owner_of(token, upstox.base_domain) is None

    def test_is_asked_where_the_environment_says(
        self, sdk: SdkLogin, upstox: LocalUpstox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("UPSTOX_BASE_DOMAIN", upstox.base_domain)
        assert owner_of(Secret(sdk().access_token)) == USER

    @pytest.mark.parametrize("text", ["", "two\r\nX-Header: lines", "not ascii: é", "two words"])
    def test_is_nobody_for_what_no_header_can_carry(self, upstox: LocalUpstox, text: str) -> None:
        assert owner_of(Secret(text), upstox.base_domain) is None
        assert log_out(Secret(text), upstox.base_domain) is False


class TestALogout:
    def test_ends_a_token_once(self, sdk: SdkLogin, mixed: Accounts, upstox: LocalUpstox) -> None:
        for end in (sdk.log_out, mixed.log_out, lambda token: log_out(token, upstox.base_domain)):
            token = Secret(sdk().access_token)
            assert end(token) is True
            assert not upstox.is_living(token.reveal())
            assert end(token) is False


class TestUpstoxThatSaysSomethingElse:
    ANSWERS: list[Answer] = [
        Answer("<p>Who are you?</p>"),
        Answer({"status": "success", "data": {}}, 500),
        Answer({"status": "error", "errors": [{"errorCode": "UDAPI100500", "message": "no"}]}),
        Answer({"status": "error", "errors": [{"errorCode": "UDAPI10005", "message": "slowly"}]}, 429),
        Answer("", 302, Location="/elsewhere"),
        Answer({"status": "error"}, 403),
    ]

    @pytest.fixture(params=range(len(ANSWERS)))
    def base_domain(self, request: pytest.FixtureRequest) -> Iterator[str]:
        def answer(_: str, __: Shown) -> Answer:
            return self.ANSWERS[int(request.param)]

        server = WebServer(answer, "127.0.0.1")
        yield f"http://127.0.0.1:{server.server_address[1]}/{{stage}}"
        server.close()

    def test_has_not_said_whether_the_token_lives(self, base_domain: str) -> None:
        self.assert_not_told(base_domain)

    def test_has_not_said_so_when_it_is_not_there(self) -> None:
        self.assert_not_told("http://127.0.0.1:9/{stage}")

    def assert_not_told(self, base_domain: str) -> None:
        token = Secret("eyJ0eXAi.eyJzdWIi.c2ln" * 9)
        for ask in (owner_of, log_out):
            with pytest.raises(LoginInterrupted, match="Upstox did not say") as caught:
                ask(token, base_domain)
            assert not caught.value.token_may_exist
            assert "eyJ" not in shown_with_locals(caught.value).replace("eyJ0…(", "")
            assert (caught.value.__cause__, caught.value.__context__) == (None, None)
