"""Programs on a device over SSH. The only file that imports paramiko; none of its types or exceptions leaves it.

What paramiko leaves open is closed here: every step has a time-out; both output streams are drained all the time; a peer that
falls silent is given up (TCP_USER_TIMEOUT on a socket, and a keep-alive deadline of our own, which also works through a jump
host, where the "socket" is a channel); an exit status of −1 is a lost link. Nothing is ever forwarded.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import paramiko
from paramiko.agent import AgentSSH
from paramiko.auth_strategy import AuthFailure
from paramiko.ber import BERException
from paramiko.buffered_pipe import PipeTimeout
from paramiko.common import MSG_CHANNEL_REQUEST, cMSG_GLOBAL_REQUEST
from paramiko.hostkeys import InvalidHostKey
from paramiko.packet import Packetizer
from paramiko.pkey import UnknownKeyType
from paramiko.ssh_exception import IncompatiblePeer, MessageOrderError

from edgevit.errors import DeviceError, EdgevitError, HostKeyError, LoginError, LostLink, Unreachable, UsageError
from edgevit.transport.hostkeypolicy import HostKeyPolicy, changed, check_host_key, wanted_types
from edgevit.transport.hostkeys import HostKey, fingerprint_of, lines_for
from edgevit.transport.prompts import Prompts
from edgevit.transport.sockets import CommandSocket, open_socket, quick_ack_of
from edgevit.transport.sshconfig import SshSettings, parse_hop, resolve
from edgevit.transport.streams import READ_BYTES, LineFeed, Tail, signal_name

# A library's own log lines are not for the people who use edgevit; whoever wants them sets up logging.
logging.getLogger("paramiko").addHandler(logging.NullHandler())

HANDSHAKE_TIMEOUT_S = 30.0
LOGIN_TIMEOUT_S = 30.0
CHANNEL_TIMEOUT_S = 30.0
WRITE_SILENCE_S = 120.0
ALIVE_INTERVAL_S = 5.0
# Longer than the kernel's own: through a jump host, and where a peer's kernel still answers, only sshd can tell, and a board
# that swaps may keep it waiting.
ALIVE_DEADLINE_S = 20.0
MAX_HOPS = 8

# AES-GCM is the fastest that paramiko has by far (one pass, in OpenSSL) and no worse than the rest; CBC and 3DES are left out.
CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr", "aes192-ctr", "aes256-ctr")
KEX_FIRST = ("mlkem768x25519-sha256", "curve25519-sha256", "curve25519-sha256@libssh.org")
KEY_TYPES = ("ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "rsa-sha2-512", "rsa-sha2-256")
MACS = ("hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com", "hmac-sha2-256", "hmac-sha2-512")

# paramiko's exceptions, most specific first: what each is while connecting, and what once connected.
MAPPED: tuple[tuple[type[BaseException], type[EdgevitError], type[EdgevitError]], ...] = (
    (paramiko.BadHostKeyException, HostKeyError, HostKeyError),
    (paramiko.BadAuthenticationType, LoginError, LoginError),
    (paramiko.ssh_exception.PartialAuthentication, LoginError, LoginError),
    (paramiko.PasswordRequiredException, LoginError, LoginError),
    (paramiko.ssh_exception.UnableToAuthenticate, LoginError, LoginError),
    (AuthFailure, LoginError, LoginError),
    (paramiko.AuthenticationException, LoginError, LoginError),
    (paramiko.ChannelException, Unreachable, DeviceError),
    (IncompatiblePeer, Unreachable, LostLink),
    (paramiko.ProxyCommandFailure, Unreachable, LostLink),
    (paramiko.CouldNotCanonicalize, UsageError, UsageError),
    (paramiko.ConfigParseError, UsageError, UsageError),
    (MessageOrderError, Unreachable, LostLink),
    (UnknownKeyType, LoginError, LoginError),
    (paramiko.SFTPError, DeviceError, DeviceError),
    (BERException, LoginError, LoginError),
    (InvalidHostKey, HostKeyError, HostKeyError),
    (PipeTimeout, Unreachable, LostLink),
    (paramiko.ssh_exception.NoValidConnectionsError, Unreachable, LostLink),
    (paramiko.SSHException, Unreachable, LostLink),
    (socket.gaierror, Unreachable, LostLink),
    (TimeoutError, Unreachable, LostLink),
    (EOFError, Unreachable, LostLink),
    (OSError, Unreachable, LostLink),
)


def map_error(error: BaseException, name: str, doing: str, *, connected: bool, hint: str = "") -> EdgevitError:
    """One of ours for anything that paramiko, its cryptography or a socket raised; what is ours already stays as it is."""
    if isinstance(error, EdgevitError):
        return error
    said = str(error).strip() or type(error).__name__
    for foreign, before, after in MAPPED:
        if isinstance(error, foreign):
            return (after if connected else before)(f"{name}: {doing}: {said}", hint=hint)
    # A damaged packet shows as an exception of the cryptography package or a ValueError in the reading thread.
    ours = LostLink if connected else Unreachable
    return ours(f"{name}: {doing}: {type(error).__name__}: {said}", hint=hint)


def lookup_in_config(text: str, host: str) -> dict[str, list[str]]:
    """paramiko's reader for ssh_config, for machines without an OpenSSH client. UsageError where it gives up."""
    try:
        found = paramiko.SSHConfig.from_text(text).lookup(host)
    except (paramiko.SSHException, ValueError, KeyError, IndexError) as e:
        raise UsageError(f"ssh_config for {host}: {e}", hint="sudo apt install openssh-client") from e
    values: dict[str, Any] = dict(found)
    return {k: list(v) if isinstance(v, list) else ["none" if v is None else str(v)] for k, v in values.items()}


