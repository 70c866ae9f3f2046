"""Deploying to an ordinary account behind a real sshd: whole, once, again, over cut links, and what a bare device says."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_agents import wire
from edgevit import signing
from edgevit.bundle import Bundle, open_bundle
from edgevit.errors import DeviceRefused, LostLink, NotProvisioned
from edgevit.fleet.agent import Agent, Have
from edgevit.fleet.connect import connect, open_agent
from edgevit.fleet.deploy import apply_plan, plan_deploy
from edgevit.fleet.inventory import Target
from edgevit.loopback_sshd import LoopbackSshd
from edgevit.progress import Quiet
from edgevit.transport.prompts import NoPrompts
from tests.support import agent_bundle as tiny
from tests.support.bundles import make_bundle
from tests.support.sshd import Account, lend_runtime

BIG = 60_000_000


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return signing.make_key(tmp_path / "signing_key", "test")


def line_of(key: Path) -> str:
    return signing.allowed_signers_line("tester@here", signing.public_line(key))


@pytest.fixture
def bundle(key: Path, tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", key)


@pytest.fixture
def runtime(box: Target, account: Account) -> None:
    """The device has a runtime: activating a variant runs its golden images there."""
    problem = lend_runtime(account, Path(box.root))
    if problem:
        pytest.skip(problem)


def runnable(folder: Path, key: Path, version: int = 1) -> Bundle:
    """A bundle of a model that really runs."""
    return open_bundle(tiny.make_bundle(tiny.Signer(key), version=version).write(folder), None)


def variant_of(bundle: Bundle) -> wire.Variant:
    return wire.Variant(bundle.digest, bundle.manifest.artifacts[0].name, "onnxruntime", "CPUExecutionProvider", 1)


def deploy(agent: Agent, bundle: Bundle, **options: bool) -> tuple[object, object]:
    facts = agent.probe(quick=True)
    plan = plan_deploy(bundle, agent.name, facts, agent.have(bundle.manifest.blobs()), variant_of(bundle), "test", **options)
    return plan, apply_plan(plan, bundle, agent, Quiet())


def test_a_bare_device_gets_the_agent_and_then_the_bundle(box: Target, account: Account, key: Path, tmp_path: Path) -> None:
    bundle = runnable(tmp_path / "bundle", key)
    with connect(box, NoPrompts()) as agent:
        with pytest.raises(NotProvisioned) as caught:
            agent.install(bundle)
        assert caught.value.hint == "edgevit target provision box"
        assert agent.allow([line_of(key)]) == 1
        before = agent.have(bundle.manifest.blobs())
        assert set(before.missing) == {b.sha256 for b in bundle.manifest.blobs()}
        with pytest.raises(NotProvisioned, match="no-numpy"):
            deploy(agent, bundle)
        assert agent.have(bundle.manifest.blobs()).missing == ()
        assert agent.probe(quick=True).active is None
        problem = lend_runtime(account, Path(box.root))
        if problem:
            pytest.skip(problem)
        _, outcome = deploy(agent, bundle)
        assert outcome.active.variant == variant_of(bundle)
        assert agent.probe(quick=True).active == outcome.active


@pytest.mark.usefixtures("runtime")
def test_deploying_again_sends_no_blob_and_changes_nothing(box: Target, key: Path, tmp_path: Path) -> None:
    bundle = runnable(tmp_path / "bundle", key)
    with connect(box, NoPrompts()) as agent:
        agent.allow([line_of(key)])
        planned, first = deploy(agent, bundle)
        assert first.changed
        assert first.sent_bytes == planned.send_bytes == sum(b.size for b in bundle.manifest.blobs())
        before = snapshot(Path(box.root))
        plan, second = deploy(agent, bundle)
        assert plan.nothing_to_do
        assert (second.sent_blobs, second.sent_bytes, second.changed) == (0, 0, False)
        assert snapshot(Path(box.root)) == before


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.lstat().st_ino, p.lstat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}


def test_a_stranger_s_bundle_is_refused_with_the_command_to_allow_it(box: Target, key: Path, tmp_path: Path) -> None:
    stranger = signing.make_key(tmp_path / "stranger", "stranger")
    with connect(box, NoPrompts()) as agent:
        agent.allow([line_of(key)])
        with pytest.raises(DeviceRefused) as caught:
            agent.install(make_bundle(tmp_path / "foreign", stranger))
        assert caught.value.code == "unknown-signer" and caught.value.hint.startswith("edgevit key allow box (with --sign-key")
        assert not list(Path(box.root).glob("blobs/*"))


@pytest.mark.usefixtures("runtime")
def test_an_older_version_is_refused_unless_allowed(box: Target, key: Path, tmp_path: Path) -> None:
    newer, older = (runnable(tmp_path / f"v{v}", key, version=v) for v in (5, 4))
    with connect(box, NoPrompts()) as agent:
        agent.allow([line_of(key)])
        deploy(agent, newer)
        with pytest.raises(DeviceRefused) as planned:
            deploy(agent, older)
        with pytest.raises(DeviceRefused) as installed:
            agent.install(older)
        assert {planned.value.code, installed.value.code} == {"older-version"}
        assert deploy(agent, older, allow_older=True)[1].active.bundle_version == 4
        assert agent.rollback().bundle_version == 5


def test_rollback_without_a_previous_bundle_is_refused(box: Target, bundle: Bundle, key: Path) -> None:
    with connect(box, NoPrompts()) as agent:
        agent.allow([line_of(key)])
        with pytest.raises(DeviceRefused) as caught:
            agent.rollback()
        assert caught.value.code in ("no-previous", "no-active")


class CutOnce(Quiet):
    """Cuts every connection of the server once some bytes are under way."""

    def __init__(self, server: LoopbackSshd, after: float) -> None:
        self.server, self.after, self.cut_at = server, after, 0.0

    def advance(self, key: str, done: float, text: str = "") -> None:
        if not self.cut_at and done > self.after and self.server.kill_connections():
            self.cut_at = time.monotonic()


def test_a_link_cut_in_mid_upload_is_said_and_the_next_deploy_goes_on_where_it_stopped(
    box: Target, server: LoopbackSshd, key: Path, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "big", key, model_bytes=BIG)
    total = sum(b.size for b in bundle.manifest.blobs())
    with connect(box, NoPrompts()) as agent:
        agent.allow([line_of(key)])
        agent.max_rate_mbit = BIG * 8e-6 / 3.0  # three seconds: progress is told ten times a second
        cut = CutOnce(server, 5e6)
        with pytest.raises(LostLink):
            agent.install(bundle, cut)
        assert cut.cut_at
        assert time.monotonic() - cut.cut_at < 10
    with connect(box, NoPrompts()) as agent:
        have = wait_for_partial(agent, bundle)
        resumed = agent.install(bundle)
        assert resumed.newly
        assert sum(have.partial.values()) > 0
        assert resumed.received_bytes == total - sum(have.partial.values()) - stored_before(bundle, have)
        assert agent.install(bundle).received_bytes == 0


def wait_for_partial(agent: Agent, bundle: Bundle) -> Have:
    """What is there once the cut-off agent has written its last byte."""
    last, deadline = None, time.monotonic() + 30
    while time.monotonic() < deadline:
        now = agent.have(bundle.manifest.blobs())
        # The free space is everybody's: it may change at any time.
        if now.partial and last and (now.missing, now.partial) == (last.missing, last.partial):
            return now
        last = now
    raise AssertionError(f"no part of a blob was kept: {last}")


def stored_before(bundle: Bundle, have: Have) -> int:
    return sum(b.size for b in bundle.manifest.blobs() if b.sha256 not in have.missing)


def test_a_damaged_blob_on_the_device_is_sent_again(box: Target, bundle: Bundle, key: Path) -> None:
    with connect(box, NoPrompts()) as agent:
        agent.allow([line_of(key)])
        agent.install(bundle)
        victim = bundle.manifest.artifacts[0].blob
        path = Path(box.root) / "blobs" / victim.sha256
        path.chmod(0o600)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
        again = agent.install(bundle)
        assert again.sent_blobs == (victim.sha256,)
        assert again.received_bytes == victim.size


def test_a_bundle_that_changed_here_is_refused_there(box: Target, bundle: Bundle, key: Path) -> None:
    """Even a host that checked nothing cannot make the device take other bytes."""
    path = bundle.blob_path(bundle.manifest.artifacts[0].blob.sha256)
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(bytes(data))
    with connect(box, NoPrompts()) as agent:
        agent.allow([line_of(key)])
        with pytest.raises(DeviceRefused) as caught:
            agent.install(bundle)
        assert caught.value.code == "digest-mismatch"
        assert agent.probe(quick=True).bundles == ()


@pytest.fixture
def small_disk(box: Target, account: Account) -> Iterator[Path]:
    if os.getuid() != 0:
        pytest.skip("a small file system can be mounted only by root")
    root = Path(box.root)
    root.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m,mode=0777", "tmpfs", str(root)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"tmpfs cannot be mounted here: {done.stderr.decode().strip()}")
    yield root
    subprocess.run(["umount", "-l", str(root)], check=True)


def test_a_full_disk_is_refused_before_the_first_byte(box: Target, small_disk: Path, key: Path, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "big", key, model_bytes=BIG)
    with connect(box, NoPrompts()) as agent:
        agent.allow([line_of(key)])
        with pytest.raises(DeviceRefused) as planned:
            deploy(agent, bundle)
        with pytest.raises(DeviceRefused) as caught:
            agent.install(bundle)
        assert {planned.value.code, caught.value.code} == {"no-space"}
        assert not list(small_disk.glob("blobs/*"))


def test_a_python_that_is_too_old_names_what_to_install(box: Target) -> None:
    installed = sorted(Path.home().glob(".pyenv/versions/3.[67].*/bin/python"))
    candidates = [str(p) for p in installed] + [p for p in map(shutil.which, ("python3.6", "python3.7")) if p]
    # A name on the path may be a version manager's, with nothing behind it.
    found = [p for p in candidates if subprocess.run([p, "-V"], capture_output=True, check=False).returncode == 0]
    if not found:
        pytest.skip("no Python 3.6 or 3.7 on this machine")
    # An ordinary account may not enter the folder of whoever runs the tests: the local transport is enough for this.
    from edgevit.transport.local import LocalTransport

    agent = Agent(LocalTransport("box"), found[0], box.root)
    with pytest.raises(NotProvisioned) as caught:
        agent.probe()
    assert "3.6" in str(caught.value) or "3.7" in str(caught.value)
    assert "apt install python3.8" in caught.value.hint


def test_no_python_at_all_names_what_to_install(box: Target) -> None:
    with (
        connect(box.model_copy(update={"python": "python3.99"}), NoPrompts()) as agent,
        pytest.raises(NotProvisioned) as caught,
    ):
        agent.probe()
    assert "apt install python3" in caught.value.hint


def test_an_agent_can_be_opened_again_after_a_cut(box: Target, server: LoopbackSshd) -> None:
    agent = open_agent(box, NoPrompts())
    assert agent.have([]).missing == ()
    server.kill_connections()
    with pytest.raises(LostLink):
        agent.have([])
    again = agent.reopen()
    assert again.have([]).missing == ()
    again.close()


def test_unprovision_leaves_nothing(box: Target, bundle: Bundle, key: Path) -> None:
    with connect(box, NoPrompts()) as agent:
        agent.allow([line_of(key)])
        agent.install(bundle)
        agent.unprovision()
    assert not Path(box.root).exists()
