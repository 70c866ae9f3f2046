"""What the transports are made of: lines kept between two threads, and plain sockets."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from edgevit.errors import Unreachable
from edgevit.transport.sockets import open_socket
from edgevit.transport.streams import MAX_LINE_BYTES, LineFeed


@pytest.mark.parametrize("line", [b"\n", b"{}\n"])
def test_a_flood_of_short_lines_is_held_back_before_it_takes_the_memory(line: bytes) -> None:
    """Each of them costs many times its own bytes here."""
    feed, chunk, taken = LineFeed("box"), line * (65_536 // len(line)), [0]

    def flood() -> None:
        while not feed._closed and taken[0] < 2000:
            feed.feed(chunk)
            taken[0] += 1

    thread = threading.Thread(target=flood, daemon=True)
    thread.start()
    thread.join(0.2)
    while thread.is_alive() and feed._waiting_bytes <= MAX_LINE_BYTES:
        thread.join(0.2)
    waiting = len(feed._lines)
    first = feed.read_line(5)
    feed.close()
    thread.join(10)
    assert taken[0] < 2000 and waiting < 1_200_000, f"{waiting:,} lines were let in"
    assert first == line[:-1] and not thread.is_alive()


def test_an_address_keeps_the_interface_it_is_reached_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link-local address (``fe80::1%eth0``, or what ``pi.local`` stands for) leads nowhere without it."""
    found = ("fe80::1", 22, 0, 7)
    met: list[Any] = []

    class Socket(socket.socket):
        def connect(self, address: Any) -> None:
            met.append(address)
            raise OSError("nobody there")

    def resolve(host: str, *_: Any) -> list[Any]:
        return [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", found if "%" in host else (*found[:3], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "socket", Socket)
    with pytest.raises(Unreachable, match="fe80::1"):
        open_socket("box", "fe80::1%eth0", 22, 5.0)
    assert met == [found]
