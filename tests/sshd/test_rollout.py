"""Deploying to several real devices at once, in waves, by two operators, and with the operator killed."""

from __future__ import annotations

import dataclasses
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgevit.bundle import open_bundle
from edgevit.cli import rollout, run_cli
from edgevit.fleet.audit import read_log
from edgevit.fleet.connect import connect
from edgevit.fleet.inventory import add_target, remove_target
from edgevit.fleet.operator import holding, this_operator
from edgevit.places import audit_path, fleet_path
from edgevit.transport.prompts import NoPrompts
from tests.support import agent_bundle as tiny
from tests.support.deploy_kills import DeployTrials
from tests.support.small_fleet import SmallFleet, small_fleet
from tests.support.sshd import Account

WORSE = "worse"


@pytest.fixture(scope="module")
def made(account: Account, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, SmallFleet]]:
    home = tmp_path_factory.mktemp("fleet-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEVIT_HOME", str(home))
        patch.delenv("SSH_AUTH_SOCK", raising=False)
        with small_fleet(account, 3) as fleet:
            yield home, fleet


@pytest.fixture
def fleet(made: tuple[Path, SmallFleet], monkeypatch: pytest.MonkeyPatch) -> SmallFleet:
    home, fleet = made
    monkeypatch.setenv("EDGEVIT_HOME", str(home))
    fleet.clear()
    audit_path().unlink(missing_ok=True)
    return fleet


