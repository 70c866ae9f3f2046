"""From settings to a logged-in SSH connection: socket → handshake → host key check → login, each through the jump host where
there is one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from paramiko.ssh_exception import IncompatiblePeer

from edgevit.errors import Unreachable, UsageError
from edgevit.transport.hostkeypolicy import HostKeyPolicy, changed, check_host_key, wanted_types
from edgevit.transport.hostkeys import HostKey, lines_for
from edgevit.transport.prompts import Prompts
from edgevit.transport.sockets import CommandSocket, open_socket
from edgevit.transport.ssh_connection import HANDSHAKE_TIMEOUT_S, KEY_TYPES, Connection, algorithms, allowed
from edgevit.transport.ssh_errors import GONE, map_error
from edgevit.transport.ssh_login import log_in
from edgevit.transport.sshconfig import SshSettings, parse_hop, resolve

MAX_HOPS = 8


@dataclass
class Link:
    """A logged-in connection and what carries it, closed together."""

    connection: Connection
    below: list[Callable[[], None]]

    def close(self) -> None:
        _end_all([*self.below, self.connection.close])


def dial(name: str, settings: SshSettings, policy: HostKeyPolicy, prompts: Prompts, hops: int = 0) -> Link:
    """Socket → handshake → host key check → login; each through the jump host where there is one."""
    if hops > MAX_HOPS:
        raise UsageError(
            f"{name}: more than {MAX_HOPS} jump hosts; does one of them jump to itself?", hint=f"ssh -G {settings.host}"
        )
    below: list[Callable[[], None]] = []
    try:
        connection = _handshake(name, settings, policy, prompts, below, hops)
        below.append(connection.close)
        log_in(name, settings, connection, prompts)
        connection.watch(settings.alive_interval_s)
    except BaseException:
        _end_all(below)
        raise
    return Link(connection, below[:-1])


def _handshake(
    name: str, settings: SshSettings, policy: HostKeyPolicy, prompts: Prompts, below: list[Callable[[], None]], hops: int
) -> Connection:
    """A connection whose host key was approved. Nothing secret has been sent yet."""
    known = algorithms(wanted_types(policy, settings))
    every = allowed(KEY_TYPES, settings.host_key_types, "host key type", settings.host)
    types = tuple(k for k in known if k in every) or every
    carrier = Carrier(name, settings, policy, prompts, below, hops)
    try:
        connection = _negotiate(name, settings, carrier.open(), types)
    except NoSharedKeyType:
        # None of the known types is offered any more: look at what is, to name it in the refusal.
        connection = _negotiate(name, settings, carrier.open(), every)
        offered = _key_of(connection)
        connection.close()
        lines = lines_for(policy.known(settings), settings.known_name, settings.known_port)
        raise changed(name, settings, offered, lines, policy) from None
    try:
        check_host_key(name, settings, _key_of(connection), policy, prompts)
    except BaseException:
        connection.close()
        raise
    return connection


def approve_host_key(name: str, settings: SshSettings, policy: HostKeyPolicy, prompts: Prompts) -> str:
    """Meet the host, have its key approved and pinned as ``policy`` says, log in nowhere; its fingerprint."""
    below: list[Callable[[], None]] = []
    try:
        connection = _handshake(name, settings, policy, prompts, below, 0)
        below.append(connection.close)
        return _key_of(connection).fingerprint
    finally:
        _end_all(below)


def _end_all(ends: Sequence[Callable[[], None]]) -> None:
    for end in reversed(ends):
        with contextlib.suppress(*GONE):
            end()


class NoSharedKeyType(Exception):
    """The host offers none of the host key types that were asked for."""


def _key_of(connection: Connection) -> HostKey:
    key = connection.get_remote_server_key()
    return HostKey(key.get_name(), key.asbytes())


def _negotiate(name: str, settings: SshSettings, sock: Any, types: Sequence[str]) -> Connection:
    doing = f"talking SSH to {settings.hostname} port {settings.port}"
    connection = Connection(sock, settings, types)
    try:
        connection.start_client(timeout=connection.banner_timeout + HANDSHAKE_TIMEOUT_S)
        if not connection.initial_kex_done:
            raise Unreachable(f"{name}: {doing}: no answer within {connection.banner_timeout + HANDSHAKE_TIMEOUT_S:g} s")
    except IncompatiblePeer as e:
        connection.close()
        if "host key" in str(e):
            raise NoSharedKeyType from e
        raise map_error(e, name, doing, connected=False) from e
    except Exception as e:
        connection.close()
        raise map_error(e, name, doing, connected=False, hint=f"ssh -v -p {settings.port} {settings.host}") from e
    return connection


@dataclass
class Carrier:
    """Opens what SSH is spoken over: a TCP socket, a ProxyCommand, or a channel through the jump host."""

    name: str
    settings: SshSettings
    policy: HostKeyPolicy
    prompts: Prompts
    below: list[Callable[[], None]]
    hops: int
    jump: Link | None = None

    def open(self) -> Any:
        s = self.settings
        if s.jump:
            return self._through_jump()
        if s.proxy_command:
            command = CommandSocket(self.name, s.proxy_command)
            self.below.append(command.close)
            return command.socket
        sock = open_socket(self.name, s.hostname, s.port, s.connect_timeout_s, s.address_family, s.bind_address)
        self.below.append(sock.close)
        return sock

    def _through_jump(self) -> Any:
        s = self.settings
        before, _, last = s.jump.rpartition(",")
        if self.jump is None:
            user, host, port = parse_hop(last)
            # As OpenSSH does: an earlier hop of the list leads to this one; the first follows its own configuration.
            settings = resolve(host, user=user, port=port, jump=before or None)
            policy = replace(self.policy, fingerprint="", replace=False, role="jump host")
            self.jump = dial(f"{self.name} (jump host {host})", settings, policy, self.prompts, self.hops + 1)
            self.below.append(self.jump.close)
        try:
            return self.jump.connection.open_channel(
                "direct-tcpip", (s.hostname, s.port), ("127.0.0.1", 0), timeout=s.connect_timeout_s
            )
        except Exception as e:
            doing = f"reaching {s.hostname} port {s.port} through {last}"
            raise map_error(e, self.name, doing, connected=False, hint=f"ssh {last} nc -vz {s.hostname} {s.port}") from e
