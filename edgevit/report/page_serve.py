"""The page served while results come in: the standard library's HTTP server, the store read only.

A web page elsewhere must not read results through a name that resolves to this machine (DNS rebinding), so a request is
answered only where its Host header is an address, ``localhost``, this machine's own name or the one it was told to listen on.
The page asks for ``data?since=REVISION`` and gets 204 while nothing has come.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from edgevit.errors import StoreError, UsageError
from edgevit.report.page import policy, render_data, script_json
from edgevit.report.page_data import page_data
from edgevit.report.page_load import Source


class PageServer(ThreadingHTTPServer):
    """Serves the page of ``source``. UsageError where ``host`` and ``port`` cannot be listened on."""

    daemon_threads = True
    # The port of a server that just ended may be taken again at once.
    allow_reuse_address = True

    def __init__(self, source: Source, host: str, port: int) -> None:
        self.source = source
        self.host = host
        self._lock = threading.Lock()
        self._known: tuple[str, str, str] | None = None
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except OSError as e:
            hint = "edgevit report --serve --port 0 takes a free one"
            raise UsageError(f"{host} port {port} cannot be listened on: {e.strerror or e}", hint=hint) from e

    @property
    def url(self) -> str:
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{name}:{self.server_address[1]}/"

    def current(self) -> tuple[str, str, str]:
        """(revision, page, JSON of the page's data) as of now; made anew only when something has come."""
        with self._lock:
            revision = self.source.revision()
            if self._known is None or self._known[0] != revision:
                data = {**page_data(self.source.load(live=True)), "revision": revision}
                self._known = revision, render_data(data), script_json(data)
            return self._known

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that went away in mid-answer, as a phone does, is no error; anything else is shown."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    def accepts(self, host: str) -> bool:
        """Whether a request with this Host header may be answered."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in {"localhost", self.host.lower(), socket.gethostname().lower()}:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve_until_interrupted(server: PageServer, started: Callable[[str], None]) -> None:
    """Serve until Ctrl-C, then let go of the port. ``started`` gets the address once it listens."""
    with server:
        started(server.url)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            pass


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    server_version = "edgevit"
    sys_version = ""
    timeout = 30

    def do_GET(self) -> None:
        if not self.server.accepts(self.headers.get("Host", "")):
            self._answer(HTTPStatus.FORBIDDEN, "this Host is not served here: use the address that edgevit report printed\n")
            return
        asked = urlsplit(self.path)
        if asked.path not in ("/", "/data"):
            self._answer(HTTPStatus.NOT_FOUND, "there is / and /data\n")
            return
        try:
            revision, page, data = self.server.current()
        except StoreError as e:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{e}\n")
            return
        if asked.path == "/":
            self._answer(HTTPStatus.OK, page, "text/html")
        elif parse_qs(asked.query).get("since") == [revision]:
            self._answer(HTTPStatus.NO_CONTENT, "")
        else:
            self._answer(HTTPStatus.OK, data, "application/json")

    do_HEAD = do_GET

    def _answer(self, status: HTTPStatus, text: str, kind: str = "text/plain") -> None:
        body = text.encode("utf-8")
        self.send_response(status)
        if status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", f"{policy(live=True)}; frame-ancestors 'none'")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD" and status != HTTPStatus.NO_CONTENT:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Every two seconds one line for each page that is open would say nothing."""
