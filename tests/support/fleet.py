"""Devices for tests of a fleet: one real sshd each, in a network namespace of its own where that is allowed.

A namespace gives each device its own link (which can be unplugged and shaped) and its own device lock; a plain sshd on this
machine's loopback stands in elsewhere: its "unplugged link" is a server that is gone, and all share one device lock.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgevit.fleet.inventory import Target
from edgevit.loopback_sshd import LoopbackSshd, find_sshd
from tests.support.processes import find_agents, kill
from tests.support.sshd import Account, lend_runtime, target_of


@functools.cache
def network() -> str:
    """The first two numbers of addresses that no other process here uses for such devices."""
    used = _ip("-4", "addr").stdout.decode()
    free = (f"10.{128 + (os.getpid() + i) % 100}" for i in range(100))
    return next(one for one in free if f" {one}." not in used)


@functools.cache
def namespaces_absent() -> str:
    """Why network namespaces cannot be made here; empty where they can. EDGEVIT_TEST_FLEET=loopback does without them."""
    if os.environ.get("EDGEVIT_TEST_FLEET") == "loopback":
        return "EDGEVIT_TEST_FLEET=loopback"
    if os.getuid() != 0:
        return "only root may make network namespaces"
    if shutil.which("ip") is None:
        return "there is no ip (Debian: iproute2)"
    name = f"evt-{os.getpid()}-try"
    made = _ip("netns", "add", name)
    if made.returncode:
        return f"ip netns add: {made.stderr.decode(errors='replace').strip()}"
    try:
        linked = _ip("link", "add", "evt-try0", "type", "veth", "peer", "name", "evt-try1")
        _ip("link", "del", "evt-try0")
        return f"ip link add: {linked.stderr.decode(errors='replace').strip()}" if linked.returncode else ""
    finally:
        _ip("netns", "del", name)


def _ip(*words: str, check: bool = False) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["ip", *words], capture_output=True, check=check)


@dataclass(frozen=True)
class Device:
    """One device of the fleet. ``namespace`` is empty where it is a plain sshd on this machine."""

    target: Target
    server: LoopbackSshd
    account: Account
    namespace: str = ""
    link: str = ""

    @property
    def root(self) -> Path:
        return Path(self.target.root)

    def unplug(self) -> None:
        """Nothing comes through from now on: no answer, no refusal. Without a namespace the server is gone instead."""
        if self.namespace:
            _ip("link", "set", self.link, "down", check=True)
        else:
            self.server.stop()

    def plug_in(self) -> None:
        if self.namespace:
            _ip("link", "set", self.link, "up", check=True)
        else:
            self.server.start()

    def limit(self, rate: str) -> None:
        """At most ``rate`` (such as ``20mbit``) is sent to it from now on; only where it has a link of its own. The bucket
        holds the kernel's largest packet: out of a smaller one each comes in pieces, which cost the CPU a wake-up apiece."""
        shape = ["tc", "qdisc", "add", "dev", self.link, "root", "tbf", "rate", rate, "burst", "128kb", "latency", "200ms"]
        subprocess.run(shape, check=True, capture_output=True)

    def processes(self) -> list[int]:
        """Everything that works this device's root: commands of the agent, its server, its worker."""
        return find_agents(self.root)

    def reboot(self) -> None:
        """The power is cut and comes back: every process gone at once, what the kernel held with them; sshd is up again."""
        self.server.stop()
        deadline = time.monotonic() + 10
        while (left := self.processes()) and time.monotonic() < deadline:
            kill(left)
            time.sleep(0.02)
        self.server.start()

    def clear(self) -> None:
        """A device that was never shipped to or measured on; what it knows of its own runtimes stays, which saves minutes."""
        kill(self.processes())
        for name in ("queue", "spool", "bundles", "blobs", "accuracy"):
            for path in (self.root / name).glob("*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in ("active.json", "allowed_signers"):
            (self.root / name).unlink(missing_ok=True)

    def forget(self) -> None:
        """A device as it came: nothing of the agent on it."""
        kill(self.processes())
        shutil.rmtree(self.root, ignore_errors=True)


@contextlib.contextmanager
def running_device(account: Account, number: int) -> Iterator[Device]:
    """Device ``number`` (from 0)."""
    if find_sshd() is None:
        raise RuntimeError("these tests need a real OpenSSH server: sudo apt install openssh-server")
    folder = Path(tempfile.mkdtemp(prefix="edgevit-device-"))
    folder.chmod(0o755)
    try:
        with contextlib.ExitStack() as opened:
            settings: dict[str, object] = {}
            namespace = link = ""
            if not namespaces_absent():
                namespace, link, address = opened.enter_context(_namespace(number))
                settings = {"host": address, "through": ("ip", "netns", "exec", namespace)}
            server = opened.enter_context(LoopbackSshd(folder, user=account.name, **settings))  # type: ignore[arg-type]
            root = str(account.home / f"agent-{number:02d}")
            target = target_of(server, account, f"box-{number:02d}", host=server.host, root=root)
            device = Device(target, server, account, namespace, link)
            try:
                yield device
            finally:
                device.forget()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _namespace(number: int) -> Iterator[tuple[str, str, str]]:
    """(its name, the host's end of its link, its address)."""
    name, here, there = f"evt-{os.getpid()}-{number}", f"evh{os.getpid() % 100_000}-{number}", "eth0"
    host, device = f"{network()}.{number}.1", f"{network()}.{number}.2"
    _remove_stale()
    _ip("netns", "add", name, check=True)
    try:
        _ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", name, check=True)
        _ip("addr", "add", f"{host}/30", "dev", here, check=True)
        _ip("link", "set", here, "up", check=True)
        for words in (("addr", "add", f"{device}/30", "dev", there), ("link", "set", there, "up"), ("link", "set", "lo", "up")):
            _ip("-n", name, *words, check=True)
        yield name, here, device
    finally:
        _ip("netns", "del", name)
        _ip("link", "del", here)


def _remove_stale() -> None:
    """Namespaces of test processes that are gone."""
    listed = _ip("netns", "list").stdout.decode().split()
    for name in listed:
        owner = name.removeprefix("evt-").partition("-")[0]
        if name.startswith("evt-") and owner.isdigit() and not Path(f"/proc/{owner}").exists():
            kill(map(int, _ip("netns", "pids", name).stdout.decode().split()))
            _ip("netns", "del", name)


class Runtime:
    """One environment with the packages of the tests, lent to every device of an account by a link."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._folder = account.home / "runtime"
        self.problem = lend_runtime(account, self._folder)

    def lend(self, device: Device) -> None:
        """Give ``device`` a runtime. RuntimeError where the tests' packages do not load for the account."""
        if self.problem:
            raise RuntimeError(self.problem)
        venv = device.root / "venv"
        if venv.is_symlink():
            return
        device.root.mkdir(exist_ok=True)
        venv.symlink_to(self._folder / "venv")
        if self._account.ordinary:
            entry = pwd.getpwnam(self._account.name)
            for path in (device.root, venv):
                os.chown(path, entry.pw_uid, entry.pw_gid, follow_symlinks=False)
