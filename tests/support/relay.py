"""A link of one's own between two programs on this machine, which can fall silent as a vanished peer does."""

from __future__ import annotations

import contextlib
import select
import socket
import threading


class Relay:
    """Forwards every TCP connection made to ``port`` to ``target``. After :meth:`fall_silent` it neither forwards nor closes
    anything: this machine's kernel still acknowledges what is sent to it, so that only a deadline of one's own can tell."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.forwarded = 0
        self._silent = threading.Event()
        self._ended = threading.Event()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._listener.close()
        for thread in self._threads:
            thread.join(5)
        for pair in self._pairs:
            for one in pair:
                one.close()

    def fall_silent(self) -> None:
        self._silent.set()

    def speak(self) -> None:
        """Forward again: new connections alone, those of before are closed."""
        for pair in self._pairs:
            for one in pair:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
        self._silent.clear()

    def _accept(self) -> None:
        self._listener.settimeout(0.1)
        while not self._ended.is_set():
            try:
                near, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            pair = (near, socket.create_connection(self._target))
            self._pairs.append(pair)
            self._threads.append(threading.Thread(target=self._forward, args=pair, daemon=True))
            self._threads[-1].start()

    def _forward(self, near: socket.socket, far: socket.socket) -> None:
        other = {near: far, far: near}
        while not self._ended.is_set():
            if self._silent.is_set():
                self._ended.wait(0.02)
                continue
            for one in select.select([near, far], [], [], 0.05)[0]:
                try:
                    data = one.recv(65536)
                    if self._silent.is_set() and data:
                        break
                    other[one].sendall(data)
                except OSError:
                    data = b""
                self.forwarded += len(data)
                if not data:
                    for closed in (near, far):
                        with contextlib.suppress(OSError):
                            closed.shutdown(socket.SHUT_RDWR)
                    return
