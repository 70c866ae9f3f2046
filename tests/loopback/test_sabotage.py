"""A seeded slice of the kills at every step, and devices with a full disk, a read-only store, a wrong clock, a torn spool."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_agents import wire
from edgevit.fleet.connect import connect
from edgevit.fleet.inventory import local_target
from edgevit.places import local_root
from edgevit.transport.prompts import NoPrompts
from tests.support.agent_bundle import AgentProcess, AgentRefused, Signer, make_bundle, make_job
from tests.support.cli import Cli
from tests.support.sabotage import COMMANDS, kill_steps, with_wrong_clock


def test_killed_before_any_step_every_command_can_be_given_again(tmp_path: Path, signer: Signer) -> None:
    tally = kill_steps(tmp_path, signer, seed=11, share=0.03)
    assert tally.problems == [], tally.text()
    assert set(tally.steps) == set(COMMANDS) and all(tally.steps.values())
    assert tally.killed.total() >= 4, f"the slice hardly killed anything: {tally.text()}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB, of which the agent leaves 16 free."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path, spare: int = 0) -> Path:
    """The file that takes the room of a file system but for ``spare`` bytes."""
    filler = place / "filler"
    handle = os.open(filler, os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(handle, b"x" * 4096)
    except OSError:
        os.ftruncate(handle, os.fstat(handle).st_size - spare)
    finally:
        os.close(handle)
    return filler


def test_a_disk_that_fills_up_costs_neither_the_active_bundle_nor_a_result(small_disk: Path, signer: Signer) -> None:
    agent = AgentProcess(small_disk / "root").upload()
    agent.allow(signer)
    first = make_bundle(signer)
    agent.install(first)
    agent.call("probe")
    request = {"variant": wire.encode(first.variant()), "policy": "test", "allow_older": False}
    agent.call("activate", stdin=request)
    with pytest.raises(AgentRefused) as refused:
        agent.install(make_bundle(signer, version=2, extra_blob=os.urandom(30_000_000)))
    assert refused.value.code == "no-space"
    agent.call("submit", stdin=wire.encode(make_job(first, "before")))
    before = agent.follow("before")
    filler = fill(small_disk)
    with pytest.raises(AgentRefused) as refused:
        agent.call("submit", stdin=wire.encode(make_job(first, "during")))
    assert refused.value.code == "no-space"
    assert agent.follow("before") == before, "a result that waits is not touched"
    with pytest.raises(AgentRefused) as refused:
        agent.call("activate", stdin=request)
    assert refused.value.code == "no-space", "a signature is checked in files"
    assert agent.call("probe", "--quick")["active"]["variant"] == request["variant"]
    filler.unlink()
    assert agent.call("activate", stdin=request)["changed"] is False
    assert agent.call("ack", "before") == {"acknowledged": True}
    agent.call("submit", stdin=wire.encode(make_job(first, "during")))
    assert agent.follow("during").status == "completed"


def test_a_job_without_room_for_its_result_waits_and_results_are_given_back_all_the_same(
    small_disk: Path, signer: Signer
) -> None:
    agent = AgentProcess(small_disk / "root").upload()
    agent.allow(signer)
    bundle = make_bundle(signer)
    agent.install(bundle)
    agent.call("submit", stdin=wire.encode(make_job(bundle, "before")))
    agent.follow("before")
    filler = fill(small_disk, spare=1_000_000)
    (agent.root / "queue" / "waits.json").write_bytes(wire.dumps(make_job(bundle, "waits")))
    for command in (("follow", "waits"), ("serve", "--once"), ("follow", "waits")):
        with pytest.raises(AgentRefused) as refused:
            agent.call(*command)
        assert refused.value.code == "no-space" and "for a result" in refused.value.message
    fill(small_disk)
    assert agent.call("ack", "before") == {"acknowledged": True}, "a full disk could not be emptied"
    assert agent.call("ack", "before") == {"acknowledged": False}
    assert agent.call("waiting")["runs"] == [{"run_id": "waits", "state": "queued"}]
    filler.unlink()
    run = agent.follow("waits")
    assert (run.status, run.attempt) == ("completed", 1), run.reason


def test_a_full_disk_is_pruned_although_no_lock_fits_on_it(
    small_disk: Path, home: Path, cli: Cli, operator: Signer, tmp_path: Path
) -> None:
    local_root().parent.mkdir(parents=True, exist_ok=True)
    local_root().symlink_to(small_disk)
    for version in (1, 2, 3):
        bundle = make_bundle(operator, version=version, extra_blob=bytes([version]) * 100_000)
        assert cli("deploy", bundle.write(tmp_path / str(version)), "local").code == 0
    with connect(local_target(), NoPrompts()) as agent:
        assert agent.take_lock("ann@desk", "deploy tiny v4", "a" * 32, 600.0).taken
        fill(small_disk)
        cli("target", "prune", "local").refused(3, "ann@desk", "--take-over")
        assert agent.release_lock("a" * 32)
    fill(small_disk)
    said = cli("target", "prune", "local")
    assert said.code == 0 and "1 bundles removed" in said.out, said.err


def test_a_store_that_became_read_only_is_named(small_disk: Path, signer: Signer) -> None:
    """As a worn-out card does it."""
    agent = AgentProcess(small_disk / "root").upload()
    agent.allow(signer)
    bundle = make_bundle(signer)
    agent.install(bundle)
    agent.call("probe")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for command, stdin in (
        ("submit", wire.encode(make_job(bundle, "nowhere"))),
        ("activate", {"variant": wire.encode(bundle.variant()), "policy": "test", "allow_older": False}),
    ):
        with pytest.raises(AgentRefused) as refused:
            agent.call(command, stdin=stdin)
        assert refused.value.code == "io-error" and "Read-only file system" in refused.value.message, command
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    agent.call("submit", stdin=wire.encode(make_job(bundle, "somewhere")))
    assert agent.follow("somewhere").status == "completed"


def test_a_clock_a_year_behind_loses_nothing(tmp_path: Path, signer: Signer) -> None:
    """A board without a battery starts in the past: versions, signatures, stale parts and marks must not depend on it."""
    agent = AgentProcess(tmp_path / "root").upload()
    agent.allow(signer)
    first, second = make_bundle(signer), make_bundle(signer, version=2)
    agent.install(first)
    agent.call("submit", stdin=wire.encode(make_job(first, "before")))
    agent.follow("before")
    behind = with_wrong_clock(agent, tmp_path / "hooks")
    behind.install(second)
    request = {"variant": wire.encode(second.variant()), "policy": "test", "allow_older": False}
    assert behind.call("activate", stdin=request)["changed"]
    behind.call("submit", stdin=wire.encode(make_job(second, "after")))
    run = behind.follow("after")
    assert run.status == "completed" and run.started_at < agent.follow("before").started_at
    behind.call("gc")
    assert {r["run_id"] for r in behind.call("waiting")["runs"]} == {"before", "after"}
    for name in ("before", "after"):
        assert behind.call("ack", name) == {"acknowledged": True}
        assert agent.call("submit", stdin=wire.encode(make_job(first, name))) == {"run_id": name, "queued": False}


@pytest.mark.parametrize("damage", [b"\xff\x00garbage\n", b'{"type":"progr', b"[1,2,3]\n", b"\n\n\n", b'{"type":5}\n'])
def test_a_corrupt_line_in_the_spool_is_passed_over(tmp_path: Path, signer: Signer, damage: bytes) -> None:
    agent = AgentProcess(tmp_path / "root").upload()
    agent.allow(signer)
    bundle = make_bundle(signer)
    agent.install(bundle)
    (agent.root / "spool" / "torn.part").write_bytes(b'{"type":"attempt","attempt":1,"at":"x"}\n' + damage)
    agent.call("submit", stdin=wire.encode(make_job(bundle, "torn")))
    run = agent.follow("torn")
    assert (run.status, run.attempt) == ("completed", 2)


def test_a_damaged_result_is_named_and_does_not_stop_the_others(tmp_path: Path, signer: Signer) -> None:
    agent = AgentProcess(tmp_path / "root").upload()
    agent.allow(signer)
    bundle = make_bundle(signer)
    agent.install(bundle)
    agent.call("submit", stdin=wire.encode(make_job(bundle, "whole")))
    agent.follow("whole")
    (agent.root / "spool" / "damaged.run").write_bytes(b'{"schema":"edgevit.run/1",')
    with pytest.raises(AgentRefused) as refused:
        agent.follow("damaged")
    assert refused.value.code == "run-damaged"
    assert [r["run_id"] for r in agent.call("waiting")["runs"]] == ["whole"]
    assert (agent.root / "spool" / "damaged.damaged").read_bytes().startswith(b'{"schema"'), "what is left of it is kept"
    assert agent.follow("whole").status == "completed"