class _HeardPacketizer(Packetizer):
    """Notes when the peer was last heard, for the keep-alive deadline, and acknowledges at once."""

    last_heard = 0.0
    quick_ack: Callable[[], None] | None = None

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


class _Connection(paramiko.Transport):
    """A transport that asks for plain host keys only, and gives up a peer that falls silent."""

    _channel_handler_table: ClassVar[dict[int, Any]] = {
        **paramiko.Transport._channel_handler_table,  # type: ignore[attr-defined]
        MSG_CHANNEL_REQUEST: _note_signal,
    }

    def __init__(self, sock: Any, settings: SshSettings, key_types: Sequence[str]) -> None:
        super().__init__(sock, packetizer_class=_HeardPacketizer)
        self.gave_up = ""
        packetizer: Any = self.packetizer
        packetizer.quick_ack = quick_ack_of(sock)
        self._watch_end = threading.Event()
        self._key_types = tuple(key_types)
        options = self.get_security_options()
        options.ciphers = _allowed(CIPHERS, settings.ciphers, "cipher", settings.host)
        options.digests = _allowed(MACS, settings.macs, "MAC", settings.host)
        known = [k for k in (*KEX_FIRST, *options.kex) if k in self._kex_info]  # type: ignore[attr-defined]
        options.kex = _allowed(tuple(dict.fromkeys(known)), settings.kex, "key exchange", settings.host)
        self.banner_timeout = settings.connect_timeout_s
        self.handshake_timeout = HANDSHAKE_TIMEOUT_S
        self.auth_timeout = LOGIN_TIMEOUT_S

    @property
    def preferred_keys(self) -> tuple[str, ...]:
        """Host key algorithms, without the certificate variants that paramiko adds: no authority is checked here."""
        return self._key_types

    def watch(self, interval: float) -> None:
        """Ask for a sign of life in every quiet ``interval``; close once nothing at all came for the deadline."""
        packetizer: Any = self.packetizer
        packetizer.last_heard = time.monotonic()
        packetizer.set_keepalive(interval, self._ask_alive)
        deadline = max(ALIVE_DEADLINE_S, 3 * interval)
        threading.Thread(target=self._watch, args=(deadline,), daemon=True, name="edgevit-ssh-watch").start()

    def why_lost(self) -> str:
        """What ended the connection; where the kernel did for want of acknowledgements, paramiko does not tell."""
        told = self.gave_up or str(self.saved_exception or "")
        if told:
            return told
        packetizer: Any = self.packetizer
        silent = time.monotonic() - packetizer.last_heard
        return "the connection was closed" + (f", {silent:.0f} s after the last word" if silent > 1 else "")

    def _ask_alive(self) -> None:
        if not self.clear_to_send.is_set():
            return
        message = paramiko.Message()
        message.add_byte(cMSG_GLOBAL_REQUEST)
        message.add_string("keepalive@openssh.com")
        message.add_boolean(True)
        self._send_user_message(message)  # type: ignore[attr-defined]

    def _watch(self, deadline: float) -> None:
        packetizer: Any = self.packetizer
        while not self._watch_end.wait(1.0) and self.is_active():
            silent = time.monotonic() - packetizer.last_heard
            if silent > deadline:
                self.gave_up = f"nothing was heard for {silent:.0f} s"
                self.close()

    def close(self) -> None:
        self._watch_end.set()
        super().close()


