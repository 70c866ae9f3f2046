"""Jobs of devices that are off: kept here, sent when they are seen, each exactly once, whatever is killed in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from device_agents import wire
from edgevit.bundle import open_bundle
from edgevit.cli import run_cli
from edgevit.cli.bench import Wanted, make_entry
from edgevit.cli.collect import _Collecting
from edgevit.cli.connect import Session
from edgevit.errors import BundleError
from edgevit.fleet import outbox
from edgevit.fleet.agent import WaitingRun
from edgevit.fleet.inventory import Target, add_target
from edgevit.places import fleet_path, outbox_dir
from edgevit.progress import Quiet
from edgevit.results.store import open_store
from tests.support import agent_bundle as tiny
from tests.support.agent_bundle import FAST_PLAN, Signer
from tests.support.fleet import Device

PROFILE = "generic-x86-64"


def command(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any], str]:
    capsys.readouterr()
    code = run_cli([*argv, "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out) if said.out else {}, said.err


@pytest.fixture
def bundle(signer: Signer, tmp_path: Path) -> Path:
    return tiny.make_bundle(signer).write(tmp_path / "bundle")


def put(bundle: Path, target: str) -> outbox.Entry:
    """What `bench --detach` leaves for a device that is off, with a plan that takes no time."""
    with open_store() as store:
        batch = store.new_batch("bench tiny")
    entry = make_entry(target, Wanted([open_bundle(bundle, None)], FAST_PLAN), batch)
    outbox.put(outbox_dir(), entry)
    return entry


def stored(run_id: str) -> int:
    with open_store() as store:
        return len(store.runs(run_id=run_id))


def known_there(device: Device) -> set[str]:
    """Every run that the device was ever given."""
    return {p.name.split(".")[0] for folder in ("queue", "spool") for p in (device.root / folder).glob("*") if p.is_file()}


def test_a_device_that_is_off_gets_its_job_once_it_is_seen(
    fleet: list[Device], bundle: Path, quick_to_give_up: None, capsys: pytest.CaptureFixture[str]
) -> None:
    on, off, _ = fleet
    off.unplug()
    try:
        code, found, said = command(
            capsys, "bench", str(bundle), on.target.name, off.target.name, "--plan", "quick", "--detach"
        )
        states = {row["target"]: row["state"] for row in found["runs"]}
        assert (code, states) == (0, {on.target.name: "submitted", off.target.name: "waits-here"}), said
        run_id = next(row["run"] for row in found["runs"] if row["target"] == off.target.name)
        code, found, said = command(capsys, "collect", off.target.name)
        assert code == 3 and off.target.name in said
        assert [(e["run"], e["target"]) for e in found["waits_here"]] == [(run_id, off.target.name)]
    finally:
        off.plug_in()
    code, found, said = command(capsys, "collect", "--wait", on.target.name, off.target.name)
    assert (code, found["waits_here"]) == (0, []), said
    assert [e["run"] for e in found["sent"]] == [run_id]
    home = {row["target"]: [one["status"] for one in row["home"]] for row in found["targets"]}
    assert home == {on.target.name: ["completed"], off.target.name: ["completed"]}
    assert stored(run_id) == 1
    code, found, _ = command(capsys, "collect", off.target.name)
    assert (code, found["sent"], found["targets"][0]["home"], found["targets"][0]["there"]) == (0, [], [], [])


def test_a_bundle_that_vanished_or_changed_is_said_and_the_rest_goes_on(
    box: Device, bundle: Path, signer: Signer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = box.target.name
    gone, changed = (tiny.make_bundle(signer, version=v).write(tmp_path / f"v{v}") for v in (2, 3))
    lost, other, good = (put(path, name) for path in (gone, changed, bundle))
    shutil.rmtree(gone)
    shutil.rmtree(changed)
    tiny.make_bundle(signer, version=4).write(changed)
    code, found, said = command(capsys, "collect", name, "--wait")
    assert code == 1
    assert f"run {lost.run_id} for {name}: tiny is not at {gone} any more" in said
    assert f"run {other.run_id} for {name}: {changed} is another bundle now" in said
    assert f"edgevit collect --cancel {lost.run_id}" in said
    assert [e["run"] for e in found["sent"]] == [good.run_id] and stored(good.run_id) == 1
    assert {e["run"] for e in found["waits_here"]} == {lost.run_id, other.run_id}
    with pytest.raises(BundleError):
        outbox.open_kept(lost)
    code, found, _ = command(capsys, "collect", name, "--cancel", lost.run_id, "--cancel", other.run_id)
    assert (code, set(found["taken_back"])) == (0, {lost.run_id, other.run_id})
    assert outbox.read(outbox_dir()).entries == ()
    assert known_there(box) == {good.run_id}


def test_what_waits_for_a_name_that_left_the_fleet_file_is_said(
    box: Device, bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EDGEVIT_FLEET", str(tmp_path / "empty.yaml"))
    entry = put(bundle, "elsewhere")
    code, found, said = command(capsys, "collect")
    assert code == 2 and "no target named 'elsewhere'" in said and f"collect --cancel {entry.run_id}" in said
    assert [e["run"] for e in found["waits_here"]] == [entry.run_id]


def test_two_that_collect_at_once_submit_once(box: Device, bundle: Path) -> None:
    entry = put(bundle, box.target.name)
    argv = [sys.executable, "-m", "edgevit", "collect", box.target.name, "--wait"]
    both = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    said = [one.communicate(timeout=120)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert sum(f"{entry.run_id} is sent" in text for text in said) == 1, said
    assert stored(entry.run_id) == 1
    assert known_there(box) == {entry.run_id}
    assert outbox.read(outbox_dir()).entries == ()


def test_a_job_for_other_boards_is_refused_though_the_device_is_off(
    signer: Signer, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_target(fleet_path(), Target(name="pi", host="192.0.2.1", profile="raspberry-pi-4b"))
    code, found, said = command(capsys, "bench", str(bundle), "pi", "--detach")
    assert code == 2 and "built for generic-x86-64" in said and "raspberry-pi-4b" in said
    assert found["runs"] == [] and outbox.read(outbox_dir()).entries == ()


# ---- kill -9 ---------------------------------------------------------------------------------------------------------

PUT = """
import os, signal, sys
from pathlib import Path
import edgevit.fleet.outbox as outbox
from device_agents import wire
entry = wire.loads(outbox.Entry, Path(sys.argv[2]).read_bytes(), "entry", 10**6)
last, done = int(sys.argv[3]), [0]
def stepping(real):
    def step(*args, **kwargs):
        done[0] += 1
        if done[0] == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return step
