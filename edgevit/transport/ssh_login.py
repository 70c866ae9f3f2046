"""Logging in over SSH: keys of the SSH agent, key files, then a password that a person types."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paramiko
from paramiko.agent import AgentSSH

from edgevit.errors import LoginError
from edgevit.transport.hostkeys import fingerprint_of, parse_key
from edgevit.transport.prompts import Prompts
from edgevit.transport.ssh_connection import Connection
from edgevit.transport.ssh_errors import GONE, map_error
from edgevit.transport.sshconfig import SshSettings


@dataclass
class Login:
    """One login: what the server still takes, and what was tried (never a secret)."""

    name: str
    settings: SshSettings
    connection: Connection
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


def log_in(name: str, settings: SshSettings, connection: Connection, prompts: Prompts) -> None:
    """Keys of the SSH agent, then key files, then a password that a person types. LoginError lists what was tried."""
    login = Login(name, settings, connection, prompts, [])
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
        "a password by keyboard-interactive", lambda: connection.auth_interactive(user, Answers(prompts, secret))
    ):
        return
    raise login.failure("the password was not accepted")


class Answers:
    """Answers a server's questions: the password to the first hidden one, a prompt for each that follows."""

    def __init__(self, prompts: Prompts, secret: str) -> None:
        self._prompts, self._secret = prompts, secret

    def __call__(self, title: str, instructions: str, questions: Sequence[tuple[str, bool]]) -> list[str]:
        out = []
        for question, _shown in questions:
            answer, self._secret = self._secret, ""
            out.append(answer or self._prompts.secret("".join(c for c in question if c.isprintable())[:200]) or "")
        return out


class AgentAt(AgentSSH):
    """The keys of an SSH agent that listens on a given socket."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Long enough for a person to touch a token or confirm.
        self._socket.settimeout(60)
        self._socket.connect(path)
        self._connect(self._socket)  # type: ignore[attr-defined]


def _keys(login: Login) -> Iterator[tuple[str, Any]]:
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
    for candidate in (_public_path(path), path):
        try:
            return parse_key(candidate.read_text("utf-8")).blob
        except (OSError, ValueError):
            continue
    return None


def _agent_keys(settings: SshSettings) -> list[Any]:
    where = settings.identity_agent
    path = os.environ.get("SSH_AUTH_SOCK", "") if where == "SSH_AUTH_SOCK" else "" if where == "none" else where
    if not path:
        return []
    try:
        return list(AgentAt(path).get_keys())
    except GONE:
        # As ssh does: an agent that is gone leaves the key files; LoginError lists what was tried.
        return []


_KEY_CLASSES: tuple[Any, ...] = (paramiko.Ed25519Key, paramiko.ECDSAKey, paramiko.RSAKey)


def _load_key(login: Login, path: Path) -> Any:
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
