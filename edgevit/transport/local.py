"""The ``local`` target: a program in a process of its own on this machine."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import IO

from edgevit.errors import DeviceError, LostLink
from edgevit.transport.streams import READ_BYTES, LineFeed, Tail, signal_name

WRITE_SILENCE_S = 120.0
END_S = 5.0


class LocalTransport:
    """Starts programs here. They get a session of their own, so that Ctrl-C in a terminal does not reach them."""

    def __init__(self, name: str = "local") -> None:
        self._name = name
        self._open: list[LocalChannel] = []

    @property
    def name(self) -> str:
        return self._name

    def open(self, argv: Sequence[str]) -> LocalChannel:
        """Start ``argv``. DeviceError where it cannot be started, naming the program."""
        try:
            process = subprocess.Popen(
                list(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            )
        except (OSError, ValueError) as e:
            raise DeviceError(f"{self._name}: {argv[0]!r} cannot be started here: {e}", hint="edgevit doctor") from e
        channel = LocalChannel(self._name, process)
        self._open = [c for c in self._open if not c.closed] + [channel]
        return channel

    def close(self) -> None:
        """End what still runs."""
        for channel in self._open:
            channel.close()
        self._open = []


class LocalChannel:
    """A child process; see :class:`edgevit.transport.base.Channel`."""

    def __init__(self, name: str, process: subprocess.Popen[bytes]) -> None:
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise LostLink(f"{name}: the process was started without pipes")
        self._name = name
        self._process = process
        self._stdin: IO[bytes] = process.stdin
        self._stdout: IO[bytes] = process.stdout
        self._stderr: IO[bytes] = process.stderr
        self._feed, self._tail = LineFeed(name), Tail()
        self._input_open = True
        self.closed = False
        os.set_blocking(self._stdin.fileno(), False)
        self._drains = [
            threading.Thread(target=self._drain_output, daemon=True),
            threading.Thread(target=self._drain_errors, daemon=True),
        ]
        for thread in self._drains:
            thread.start()

    def _drain_output(self) -> None:
        while data := os.read(self._stdout.fileno(), READ_BYTES):
            self._feed.feed(data)
        self._feed.end()

    def _drain_errors(self) -> None:
        while data := os.read(self._stderr.fileno(), READ_BYTES):
            self._tail.feed(data)

    def write(self, data: bytes) -> None:
        if not self._input_open:
            raise LostLink(f"{self._name}: its input is closed already")
        view = memoryview(data)
        last = time.monotonic()
        while view:
            _r, ready, _x = select.select([], [self._stdin.fileno()], [], 1.0)
            if not ready:
                if time.monotonic() - max(last, self._feed.last_data) > WRITE_SILENCE_S:
                    raise LostLink(f"{self._name} took nothing and said nothing for {WRITE_SILENCE_S:g} s")
                continue
            try:
                sent = os.write(self._stdin.fileno(), view[: 1 << 20])
            except BlockingIOError:
                continue
            except OSError as e:
                raise LostLink(f"{self._name}: the program stopped reading: {e.strerror}") from e
            view = view[sent:]
            last = time.monotonic()

    def close_input(self) -> None:
        if self._input_open:
            self._input_open = False
            with contextlib.suppress(BrokenPipeError):
                self._stdin.close()

    def read_line(self, timeout: float) -> bytes:
        return self._feed.read_line(timeout)

    def error_text(self) -> str:
        if self._process.poll() is not None:
            self._drains[1].join(1.0)
        return self._tail.text()

    def wait(self, timeout: float) -> int:
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired as e:
            raise LostLink(f"{self._name}: the program did not end within {timeout:g} s") from e
        if status < 0:
            raise LostLink(f"{self._name}: the program was killed by {signal_name(-status)}")
        return status

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self.close_input()
        self._feed.close()
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for thread in self._drains:
            thread.join(1.0)
        # A detached child may still hold the pipes; closing under a reading thread would hand its descriptor to another.
        if not any(thread.is_alive() for thread in self._drains):
            self._stdout.close()
            self._stderr.close()
