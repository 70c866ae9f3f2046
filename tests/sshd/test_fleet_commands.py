"""``edgevit fleet`` over a real sshd: one device that answers, one that is off, one whose host key changed."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from edgevit.cli import run_cli
from edgevit.fleet.connect import pins_path
from edgevit.fleet.inventory import Target, add_target
from edgevit.loopback_sshd import LoopbackSshd, make_key
from edgevit.places import audit_path, config_dir, fleet_path
from edgevit.transport.hostkeys import parse_key, pin
from tests.support import agent_bundle as tiny
from tests.support.sshd import Account, lend_runtime


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def other_key(tmp_path: Path) -> str:
    """The fingerprint of a key that was pinned once."""
    make_key(tmp_path / "before")
    return (tmp_path / "before.pub").read_text()


def command(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any], str]:
    capsys.readouterr()
    code = run_cli([*argv, "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out), said.err


def test_a_fleet_of_three_is_checked_deployed_to_and_audited(
    box: Target,
    server: LoopbackSshd,
    account: Account,
    closed_port: int,
    other_key: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pin(pins_path(), "localhost", server.port, parse_key(other_key))
    for target in (
        box,
        box.model_copy(update={"name": "off", "port": closed_port}),
        box.model_copy(update={"name": "changed", "host": "localhost"}),
    ):
        add_target(fleet_path(), target)

    code, found, said = command(capsys, "fleet", "check")
    assert code == found["exit_code"] == 3
    assert "looking at 3 targets" in said
    rows = {row["target"]: row for row in found["targets"]}
    assert {name: row["state"] for name, row in rows.items()} == {"box": "error", "off": "unreachable", "changed": "host key"}
    assert rows["box"]["agent"]["sent_now"] and abs(rows["box"]["clock_skew_s"]) <= rows["box"]["clock_uncertainty_s"] + 0.5
    hints = [f["hint"] for f in rows["box"]["findings"]]
    assert any(hint.startswith("edgevit target provision box") for hint in hints) and "edgevit key allow box" in hints
    changed = rows["changed"]["error"]["message"]
    assert server.fingerprint in changed and parse_key(other_key).fingerprint in changed
    assert not audit_path().exists(), "looking is no action"

    code, found, _ = command(capsys, "fleet", "check", "box")
    assert code == 1 and not found["targets"][0]["agent"]["sent_now"]
    assert run_cli(["fleet", "check"]) == 3
    table = capsys.readouterr().out
    assert max(len(line) for line in table.splitlines()) <= 100 and "host key" in table and "unreachable" in table

    assert run_cli(["key", "make"]) == 0
    assert run_cli(["key", "allow", "box", "off"]) == 3
    problem = lend_runtime(account, Path(box.root))
    if problem:
        pytest.skip(problem)
    bundle = tiny.make_bundle(tiny.Signer(config_dir() / "signing_key")).write(tmp_path / "bundle")
    assert run_cli(["deploy", str(bundle), "box"]) == 0
    code, found, _ = command(capsys, "fleet", "check", "box", "--prove")
    assert (code, found["targets"][0]["findings"]) == (0, [])

    code, found, _ = command(capsys, "fleet", "status", "box", "off")
    assert code == 3
    first, second = found["targets"]
    assert (first["source"], first["active"]["version"], first["waiting"]) == ("device", 1, 0)
    assert (second["source"], second["active"]) == ("nothing known", None)

    _, found, _ = command(capsys, "fleet", "audit")
    entries = [(e["action"], e["target"], e["outcome"]) for e in found["entries"]]
    assert sorted(entries[:2]) == [("key allow", "box", "done"), ("key allow", "off", "failed")]
    assert entries[2:] == [("deploy", "box", "done")]
    last = found["entries"][-1]
    assert last["host_keys"] == [server.fingerprint]
    assert last["details"]["digest"] == first["active"]["digest"]

    # The same box behind a port where nobody listens: what was done from here is what is known.
    assert run_cli(["target", "remove", "box"]) == 0
    add_target(fleet_path(), box.model_copy(update={"port": closed_port}))
    code, found, _ = command(capsys, "fleet", "status", "box")
    (known,) = found["targets"]
    assert (code, known["source"], known["active"]["digest"]) == (3, "audit log", first["active"]["digest"])


def test_a_device_that_falls_silent_is_given_up_in_time_and_the_other_is_looked_at(
    box: Target, account: Account, capsys: pytest.CaptureFixture[str]
) -> None:
    stuck = account.home / "stuck-python"
    stuck.write_text("#!/bin/sh\nexec sleep 600\n")
    stuck.chmod(0o755)
    for target in (box, box.model_copy(update={"name": "silent", "python": str(stuck)})):
        add_target(fleet_path(), target)
    code, found, _ = command(capsys, "fleet", "check", "--timeout", "20")
    assert code == 3
    states = {row["target"]: row["state"] for row in found["targets"]}
    assert states == {"box": "error", "silent": "unreachable"}
    silent = next(row for row in found["targets"] if row["target"] == "silent")
    assert "after 20 s" in silent["error"]["message"]
