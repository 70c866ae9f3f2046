"""One plan over several devices and bundles: all of them busy with fewer connections, one job a device, differences told."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from device_agents import wire
from edgevit.cli import run_cli
from edgevit.fleet.agent import Agent
from edgevit.fleet.connect import connect
from edgevit.fleet.inventory import Target, add_target
from edgevit.places import fleet_path
from edgevit.results.store import open_store
from edgevit.transport.prompts import NoPrompts
from tests.support import agent_bundle as tiny
from tests.support.agent_bundle import Signer
from tests.support.fleet import Device


def test_all_devices_are_given_their_job_over_one_connection_before_one_is_waited_for(
    fleet: list[Device],
    signer: Signer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = tiny.make_bundle(signer).write(tmp_path / "first")
    second = tiny.make_bundle(signer, name="other", onnx_model=None, version=2).write(tmp_path / "second")
    order: list[str] = []
    submit, follow = Agent.submit, Agent.follow

    def noted_submit(self: Agent, job: wire.Job) -> bool:
        order.append("submit")
        return submit(self, job)

    def noted_follow(self: Agent, *words: Any) -> wire.Run:
        order.append("follow")
        return follow(self, *words)

    monkeypatch.setattr(Agent, "submit", noted_submit)
    monkeypatch.setattr(Agent, "follow", noted_follow)
    names = [device.target.name for device in fleet]
    argv = ["bench", str(first), *names, "--and", str(second), "--plan", "quick", "--at-once", "1", "--json"]
    assert run_cli(argv) == 0
    said = capsys.readouterr()
    assert order == ["submit"] * 3 + ["follow"] * 3
    document = json.loads(said.out)
    with open_store() as store:
        runs = store.runs(batch_id=document["batch"])
    assert sorted(run.job.target for run in runs) == sorted(names)
    for run in runs:
        assert [m.bundle_name for m in run.measurements] == ["tiny", "other"], "both in one job"
    assert "device_spread" not in document, "three namespaces of one machine, as its boot tells, are no three devices"


def test_a_device_that_is_off_keeps_no_table_from_the_others(
    box: Device, signer: Signer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        add_target(fleet_path(), Target(name="off", host="127.0.0.1", port=s.getsockname()[1]))
    bundle = tiny.make_bundle(signer).write(tmp_path / "bundle")
    assert run_cli(["bench", str(bundle), "off", box.target.name, "--plan", "quick", "--json"]) == 3
    said = capsys.readouterr()
    assert [row["target"] for row in json.loads(said.out)["rows"]] == [box.target.name]
    assert "off" in said.err


def test_a_version_before_the_active_one_is_measured_and_predicted_with_and_what_is_active_stays(
    box: Device, signer: Signer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the new version is better than the one before is asked once the new one is active, too."""
    name = box.target.name
    before = tiny.make_bundle(signer, version=1).write(tmp_path / "before")
    active = tiny.make_bundle(signer, version=2).write(tmp_path / "active")
    assert run_cli(["deploy", str(active), name]) == 0
    assert run_cli(["bench", str(before), name, "--plan", "quick"]) == 0, capsys.readouterr().err
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    assert run_cli(["predict", str(before), name, str(tmp_path / "image.png")]) == 0, capsys.readouterr().err
    with connect(box.target, NoPrompts()) as agent:
        facts = agent.probe(quick=True)
    assert facts.active is not None and facts.active.bundle_version == 2
    assert {one.version for one in facts.bundles} == {1, 2}
    assert run_cli(["deploy", str(before), name]) == 3, "to make it active again stays something to ask for"


def test_the_same_bundle_twice_and_against_with_and_are_refused(
    signer: Signer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = tiny.make_bundle(signer).write(tmp_path / "one")
    two = tiny.make_bundle(signer, version=2).write(tmp_path / "two")
    assert run_cli(["bench", str(one), "local", "--and", str(one)]) == 2
    assert "given twice" in capsys.readouterr().err
    assert run_cli(["bench", str(one), "local", "--and", str(two), "--against", str(two)]) == 2
    assert "leave --and out" in capsys.readouterr().err


def test_a_profile_that_the_board_contradicts_is_refused_naming_both(
    box: Device, signer: Signer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_target(fleet_path(), box.target.model_copy(update={"name": "wrong", "profile": "raspberry-pi-4b"}))
    bundle = tiny.make_bundle(signer).write(tmp_path / "bundle")
    assert run_cli(["bench", str(bundle), "wrong", "--plan", "quick"]) == 2
    said = capsys.readouterr().err
    assert "raspberry-pi-4b" in said and "x86_64" in said
    assert run_cli(["bench", str(bundle), "tag:nowhere"]) == 2
    assert "no tag named 'nowhere'" in capsys.readouterr().err
