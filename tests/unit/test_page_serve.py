"""The served page: whom it answers, what it says, and that it only reads."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgevit.errors import StoreError, UnknownName, UsageError
from edgevit.report.page_load import Source
from edgevit.report.page_serve import PageServer, is_loopback
from edgevit.results.store import Batch, Store
from tests.support.runs import run


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A store with one batch of one run."""
    made = f"sqlite:///{tmp_path / 'results.sqlite'}"
    with Store(made) as store:
        store.add_batch(Batch("b1", "2025-01-15T10:00:00Z", "bench"))
        store.add_run(run("pi4"))
    return made


@pytest.fixture
def server(url: str) -> Iterator[PageServer]:
    with Store(url, read_only=True) as store:
        made = PageServer(Source(store), "127.0.0.1", 0)
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()
        made.server_close()


def ask(server: PageServer, path: str, host: str | None = None, method: str = "GET") -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=120)  # type: ignore[arg-type]
    connection.putrequest(method, path, skip_host=host is not None)
    if host:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode("utf-8")
    connection.close()
    return answer.status, dict(answer.headers), text


def test_the_page_and_what_is_new(server: PageServer, url: str) -> None:
    status, headers, text = ask(server, "/")
    assert status == 200 and "deit_tiny_patch16_224 on pi4" in text
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src 'self'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
    status, _, text = ask(server, "/data")
    data = json.loads(text)
    assert status == 200 and data["table"]["count"] == 4 and data["live"] is True
    assert ask(server, f"/data?since={data['revision']}")[::2] == (204, "")
    with Store(url) as store:
        store.add_run(run("pi5"))
    status, _, text = ask(server, f"/data?since={data['revision']}")
    assert status == 200 and json.loads(text)["table"]["count"] == 8


def test_without_a_batch_named_the_newest_is_followed(server: PageServer, url: str) -> None:
    with Store(url) as store:
        store.add_batch(Batch("b2", "2025-01-16T10:00:00Z", "study"))
        assert "on pi4" in ask(server, "/")[2], "a batch without a run is not shown yet"
        store.add_run(run("zero", batch="b2"))
    assert "deit_tiny_patch16_224 on zero" in ask(server, "/")[2]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8350", "localhost.evil.example", "127.0.0.1.evil.example", "", "["]
)
def test_a_foreign_host_is_refused(server: PageServer, host: str) -> None:
    """A page of evil.example whose name was made to resolve to this machine would send its own name as Host."""
    status, _, text = ask(server, "/data", host or " ")
    assert status == 403 and "pi4" not in text


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9000", "127.0.0.1:1", "[::1]:8350", "192.168.1.7"])
def test_an_address_is_answered_also_through_a_tunnel(server: PageServer, host: str) -> None:
    assert ask(server, "/data", host)[0] == 200


def test_there_is_nothing_else(server: PageServer) -> None:
    assert ask(server, "/../../etc/passwd")[0] == 404
    assert ask(server, "/", method="POST")[0] == 501
    status, headers, text = ask(server, "/", method="HEAD")
    assert (status, text) == (200, "") and int(headers["Content-Length"]) > 500_000


def test_a_reader_that_goes_away_is_no_error(
    server: PageServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    over = threading.Event()

    def end(request: Any) -> None:
        request.close()
        over.set()

    monkeypatch.setattr(server, "shutdown_request", end)
    with socket.create_connection(server.server_address[:2]) as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset instead of a farewell
        reader.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert over.wait(120)
    assert capfd.readouterr().err == ""


def test_a_store_that_goes_away_is_said_and_ends_nothing(server: PageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: Source) -> str:
        raise StoreError("the store said: disk I/O error")

    with monkeypatch.context() as patched:
        patched.setattr(Source, "revision", gone)
        status, _, text = ask(server, "/data")
        assert status == 503 and "disk I/O error" in text
    assert ask(server, "/data")[0] == 200


def test_a_port_in_use_is_an_error(server: PageServer) -> None:
    with pytest.raises(UsageError, match="cannot be listened on"):
        PageServer(server.source, "127.0.0.1", server.server_address[1])


def test_what_is_loopback() -> None:
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("192.168.1.7") and not is_loopback("board.example")


def test_a_batch_that_is_not_there_is_named(url: str) -> None:
    with Store(url, read_only=True) as store, pytest.raises(UnknownName, match="b9"):
        Source(store, "b9").verify()


def test_the_command_serves_until_interrupted_and_ends_cleanly(url: str, tmp_path: Path) -> None:
    before = (tmp_path / "results.sqlite").read_bytes()
    environment = {**os.environ, "EDGEVIT_DB": url, "EDGEVIT_HOME": str(tmp_path / "home")}
    serving = subprocess.Popen(
        [sys.executable, "-m", "edgevit", "report", "--serve", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert serving.stderr is not None
        line = serving.stderr.readline()
        found = re.fullmatch(r"serving http://127\.0\.0\.1:(\d+)/ until Ctrl-C\n", line)
        assert found is not None, line
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=120)
        connection.request("GET", "/data")
        assert connection.getresponse().status == 200
        connection.close()
        serving.send_signal(signal.SIGINT)
        assert serving.wait(120) == 0
        assert serving.stderr.read() == "stopped serving\n"
    finally:
        serving.kill()
        serving.wait()
    assert (tmp_path / "results.sqlite").read_bytes() == before, "the store was written"
