"""PostgreSQL tells of changed tokens: LISTEN, on a connection that does nothing else.

Behind a pooler in transaction mode LISTEN fails in silence: the session that listens is not the client's any more. So
a notification to ourselves has to come back first, sent over another connection. (Over the same one it might come back
although nothing ever would again, together with the answer.) Otherwise the states are polled. The channel of this trial
has a name of its own, because the LISTEN stays in a session that the pooler lends to others.
"""

from __future__ import annotations

import logging
import time
import uuid

from psycopg2.extensions import connection

from ..core.listener import MOMENT, Listener, Polling
from .connections import PostgreSQLConnections, is_readable
from .queries import CHANNEL, NOTIFY

logger = logging.getLogger(__name__)

COMES_BACK_WITHIN = 1.0  # seconds; it takes a millisecond or two
# Ask for a sign of life this often. A server whose machine is gone, or a firewall that forgot the connection, says
# nothing. The settings of libpq would do it, too, but not through every proxy.
ASK_EVERY = 30.0


def listen(connections: PostgreSQLConnections) -> Listener:
    """Start to listen, or to poll if the notifications do not arrive.

    Raises:
        StoreUnavailable, ConfigurationError: there is no connection.
    """
    connections.refuse_if_closed()
    with connections.translating():
        conn = connections.connect()
        try:
            if _arrives(connections, conn):
                return Notices(connections, conn)
        except BaseException:
            conn.close()
            raise
    conn.close()
    logger.info("A pooler keeps notifications from %s back, so new tokens are noticed by polling", connections.where)
    return Polling()


def _arrives(connections: PostgreSQLConnections, conn: connection) -> bool:
    """Return whether a notification that somebody else sends comes through to this connection."""
    channel, deadline = f"upstox_trial_{uuid.uuid4().hex}", time.monotonic() + COMES_BACK_WITHIN
    connections.answer(conn, f"LISTEN {channel}")
    connections.run(NOTIFY, channel=channel)
    while not conn.notifies:
        if not is_readable(conn, deadline - time.monotonic()):
            return False
        conn.poll()
    connections.answer(conn, f"LISTEN {CHANNEL}; UNLISTEN {channel}")
    conn.notifies.clear()  # The caller looks once anyway.
    return True


class Notices(Listener):
    """Reads the notifications that arrive on this connection, and closes it at the end."""

    def __init__(self, connections: PostgreSQLConnections, conn: connection) -> None:
        self._connections, self._conn = connections, conn
        self._ask_at = time.monotonic() + ASK_EVERY

    def wait(self) -> bool:
        with self._connections.translating():
            if is_readable(self._conn, MOMENT):
                self._conn.poll()  # This raises if the server has closed the connection.
            elif time.monotonic() >= self._ask_at:
                self._connections.answer(self._conn, "SELECT 1")
                self._ask_at = time.monotonic() + ASK_EVERY
        told = bool(self._conn.notifies)
        self._conn.notifies.clear()
        return told

    def close(self) -> None:
        self._conn.close()
