"""Programs on a device over SSH.

What paramiko leaves open is closed here and in the other ``ssh`` files, the only ones that import it; none of its types or
exceptions leaves them. Every step has a time-out; both output streams are drained all the time; a peer that falls silent is
given up; an exit status of −1 is a lost link. Nothing is ever forwarded.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from edgevit.errors import LostLink
from edgevit.transport.hostkeypolicy import HostKeyPolicy
from edgevit.transport.prompts import Prompts
from edgevit.transport.ssh_connect import Link, dial
from edgevit.transport.ssh_connection import Connection
from edgevit.transport.ssh_errors import GONE, map_error
from edgevit.transport.sshconfig import SshSettings
from edgevit.transport.streams import READ_BYTES, LineFeed, Tail, signal_name

CHANNEL_TIMEOUT_S = 30.0
WRITE_SILENCE_S = 120.0


class SshTransport:
    """One connection to one device; every program on it is a channel of its own."""

    def __init__(self, name: str, link: Link) -> None:
        self._name = name
        self._link = link

    @classmethod
    def connect(cls, name: str, settings: SshSettings, policy: HostKeyPolicy, prompts: Prompts) -> SshTransport:
        """Connect and log in. Unreachable, HostKeyError or LoginError where that fails, UsageError for bad settings."""
        return cls(name, dial(name, settings, policy, prompts))

    @property
    def name(self) -> str:
        return self._name

    def open(self, argv: Sequence[str]) -> SshChannel:
        connection = self._link.connection
        doing = f"starting {argv[0]!r}"
        try:
            channel = connection.open_session(timeout=CHANNEL_TIMEOUT_S)
            channel.exec_command(shlex.join(argv))
        except Exception as e:
            if connection.gave_up:
                raise LostLink(f"{self._name}: {doing}: {connection.gave_up}") from e
            raise map_error(e, self._name, doing, connected=True) from e
        return SshChannel(self._name, channel, connection)

    def close(self) -> None:
        self._link.close()


class SshChannel:
    """A program on the device; see :class:`edgevit.transport.base.Channel`."""

    def __init__(self, name: str, channel: Any, connection: Connection) -> None:
        self._name = name
        self._channel = channel
        self._connection = connection
        self._feed, self._tail = LineFeed(name), Tail()
        # Reading waits for data however long; the limits on silence are held by LineFeed and write.
        channel.settimeout(1.0)
        self._drains = [
            threading.Thread(target=self._drain, args=(channel.recv, self._feed.feed), daemon=True),
            threading.Thread(target=self._drain, args=(channel.recv_stderr, self._tail.feed), daemon=True),
        ]
        for thread in self._drains:
            thread.start()

    def _drain(self, receive: Callable[[int], bytes], feed: Callable[[bytes], None]) -> None:
        is_output = feed == self._feed.feed
        while True:
            try:
                data = receive(READ_BYTES)
            except TimeoutError:
                continue
            except GONE:
                data = b""
            if not data:
                break
            feed(data)
        if is_output:
            orderly = self._channel.eof_received or self._channel.exit_status != -1
            self._feed.end("" if orderly else self._loss())

    def _loss(self) -> str:
        killed = getattr(self._channel, "edgevit_signal", "")
        if killed:
            return f"{self._name}: the program was killed by {killed}"
        return f"{self._name}: the connection was lost: {self._connection.why_lost()}"

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        # One SSH packet a time: handing paramiko more makes it copy the rest again for every packet.
        step = max(1024, self._channel.out_max_packet_size - 64)
        last = time.monotonic()
        while view:
            try:
                sent = self._channel.send(bytes(view[:step]))
            except TimeoutError as e:
                if time.monotonic() - max(last, self._feed.last_data) > WRITE_SILENCE_S:
                    raise LostLink(f"{self._name} took nothing and said nothing for {WRITE_SILENCE_S:g} s") from e
                continue
            except GONE as e:
                raise LostLink(self._loss()) from e
            if not sent:
                raise LostLink(self._loss())
            view = view[sent:]
            last = time.monotonic()

    def close_input(self) -> None:
        try:
            self._channel.shutdown_write()
        except GONE as e:
            raise LostLink(self._loss()) from e

    def read_line(self, timeout: float) -> bytes:
        return self._feed.read_line(timeout)

    def error_text(self) -> str:
        # The exit status can overtake what was written before it; a child that keeps the stream open must not hold us up.
        if self._channel.eof_received or self._channel.closed or self._channel.status_event.is_set():
            self._drains[1].join(5.0)
        return self._tail.text()

    def wait(self, timeout: float) -> int:
        if not self._channel.status_event.wait(timeout):
            raise LostLink(f"{self._name}: the program did not end within {timeout:g} s")
        status = int(self._channel.exit_status)
        if status == -1:
            raise LostLink(self._loss())
        if 128 < status < 128 + signal.NSIG:
            # A login shell that stayed in between tells of a signal like this; no program of ours ends so.
            raise LostLink(f"{self._name}: the program was killed by {signal_name(status - 128)}")
        return status

    def close(self) -> None:
        self._feed.close()
        with contextlib.suppress(*GONE):
            self._channel.close()
