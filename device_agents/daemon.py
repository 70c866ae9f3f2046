"""The daemon: waits for jobs on behalf of one root, and starts a server for them.

It holds ``daemon.lock`` for as long as it lives, so nobody else starts a server meanwhile, and does nothing but wait: jobs,
garbage collection and all they import run in processes of their own, which end; not even :mod:`device_agents.wire` is
imported here. What it serves is the agent that submitted last (``agent/current``), so a daemon need not be installed anew
when the host's edgevit is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence, Tuple

from device_agents.clock import utc_now
from device_agents.errors import Refused
from device_agents.root import Root, open_log
from device_agents.servers import agent_argv, read_server_log, start_server
from device_agents.systemd import notify, watchdog_seconds

POLL_S = 1.0
LOOK_EVERY_S = 10.0
LOCK_WAIT_S = 10.0
TIDY_EVERY_S = 3600.0
TIDY_LIMIT_S = 600.0
DESCRIBE_LIMIT_S = 60
SERVER_END_S = 8.0
"""A server that is asked to end puts back what it changed of the system; systemd waits 15 s for all of it."""

BACKOFF_S = (1.0, 60.0)
"""Between servers that end without taking a job: the first wait and the longest, doubling."""


@dataclass(frozen=True)
class Settings:
    """``quota_mb``: what the root may take on the disk in MB, None: no limit. ``devices``: files its sensors need."""

    unit: str = ""
    quota_mb: Optional[int] = None
    devices: Tuple[str, ...] = ()


def parse_settings(arguments: Tuple[str, ...]) -> Settings:
    """``--unit NAME --quota-mb N --device FILE…``; :class:`Refused` ``bad-request`` for anything else."""
    unit, quota, devices = "", None, []
    left = list(arguments)
    while left:
        key = left.pop(0)
        value = left.pop(0) if left else ""
        if key == "--unit" and value:
            unit = value
        elif key == "--quota-mb" and value.isdigit() and int(value) > 0:
            quota = int(value)
        elif key == "--device" and value.startswith("/"):
            devices.append(value)
        else:
            raise Refused("bad-request", "daemon: {!r} {!r} is no option with its value".format(key[:80], value[:80]))
    return Settings(unit, quota, tuple(devices))


def forget_launcher(argv: Sequence[str]) -> None:
    """Begin again as the same process without what the launcher needed to check this agent: OpenSSL alone takes 4 MB."""
    if "hashlib" in sys.modules:
        text = "import sys; sys.path.insert(0, sys.argv.pop(1))\nfrom device_agents.__main__ import main\n"
        text += "sys.exit(main(sys.argv[1:]))"
        os.execv(sys.executable, [sys.executable, "-I", "-c", text, sys.path[0], *argv])


def run_daemon(folder: Path, agent_sha256: str, arguments: Tuple[str, ...]) -> int:
    """Serve this root until SIGTERM or SIGINT. 1, saying why on standard error, where it cannot: another daemon does."""
    root = Root(folder)
    try:
        settings = parse_settings(arguments)
        root.create()
        lock = _take_lock(root)
    except Refused as e:
        sys.stderr.write("{}: {}\n".format(e.code, e))
        return 1
    try:
        _Daemon(root, agent_sha256, settings).run()
    finally:
        os.close(lock)
    return 0


def _take_lock(root: Root) -> int:
    """Tries a while: others hold the lock for an instant to see whether a daemon is there, an ended daemon until it is gone."""
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        lock = root.try_lock_daemon()
        if lock is not None:
            return lock
        if time.monotonic() >= deadline:
            raise Refused("busy", "another daemon serves {} already".format(root.root), "edgevit target daemon status")
        time.sleep(0.05)


class _Daemon:
    """One daemon's life. Everything it may forget is in the store."""

    def __init__(self, root: Root, agent_sha256: str, settings: Settings) -> None:
        self._root, self._agent_sha256, self._settings = root, agent_sha256, settings
        self._stop = threading.Event()
        self._server: "Optional[subprocess.Popen[bytes]]" = None
        self._head = ""
        self._wait_s, self._next_start = BACKOFF_S[0], 0.0
        self._next_tidy = 0.0
        self._tidier: "Optional[subprocess.Popen[bytes]]" = None
        self._tidy_until = 0.0
        self._ping_every = watchdog_seconds() / 3
        self._next_ping = 0.0
        self._moved = False
        self._queue, self._seen, self._next_look = str(root.root / "queue"), 0, 0.0

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        self._describe()
        self._say("started, agent {}".format(self._agent_sha256[:12]))
        notify("READY=1")
        try:
            while not self._stop.is_set():
                self._step()
                self._stop.wait(POLL_S)
        finally:
            notify("STOPPING=1")
            self._end_tidier()
            self._end_server()
            self._say("stopped")

    def _describe(self) -> None:
        """Have ``daemon.json`` written by a process under the same protections; until then there is none."""
        settings = self._settings
        command = ["daemon-describe", str(os.getpid()), settings.unit, str(settings.quota_mb or 0), *settings.devices]
        with contextlib.suppress(FileNotFoundError):
            os.unlink(str(self._root.daemon_path))
        try:
            described = self._start(command)
            said = described.communicate(timeout=DESCRIBE_LIMIT_S)[0]
        except subprocess.TimeoutExpired:
            described.kill()
            said = described.communicate()[0] + b" (ended after %d s)" % DESCRIBE_LIMIT_S
        if described.returncode != 0:
            self._say("daemon-describe ended with status {}: {}".format(described.returncode, _end_of(said)))

    def _start(self, command: Sequence[str]) -> "subprocess.Popen[bytes]":
        """This same agent once more; it says little, and all of it into a pipe."""
        argv = agent_argv(sys.executable, self._agent_sha256, self._root, *command)
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, cwd="/"
        )

    def _step(self) -> None:
        now = time.monotonic()
        if self._ping_every and now >= self._next_ping:
            self._next_ping = now + self._ping_every
            notify("WATCHDOG=1")
        if self._tidier is not None:
            self._watch_tidier(now)
        elif self._server is not None:
            self._watch_server(now)
        elif now >= self._next_start and self._may_have_jobs(now):
            self._start_if_queued(now)
        if self._server is None and self._tidier is None and now >= self._next_tidy:
            self._next_tidy = now + TIDY_EVERY_S
            self._tidy(now)

    # ---- the server ------------------------------------------------------------------------------------------------

    def _may_have_jobs(self, now: float) -> bool:
        """Whether the queue's folder changed since the last look. Now and then it is looked into anyway: two changes within one
        tick of the file system's clock look like one."""
        changed = os.stat(self._queue).st_mtime_ns
        if changed == self._seen and now < self._next_look:
            return False
        self._seen, self._next_look = changed, now + LOOK_EVERY_S
        return True

    def _start_if_queued(self, now: float) -> None:
        head = next(iter(self._root.queued()), "")
        if not head:
            return
        self._server = start_server(self._root, self._agent_for_jobs())
        if self._server is None:  # another server, from before this daemon, is still at work
            self._seen = 0
        self._head, self._moved = head, False

    def _agent_for_jobs(self) -> str:
        named = (self._root.read(self._root.current_agent_path, 1000) or b"").decode("ascii", "replace").strip()
        with contextlib.suppress(Refused):
            if named and self._root.agent_path(named).is_file():
                return named
        return self._agent_sha256

    def _watch_server(self, now: float) -> None:
        server = self._server
        if server is None:
            return
        status = server.poll()
        if status is None:
            self._moved = self._moved or next(iter(self._root.queued()), "") != self._head
            return
        self._server, self._seen = None, 0
        moved = self._moved or next(iter(self._root.queued()), "") != self._head
        if status != 0 or not moved:
            self._say(
                "a server ended with status {}{}; next try in {:.0f} s: {}".format(
                    status, "" if moved else " without taking a job", self._wait_s, self._server_log()
                )
            )
            self._next_start = now + self._wait_s
            self._wait_s = min(self._wait_s * 2, BACKOFF_S[1])
        else:
            self._wait_s, self._next_start = BACKOFF_S[0], 0.0
            self._next_tidy = 0.0

    def _server_log(self) -> str:
        with contextlib.suppress(Refused):
            return read_server_log(self._root)[-500:]
        return ""

    def _end_server(self) -> None:
        """Asked first: it puts back a governor that it set. Its worker ends by itself once nobody holds its standard input."""
        server, self._server = self._server, None
        if server is None or server.poll() is not None:
            return
        with contextlib.suppress(OSError):
            os.kill(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(SERVER_END_S)
        with contextlib.suppress(OSError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()

    # ---- order -----------------------------------------------------------------------------------------------------

    def _tidy(self, now: float) -> None:
        """Over the quota: remove what nobody needs. In a process of its own, whose memory goes with it, and which is watched
        rather than waited for: a watchdog wants to hear of this one meanwhile. No job begins until it has ended."""
        if self._settings.quota_mb is None or self._root.used_bytes() <= self._settings.quota_mb * 10**6:
            return
        self._tidier, self._tidy_until = self._start(["gc"]), now + TIDY_LIMIT_S

    def _watch_tidier(self, now: float) -> None:
        tidier = self._tidier
        if tidier is None or (tidier.poll() is None and now < self._tidy_until):
            return
        self._end_tidier()
        said = _end_of(tidier.communicate()[0])
        if tidier.returncode == 0:
            self._say("over the quota: collected garbage, {:,} MB remain: {}".format(self._root.used_bytes() // 10**6, said))
        else:
            self._say("over the quota: gc ended with status {}: {}".format(tidier.returncode, said))

    def _end_tidier(self) -> None:
        """Killed anywhere it leaves nothing half-removed: the next one goes on."""
        tidier, self._tidier = self._tidier, None
        if tidier is not None and tidier.poll() is None:
            tidier.kill()
            tidier.wait()

    def _say(self, text: str) -> None:
        """One line into ``log/daemon.log`` and onto standard error."""
        line = "{} {}\n".format(utc_now(), " ".join(text.split()))
        with contextlib.suppress(OSError):  # a full disk must not end the daemon: systemd's journal has the line too
            fd = open_log(self._root.daemon_log_path, self._root.file_mode)
            try:
                os.write(fd, line.encode("utf-8"))
            finally:
                os.close(fd)
        with contextlib.suppress(OSError):
            sys.stderr.write(line)
            sys.stderr.flush()


def _end_of(said: bytes) -> str:
    return said[-300:].decode("utf-8", "replace").strip()
