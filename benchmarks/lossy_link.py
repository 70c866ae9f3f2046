"""A slow and lossy link to a network namespace, in user space: two TUN devices, between them packets are delayed and dropped.

For kernels without ``tc netem``. Real TCP of both kernels runs over it, packet by packet, so loss and round trip act as they do
on a network. What it does not have: a bottleneck's queue (packets wait for the delay alone, their order is kept), jitter, and
offloads (each packet is at most 1500 bytes). Root only.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections import deque
from types import TracebackType

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
NEAR, FAR = "10.215.0.1", "10.215.0.2"


class LossyLink:
    """``rtt_ms`` of round trip, ``loss`` of the packets (a share) lost in each direction. ``address`` is the far end,
    ``through`` what starts a program there."""

    def __init__(self, rtt_ms: float, loss: float, seed: int) -> None:
        self._rtt_ms, self._loss, self._seed = rtt_ms, loss, seed
        self._name = f"evlink{os.getpid()}"
        self.address = FAR
        self.through = ("ip", "netns", "exec", self._name)

    def __enter__(self) -> LossyLink:
        _run("ip", "netns", "add", self._name)
        self._near, self._far = _open_tun("evnear"), _open_tun("evfar")
        _run("ip", "link", "set", "evfar", "netns", self._name)
        _run("ip", "addr", "add", NEAR, "peer", FAR, "dev", "evnear")
        _run("ip", "link", "set", "evnear", "up")
        _run(*self.through, "ip", "addr", "add", FAR, "peer", NEAR, "dev", "evfar")
        _run(*self.through, "ip", "link", "set", "evfar", "up")
        _run(*self.through, "ip", "link", "set", "lo", "up")
        numbers = [self._near, self._far, self._rtt_ms / 2000, self._loss, self._seed]
        argv = [sys.executable, __file__, *map(str, numbers)]
        self._relay = subprocess.Popen(argv, pass_fds=(self._near, self._far))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._relay.terminate()
        self._relay.wait()
        os.close(self._near)
        os.close(self._far)
        _run("ip", "netns", "del", self._name)


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True)


def _open_tun(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return fd


def relay(near: int, far: int, delay_s: float, loss: float, seed: int) -> None:
    """Forward between the two for good."""
    draw = random.Random(seed)
    waiting: dict[int, deque[tuple[float, bytes]]] = {near: deque(), far: deque()}
    other = {near: far, far: near}
    while True:
        now = time.monotonic()
        due = min((queue[0][0] for queue in waiting.values() if queue), default=now + 1.0)
        for source in select.select([near, far], [], [], max(0.0, due - now))[0]:
            for _ in range(64):
                try:
                    packet = os.read(source, 65536)
                except BlockingIOError:
                    break
                if draw.random() >= loss:
                    waiting[other[source]].append((time.monotonic() + delay_s, packet))
        now = time.monotonic()
        for target, queue in waiting.items():
            while queue and queue[0][0] <= now:
                os.write(target, queue.popleft()[1])


if __name__ == "__main__":
    relay(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))
