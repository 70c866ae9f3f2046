"""What a program on a device writes, kept between the thread that drains it and the one that reads it."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque

from edgevit.errors import LostLink

MAX_LINE_BYTES = 64 * 1024 * 1024
ERROR_TAIL_BYTES = 64 * 1024
READ_BYTES = 64 * 1024
LINE_COSTS_BYTES = 64
"""What a line that waits takes here beside its own bytes: without it short ones would cost many times what is counted."""


class LineFeed:
    """Standard output: bytes in from a draining thread, whole lines out.

    The drain is held back only once more than :data:`MAX_LINE_BYTES` wait to be read, so that a flood costs bounded memory.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._lines: deque[bytes] = deque()
        self._rest: list[bytes] = []
        self._rest_bytes = 0
        self._waiting_bytes = 0
        self._ended = False
        self._closed = False
        self._loss = ""
        self.last_data = time.monotonic()

    def feed(self, data: bytes) -> None:
        """Called by the draining thread alone."""
        first, *more = data.split(b"\n")
        with self._changed:
            self.last_data = time.monotonic()
            while self._waiting_bytes > MAX_LINE_BYTES and not self._closed:
                self._changed.wait()
            if self._closed or self._loss:
                return
            self._rest.append(first)
            self._rest_bytes += len(first)
            for part in more:
                line = b"".join(self._rest)
                self._lines.append(line)
                self._waiting_bytes += len(line) + LINE_COSTS_BYTES
                self._rest, self._rest_bytes = [part], len(part)
            if self._rest_bytes > MAX_LINE_BYTES:
                self._loss = f"{self._name} sent a line of more than {MAX_LINE_BYTES:,} bytes, which no agent does"
                self._rest, self._rest_bytes = [], 0
            self._changed.notify_all()

    def end(self, loss: str = "") -> None:
        """No more comes. ``loss`` says how the link was lost; empty for an orderly end."""
        with self._changed:
            self._ended = True
            self._loss = self._loss or loss
            if self._rest_bytes and not self._loss:
                self._lines.append(b"".join(self._rest))
                self._waiting_bytes += self._rest_bytes + LINE_COSTS_BYTES
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody will read on: lets the draining thread run empty."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def read_line(self, timeout: float) -> bytes:
        """The next line without its newline, ``b""`` at the end. LostLink after ``timeout`` seconds in which nothing came."""
        started = time.monotonic()
        with self._changed:
            while not self._lines:
                if self._loss:
                    raise LostLink(self._loss)
                if self._ended:
                    return b""
                left = max(started, self.last_data) + timeout - time.monotonic()
                if left <= 0:
                    raise LostLink(f"{self._name} said nothing for {timeout:g} s")
                self._changed.wait(left)
            line = self._lines.popleft()
            self._waiting_bytes -= len(line) + LINE_COSTS_BYTES
            self._changed.notify_all()
            return line


class Tail:
    """Standard error: always drained, the last :data:`ERROR_TAIL_BYTES` kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept = bytearray()

    def feed(self, data: bytes) -> None:
        with self._lock:
            self._kept += data
            del self._kept[:-ERROR_TAIL_BYTES]

    def text(self) -> str:
        with self._lock:
            return self._kept.decode("utf-8", "replace")


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
