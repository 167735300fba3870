"""Compose is run where it is. Kubernetes is not: what its file says is run as processes."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from recipes.playground import ROOT, USER, playground
from upstox_db_examples import KeyRing

from ..support.command import call, good
from ..support.compose import COMPOSE, replicas

DEPLOYMENT, CRON_JOB = yaml.safe_load_all((ROOT / "recipes" / "kubernetes.yaml").read_text())


def test_three_replicas_by_the_commands_of_both_files_log_in_once_and_renew_once(
    postgres_url: str, tmp_path: Path
) -> None:
    program = COMPOSE["services"]["program"]
    (container,) = DEPLOYMENT["spec"]["template"]["spec"]["containers"]
    assert program["deploy"]["replicas"] == DEPLOYMENT["spec"]["replicas"] == 3
    assert program["command"] == container["command"]
    command = program["command"]
    assert command[command.index("--host") + 1] == "0.0.0.0"  # inside the container
    port = command[command.index("--port") + 1]
    assert container["ports"] == [{"containerPort": int(port)}]
    assert container["readinessProbe"]["httpGet"] == {"path": "/health", "port": int(port)}
    assert program["ports"] == [f"127.0.0.1:8000-8002:{port}"], "not on the network's side of the machine"
    with replicas(postgres_url, tmp_path) as (here, urls, printed):
        here.upstox.login_seconds = 0.5
        assert here.get_at_once(*(f"{url}/name" for url in urls * 3)) == ['"User AB1234"'] * 9
        assert here.upstox.logins() == 1
        here.upstox.kill_token(USER)
        assert here.get_at_once(*(f"{url}/name" for url in urls * 3)) == ['"User AB1234"'] * 9
        assert here.upstox.logins() == 2
        health = json.loads(here.get(f"{urls[0]}/health"))
        assert health["token"] == "works"
        assert 0 < health["minutes_to_live"] <= 24 * 60
        assert "/health" in printed()
        assert "eyJ" not in printed(), "the start of each token"


def test_compose_starts_what_there_is_and_holds_no_secret() -> None:
    services = COMPOSE["services"]
    assert services["program"]["depends_on"] == {"database": {"condition": "service_healthy"}}
    assert services["program"]["environment"] == {
        "UPSTOX_DB_STORE": "postgresql://upstox:${POSTGRES_PASSWORD:?}@database/upstox"
    }
    copied = [line.split()[1:-1] for line in services["program"]["build"]["dockerfile_inline"].splitlines()]
    files = [name for line in copied for name in line if line and name[0] not in "-." and "pip" not in name]
    assert {"pyproject.toml", "README.md", "LICENSE", "upstox_db_examples", "recipes"} <= set(files)
    assert [name for name in ("pyproject.toml", "README.md", "LICENSE", "recipes") if not (ROOT / name).exists()] == []


def test_the_cron_job_logs_in_once_a_day_in_india() -> None:
    spec = CRON_JOB["spec"]
    assert (spec["schedule"], spec["timeZone"]) == ("45 8 * * 1-5", "Asia/Kolkata")
    template = spec["jobTemplate"]["spec"]["template"]["spec"]
    assert (spec["jobTemplate"]["spec"]["backoffLimit"], template["restartPolicy"]) == (0, "Never")
    (container,) = template["containers"]
    program, *arguments = container["command"]
    assert program == "upstox-db"
    with playground() as here:
        KeyRing.default()
        for _ in range(2):
            good(call(*arguments))
        assert here.upstox.logins() == 1