for name in ("open", "replace", "fsync", "unlink"):
    setattr(os, name, stepping(getattr(os, name)))
outbox.put(Path(sys.argv[1]), entry)
"""


def test_killed_at_any_step_of_keeping_a_job_it_is_there_whole_or_not_at_all(bundle: Path, tmp_path: Path) -> None:
    entry = make_entry("off", Wanted([open_bundle(bundle, None)], FAST_PLAN), "batch")
    document, folder = tmp_path / "entry", tmp_path / "outbox"
    document.write_bytes(wire.dumps(entry))
    seen = []
    for step in range(1, 12):
        argv = [sys.executable, "-c", PUT, str(folder), str(document), str(step)]
        status = subprocess.run(argv, timeout=60, check=False).returncode
        listing = outbox.read(folder)
        assert listing.unreadable == () and listing.entries in ((), (entry,)), f"step {step}"
        seen.append((status, bool(listing.entries)))
        if status == 0:
            break
    killed = [found for status, found in seen if status == -signal.SIGKILL]
    assert seen[-1][0] == 0 and len(killed) >= 4 and not killed[0]
    assert [p.name for p in folder.iterdir()] == [f"{entry.run_id}.json"], "what a killed one left half-written is swept"


SEND = """
import os, signal, sys
import edgevit.fleet.outbox as outbox
from edgevit.fleet.agent import Agent
def before(holder, name):
    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(holder, name, die)
