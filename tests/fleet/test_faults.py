"""What a fleet does to people: unplugged links, reboots, restarted servers, full disks and wrong clocks, over real sshds."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from device_agents import wire
from edgevit.bench import bring_home, measure
from edgevit.bundle import Bundle, open_bundle
from edgevit.cli import run_cli
from edgevit.errors import DeviceRefused, LostLink, Unreachable
from edgevit.fleet.agent import Agent
from edgevit.fleet.connect import connect, open_agent
from edgevit.fleet.inventory import Target, add_target
from edgevit.places import fleet_path
from edgevit.progress import Quiet
from edgevit.results.store import Store, open_store
from edgevit.transport.prompts import NoPrompts
from tests.support import agent_bundle as tiny
from tests.support.agent_bundle import FAST_PLAN, Signer
from tests.support.fleet import Device
from tests.support.waiting import wait_for

pytestmark = pytest.mark.usefixtures("quick_to_give_up")
WEIGHT = 12_000_000


class At(Quiet):
    """Does something once, when the work has come so far."""

    def __init__(self, act: Callable[[], None], after: float = 0.0) -> None:
        self._act, self._after, self.done = act, after, False

    def advance(self, key: str, done: float, text: str = "") -> None:
        if not self.done and done >= self._after:
            self.done = True
            self._act()


@pytest.fixture
def made(signer: Signer) -> tiny.TinyBundle:
    # Random, so that no part of it is another's copy, which would not be sent.
    return tiny.make_bundle(signer, extra_blob=json.dumps([random.Random(1).randbytes(WEIGHT // 2).hex()]).encode())


@pytest.fixture
def bundle(made: tiny.TinyBundle, tmp_path: Path) -> Bundle:
    return open_bundle(made.write(tmp_path / "bundle"), None)


@pytest.fixture
def plugged(box: Device) -> Iterator[Device]:
    """The device, its link in again at the end whatever happened."""
    yield box
    with contextlib.suppress(Exception):
        box.server.stop()
    box.plug_in() if box.namespace else None
    box.server.start()


@pytest.fixture
def store() -> Iterator[Store]:
    with open_store() as opened:
        yield opened


@pytest.fixture
def links() -> Iterator[list[Agent]]:
    """The connections that a test makes again."""
    made: list[Agent] = []
    yield made
    for link in made:
        link.close()


def reconnect_to(target: Target, links: list[Agent]) -> Callable[[], Agent]:
    def again() -> Agent:
        links.append(open_agent(target, NoPrompts()))
        return links[-1]

    return again


def job(made: tiny.TinyBundle, run_id: str, seconds: float = 0.0) -> wire.Job:
    import dataclasses

    plan = dataclasses.replace(FAST_PLAN, min_seconds=seconds, max_seconds=seconds + 5.0)
    return dataclasses.replace(tiny.make_job(made, run_id, made.variant(), plan=plan), target="box-00")


def test_unplugged_while_connecting_the_device_is_named_and_the_others_are_done(
    fleet: list[Device], bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    off, on, _ = fleet
    off.unplug()
    try:
        assert run_cli(["deploy", str(bundle.path), off.target.name, on.target.name]) == 3
        assert off.target.name in capsys.readouterr().err
    finally:
        off.plug_in()
    with connect(on.target, NoPrompts()) as agent:
        assert agent.probe(quick=True).active is not None
    with connect(off.target, NoPrompts()) as agent:
        assert agent.probe(quick=True).active is None


def test_unplugged_while_sending_what_arrived_is_kept(plugged: Device, bundle: Bundle) -> None:
    with connect(plugged.target, NoPrompts()) as agent, pytest.raises(LostLink):
        agent.max_rate_mbit = 40.0  # or all of it may lie in the kernel's buffers before the link is down
        agent.install(bundle, At(plugged.unplug, after=1e6))
    plugged.plug_in()
    with connect(plugged.target, NoPrompts()) as agent:
        assert agent.probe(quick=True).bundles == ()
        again = agent.install(bundle)
        assert again.newly and again.received_bytes <= WEIGHT + 10**6
        assert agent.install(bundle).received_bytes == 0


def test_unplugged_while_activating_the_old_or_the_new_is_active_and_asking_again_converges(
    plugged: Device, made: tiny.TinyBundle, bundle: Bundle, signer: Signer, tmp_path: Path
) -> None:
    newer = tiny.make_bundle(signer, version=2)
    with connect(plugged.target, NoPrompts()) as agent:
        agent.install(bundle)
        before = agent.activate(made.variant(), "test").active
        agent.install(open_bundle(newer.write(tmp_path / "newer"), None))
        unplugging = threading.Timer(0.2, plugged.unplug)
        unplugging.start()
        with contextlib.suppress(LostLink):
            agent.activate(newer.variant(), "test")
    unplugging.join()
    plugged.plug_in()
    with connect(plugged.target, NoPrompts()) as agent:
        found = agent.probe(quick=True).active
        assert found is not None and (found == before or found.variant == newer.variant())
        after = agent.activate(newer.variant(), "test").active
        assert after.variant == newer.variant()
        assert agent.probe(quick=True).previous == before


def test_unplugged_while_measuring_the_run_goes_on_and_comes_home_once(
    plugged: Device, made: tiny.TinyBundle, bundle: Bundle, store: Store, links: list[Agent]
) -> None:
    def cut() -> None:
        plugged.unplug()
        threading.Timer(4.0, plugged.plug_in).start()

    with connect(plugged.target, NoPrompts()) as agent:
        agent.install(bundle)
        home = measure(agent, job(made, "cut-run", seconds=2.0), store, At(cut), reconnect_to(plugged.target, links))
    assert home.newly_stored and home.run.status == "completed" and home.run.attempt == 1, home.run.reason
    assert links and len(store.runs(run_id="cut-run")) == 1
    assert links[-1].waiting() == ()


def test_unplugged_while_collecting_it_is_stored_once_and_offered_until_acknowledged(
    plugged: Device, made: tiny.TinyBundle, bundle: Bundle, store: Store
) -> None:
    class Unplugging:
        """A store whose device vanishes as soon as it has a run."""

        def add_run(self, run: wire.Run) -> bool:
            added = store.add_run(run)
            plugged.unplug()
            return added

    with connect(plugged.target, NoPrompts()) as agent:
        agent.install(bundle)
        agent.submit(job(made, "once"))
        with pytest.raises(LostLink):
            bring_home(agent, Unplugging(), Quiet(), wait=True)
    plugged.plug_in()
    assert len(store.runs(run_id="once")) == 1
    with connect(plugged.target, NoPrompts()) as agent:
        (again,) = bring_home(agent, store, Quiet(), wait=True)
        assert not again.newly_stored
        assert agent.waiting() == ()
    assert len(store.runs(run_id="once")) == 1


def test_rebooted_in_the_middle_the_job_is_begun_again_and_comes_home_once(
    plugged: Device, made: tiny.TinyBundle, bundle: Bundle, store: Store
) -> None:
    """Agent, server and worker are gone at once, with every lock the kernel held for them; the queue is on the disk."""
    with connect(plugged.target, NoPrompts()) as agent:
        agent.install(bundle)
        agent.activate(made.variant(), "test")
        agent.submit(job(made, "survivor", seconds=2.0))
        wait_for((plugged.root / "spool" / "survivor.part").exists, "the job to begin")
        plugged.reboot()
        with pytest.raises((LostLink, Unreachable)):
            agent.waiting()
    with connect(plugged.target, NoPrompts()) as agent:
        assert [(w.run_id, w.state) for w in agent.waiting()] == [("survivor", "running")]
        (home,) = bring_home(agent, store, Quiet(), wait=True)
        assert home.run.status == "completed" and home.run.attempt == 2, home.run.reason
        facts = agent.probe(quick=True)
        assert facts.active is not None and facts.active.variant == made.variant() and facts.active_refused == ""
    assert len(store.runs(run_id="survivor")) == 1


def test_sshd_restarted_while_measuring_is_no_more_than_a_lost_link(
    plugged: Device, made: tiny.TinyBundle, bundle: Bundle, store: Store, links: list[Agent]
) -> None:
    def restart() -> None:
        plugged.server.stop()
        plugged.server.start()

    with connect(plugged.target, NoPrompts()) as agent:
        agent.install(bundle)
        home = measure(agent, job(made, "restarted", seconds=1.0), store, At(restart), reconnect_to(plugged.target, links))
    assert (home.run.status, home.run.attempt, len(store.runs(run_id="restarted"))) == ("completed", 1, 1)


@pytest.fixture
def small_disk(box: Device) -> Iterator[Device]:
    """A device with room for 6 MB of blobs."""
    if os.getuid() != 0:
        pytest.skip("a small file system can be mounted only by root")
    folder = box.root / "blobs"
    folder.mkdir(exist_ok=True)
    owner = folder.stat()
    options = f"size=6m,mode=0700,uid={owner.st_uid},gid={owner.st_gid}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, capture_output=True)
    # An sshd in a namespace sees the mounts that were there when it started.
    box.server.stop()
    box.server.start()
    try:
        yield box
    finally:
        box.server.stop()
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)
        box.server.start()


def test_a_full_disk_is_said_and_leaves_the_device_as_it_was(small_disk: Device, bundle: Bundle) -> None:
    with connect(small_disk.target, NoPrompts()) as agent:
        with pytest.raises(DeviceRefused) as refused:
            agent.install(bundle)
        assert refused.value.code == "no-space" and "edgevit target prune" in refused.value.hint
        facts = agent.probe(quick=True)
        assert facts.bundles == () and facts.active is None


def test_a_wrong_clock_is_reported_and_measures_all_the_same(
    box: Device, made: tiny.TinyBundle, signer: Signer, tmp_path: Path, capsys: pytest.CaptureFixture[str], store: Store
) -> None:
    """A year behind, as a board without a battery is after a boot."""
    folder = box.account.home / "clock"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        "import time\n_time, _ns = time.time, time.time_ns\n"
        "time.time = lambda: _time() - 365 * 86400\ntime.time_ns = lambda: _ns() - 365 * 86400 * 10**9\n"
    )
    late = folder / "python"
    late.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {box.account.python} "$@"\n')
    for path, mode in ((folder, 0o755), (folder / "sitecustomize.py", 0o644), (late, 0o755)):
        path.chmod(mode)
    target: Target = box.target.model_copy(update={"name": "late", "python": str(late)})
    add_target(fleet_path(), target)
    run_cli(["fleet", "check", "late"])
    assert "behind this machine's" in " ".join(capsys.readouterr().out.split())
    small = tiny.make_bundle(signer)
    with connect(target, NoPrompts()) as agent:
        agent.install(open_bundle(small.write(tmp_path / "small"), None))
        agent.submit(job(small, "late-run"))
        (home,) = bring_home(agent, store, Quiet(), wait=True)
    assert home.run.status == "completed", home.run.reason
    (series,) = home.run.measurements[0].series
    assert min(series.samples_ns) > 0