def _allowed(ours: tuple[str, ...], configured: tuple[str, ...], what: str, host: str) -> tuple[str, ...]:
    """Ours in our order, without those that the person's ssh_config leaves out."""
    left = tuple(n for n in ours if not configured or n in configured)
    if not left:
        raise UsageError(
            f"ssh_config for {host} allows no {what} that edgevit has: it lists {', '.join(configured)}; "
            f"edgevit has {', '.join(ours)}",
            hint=f"ssh -G {host}",
        )
    return left


def _algorithms(types: Sequence[str]) -> tuple[str, ...]:
    """Key types as known_hosts names them → signature algorithms."""
    out: list[str] = []
    for kind in types:
        out += ["rsa-sha2-512", "rsa-sha2-256"] if kind == "ssh-rsa" else [kind]
    return tuple(k for k in KEY_TYPES if k in out)


# --------------------------------------------------------------------------------------------------------------------
# Connecting
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class _Link:
    """A logged-in connection and what carries it, closed together."""

    connection: _Connection
    below: list[Callable[[], None]]

    def close(self) -> None:
        _end_all([*self.below, self.connection.close])


def _dial(name: str, settings: SshSettings, policy: HostKeyPolicy, prompts: Prompts, hops: int = 0) -> _Link:
    """Socket → handshake → host key check → login; each through the jump host where there is one."""
    if hops > MAX_HOPS:
        raise UsageError(
            f"{name}: more than {MAX_HOPS} jump hosts; does one of them jump to itself?", hint=f"ssh -G {settings.host}"
        )
    below: list[Callable[[], None]] = []
    try:
        connection = _handshake(name, settings, policy, prompts, below, hops)
        below.append(connection.close)
        _login(name, settings, connection, prompts)
        connection.watch(settings.alive_interval_s or ALIVE_INTERVAL_S)
    except BaseException:
        _end_all(below)
        raise
    return _Link(connection, below[:-1])


def _handshake(
    name: str, settings: SshSettings, policy: HostKeyPolicy, prompts: Prompts, below: list[Callable[[], None]], hops: int
) -> _Connection:
    """A connection whose host key was approved. Nothing secret has been sent yet."""
    known = _algorithms(wanted_types(policy, settings))
    every = _allowed(KEY_TYPES, settings.host_key_types, "host key type", settings.host)
    types = tuple(k for k in known if k in every) or every
    carrier = _Carrier(name, settings, policy, prompts, below, hops)
    try:
        connection = _negotiate(name, settings, carrier.open(), types)
    except _NoSharedKeyType:
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
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            end()


class _NoSharedKeyType(Exception):
    """The host offers none of the host key types that were asked for."""


def _key_of(connection: _Connection) -> HostKey:
    key = connection.get_remote_server_key()
    return HostKey(key.get_name(), key.asbytes())


def _negotiate(name: str, settings: SshSettings, sock: Any, types: Sequence[str]) -> _Connection:
    doing = f"talking SSH to {settings.hostname} port {settings.port}"
    connection = _Connection(sock, settings, types)
    try:
        connection.start_client(timeout=connection.banner_timeout + HANDSHAKE_TIMEOUT_S)
        if not connection.initial_kex_done:
            raise Unreachable(f"{name}: {doing}: no answer within {connection.banner_timeout + HANDSHAKE_TIMEOUT_S:g} s")
    except IncompatiblePeer as e:
        connection.close()
        if "host key" in str(e):
            raise _NoSharedKeyType from e
        raise map_error(e, name, doing, connected=False) from e
    except Exception as e:
        connection.close()
        raise map_error(e, name, doing, connected=False, hint=f"ssh -v -p {settings.port} {settings.host}") from e
    return connection


