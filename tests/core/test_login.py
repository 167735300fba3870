"""Logins with the real SDK at the local Upstox: with one account, and with several."""

from __future__ import annotations

import logging
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from upstox_db_examples import (
    Accounts,
    ConfigurationError,
    LoginError,
    LoginRefused,
    SdkLogin,
)
from upstox_db_examples.core.login import FIELDS, Credentials
from upstox_db_examples.local.upstox import Account, LocalUpstox

from ..support.leaks import assert_shows_nothing, secrets_of, shown_with_locals
from ..support.processes import USER


class TestALogin:
    def test_goes_through_all_six_requests_of_the_real_sdk(self, login: SdkLogin, upstox: LocalUpstox) -> None:
        data = login()
        assert data.user_id == USER
        assert upstox.is_living(data.access_token)
        assert (upstox.attempts(), upstox.logins()) == (1, 1)

    def test_takes_the_sdks_variables_when_it_is_due_and_not_before(
        self, upstox: LocalUpstox, account: Account, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        login = SdkLogin()
        with pytest.raises(LoginRefused, match=r"UPSTOX_USERNAME \(username\).*UPSTOX_REDIRECT_URI .* not set"):
            login()
        for name, value in account.environ().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("UPSTOX_BASE_DOMAIN", upstox.base_domain)
        assert login().user_id == USER

    def test_never_reads_a_dotenv_file(self, login: SdkLogin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / ".env").write_text("UPSTOX_PIN_CODE=999999\nUPSTOX_USERNAME=0000000000\n")
        monkeypatch.chdir(tmp_path)
        assert login().user_id == USER
        with pytest.raises(LoginRefused, match="not set"):
            SdkLogin()()

    def test_has_a_client_of_its_own_so_that_accounts_log_in_side_by_side(self, upstox: LocalUpstox) -> None:
        users = [f"CD000{n}" for n in range(8)]
        accounts = Accounts(
            {user: upstox.add_account(user).credentials() for user in users}, base_domain=upstox.base_domain
        )
        with ThreadPoolExecutor(8) as threads:
            data = list(threads.map(accounts, users))
        assert [each.user_id for each in data] == users
        assert all(upstox.is_living(each.access_token) for each in data)

    def test_is_not_sent_through_a_proxy_when_upstox_is_on_this_machine(
        self, login: SdkLogin, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        assert login().user_id == USER

    def test_of_another_user_than_these_credentials_are_for_is_refused_before_any_request(
        self, upstox: LocalUpstox, account: Account
    ) -> None:
        login = SdkLogin(account.credentials(), user_id=USER, base_domain=upstox.base_domain)
        with pytest.raises(LoginRefused, match="belong to AB1234, not XY9999"):
            login("XY9999")
        assert upstox.attempts() == 0

    def test_keeps_the_sdks_debug_log_silent(
        self, login: SdkLogin, account: Account, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("UPSTOX_DEBUG", "true")
        caplog.set_level(logging.DEBUG)
        caplog.set_level(logging.DEBUG, "upstox-totp")
        token = login().access_token
        logging.getLogger("upstox-totp").info("others may still speak")
        assert "others may still speak" in caplog.text
        assert [secret for secret in [*secrets_of(account), token] if secret in caplog.text] == []


class TestCredentials:
    @pytest.mark.parametrize(
        ("field", "value", "says"),
        [
            *((field, "", f"UPSTOX_{field.upper()} .* not set") for field in FIELDS),
            ("username", "+919876543210", "10 digits"),
            ("username", "trader@example.com", "10 digits"),
            ("pin_code", "12a456", "4 to 8 digits"),
            ("totp_secret", "ABCD EFGH IJKL MNOP QRST UVWX", "not base32"),
            ("totp_secret", "ABCDEFGHIJKLMNOP1890ABCDEFGHIJKL", "not base32"),
            ("totp_secret", "ABCDEFGHIJKLMNOP", "80 bits and needs at least 112"),
            ("redirect_uri", "localhost", "not a URL"),
            ("redirect_uri", "https://x.example/?a=1&b=2", "does not send correctly"),
            ("client_secret", "a+b%c", "does not send correctly"),
        ],
    )
    def test_that_cannot_work_cost_no_request_and_are_not_shown(
        self, upstox: LocalUpstox, account: Account, field: str, value: str, says: str
    ) -> None:
        with pytest.raises(LoginRefused, match=says) as caught:
            SdkLogin({**account.credentials(), field: value}, base_domain=upstox.base_domain)()
        assert upstox.attempts() == 0
        assert_shows_nothing(caught.value, account)
        assert not value or value not in shown_with_locals(caught.value)

    def test_of_an_unknown_name_are_refused(self, account: Account) -> None:
        with pytest.raises(LoginRefused, match="Unknown credentials: pin"):
            SdkLogin({**account.credentials(), "pin": "123456"})

    def test_show_nothing_and_are_not_pickled(self, account: Account) -> None:
        login = SdkLogin(account.credentials())
        accounts = Accounts({USER: account.credentials()})
        for thing in (login, accounts, Credentials(account.credentials())):
            shown = f"{thing} {thing!r} {vars(thing)}"
            assert [secret for secret in secrets_of(account) if secret in shown] == []
            with pytest.raises(TypeError, match="cannot be pickled"):
                pickle.dumps(thing)

    def test_have_a_name_that_is_the_same_for_the_same_account_only(
        self, upstox: LocalUpstox, account: Account
    ) -> None:
        here, again = SdkLogin(account.credentials()), SdkLogin(account.credentials())
        other = SdkLogin(upstox.add_account("XY9999").credentials())
        assert here.account == again.account != other.account
        assert SdkLogin().account is None
        assert [secret for secret in secrets_of(account) if secret in str(here.account)] == []


class TestWhereUpstoxIs:
    @pytest.mark.parametrize(
        "elsewhere", ["http://upstox.example/{stage}", "ftp://127.0.0.1.example/{stage}", "nonsense"]
    )
    def test_has_to_be_https_or_this_machine(self, account: Account, elsewhere: str) -> None:
        with pytest.raises(LoginRefused, match="must be https"):
            SdkLogin(account.credentials(), base_domain=elsewhere)()

    def test_has_to_name_the_stage(self, account: Account) -> None:
        with pytest.raises(LoginRefused, match="stage"):
            SdkLogin(account.credentials(), base_domain="https://upstox.example")()


class TestAccounts:
    @pytest.fixture
    def file(self, tmp_path: Path, account: Account) -> Path:
        path = tmp_path / "accounts.toml"
        lines = [f'{name} = "{value}"' for name, value in account.credentials().items()]
        path.write_text("\n".join([f"[{USER}]", *lines]))
        path.chmod(0o600)
        return path

    def test_come_from_a_file_of_their_owners_own(self, file: Path, upstox: LocalUpstox) -> None:
        accounts = Accounts.from_file(file, base_domain=upstox.base_domain)
        assert accounts.user_ids == [USER]
        assert accounts(USER).user_id == USER
        assert accounts().user_id == USER, "a single account needs no name"

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
    def test_in_a_file_that_others_can_read_are_refused(self, file: Path, mode: int) -> None:
        file.chmod(mode)
        with pytest.raises(ConfigurationError, match="chmod 600"):
            Accounts.from_file(file)

    @pytest.mark.parametrize("change", ["[[broken", 'x = "{pin}', "\N{BAT}[", f"[{USER}]"])
    def test_in_a_broken_file_are_a_clear_error_that_shows_nothing(
        self, file: Path, account: Account, change: str
    ) -> None:
        file.write_text(f"{file.read_text()}\n{change.format(pin=account.pin)}")
        with pytest.raises(ConfigurationError, match="is not a TOML file") as caught:
            Accounts.from_file(file)
        assert_shows_nothing(caught.value, account)

    @pytest.mark.parametrize("text", ["", 'AB1234 = "text"', "[AB1234]\nusername = 1"])
    def test_in_a_file_without_tables_of_credentials_are_a_clear_error(self, file: Path, text: str) -> None:
        file.write_text(text)
        with pytest.raises((ConfigurationError, LoginError)):
            Accounts.from_file(file)

    def test_in_a_missing_file_or_a_folder_are_a_clear_error(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none.toml", tmp_path):
            with pytest.raises(ConfigurationError, match="could not be read"):
                Accounts.from_file(path)

    def test_with_one_that_cannot_work_show_nothing(self, account: Account) -> None:
        with pytest.raises(LoginRefused, match="AB1234") as caught:
            Accounts({USER: {**account.credentials(), "pin_code": ""}})
        assert_shows_nothing(caught.value, account)

    def test_that_are_not_there_are_named(self, account: Account, upstox: LocalUpstox) -> None:
        accounts = Accounts(
            {USER: account.credentials(), "XY9999": upstox.add_account("XY9999").credentials()},
            base_domain=upstox.base_domain,
        )
        with pytest.raises(LoginRefused, match=r"There is no account ZZ0000\. The known ones: AB1234, XY9999"):
            accounts("ZZ0000")
        with pytest.raises(LoginRefused, match="No account was named"):
            accounts()
        assert upstox.attempts() == 0
