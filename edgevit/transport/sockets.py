"""Plain sockets to a host: every step with a time-out, and the kernel told to give a vanished peer up."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any

from edgevit.errors import Unreachable

# A peer whose kernel acknowledges nothing for this long is gone, whatever its programs do. Without it a write to a vanished
# host blocks for a quarter of an hour. An upload that was given up too early goes on where it stopped.
USER_TIMEOUT_S = 10
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT = 4, 3, 2

_FAMILIES = {"any": socket.AF_UNSPEC, "inet": socket.AF_INET, "inet6": socket.AF_INET6}


def open_socket(name: str, host: str, port: int, timeout: float, family: str = "any", bind_address: str = "") -> socket.socket:
    """A TCP connection to the first address of ``host`` that answers within ``timeout`` seconds, all tries together.

    Raises Unreachable naming the target, the address and what each try met.
    """
    try:
        found = socket.getaddrinfo(host, port, _FAMILIES.get(family, socket.AF_UNSPEC), socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as e:
        raise Unreachable(f"{name}: the name {host!r} was not found: {e}", hint=f"ping {host}") from e
    deadline = time.monotonic() + timeout
    met = []
    for one, _kind, _proto, _canonical, address in found:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        try:
            sock = _connect(one, address, left, bind_address)
        except OSError as e:
            met.append(f"{address[0]}: {e.strerror or e}")
            continue
        set_options(sock)
        return sock
    raise Unreachable(
        f"{name}: {host} port {port} could not be reached within {timeout:g} s ({'; '.join(met) or 'no answer'})",
        hint=f"is it on, and does it run an SSH server? ssh -p {port} {host}",
    )


def _connect(family: int, address: Any, timeout: float, bind_address: str) -> socket.socket:
    """``address`` whole, as getaddrinfo gave it: a link-local one leads nowhere without its interface. Raises OSError."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        if bind_address:
            sock.bind((bind_address, 0))
        sock.connect(address)
    except OSError:
        sock.close()
        raise
    return sock


def set_options(sock: socket.socket) -> None:
    """No delay for small packets; keep-alive probes; give up on a silent peer after :data:`USER_TIMEOUT_S`."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": KEEPALIVE_IDLE_S,
        "TCP_KEEPINTVL": KEEPALIVE_INTERVAL_S,
        "TCP_KEEPCNT": KEEPALIVE_COUNT,
        "TCP_USER_TIMEOUT": USER_TIMEOUT_S * 1000,
    }
    for option, value in options.items():
        # Not every system knows all four; the transport's own keep-alive deadline holds everywhere.
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def quick_ack_of(sock: object) -> Callable[[], None] | None:
    """What makes the kernel acknowledge the packet just read at once; None where ``sock`` is no TCP socket of Linux.

    sshd holds its second small answer back until the first is acknowledged (Nagle), and a kernel waits 40 ms before it does;
    that would be paid for every program started. The option wears off, so it is set again after each packet.
    """
    option = getattr(socket, "TCP_QUICKACK", None)
    if option is None or not isinstance(sock, socket.socket) or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return None

    def acknowledge() -> None:
        # A socket closed in between needs no acknowledgement; whoever reads next learns that it is closed.
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, option, 1)

    return acknowledge


class CommandSocket:
    """The near end of a ProxyCommand: a socket whose other end is the command's standard input and output."""

    def __init__(self, name: str, command: str) -> None:
        near, far = socket.socketpair()
        self.socket = near
        try:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", f"exec {command}"],
                stdin=far.fileno(),
                stdout=far.fileno(),
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as e:
            self.socket.close()
            raise Unreachable(f"{name}: the ProxyCommand {command!r} could not be started: {e.strerror}") from e
        finally:
            far.close()

    def close(self) -> None:
        self.socket.close()
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
