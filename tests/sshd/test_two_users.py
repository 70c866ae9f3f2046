"""A root shared by two real users: the one who logs in by SSH, and the one the daemon runs as."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_agents.root import SHARED_BITS
from device_agents.unit import unit_name
from edgevit.agentpack import LAUNCHER, agent_pyz
from edgevit.bundle import open_bundle
from edgevit.errors import DeviceRefused
from edgevit.fleet.connect import connect
from edgevit.fleet.inventory import Target
from edgevit.loopback_sshd import LoopbackSshd
from edgevit.transport.prompts import NoPrompts
from tests.support import agent_bundle as tiny
from tests.support.sshd import Account, lend_runtime, target_of
from tests.support.waiting import wait_for

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="two users can only be made by root")


@pytest.fixture
def other_user() -> Iterator[pwd.struct_passwd]:
    name = f"edgevit-test-{os.getpid()}-d"
    subprocess.run(["useradd", "--no-create-home", "--shell", "/usr/sbin/nologin", "--user-group", name], check=True)
    try:
        yield pwd.getpwnam(name)
    finally:
        subprocess.run(["userdel", "--force", name], check=False, capture_output=True)


@pytest.fixture
def shared_root(account: Account, other_user: pwd.struct_passwd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """As `share_commands` makes one: mode 2770, of a group that both users are in."""
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="edgevit-shared-"))
    folder.chmod(0o755)
    root = folder / "root"
    root.mkdir()
    group = grp.getgrgid(other_user.pw_gid).gr_name
    subprocess.run(["usermod", "-aG", group, account.name], check=True, capture_output=True)
    os.chown(root, pwd.getpwnam(account.name).pw_uid, other_user.pw_gid)
    root.chmod(0o2770)
    try:
        yield root
    finally:
        subprocess.run(["gpasswd", "-d", account.name, group], check=False, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


@needs_root
def test_one_sends_the_other_measures(
    server: LoopbackSshd, account: Account, other_user: pwd.struct_passwd, shared_root: Path, tmp_path: Path
) -> None:
    from edgevit.fleet.connect import trust

    target = target_of(server, account, root=str(shared_root))
    trust(target, NoPrompts(), server.fingerprint)
    signer = tiny.make_signer(tmp_path / "keys")
    made = tiny.make_bundle(signer)
    bundle = open_bundle(made.write(tmp_path / "bundle"), None)
    with connect(target, NoPrompts()) as agent:
        agent.allow([signer.line()])
        problem = lend_runtime(account, shared_root)
        if problem:
            pytest.skip(problem)
        agent.install(bundle)
        with daemon_of(account, other_user, shared_root):
            assert agent.submit(tiny.make_job(made, "shared", made.variant()))
            run = agent.follow("shared")
            owner = (shared_root / "spool" / "shared.run").stat().st_uid
            status = agent.daemon_status()
            assert run.status == "completed", run.reason
            assert owner == other_user.pw_uid, "measured by the daemon's user"
            assert status.at_work and status.state is not None and status.state.user == other_user.pw_name
            assert agent.submit(tiny.make_job(made, "to-cancel", made.variant()))
            agent.cancel("to-cancel")
            assert agent.follow("to-cancel").status in ("interrupted", "completed")
            assert agent.ack("shared") and agent.ack("to-cancel")
            assert agent.waiting() == ()
            check_modes(shared_root, other_user.pw_gid)
        # Without a daemon the one who logged in serves the same root, over what the other left.
        assert agent.submit(tiny.make_job(made, "alone", made.variant()))
        assert agent.follow("alone").status == "completed"
        assert (shared_root / "spool" / "alone.run").stat().st_uid == pwd.getpwnam(account.name).pw_uid
        check_modes(shared_root, other_user.pw_gid)
        agent.unprovision()
    assert not shared_root.exists() or not list(shared_root.iterdir())


def check_modes(root: Path, group: int) -> None:
    """Both users' group may do everything, the world nothing; environments are pip's own affair."""
    for path in [root, *root.rglob("*")]:
        if path.is_symlink() or {"venv", "venvs"} & set(path.relative_to(root).parts):
            continue
        info = path.lstat()
        mode = stat.S_IMODE(info.st_mode)
        assert not mode & 0o007, f"{path} is open to the world: {mode:o}"
        assert info.st_gid == group, f"{path} belongs to group {info.st_gid}"
        wanted = SHARED_BITS if stat.S_ISDIR(info.st_mode) else 0o060
        assert mode & wanted == wanted, f"{path} has mode {mode:o}"


@contextlib.contextmanager
def daemon_of(account: Account, user: pwd.struct_passwd, root: Path) -> Iterator[None]:
    """A daemon as systemd would start one: by ``user``, in the group of the root alone."""
    argv = [account.python, "-I", "-c", LAUNCHER, agent_pyz().sha256, str(root), "daemon", "--unit", unit_name(root)]
    process = subprocess.Popen(
        argv,
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=[],
        umask=0o007,
        cwd="/",
        env={"PATH": "/usr/bin:/bin"},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        wait_for(lambda: (root / "daemon.json").exists() or process.poll() is not None, "the daemon at work")
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        yield
    finally:
        process.terminate()
        process.wait(30)
        if process.stderr:
            process.stderr.close()


@needs_root
def test_a_root_that_is_not_shared_is_refused_with_what_to_type(
    box: Target, account: Account, other_user: pwd.struct_passwd, monkeypatch: pytest.MonkeyPatch
) -> None:
    from device_agents.errors import Refused
    from device_agents.service import check_shared

    with connect(box, NoPrompts()) as agent:
        agent.probe(quick=True)
    with pytest.raises(Refused) as refused:
        check_shared(Path(box.root), account.name, other_user.pw_name)
    text = str(refused.value)
    assert refused.value.code == "needs-root"
    assert "expected 2770" in text and f"sudo usermod -aG {other_user.pw_name} {account.name}" in text
    with pytest.raises(Refused, match="there is no user nobody-of-this-name"):
        check_shared(Path(box.root), account.name, "nobody-of-this-name")


def test_a_device_without_systemd_says_so(box: Target) -> None:
    if Path("/run/systemd/system").is_dir():
        pytest.skip("systemd runs this machine; `make lab` installs real units")
    with connect(box, NoPrompts()) as agent, pytest.raises(DeviceRefused, match="systemd does not run this device") as refused:
        agent.install_daemon(kind="auto", user=None, groups=(), devices=(), quota_mb=None)
    assert refused.value.code == "no-systemd"
