"""Celery: a login at 08:45 in India. Only user ids go through the broker and the result backend.

celery --app recipes.celery_app worker --beat
"""

from __future__ import annotations

import functools
import os
from typing import Any

from celery import Celery
from celery.schedules import crontab

from upstox_db_examples import LoginInterrupted, LoginLimited, StoreUnavailable, TokenStorage, open_store

app = Celery("upstox", broker=os.environ["CELERY_BROKER_URL"], backend=os.environ["CELERY_BROKER_URL"])
app.conf.timezone = "Asia/Kolkata"  # By default beat counts in UTC, and 08:45 would be 14:15 in India.
app.conf.broker_connection_retry_on_startup = True


@functools.cache
def store() -> TokenStorage:
    """Open the store once for each worker process."""
    return open_store(os.environ["UPSTOX_DB_STORE"])


@app.task(bind=True, max_retries=5)
def log_in(self: Any, user_id: str) -> str:
    """Log the user in, unless a token works. Whoever needs the token reads it from the store."""
    try:
        store().get_or_create_token(user_id)
    except (StoreUnavailable, LoginInterrupted, LoginLimited) as error:
        # Only these can be tried again. To repeat a refused login would lock the account.
        raise self.retry(exc=error, countdown=getattr(error, "retry_after", 60)) from None
    return user_id


app.conf.beat_schedule = {
    "daily login": {
        "task": log_in.name,
        "schedule": crontab(hour=8, minute=45, day_of_week="mon-fri", app=app),
        "args": [os.environ["UPSTOX_USER_ID"]],
    }
}
