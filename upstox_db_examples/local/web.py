"""HTTP for the local Upstox: requests become plain fields, answers become JSON, and the server really closes."""

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

# What a request sends: query, fields, body (the whole JSON object), session, bearer, x-api-key. A missing one is "".
type Shown = defaultdict[str, Any]


class Answer(Exception):
    """A page (str) or JSON. It is returned, or raised for a refusal. A Content-Type in `headers` overrides ours."""

    def __init__(self, body: str | dict[str, Any], status: int = 200, **headers: str) -> None:
        self.body, self.status, self.headers = body, status, headers


HANG_UP = Answer("")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # Keeps connections open.
    disable_nagle_algorithm = True  # Otherwise the body waits until the client acknowledges the headers.
    server: WebServer

    def _serve(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        session = SimpleCookie(self.headers.get("Cookie", "")).get("session")
        shown: Shown = defaultdict(str, parse_qsl(url.query))
        shown |= _fields(self.headers.get_content_type(), body)
        shown["session"] = session.value if session else ""
        shown["bearer"] = self.headers.get("Authorization", "").removeprefix("Bearer ")
        shown["x-api-key"] = self.headers.get("x-api-key", "")
        method = "GET" if self.command == "HEAD" else self.command
        try:
            answer = self.server.answer(f"{method} {url.path}", shown)
        except Exception:
            self.hang_up()
            raise
        if answer is HANG_UP:
            self.hang_up()
            return
        is_page = isinstance(answer.body, str)
        content = (str(answer.body) if is_page else json.dumps(answer.body)).encode()
        # The SDK compares the type with ==. If a charset followed it, the SDK would not read the body as JSON.
        headers = {"Content-Type": "text/html" if is_page else "application/json"} | answer.headers
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def hang_up(self) -> None:
        """Send half an answer, because curl silently repeats a request whose connection ends without a byte."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n")
        self.close_connection = True

    do_GET = do_HEAD = do_POST = do_DELETE = _serve

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def _fields(content_type: str, sent: bytes) -> dict[str, Any]:
    """Return the fields of a form, or of `data` in a JSON object, and the whole JSON object as `body`."""
    if content_type == "application/x-www-form-urlencoded":
        return dict(parse_qsl(sent.decode(errors="replace"))) | {"body": {}}
    try:
        body = json.loads(sent) if content_type == "application/json" else None
    except ValueError:
        body = None
    if not isinstance(body, dict):
        return {"body": {}}  # Each step refuses a request without the fields that it needs.
    data = body.get("data")
    fields = data.items() if isinstance(data, dict) else ()
    return {name: value for name, value in fields if isinstance(value, str | bool)} | {"body": body}


class WebServer(ThreadingTCPServer):  # http.server's class looks up the machine's name, which can take seconds.
    request_queue_size = 128  # The default of 5 makes clients wait if many come at once.

    def __init__(self, answer: Callable[[str, Shown], Answer], host: str) -> None:
        super().__init__((host, 0), Handler)
        self.answer = answer
        self._connections: list[tuple[Thread, socket.socket]] = []
        self._loop = Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._loop.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start our own thread, because the library's either outlive close() or block it while a client stays."""
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
            with contextlib.suppress(OSError):  # It is already closed.
                connection.shutdown(socket.SHUT_RDWR)
            thread.join()