@pytest.fixture(scope="module")
def bundles(made: tuple[Path, SmallFleet], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Versions of one model; those with an odd version hold an artifact that is right by its own golden outputs and wrong by
    the labels."""
    folder = tmp_path_factory.mktemp("bundles")
    signer = made[1].signer
    weight = b" " * 1_500_000
    return {
        version: tiny.make_bundle(
            signer,
            version=version,
            extra_blob=f'["{version}"]'.encode() + weight,
            more={WORSE: ("fp32", tiny.tiny_onnx(5))} if version % 2 else None,
        ).write(folder / str(version))
        for version in (2, 3, 4, 5, 6)
    }


def command(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, dict[str, Any], str]:
    capsys.readouterr()
    code = run_cli([*map(str, argv), "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out) if said.out else {}, said.err


def active(fleet: SmallFleet, *names: str) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for target in (t for t in fleet.targets if not names or t.name in names):
        with connect(target, NoPrompts()) as agent:
            there = agent.probe(quick=True).active
            found[target.name] = there.bundle_version if there else None
    return found


def test_two_devices_and_one_that_is_off(
    fleet: SmallFleet, bundles: dict[int, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    two = ("box-1", "box-2")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    add_target(fleet_path(), fleet.targets[0].model_copy(update={"name": "off", "port": port}))
    try:
        code, planned, _ = command(capsys, "deploy", bundles[2], *two, "off", "--dry-run")
        rows = {row["target"]: row for row in planned["targets"]}
        assert code == 3 and rows["off"]["outcome"] == "unreachable"
        assert rows["box-1"]["send_bytes"] > 1_500_000 and rows["box-1"]["seconds"] is None
        assert "no deployment there from here" in rows["box-1"]["seconds_absent"]
        assert active(fleet, *two) == dict.fromkeys(two)

        code, done, said = command(capsys, "deploy", bundles[2], *two, "off", "--at-once", "2")
        rows = {row["target"]: row for row in done["targets"]}
        assert code == 3 and "off" in said
        assert {rows[name]["sent_bytes"] for name in two} == {planned["targets"][0]["send_bytes"]}
        assert active(fleet, *two) == dict.fromkeys(two, 2)
    finally:
        remove_target(fleet_path(), "off")
    kept = {e.target: (e.outcome, e.details.get("sent_bytes")) for e in read_log(audit_path()).entries if e.action == "deploy"}
    assert kept["off"][0] == "failed" and kept["box-2"] == ("done", rows["box-2"]["sent_bytes"])

    capsys.readouterr()
    assert run_cli(["deploy", str(bundles[2]), *two]) == 0
    table = capsys.readouterr().out
    assert table.count("was there") == 2 and max(map(len, table.splitlines())) <= 100
    again = [e.details for e in read_log(audit_path()).entries if e.action == "deploy"][-2:]
    assert [(e["sent_bytes"], e["activated"]) for e in again] == [(0, False)] * 2
    code, planned, _ = command(capsys, "deploy", bundles[4], "box-2", "--dry-run")
    assert code == 0 and planned["targets"][0]["seconds"] > 0, "the last deployment says how long one takes"


def test_the_second_operator_is_told_and_the_others_are_finished(
    fleet: SmallFleet, bundles: dict[int, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    target = fleet.targets[1]
    with connect(target, NoPrompts()) as agent, holding(agent, this_operator("deploy by another")):
        code, done, said = command(capsys, "deploy", bundles[4], "box-2", "box-3")
        rows = {row["target"]: row for row in done["targets"]}
        assert (code, rows["box-2"]["outcome"], rows["box-2"]["error"]["code"]) == (3, "locked", "locked")
        assert "is at it (deploy by another) since" in said and "--take-over" in said and "until" in said
        assert rows["box-3"]["active"]["bundle_version"] == 4
        assert run_cli(["rollback", "box-2"]) == 3
        code, done, _ = command(capsys, "deploy", bundles[4], "box-2", "--take-over")
        assert code == 0 and done["targets"][0]["took_over"].count("@") == 1
    for one in fleet.targets:
        assert not (Path(one.root) / "operator.json").exists(), "a command gives its lock back"


def test_the_lock_of_a_command_that_was_killed_here_does_not_keep_the_next_one_out(
    fleet: SmallFleet, bundles: dict[int, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    script = (
        "import sys\nfrom edgevit.fleet.connect import connect\nfrom edgevit.fleet.inventory import load_fleet\n"
        "from edgevit.fleet.operator import take_lock, this_operator\nfrom edgevit.places import fleet_path\n"
        "from edgevit.transport.prompts import NoPrompts\n"
        "with connect(load_fleet(fleet_path()).targets[0], NoPrompts()) as agent:\n"
        "    take_lock(agent, this_operator('deploy that dies'))\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        assert command(capsys, "deploy", bundles[4], "box-1")[0] == 3
    finally:
        other.kill()
        other.communicate()
    code, done, _ = command(capsys, "deploy", bundles[4], "box-1")
    assert code == 0 and done["targets"][0]["took_over"]


@pytest.fixture
def quick_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates that ask for little time, and whose verdict no neighbour on this machine can change."""

    def plan(wanted: rollout.Rollout) -> Any:
        usual = rollout_plan(wanted)
        return dataclasses.replace(
            usual, processes=1, warmup_seconds=0.0, min_samples=8, min_seconds=0.0,
            max_foreign_cpu=1e6, max_waiting=1.0, max_frequency_drift=1.0,
        )  # fmt: skip

    rollout_plan = rollout.gate_plan
    monkeypatch.setattr(rollout, "gate_plan", plan)


GATES = ("--without-gate", "p90", "--max-memory-growth", "500")


@pytest.mark.usefixtures("quick_gates")
def test_a_wave_whose_gate_does_not_hold_goes_back_whole_and_the_next_is_not_begun(
    fleet: SmallFleet, bundles: dict[int, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    two = ("box-1", "box-3")
    assert run_cli(["deploy", str(bundles[4]), *two]) == 0
    waves = ("--wave", "1", "--wave", "100%", *GATES)
    code, done, said = command(capsys, "deploy", bundles[5], *two, *waves, "--select", WORSE)
    assert (code, done["decision"]) == (1, "roll back")
    assert [row["outcome"] for row in done["targets"]] == ["rolled back", "not tried"]
    verdicts = {gate["name"]: gate["held"] for gate in done["targets"][0]["gates"]}
    assert verdicts == {"accuracy": False, "memory": True}
    assert "top-1" in done["reasons"][0] and "wave 1 of 2 was rolled back" in said
    assert active(fleet, *two) == dict.fromkeys(two, 4)
    entries = [e for e in read_log(audit_path()).entries if e.target == "box-1"][-3:]
    assert [(e.action, e.outcome) for e in entries] == [("deploy", "done"), ("gate", "failed"), ("rollback", "done")]
    assert "top-1" in str(entries[2].details["why"])

    # As where a roll-out was killed after it had deployed to the first and before it had judged it.
    assert run_cli(["deploy", str(bundles[6]), "box-1"]) == 0
    waves = (*waves, "--without-gate", "accuracy")
    code, done, _ = command(capsys, "deploy", bundles[6], *two, *waves)
    assert (code, done["decision"]) == (0, "finished")
    assert [(row["wave"], row["outcome"], len(row["gates"])) for row in done["targets"]] == [
        (1, "was there", 1),
        (2, "deployed", 1),
    ]
    assert active(fleet, *two) == dict.fromkeys(two, 6)
    judged = sum(e.action == "gate" for e in read_log(audit_path()).entries)
    code, again, _ = command(capsys, "deploy", bundles[6], "box-1", *waves)
    assert code == 0 and [row["outcome"] for row in again["targets"]] == ["was there"]
    assert sum(e.action == "gate" for e in read_log(audit_path()).entries) == judged, "what held is not judged again"
    for target in fleet.targets:
        assert not (Path(target.root) / "operator.json").exists()


def test_what_a_roll_out_cannot_do_is_said_before_anything_is_done(
    fleet: SmallFleet, bundles: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unlabelled = tiny.make_bundle(fleet.signer, version=7, evaluation=False).write(tmp_path / "unlabelled")
    assert run_cli(["deploy", str(bundles[6]), "box-1", "box-3"]) == 0
    code, _, said = command(capsys, "deploy", unlabelled, "box-1", "--wave", "1")
    assert code == 2 and "accuracy cannot be judged: no labelled images" in said and "--without-gate accuracy" in said
    code, _, said = command(capsys, "deploy", unlabelled, "box-1", "box-3", "--wave", "1", "--wave", "100%", "--pause")
    assert code == 2 and "no terminal" in said and "--wave 1 alone" in said
    pinned = fleet.targets[2].model_copy(update={"name": "pinned", "pin": "tiny@6"})
    add_target(fleet_path(), pinned)
    try:
        code, done, said = command(capsys, "deploy", unlabelled, "pinned")
        assert (code, done["targets"][0]["outcome"]) == (2, "pinned") and "--despite-pin" in said
        code, _, said = command(capsys, "deploy", unlabelled, "pinned", "--wave", "1")
        assert code == 2 and "pinned to tiny@6" in said
        assert command(capsys, "deploy", bundles[6], "pinned", "--dry-run")[0] == 0
        assert command(capsys, "deploy", unlabelled, "pinned", "--despite-pin", "--dry-run")[0] == 0
    finally:
        remove_target(fleet_path(), "pinned")
    assert active(fleet, "box-1", "box-3") == {"box-1": 6, "box-3": 6}


def test_a_link_that_is_cut_is_taken_up_again(
    fleet: SmallFleet, bundles: dict[int, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgevit.fleet.agent import Agent

    cut = []
    activate = Agent.activate

    def cut_once(agent: Agent, *arguments: Any, **options: Any) -> Any:
        if agent.name == "box-2" and not cut:
            cut.append(fleet.servers[1].kill_connections())
        return activate(agent, *arguments, **options)

    monkeypatch.setattr(Agent, "activate", cut_once)
    code, done, said = command(capsys, "deploy", bundles[3], "box-2")
    assert code == 0 and cut[0] and done["targets"][0]["links_lost"] == 1
    assert "trying again in" in said
    last = read_log(audit_path()).entries[-1]
    assert (last.target, last.outcome, last.details["links_lost"]) == ("box-2", "done", 1)


def test_prune_removes_what_nothing_needs(
    fleet: SmallFleet, bundles: dict[int, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(["deploy", str(bundles[4]), "box-3"]) == 0
    with connect(fleet.targets[2], NoPrompts()) as agent:
        for version in (3, 5):
            agent.install(open_bundle(bundles[version], None), allow_older=True)
    code, planned, _ = command(capsys, "deploy", bundles[6], "box-3", "--prune", "--dry-run")
    foreseen = planned["targets"][0]["remove"]
    assert code == 0 and foreseen["removed_bundles"] == 2
    code, done, _ = command(capsys, "deploy", bundles[6], "box-3", "--prune")
    assert code == 0 and done["targets"][0]["removed"] == foreseen
    assert run_cli(["rollback", "box-3"]) == 0 and active(fleet, "box-3") == {"box-3": 4}, (
        "what was active before is not removed"
    )


def test_a_deployment_whose_operator_is_killed_converges_when_it_is_run_again(fleet: SmallFleet, tmp_path: Path) -> None:
    trials = DeployTrials(fleet, tmp_path, seed=20260101, thorough=False)
    while trials.tally.killed < 3 and trials.tally.trials < 8:
        trials.one()
    assert trials.tally.problems == [] and trials.tally.killed >= 3
