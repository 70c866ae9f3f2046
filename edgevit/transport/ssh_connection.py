"""An SSH connection: which algorithms it speaks, and when a peer that fell silent is given up.

TCP_USER_TIMEOUT on the socket (:mod:`edgevit.transport.sockets`) finds a peer that is gone; the keep-alive deadline here also
finds one behind a jump host, where the "socket" is a channel.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import paramiko
from paramiko.common import MSG_CHANNEL_REQUEST, cMSG_GLOBAL_REQUEST
from paramiko.packet import Packetizer

from edgevit.errors import UsageError
from edgevit.transport.sockets import quick_ack_of
from edgevit.transport.sshconfig import SshSettings

# A library's own log lines are not for the people who use edgevit; whoever wants them sets up logging.
logging.getLogger("paramiko").addHandler(logging.NullHandler())

HANDSHAKE_TIMEOUT_S = 30.0
LOGIN_TIMEOUT_S = 30.0
ALIVE_INTERVAL_S = 5.0
# Longer than the kernel's own: through a jump host, and where a peer's kernel still answers, only sshd can tell, and a board
# that swaps may keep it waiting.
ALIVE_DEADLINE_S = 20.0

# AES-GCM is the fastest that paramiko has by far (one pass, in OpenSSL) and no worse than the rest; CBC and 3DES are left out.
CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr", "aes192-ctr", "aes256-ctr")
KEX_FIRST = ("mlkem768x25519-sha256", "curve25519-sha256", "curve25519-sha256@libssh.org")
KEY_TYPES = ("ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "rsa-sha2-512", "rsa-sha2-256")
MACS = ("hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com", "hmac-sha2-256", "hmac-sha2-512")


class HeardPacketizer(Packetizer):
    """Notes when the peer was last heard, for the keep-alive deadline, asks it for a sign of life, and acknowledges at once."""

    last_heard = 0.0
    last_asked = 0.0
    interval: float | None = None
    ask_alive: Callable[[], None] | None = None
    quick_ack: Callable[[], None] | None = None

    def _check_keepalive(self) -> None:
        """Called ten times a second while nothing comes. paramiko's own asks once nothing was heard *or sent*, so never while
        others only send: a jump host was given up with the device behind it that had vanished."""
        now = time.monotonic()
        if self.ask_alive is not None and self.interval and now > max(self.last_heard, self.last_asked) + self.interval:
            self.last_asked = now
            self.ask_alive()

    def read_message(self) -> Any:
        message = super().read_message()
        self.last_heard = time.monotonic()
        if self.quick_ack is not None:
            self.quick_ack()
        return message


def _note_signal(channel: Any, message: Any) -> None:
    """paramiko forgets ``exit-signal``; it tells a killed program from a lost link."""
    copy = paramiko.Message(message.get_remainder())
    if copy.get_text() == "exit-signal":
        copy.get_boolean()
        channel.edgevit_signal = f"SIG{copy.get_text()[:20]}"
    channel._handle_request(message)


class Connection(paramiko.Transport):
    """A transport that asks for plain host keys only, and gives up a peer that falls silent."""

    _channel_handler_table: ClassVar[dict[int, Any]] = {
        **paramiko.Transport._channel_handler_table,  # type: ignore[attr-defined]
        MSG_CHANNEL_REQUEST: _note_signal,
    }

    def __init__(self, sock: Any, settings: SshSettings, key_types: Sequence[str]) -> None:
        super().__init__(sock, packetizer_class=HeardPacketizer)
        self.gave_up = ""
        self._packets = cast(HeardPacketizer, self.packetizer)
        self._packets.quick_ack = quick_ack_of(sock)
        self._watch_end = threading.Event()
        self._key_types = tuple(key_types)
        options = self.get_security_options()
        options.ciphers = allowed(CIPHERS, settings.ciphers, "cipher", settings.host)
        options.digests = allowed(MACS, settings.macs, "MAC", settings.host)
        known = [k for k in (*KEX_FIRST, *options.kex) if k in self._kex_info]  # type: ignore[attr-defined]
        options.kex = allowed(tuple(dict.fromkeys(known)), settings.kex, "key exchange", settings.host)
        self.banner_timeout = settings.connect_timeout_s
        self.handshake_timeout = HANDSHAKE_TIMEOUT_S
        self.auth_timeout = LOGIN_TIMEOUT_S

    @property
    def preferred_keys(self) -> tuple[str, ...]:
        """Host key algorithms, without the certificate variants that paramiko adds: no authority is checked here."""
        return self._key_types

    def watch(self, interval: float | None) -> None:
        """Ask for a sign of life whenever nothing came for ``interval`` (s; None: ours, and never seldomer than that); close
        once nothing came for the deadline."""
        self._packets.last_heard = time.monotonic()
        self._packets.interval = min(interval or ALIVE_INTERVAL_S, ALIVE_INTERVAL_S)
        self._packets.ask_alive = self._ask_alive
        threading.Thread(target=self._watch, args=(ALIVE_DEADLINE_S,), daemon=True, name="edgevit-ssh-watch").start()

    def why_lost(self) -> str:
        """What ended the connection; where the kernel did for want of acknowledgements, paramiko does not tell. One that goes
        through a jump host ends with the connection to that."""
        told = self.gave_up or str(self.saved_exception or "")
        carrier = self.sock.get_transport() if isinstance(self.sock, paramiko.Channel) else None
        if not told and isinstance(carrier, Connection) and not carrier.is_active():
            return f"its jump host is lost: {carrier.why_lost()}"
        if told:
            return told
        silent = time.monotonic() - self._packets.last_heard
        return "the connection was closed" + (f", {silent:.0f} s after the last word" if silent > 1 else "")

    def _ask_alive(self) -> None:
        # To wait while keys are exchanged, or for another thread whose message finds no room, would stop the reading.
        if not self.clear_to_send.is_set() or self.clear_to_send_lock.locked():
            return
        message = paramiko.Message()
        message.add_byte(cMSG_GLOBAL_REQUEST)
        message.add_string("keepalive@openssh.com")
        message.add_boolean(True)
        self._send_user_message(message)  # type: ignore[attr-defined]

    def _watch(self, deadline: float) -> None:
        while not self._watch_end.wait(1.0) and self.is_active():
            silent = time.monotonic() - self._packets.last_heard
            if silent > deadline:
                self.gave_up = f"nothing was heard for {silent:.0f} s"
                self.close()

    def close(self) -> None:
        self._watch_end.set()
        super().close()


def allowed(ours: tuple[str, ...], configured: tuple[str, ...], what: str, host: str) -> tuple[str, ...]:
    """Ours in our order, without those that the person's ssh_config leaves out."""
    left = tuple(n for n in ours if not configured or n in configured)
    if not left:
        raise UsageError(
            f"ssh_config for {host} allows no {what} that edgevit has: it lists {', '.join(configured)}; "
            f"edgevit has {', '.join(ours)}",
            hint=f"ssh -G {host}",
        )
    return left


def algorithms(types: Sequence[str]) -> tuple[str, ...]:
    """Key types as known_hosts names them → signature algorithms."""
    out: list[str] = []
    for kind in types:
        out += ["rsa-sha2-512", "rsa-sha2-256"] if kind == "ssh-rsa" else [kind]
    return tuple(k for k in KEY_TYPES if k in out)