@dataclass
class _Carrier:
    """Opens what SSH is spoken over: a TCP socket, a ProxyCommand, or a channel through the jump host."""

    name: str
    settings: SshSettings
    policy: HostKeyPolicy
    prompts: Prompts
    below: list[Callable[[], None]]
    hops: int
    jump: _Link | None = None

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
            policy = replace(self.policy, fingerprint="", replace=False)
            self.jump = _dial(f"{self.name} (jump host {host})", settings, policy, self.prompts, self.hops + 1)
            self.below.append(self.jump.close)
        try:
            return self.jump.connection.open_channel(
                "direct-tcpip", (s.hostname, s.port), ("127.0.0.1", 0), timeout=s.connect_timeout_s
            )
        except Exception as e:
            doing = f"reaching {s.hostname} port {s.port} through {last}"
            raise map_error(e, self.name, doing, connected=False, hint=f"ssh {last} nc -vz {s.hostname} {s.port}") from e


# --------------------------------------------------------------------------------------------------------------------
# Login
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class _Login:
    """One login: what the server still takes, and what was tried (never a secret)."""

    name: str
    settings: SshSettings
    connection: _Connection
    prompts: Prompts
    tried: list[str]
    methods: tuple[str, ...] = ("publickey", "keyboard-interactive", "password")

    def attempt(self, what: str, call: Callable[[], list[str]]) -> bool:
        """True once logged in. A refusal is noted; anything else ends the login."""
        self.tried.append(what)
        try:
            further = call()
        except paramiko.BadAuthenticationType as e:
            self.methods = tuple(e.allowed_types)
            return False
        except paramiko.AuthenticationException as e:
            if not self.connection.is_active():
                raise self.failure("the server ended the connection (too many tries?)") from e
            return False
        except Exception as e:
            if isinstance(e, (EOFError, OSError)) or not self.connection.is_active():
                raise self.failure(f"the server ended the connection: {e or type(e).__name__}") from e
            raise map_error(e, self.name, f"logging in with {what}", connected=False) from e
        if further and not self.connection.is_authenticated():
            self.tried[-1] += " (accepted, more is asked)"
            self.methods = tuple(further)
        return self.connection.is_authenticated()

    def failure(self, why: str) -> LoginError:
        s = self.settings
        tried = "; ".join(self.tried) or "nothing: there is no key, and no password could be asked for"
        takes = ", ".join(self.methods)
        return LoginError(
            f"{self.name}: {s.user}@{s.hostname} port {s.port} let nobody in: {why}. Tried {tried}. The server takes: {takes}",
            hint=f"ssh-copy-id -p {s.port} {s.user}@{s.hostname}",
        )


def _login(name: str, settings: SshSettings, connection: _Connection, prompts: Prompts) -> None:
    """Keys of the SSH agent, then key files, then a password that a person types. LoginError lists what was tried."""
    login = _Login(name, settings, connection, prompts, [])
    user = settings.user
    if settings.public_key_allowed:
        for what, key in _keys(login):
            if login.attempt(what, lambda key=key: connection.auth_publickey(user, key)):  # type: ignore[misc]
                return
            if "publickey" not in login.methods:
                break
    # Also tells which methods the server takes at all: a refused key does not.
    if login.attempt("no key", lambda: connection.auth_none(user)):
        return
    login.tried.pop()
    if not settings.password_allowed or not {"password", "keyboard-interactive"} & set(login.methods):
        raise login.failure("no key was accepted")
    secret = prompts.secret(f"Password for {user}@{settings.hostname}")
    if secret is None:
        raise login.failure("no key was accepted, and no password was given (nobody can be asked without a terminal)")
    if "password" in login.methods and login.attempt(
        "a password", lambda: connection.auth_password(user, secret, fallback=False)
    ):
        return
    if "keyboard-interactive" in login.methods and login.attempt(
        "a password by keyboard-interactive", lambda: connection.auth_interactive(user, _Answers(prompts, secret))
    ):
        return
    raise login.failure("the password was not accepted")


class _Answers:
    """Answers a server's questions: the password to the first hidden one, a prompt for each that follows."""

    def __init__(self, prompts: Prompts, secret: str) -> None:
        self._prompts, self._secret = prompts, secret

    def __call__(self, title: str, instructions: str, questions: Sequence[tuple[str, bool]]) -> list[str]:
        out = []
        for question, _shown in questions:
            answer, self._secret = self._secret, ""
            out.append(answer or self._prompts.secret("".join(c for c in question if c.isprintable())[:200]) or "")
        return out


