"""The web recipes: servers in their own processes, with several workers, and one login."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from recipes.playground import USER, Playground
from upstox_db_examples import TokenStorage

UVICORN = ["uvicorn", "recipes.fastapi_app:app", "--port", "PORT"]
GUNICORN = ["gunicorn", "--config", "recipes/gunicorn_conf.py", "--bind", "127.0.0.1:PORT", "--no-control-socket"]


def nothing_leaked(here: Playground, store: TokenStorage, *told: str) -> None:
    result = store.get_valid_token(USER)
    assert result is not None
    assert here.upstox.is_living(result["token"])
    text = here.printed() + "".join(told)
    assert result["token"][8:24] not in text
    assert "Traceback" not in text, text


def test_three_workers_log_in_once_and_renew_once(here: Playground, store: TokenStorage) -> None:
    url = here.serve(*GUNICORN, "recipes.flask_app:make_app()")
    assert json.loads(here.get(f"{url}/health")) == {"token": "none", "minutes_to_live": 0}
    here.upstox.login_seconds = 0.5  # so that the requests overlap
    names = here.get_at_once(*[f"{url}/name"] * 12)
    assert here.upstox.logins() == 1
    here.upstox.kill_token(USER)
    names += here.get_at_once(*[f"{url}/name"] * 12)
    assert here.upstox.logins() == 2
    assert len(names) == 24
    assert all("User AB1234" in each for each in names)
    health = here.get(f"{url}/health")
    assert json.loads(health)["token"] == "works"
    assert 0 < json.loads(health)["minutes_to_live"] <= 24 * 60
    nothing_leaked(here, store, health, *names)


def test_django_logs_in_once(here: Playground, store: TokenStorage) -> None:
    url = here.serve(*GUNICORN, "recipes.django_app:application")
    here.upstox.login_seconds = 0.5
    assert json.loads(here.get(f"{url}/health")) == {"token": "none", "minutes_to_live": 0}
    names = here.get_at_once(*[f"{url}/name"] * 6)
    assert [json.loads(each) for each in names] == [{"name": "User AB1234"}] * 6
    assert here.upstox.logins() == 1
    health = here.get(f"{url}/health")
    assert json.loads(health)["minutes_to_live"] > 0
    nothing_leaked(here, store, health)


def test_the_event_loop_answers_while_a_login_waits_for_upstox(here: Playground) -> None:
    url = here.serve(*UVICORN)
    reached = False

    def look(_: int, what: str) -> None:
        nonlocal reached
        if what == "answer" and not reached:
            here.get(f"{url}/health")  # while the login waits for us: a blocked loop would never answer
            reached = True

    here.upstox.on_step = look
    assert "User AB1234" in here.get(f"{url}/name")
    assert reached


def post(url: str, message: Any) -> int:
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_the_notifiers_token_is_saved_and_nobody_elses(here: Playground, store: TokenStorage) -> None:
    url = here.serve("uvicorn", "recipes.webhook:app", "--port", "PORT", "--no-access-log", NOTIFIER_PATH="a-secret")
    message = here.upstox.notify(USER, f"{url}/notifier/a-secret")
    saved = store.get_valid_token(USER)
    assert saved is not None
    assert saved["token"] == message["access_token"]
    assert here.upstox.logins() == 1, "the notifier's own"
    here.upstox.add_account("CD5678")
    forged = {**message, "access_token": message["access_token"][:-4] + "AAAA"}
    refused = [
        (f"{url}/notifier/guessed", message, 404),
        (f"{url}/notifier/a-secret", forged, 400),
        (f"{url}/notifier/a-secret", here.upstox.notify("CD5678"), 400),
        (f"{url}/notifier/a-secret", {**message, "message_type": "order"}, 400),
        (f"{url}/notifier/a-secret", {}, 400),
        (f"{url}/notifier/a-secret", [], 400),
        (f"{url}/notifier/a-secret", b"\xff", 400),
    ]
    assert [post(to, what) for to, what, _ in refused] == [code for _, _, code in refused]
    kept = store.get_valid_token(USER)
    assert kept is not None
    assert kept["token"] == message["access_token"]
    assert store.get_valid_token("CD5678") is None
    nothing_leaked(here, store)
