"""The agent's standard streams: requests in, one JSON object a line out, and a sign of life in between."""

from __future__ import annotations

import contextlib
import json
import os
import select
import threading
import time
from typing import Any, Dict, Iterator, List, Optional

from device_agents import wire
from device_agents.errors import Refused

CHUNK = 1024 * 1024
ALIVE_AFTER_S = 1.5
"""Silence after which ``alive`` is said; the wire promises at most 2 s."""


class HostGone(Exception):
    """Nobody reads standard output any more."""


class Console:
    """Reads file descriptor 0 and writes file descriptor 1 directly: no buffering layer can reorder or withhold anything."""

    def __init__(self, fd_in: int = 0, fd_out: int = 1) -> None:
        self._in = fd_in
        self._out = fd_out
        self._pending = b""
        self._lock = threading.Lock()
        self._last = time.monotonic()
        _widen_pipe(fd_in)

    def emit(self, message: Dict[str, Any]) -> None:
        """Write one message as one line. Raises :class:`HostGone` when nobody reads any more."""
        self.emit_line(json.dumps(message, separators=(",", ":"), allow_nan=False).encode("utf-8"))

    def emit_line(self, line: bytes) -> None:
        """Write a message that is JSON already."""
        data = memoryview(line + b"\n")
        with self._lock:
            try:
                while data:
                    data = data[os.write(self._out, data) :]
            except OSError as e:
                raise HostGone(str(e)) from e
            self._last = time.monotonic()

    def progress(self, stage: str, done: int, total: int, unit: str, text: str = "") -> None:
        self.emit({"type": "progress", "stage": stage, "done": done, "total": total, "unit": unit, "text": text})

    def alive(self) -> None:
        """Say ``alive`` if nothing was said for a while."""
        if time.monotonic() - self._last >= ALIVE_AFTER_S:
            self.emit({"type": "alive"})

    @contextlib.contextmanager
    def heartbeat(self) -> Iterator[None]:
        """Says ``alive`` from a thread while the body works in silence."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(0.25):
                try:
                    self.alive()
                except HostGone:
                    return

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def read_line(self, max_bytes: int, what: str, idle_s: Optional[float] = None) -> bytes:
        """The next line without its newline; the end of input also ends a line.

        Raises :class:`Refused` ``bad-request`` over ``max_bytes``, ``interrupted`` after ``idle_s`` seconds of silence.
        """
        parts: List[bytes] = []
        size = 0
        while True:
            chunk = self._pending or self._read(idle_s, what)
            self._pending = b""
            if not chunk:
                return b"".join(parts)
            line, newline, rest = chunk.partition(b"\n")
            parts.append(line)
            size += len(line)
            if size > max_bytes:
                raise Refused("bad-request", "{}: over {:,} bytes on standard input".format(what, max_bytes))
            if newline:
                self._pending = rest
                return b"".join(parts)

    def read_json(self, what: str, max_bytes: int = wire.MAX_JOB_BYTES) -> Any:
        """One line of JSON; :class:`Refused` ``bad-request`` where it is none."""
        try:
            return wire.parse_json(self.read_line(max_bytes, what), what, max_bytes)
        except wire.WireError as e:
            raise Refused("bad-request", str(e)) from e

    def read_some(self, at_most: int, what: str, idle_s: Optional[float] = None) -> bytes:
        """One to ``at_most`` bytes, ``b""`` at the end of input; ``interrupted`` after ``idle_s`` seconds of silence."""
        if self._pending:
            chunk, self._pending = self._pending[:at_most], self._pending[at_most:]
            return chunk
        return self._read(idle_s, what, at_most)

    def read_exactly(self, size: Any, what: str, max_bytes: int = 256 * 1024 * 1024) -> bytes:
        """``size`` bytes, or :class:`Refused`: ``bad-request`` for a size out of range, ``interrupted`` when fewer come."""
        if isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= max_bytes:
            raise Refused("bad-request", "{}: {!r} is not a size from 1 to {:,} bytes".format(what, size, max_bytes))
        parts, left = [], size
        while left:
            chunk = self.read_some(left, what, 60.0)
            if not chunk:
                raise Refused("interrupted", "{}: the host stopped {:,} bytes before the end".format(what, left))
            parts.append(chunk)
            left -= len(chunk)
        return b"".join(parts)

    def _read(self, idle_s: Optional[float], what: str, at_most: int = CHUNK) -> bytes:
        if idle_s is not None and not select.select([self._in], [], [], idle_s)[0]:
            raise Refused("interrupted", "{}: no byte arrived for {:.0f} s".format(what, idle_s))
        return os.read(self._in, min(at_most, CHUNK))


def _widen_pipe(fd: int) -> None:
    """A pipe holds 64 KiB; where Linux lets us, 1 MiB saves most of the wake-ups of an upload. No pipe: nothing to widen."""
    import fcntl

    try:
        fcntl.fcntl(fd, getattr(fcntl, "F_SETPIPE_SZ", 1031), CHUNK)
    except OSError:
        pass
