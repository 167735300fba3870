"""The HTTP under the local Upstox: requests into plain fields, answers into JSON, and a server that really closes."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from collections import defaultdict
from collections.abc import Callable
from http.cookies import SimpleCookie
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qsl, urlsplit

type Shown = defaultdict[str, Any]  # What a request shows: query, fields, session, bearer. What it lacks is "".


class Answer(Exception):
    """A page (str) or JSON. Returned, or raised where the answer is no."""

    def __init__(self, body: str | dict[str, Any], status: int = 200, **headers: str) -> None:
        self.body, self.status, self.headers = body, status, headers


HANG_UP = Answer("")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # Keeps connections open.
    disable_nagle_algorithm = True  # Else an answer's body waits until the client has acknowledged its headers.
    server: WebServer

    def _serve(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        session = SimpleCookie(self.headers.get("Cookie", "")).get("session")
        shown: Shown = defaultdict(str, parse_qsl(url.query))
        shown |= _fields(self.headers.get_content_type(), body)
        shown["session"] = session.value if session else ""
        shown["bearer"] = self.headers.get("Authorization", "").removeprefix("Bearer ")
        answer = self.server.answer(f"{self.command} {url.path}", shown)
        if answer is HANG_UP:
            # Half an answer, because curl silently sends a request again whose connection ends without a byte.
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n")
            self.close_connection = True
            return
        is_page = isinstance(answer.body, str)
        content = str(answer.body) if is_page else json.dumps(answer.body)
        self.send_response(answer.status)
        # The SDK compares the type with ==: with a charset behind it, it would not read the body as JSON.
        self.send_header("Content-Type", "text/html" if is_page else "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content.encode())

    do_GET = do_POST = do_DELETE = _serve

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _fields(content_type: str, body: bytes) -> dict[str, Any]:
    """The fields of a form, or of the `data` of JSON."""
    if content_type == "application/x-www-form-urlencoded":
        return dict(parse_qsl(body.decode(errors="replace")))
    try:
        data = dict(json.loads(body)["data"])
    except (ValueError, LookupError, TypeError):
        return {}  # Each step refuses who does not show what it asks for.
    return {name: value for name, value in data.items() if isinstance(value, str | bool)}


class WebServer(ThreadingTCPServer):  # http.server's own would look up the machine's name, which can take seconds.
    request_queue_size = 128  # The default of 5 keeps clients waiting that come all at once.

    def __init__(self, answer: Callable[[str, Shown], Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self._connections: list[tuple[Thread, socket.socket]] = []
        self._loop = Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._loop.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """As the library does it, but its threads either outlive close() or block it for as long as a client stays."""
        thread = Thread(target=self.process_request_thread, args=(request, client_address), daemon=True)
        self._connections = [living for living in self._connections if living[0].is_alive()] + [(thread, request)]
        thread.start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what went wrong, unless only the client hung up."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def close(self) -> None:
        self.shutdown()
        self._loop.join()
        self.server_close()
        for thread, connection in self._connections:
            with contextlib.suppress(OSError):  # It is closed already.
                connection.shutdown(socket.SHUT_RDWR)
            thread.join()
