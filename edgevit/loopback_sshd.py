"""A throw-away OpenSSH server on this machine, for the demo, benchmarks and tests: own port, own keys, own configuration.

It runs as whoever starts it. An sshd that is not root can let in only that same user; started by root it lets in any user.
Nothing of the system's own SSH configuration is read or changed.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from edgevit.errors import Unreachable, UsageError

_PLACES = ("/usr/sbin/sshd", "/usr/local/sbin/sshd", "/usr/lib/ssh/sshd")
START_S = 15.0


def find_sshd() -> str | None:
    """The sshd binary, which is seldom on a person's PATH; None where there is none."""
    return shutil.which("sshd") or next((p for p in _PLACES if os.access(p, os.X_OK)), None)


class LoopbackSshd:
    """An sshd under ``folder``. A context manager: started on entry, gone with all its connections on exit."""

    def __init__(
        self, folder: Path, *, user: str = "", extra: str = "", host: str = "127.0.0.1", through: Sequence[str] = ()
    ) -> None:
        """``user`` may log in (default: who runs this); ``extra`` is appended to its configuration; ``host`` is the address it
        listens at, ``through`` what starts it there (such as ``ip netns exec NAME``)."""
        self.folder = folder
        self.user = user or getpass.getuser()
        self.host = host
        self.port = 0
        self._extra = extra
        self._through = tuple(through)
        self._process: subprocess.Popen[bytes] | None = None
        self.client_key = folder / "client_key"
        self.host_key = folder / "host_key_ed25519"
        self.log = folder / "sshd.log"

    def __enter__(self) -> LoopbackSshd:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Make keys and configuration, start, and return once it greets; again on the same port after :meth:`stop`. Unreachable
        with its log's end where it does not."""
        sshd = find_sshd()
        if sshd is None:
            raise UsageError("no sshd on this machine", hint="sudo apt install openssh-server")
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o755)
        for key in (self.client_key, self.host_key):
            if not key.exists():
                make_key(key)
        authorized = self.folder / "authorized_keys"
        authorized.write_text(self.client_key.with_name("client_key.pub").read_text())
        authorized.chmod(0o644)
        if os.getuid() == 0:
            # Debian's sshd wants it before it drops privileges; the service normally makes it.
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self.port = self.port or _free_port()
        config = self.folder / "sshd_config"
        config.write_text(self._config(authorized))
        self._process = subprocess.Popen(
            [*self._through, sshd, "-D", "-f", str(config), "-E", str(self.log)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._await_greeting()

    def _config(self, authorized: Path) -> str:
        lines = [
            f"Port {self.port}",
            f"ListenAddress {self.host}",
            f"HostKey {self.host_key}",
            f"PidFile {self.folder / 'sshd.pid'}",
            f"AuthorizedKeysFile {authorized}",
            # The folder may lie under a temporary directory that others may write to; it lives only as long as this server.
            "StrictModes no",
            "UsePAM no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin prohibit-password",
            "AllowTcpForwarding yes",
            "X11Forwarding no",
            "MaxStartups 100",
            # What scp speaks nowadays.
            "Subsystem sftp internal-sftp",
            "LogLevel VERBOSE",
        ]
        return "\n".join(filter(None, [self._extra, *lines])) + "\n"

    def _await_greeting(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                break
            with contextlib.suppress(OSError), socket.create_connection((self.host, self.port), timeout=1) as s:
                if s.recv(4) == b"SSH-":
                    return
            time.sleep(0.02)
        said = self.log.read_text(errors="replace")[-2000:] if self.log.exists() else "nothing"
        self.stop()
        raise Unreachable(f"the throw-away sshd on port {self.port} did not start; it said: {said.strip()}")

    @property
    def known_hosts_line(self) -> str:
        """What a known_hosts file would hold for it."""
        kind, key, *_ = self.host_key.with_name(self.host_key.name + ".pub").read_text().split()
        return f"[{self.host}]:{self.port} {kind} {key}"

    @property
    def fingerprint(self) -> str:
        """Of its host key, as ``SHA256:…``."""
        from edgevit.transport.hostkeys import parse_key

        return parse_key(self.host_key.with_name(self.host_key.name + ".pub").read_text()).fingerprint

    @property
    def pid(self) -> int:
        """Its process; 0 while it is stopped."""
        return self._process.pid if self._process is not None else 0

    def connections(self) -> list[int]:
        """Process ids of the servers of single connections, from the process table."""
        return _children(self.pid) if self.pid else []

    def kill_connections(self) -> int:
        """``kill -9`` every connection, as a cut cable would look from here; returns how many there were."""
        count = 0
        for pid in self.connections():
            for child in [*_children(pid), pid]:
                if child != pid and not _is_sshd(child):
                    continue
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                    count += 1
        return count

    def stop(self) -> None:
        """End the server and its connections; harmless when called twice."""
        if self._process is None:
            return
        self.kill_connections()
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


def make_key(path: Path) -> None:
    """An ed25519 key without passphrase at ``path``."""
    try:
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "edgevit throw-away", "-f", str(path)],
            check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=60,
        )  # fmt: skip
    except FileNotFoundError as e:
        raise UsageError("ssh-keygen is not installed", hint="sudo apt install openssh-client") from e
    except subprocess.SubprocessError as e:
        raise UsageError(f"ssh-keygen made no key at {path}: {e}", hint=f"ls -ld {path.parent}") from e


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The command in parentheses may hold anything; what follows the last one is plain.
            if int(entry.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.parent.name))
    return found


def _is_sshd(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip().startswith("sshd")
    except OSError:
        return False
