"""APScheduler: a login at 08:45 in India."""

from __future__ import annotations

from apscheduler.job import Job
from apscheduler.schedulers.base import BaseScheduler
from apscheduler.triggers.cron import CronTrigger

from upstox_db_examples import TokenStorage


def add_daily_login(scheduler: BaseScheduler, store: TokenStorage, user_id: str) -> Job:
    """Log the user in on each trading day at 08:45, unless a token works then."""

    def log_in() -> str:
        store.get_or_create_token(user_id)
        return user_id  # The scheduler hands the result to its listeners, so it is not the token.

    return scheduler.add_job(
        log_in,
        CronTrigger(hour=8, minute=45, day_of_week="mon-fri", timezone="Asia/Kolkata"),
        id=f"log in {user_id}",
        replace_existing=True,
        misfire_grace_time=3600,  # By default, a machine that is one second late skips the login.
    )
