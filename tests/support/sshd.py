"""A throw-away real sshd and, where the tests run as root, an ordinary account to log in to."""

from __future__ import annotations

import contextlib
import getpass
import os
import pwd
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from edgevit.fleet.inventory import Target
from edgevit.loopback_sshd import LoopbackSshd

PASSWORD = "a test's own password"


@dataclass(frozen=True)
class Account:
    """Who is logged in as. ``python`` is one that this user can start; ``home`` is writable for it."""

    name: str
    home: Path
    python: str
    ordinary: bool


@contextlib.contextmanager
def test_account() -> Iterator[Account]:
    """An ordinary account made for the tests, gone afterwards; whoever runs them where that is not root."""
    home = Path(tempfile.mkdtemp(prefix="edgevit-home-"))
    if os.getuid() != 0:
        try:
            yield Account(getpass.getuser(), home, sys.executable, False)
        finally:
            shutil.rmtree(home, ignore_errors=True)
        return
    name = f"edgevit-test-{os.getpid()}-{secrets.token_hex(2)}"
    _remove_stale()
    subprocess.run(
        ["useradd", "--no-create-home", "--home-dir", str(home), "--shell", "/bin/sh", name], check=True, capture_output=True
    )
    try:
        subprocess.run(["chpasswd"], input=f"{name}:{PASSWORD}".encode(), check=True, capture_output=True)
        entry = pwd.getpwnam(name)
        os.chown(home, entry.pw_uid, entry.pw_gid)
        yield Account(name, home, _python_for(entry), True)
    finally:
        subprocess.run(["userdel", "--force", name], check=False, capture_output=True)
        shutil.rmtree(home, ignore_errors=True)


def _remove_stale() -> None:
    for entry in pwd.getpwall():
        owner = entry.pw_name.removeprefix("edgevit-test-").partition("-")[0]
        if entry.pw_name.startswith("edgevit-test-") and owner.isdigit() and not Path(f"/proc/{owner}").exists():
            subprocess.run(["userdel", "--force", entry.pw_name], check=False, capture_output=True)


def _python_for(entry: pwd.struct_passwd) -> str:
    """The Python of the tests where an ordinary user may start it, else the system's."""
    for candidate in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        with contextlib.suppress(OSError):
            if (
                subprocess.run(
                    [candidate, "-c", ""], user=entry.pw_uid, group=entry.pw_gid, capture_output=True, check=False
                ).returncode
                == 0
            ):
                return candidate
    raise RuntimeError("no Python that an ordinary user may start; install python3")


@contextlib.contextmanager
def running_sshd(account: Account, extra: str = "") -> Iterator[LoopbackSshd]:
    """An sshd that lets ``account`` in with its ``client_key``. Its folder is readable for the account, as its keys must be."""
    folder = Path(tempfile.mkdtemp(prefix="edgevit-sshd-"))
    folder.chmod(0o755)
    try:
        with LoopbackSshd(folder, user=account.name, extra=extra) as server:
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def target_of(server: LoopbackSshd, account: Account, name: str = "box", **settings: object) -> Target:
    """The target that an operator would have for this server."""
    given = {
        "host": "127.0.0.1",
        "port": server.port,
        "user": account.name,
        "key": str(server.client_key),
        "python": account.python,
        "root": str(account.home / "agent"),
        **settings,
    }
    return Target(name=name, **given)


def lend_runtime(account: Account, root: Path) -> str:
    """Give an agent's root an environment that sees the packages of the tests, without downloading anything.

    Returns "" once it is there, else why it cannot be.
    """
    import sysconfig

    packages = sysconfig.get_path("purelib")
    entry = pwd.getpwnam(account.name)
    program = "import sys; print('%d.%d' % sys.version_info[:2])"
    version = subprocess.run([account.python, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    if version != "{}.{}".format(*sys.version_info[:2]):
        return f"the account's Python is {version}, the packages here are for {sys.version.split()[0]}"
    as_account = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []} if account.ordinary else {}
    venv = [account.python, "-m", "venv", "--without-pip", str(root / "venv")]
    made = subprocess.run(venv, capture_output=True, text=True, check=False, **as_account)  # type: ignore[call-overload]
    if made.returncode:
        return f"no environment could be made: {made.stderr.strip()[-300:]}"
    link = next((root / "venv").glob("lib/python*/site-packages")) / "lent.pth"
    link.write_text(packages + "\n")
    link.chmod(0o644)
    argv = [str(root / "venv/bin/python"), "-c", "import numpy, onnxruntime"]
    works = subprocess.run(argv, capture_output=True, text=True, check=False, cwd="/", **as_account)  # type: ignore[call-overload]
    return "" if works.returncode == 0 else f"the lent packages do not load for {account.name}: {works.stderr.strip()[-300:]}"


@dataclass
class Scripted:
    """A person who answers as the test says; ``asked`` keeps the questions."""

    trusts: bool | None = None
    secrets: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def trust_host_key(self, question: str) -> bool | None:
        self.asked.append(question)
        return self.trusts

    def secret(self, text: str) -> str | None:
        self.asked.append(text)
        return self.secrets.pop(0) if self.secrets else None