class _AgentAt(AgentSSH):
    """The keys of an SSH agent that listens on a given socket."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Long enough for a person to touch a token or confirm.
        self._socket.settimeout(60)
        self._socket.connect(path)
        self._connect(self._socket)  # type: ignore[attr-defined]


def _keys(login: _Login) -> Any:
    """(what, key) in OpenSSH's order: agent keys that belong to a named file, other agent keys, then files."""
    settings = login.settings
    files = [path for path in settings.identity_files if path.exists() or _public_path(path).exists()]
    wanted = {path: _public_blob(path) for path in files}
    held = {key.asbytes(): key for key in _agent_keys(settings)}
    used: set[bytes] = set()
    for path in files:
        blob = wanted[path]
        if blob is not None and blob in held:
            used.add(blob)
            yield f"{path} from the SSH agent ({fingerprint_of(blob)})", held[blob]
    if not settings.identities_only and not settings.chosen_key:
        for blob, key in held.items():
            if blob not in used:
                yield f"an agent key ({fingerprint_of(blob)})", key
    for path in files:
        if wanted[path] in used or not path.exists():
            continue
        key = _load_key(login, path)
        if key is not None:
            yield f"{path} ({fingerprint_of(key.asbytes())})", key


def _public_path(path: Path) -> Path:
    return path.with_name(path.name + ".pub")


def _public_blob(path: Path) -> bytes | None:
    from edgevit.transport.hostkeys import parse_key

    for candidate in (_public_path(path), path):
        try:
            return parse_key(candidate.read_text("utf-8")).blob
        except (OSError, ValueError):
            continue
    return None


def _agent_keys(settings: SshSettings) -> list[Any]:
    import os

    where = settings.identity_agent
    path = os.environ.get("SSH_AUTH_SOCK", "") if where == "SSH_AUTH_SOCK" else "" if where == "none" else where
    if not path:
        return []
    try:
        return list(_AgentAt(path).get_keys())
    except (OSError, paramiko.SSHException, EOFError):
        # As ssh does: an agent that is gone leaves the key files; LoginError lists what was tried.
        return []


_KEY_CLASSES: tuple[Any, ...] = (paramiko.Ed25519Key, paramiko.ECDSAKey, paramiko.RSAKey)


def _load_key(login: _Login, path: Path) -> Any:
    """The private key in ``path``, or None (noted as tried) where it cannot be used. A passphrase is asked for, never kept."""
    secret: str | None = None
    problem = "not a key that can be read"
    for _ask in range(3):
        locked = False
        for key_class in _KEY_CLASSES:
            try:
                return key_class.from_private_key_file(str(path), password=secret)
            except paramiko.PasswordRequiredException:
                locked = True
            except Exception as e:  # noqa: BLE001 - a wrong class, a wrong passphrase and a damaged file come as anything
                problem = str(e).split("\n")[0][:200] or type(e).__name__
                locked = locked or secret is not None
        if not locked:
            break
        problem = "locked by a passphrase" if secret is None else "the passphrase does not open it"
        secret = login.prompts.secret(f"Passphrase of {path}")
        if secret is None:
            break
    login.tried.append(f"{path} (not used: {problem})")
    return None


# --------------------------------------------------------------------------------------------------------------------
# Transport and channel
# --------------------------------------------------------------------------------------------------------------------


class SshTransport:
    """One connection to one device; every program on it is a channel of its own."""

    def __init__(self, name: str, link: _Link) -> None:
        self._name = name
        self._link = link

    @classmethod
    def connect(cls, name: str, settings: SshSettings, policy: HostKeyPolicy, prompts: Prompts) -> SshTransport:
        """Connect and log in. Unreachable, HostKeyError or LoginError where that fails, UsageError for bad settings."""
        return cls(name, _dial(name, settings, policy, prompts))

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

    def __init__(self, name: str, channel: Any, connection: _Connection) -> None:
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
            except (OSError, EOFError, paramiko.SSHException):
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
            except (OSError, EOFError, paramiko.SSHException) as e:
                raise LostLink(self._loss()) from e
            if not sent:
                raise LostLink(self._loss())
            view = view[sent:]
            last = time.monotonic()

    def close_input(self) -> None:
        try:
            self._channel.shutdown_write()
        except (OSError, EOFError, paramiko.SSHException) as e:
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
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            self._channel.close()