def after(holder, name):
    real = getattr(holder, name)
    def act_and_die(*args, **kwargs):
        real(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(holder, name, act_and_die)
{
    "before it is sent": lambda: before(Agent, "submit"),
    "between sending and noting": lambda: after(Agent, "submit"),
    "before it is acknowledged": lambda: before(Agent, "ack"),
}[sys.argv[1]]()
from edgevit.cli import main
main(["collect", sys.argv[2], "--wait"])
"""


@pytest.mark.parametrize("moment", ["before it is sent", "between sending and noting", "before it is acknowledged"])
def test_killed_while_sending_or_bringing_home_nothing_is_lost_or_doubled(box: Device, bundle: Path, moment: str) -> None:
    entry = put(bundle, box.target.name)
    killed = subprocess.run(
        [sys.executable, "-c", SEND, moment, box.target.name], capture_output=True, timeout=120, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert outbox.read(outbox_dir()).entries or known_there(box), "it is nowhere"
    assert run_cli(["collect", box.target.name, "--wait"]) == 0
    assert stored(entry.run_id) == 1
    assert known_there(box) == {entry.run_id}
    assert list(outbox_dir().glob("*.json")) == []


def test_cancelled_while_nobody_knows_whether_it_arrived_the_device_is_asked(
    box: Device, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sending that was cut off is neither taken back without asking nor sent again."""
    arrived, lost = sorted((put(bundle, box.target.name) for _ in range(2)), key=lambda e: (e.queued_at, e.run_id))
    argv = [sys.executable, "-c", SEND, "between sending and noting", box.target.name]
    killed = subprocess.run(argv, capture_output=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert outbox.was_asked(outbox_dir(), arrived.run_id), "it was another job that was sent first"
    outbox.note_asked(outbox_dir(), lost.run_id)
    assert outbox.take_back(outbox_dir(), [arrived.run_id, lost.run_id]) == []
    code, found, said = command(capsys, "collect", box.target.name, "--cancel", arrived.run_id, "--cancel", lost.run_id)
    assert code == 0, said
    assert found["taken_back"] == [lost.run_id] and found["waits_here"] == []
    assert known_there(box) == {arrived.run_id} and stored(arrived.run_id) == 1


def test_cancelled_while_another_edgevit_sends_it_again_it_is_ended_on_the_device(bundle: Path) -> None:
    """Asked before that one is done, the device would know nothing of the run yet."""
    entry, there, asked, held = put(bundle, "box"), list[str](), threading.Event(), threading.Event()
    outbox.note_asked(outbox_dir(), entry.run_id)

    class Asked:
        def waiting(self) -> list[WaitingRun]:
            found = [WaitingRun(run_id, "queued") for run_id in there]
            asked.set()
            return found

        def cancel(self, run_id: str) -> bool:
            there.remove(run_id)
            return True

    def send() -> None:
        with outbox.hold(outbox_dir(), entry.run_id, wait=True):
            held.set()
            asked.wait(0.5)
            there.append(entry.run_id)
            outbox.remove(outbox_dir(), entry.run_id)

    sender = threading.Thread(target=send)
    sender.start()
    held.wait()
    with open_store() as store:
        collecting = _Collecting(outbox_dir(), outbox.read(outbox_dir()), store, Quiet(), False, frozenset({entry.run_id}))
        collecting._cancel(Session(Target(name="box", host="192.0.2.1"), Asked()))  # type: ignore[arg-type]
    sender.join()
    assert (collecting.ended, collecting.taken, there) == ([entry.run_id], [], []), "said to be taken back, and measured"


def test_the_lock_of_an_entry_is_its_own_and_ends_with_its_holder(bundle: Path, tmp_path: Path) -> None:
    entry = make_entry("off", Wanted([open_bundle(bundle, None)], FAST_PLAN), "batch")
    outbox.put(tmp_path, entry)
    with outbox.hold(tmp_path, entry.run_id, wait=False) as first:
        assert first is outbox.Hold.MINE
        with outbox.hold(tmp_path, entry.run_id, wait=False) as second:
            assert second is outbox.Hold.ELSEWHERE
        found: list[outbox.Hold] = []

        def wait_for_it() -> None:
            with outbox.hold(tmp_path, entry.run_id, wait=True) as third:
                found.append(third)

        waiter = threading.Thread(target=wait_for_it)
        waiter.start()
        outbox.remove(tmp_path, entry.run_id)
    waiter.join(10)
    assert found == [outbox.Hold.GONE]
    with outbox.hold(tmp_path, entry.run_id, wait=False) as gone:
        assert gone is outbox.Hold.GONE


def test_killed_between_the_two_removals_leaves_nothing_for_long(bundle: Path, tmp_path: Path) -> None:
    first, second = (make_entry("off", Wanted([open_bundle(bundle, None)], FAST_PLAN), "batch") for _ in range(2))
    outbox.put(tmp_path, first)
    outbox.note_asked(tmp_path, first.run_id)
    (tmp_path / f"{first.run_id}.json").unlink()
    assert outbox.read(tmp_path).entries == ()
    outbox.put(tmp_path, second)
    outbox.note_asked(tmp_path, second.run_id)
    assert not outbox.was_asked(tmp_path, first.run_id) and outbox.was_asked(tmp_path, second.run_id)


def test_a_damaged_file_in_the_outbox_is_named_and_skipped(bundle: Path, tmp_path: Path) -> None:
    entry = make_entry("off", Wanted([open_bundle(bundle, None)], FAST_PLAN), "batch")
    outbox.put(tmp_path, entry)
    (tmp_path / "torn.json").write_bytes(wire.dumps(entry)[:50])
    (tmp_path / "other.json").write_bytes(wire.dumps(entry))
    listing = outbox.read(tmp_path)
    assert listing.entries == (entry,)
    assert len(listing.unreadable) == 2 and all("torn.json" in u or "other.json" in u for u in listing.unreadable)
    assert os.stat(tmp_path / f"{entry.run_id}.json").st_mode & 0o777 == 0o600
