"""The operators' lock between real agent processes: who gets it, who is refused, when it ends."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from device_agents.__main__ import CHANGING
from device_agents.operator_lock import COMMANDS, Held, left_s
from device_agents.wire import OperatorLock, decode
from edgevit.bundle import open_bundle
from edgevit.cli.ship import Order, ship_one
from edgevit.fleet.agent import UNDER_THE_LOCK
from edgevit.fleet.connect import connect
from edgevit.fleet.inventory import local_target
from edgevit.fleet.operator import this_operator
from edgevit.progress import Quiet
from edgevit.transport.prompts import NoPrompts
from tests.support import agent_bundle as tiny
from tests.support.waiting import wait_for

ANN, BEN = "ann0000000", "ben0000000"


def take(agent: tiny.AgentProcess, token: str, seconds: float = 600.0, over: str = "") -> dict[str, Any]:
    owner = f"{token[:3]}@desk"
    asked = {"owner": owner, "what": "deploy tiny v1", "token": token, "seconds": seconds, "over": over}
    return agent.call("operator-take", stdin=asked)


def release(agent: tiny.AgentProcess, token: str) -> bool:
    return agent.call("operator-release", "--operator", token)["released"]


def refused(agent: tiny.AgentProcess, *command: str, stdin: Any = b"") -> str:
    with pytest.raises(tiny.AgentRefused) as caught:
        agent.call(*command, stdin=stdin)
    assert caught.value.code == "locked"
    return caught.value.message


def test_one_operator_holds_it_and_another_learns_who_since_when_until_when(agent: tiny.AgentProcess) -> None:
    mine = take(agent, ANN)
    assert mine["taken"] and mine["from"] is None
    theirs = take(agent, BEN)
    assert not theirs["taken"] and theirs["lock"]["token"] == ANN
    said = decode(OperatorLock, theirs["lock"], "lock").text()
    since, until = mine["lock"]["since"][:19], mine["lock"]["until"][:19]
    assert said.startswith(f"ann@desk is at it (deploy tiny v1) since {since}Z, until {until}Z by the device's clock;")
    assert take(agent, ANN)["lock"]["since"] == mine["lock"]["since"], "renewing keeps since when"
    assert not release(agent, BEN) and release(agent, ANN) and not release(agent, ANN)
    assert take(agent, BEN)["taken"]


def test_what_changes_the_device_is_refused_to_everyone_else(agent: tiny.AgentProcess, signer: tiny.Signer) -> None:
    bundle = tiny.make_bundle(signer)
    take(agent, ANN)
    for stranger in ((), ("--operator", BEN)):
        assert "ann@desk is at it" in refused(agent, "rollback", *stranger)
    assert "ann@desk" in refused(agent, "gc", "--operator", BEN)
    assert "ann@desk" in refused(agent, "unprovision")
    assert "ann@desk" in refused(agent, "activate", stdin={})
    assert "ann@desk" in refused(agent, "install", "--operator", BEN)
    agent.install(bundle)  # adds what nothing uses: a measurement by another does that too
    with pytest.raises(tiny.AgentRefused, match="no-active"):
        agent.call("rollback", "--operator", ANN)
    assert agent.call("gc", "--operator", ANN)["removed_bundles"] == 0
    assert agent.call("probe", "--quick")["bundles"] and agent.call("have", stdin={"blobs": []})


def test_a_lost_lock_is_not_worked_under_any_more(agent: tiny.AgentProcess) -> None:
    take(agent, ANN)
    assert take(agent, BEN, over=ANN)["from"]["token"] == ANN
    assert take(agent, ANN, over="someoneelse")["taken"] is False, "only the holder that was named is taken over"
    assert "ben@desk is at it" in refused(agent, "gc", "--operator", ANN)
    release(agent, BEN)
    assert "another operator had the lock" in refused(agent, "gc", "--operator", ANN)


def test_a_dead_operator_s_lock_ends_by_itself(agent: tiny.AgentProcess) -> None:
    take(agent, ANN, seconds=1.0)
    wait_for(lambda: take(agent, BEN)["taken"], "the end of its second")
    assert release(agent, BEN)


def test_a_command_of_the_holder_holds_it_beyond_its_time(agent: tiny.AgentProcess) -> None:
    take(agent, ANN, seconds=1.0)
    upload = agent.start("install", "--operator", ANN)  # waits for its request, as on a link that has gone silent
    try:
        wait_for((agent.root / "operator.work").exists, "its command at work")

        def told_after_its_time() -> dict[str, Any] | None:
            told = take(agent, BEN)
            return told if told["taken"] or told["lock"]["left_s"] == 0 else None

        theirs = wait_for(told_after_its_time, "the end of its second")
        assert not theirs["taken"]
        assert "its command is still at work there" in decode(OperatorLock, theirs["lock"], "lock").text()
    finally:
        upload.kill()
        upload.communicate()
    assert take(agent, BEN)["taken"]


def test_it_does_not_ask_the_clock_of_the_day(agent: tiny.AgentProcess) -> None:
    """A lock from a year that is still to come, by a clock that was wrong then, ends when its seconds are over all the same."""
    take(agent, ANN, seconds=1.0)
    path = agent.root / "operator.json"
    written = json.loads(path.read_text())
    written["lock"]["since"], written["lock"]["until"] = "2099-01-01T00:00:00.000Z", "2099-01-01T00:00:01.000Z"
    path.write_text(json.dumps(written))
    wait_for(lambda: take(agent, BEN)["taken"], "the end of its second")


def test_a_reboot_or_a_clock_that_began_anew_ends_it() -> None:
    lock = OperatorLock("ann@desk", "deploy", ANN, "", "", 0)
    held = Held(lock, "boot-1", 1000.0, 600.0)
    assert left_s(held, "boot-1", 900.0) == 100.0
    assert left_s(held, "boot-1", 1000.0) == 0.0
    assert left_s(held, "boot-2", 900.0) == 0.0
    assert left_s(Held(lock, "", 1000.0, 600.0), "", 10.0) == 0.0, "990 s cannot be left of 600"


def test_a_damaged_lock_keeps_nobody_out(agent: tiny.AgentProcess) -> None:
    take(agent, ANN)
    (agent.root / "operator.json").write_bytes(b"{")
    assert take(agent, BEN)["taken"]


def test_eight_at_once_and_one_gets_it(agent: tiny.AgentProcess) -> None:
    agent.root.mkdir(exist_ok=True)
    started = []
    for number in range(8):
        process = agent.start("operator-take")
        asked = {"owner": f"op{number}@desk", "what": "deploy", "token": f"operator-{number:02}", "seconds": 600.0, "over": ""}
        started.append((process, json.dumps(asked).encode() + b"\n"))
    answers = [json.loads(p.communicate(data, timeout=120)[0].splitlines()[-1])["value"] for p, data in started]
    assert sum(a["taken"] for a in answers) == 1
    assert len({a["lock"]["token"] for a in answers}) == 1


def test_host_and_device_agree_on_what_is_under_the_lock() -> None:
    assert set(CHANGING) == set(COMMANDS) == set(UNDER_THE_LOCK)


def test_a_root_that_others_share_has_a_lock_that_they_share(tmp_path: Path) -> None:
    root = tmp_path / "shared"
    root.mkdir()
    root.chmod(0o2770)
    agent = tiny.AgentProcess(root).upload()
    take(agent, ANN)
    for name in ("operator.json", "operator.lock"):
        assert os.stat(root / name).st_mode & 0o777 == 0o660, name


def test_in_a_wave_it_lasts_as_long_as_the_others_of_the_wave_may_take(
    home: Path, operator: tiny.Signer, tmp_path: Path
) -> None:
    """They are judged sixteen at a time, minutes each, and nothing speaks to this device meanwhile."""
    bundle = open_bundle(tiny.make_bundle(operator).write(tmp_path / "v1"), None)
    ship_one(Order(bundle, this_operator("deploy tiny v1")), local_target(), Quiet(), keep_lock=True)
    with connect(local_target(), NoPrompts()) as agent:
        found = agent.take_lock("ben@desk", "deploy tiny v2", BEN, 1.0)
    assert not found.taken and found.lock.left_s > 3000
