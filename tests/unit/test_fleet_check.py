"""What fleet check and fleet status make of what they saw: clocks, findings, exit codes, tables that fit."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from device_agents.wire import Active, DaemonState, DaemonStatus, Run, Variant
from edgevit import places
from edgevit.cli import run_cli
from edgevit.cli.fleet import exit_code_of_check
from edgevit.errors import HostKeyError, LoginError, LostLink, NotProvisioned, Unreachable, UsageError
from edgevit.fleet.agent import Agent
from edgevit.fleet.audit import Entry, append
from edgevit.fleet.check import (
    Checked,
    Exchange,
    Seen,
    Skew,
    check_targets,
    estimate_skew,
    judge,
    measure_clock,
)
from edgevit.fleet.inventory import Target, local_target
from edgevit.fleet.status import find_runs, from_device, from_here, judge_run
from edgevit.profile import Finding
from edgevit.report.fleet_view import json_check, json_status, render_audit, render_check, render_status
from edgevit.transport.local import LocalTransport
from edgevit.transport.prompts import NoPrompts
from tests.support import runs

HOST_AGENT = runs.sha("agent")
PI = Target(name="pi4", host="192.0.2.4", profile="raspberry-pi-4b")
ABSENT = DaemonStatus(False, None, "edgevit-agent-1.service", "", "absent", None, None, (), (), 3)
GOOD = Seen(runs.facts(signers=1, ssh_keygen="OpenSSH_9.2"), ABSENT, Skew(0.1, 0.02), False, True)


def printed(renderable: object) -> str:
    stream = io.StringIO()
    Console(file=stream, width=100, highlight=False).print(renderable)
    return stream.getvalue()


delays = st.floats(0.0001, 3.0)


@given(
    st.floats(-1e6, 1e6),
    st.lists(st.tuples(st.floats(0, 1e4), delays, delays), min_size=1, max_size=8),
)
def test_the_true_offset_lies_within_the_stated_uncertainty(offset: float, ways: list[tuple[float, float, float]]) -> None:
    exchanges = [Exchange(start, start + there + offset, start + there + back) for start, there, back in ways]
    skew = estimate_skew(exchanges)
    assert abs(skew.seconds - offset) <= skew.uncertainty + 1e-6
    assert skew.uncertainty <= min(there + back for _, there, back in ways) / 2 + 1e-6


def test_the_clock_of_this_machine_is_its_own() -> None:
    local = local_target()
    agent = Agent(LocalTransport("local"), local.python, local.root)
    skew = measure_clock(agent)
    assert skew.certain < 0.5
    assert 0 < skew.uncertainty < 30


def test_a_device_without_the_python_says_so_when_asked_for_its_clock() -> None:
    import sys

    agent = Agent(LocalTransport("pi"), sys.executable, "/nonexistent")
    agent.python = "/bin/cat"
    with pytest.raises(Exception, match="pi: ") as caught:
        measure_clock(agent)
    assert isinstance(caught.value, LostLink | Unreachable | NotProvisioned) or "asked for its clock" in str(caught.value)


def test_a_target_that_never_answers_is_given_up(home: Path, tmp_path: Path) -> None:
    stuck = tmp_path / "python"
    stuck.write_text("#!/bin/sh\nexec sleep 600\n")
    stuck.chmod(0o755)
    silent = local_target().model_copy(update={"python": str(stuck)})
    answered: list[Checked] = []
    (one,) = check_targets([silent], NoPrompts(), HOST_AGENT, prove=False, limit_s=1.0, on_done=answered.append)
    assert answered == [one] and one.state == "unreachable"
    assert one.error is not None and "after 1 s" in str(one.error) and "--timeout 4" in one.error.hint


def test_nothing_is_wrong_with_a_device_that_is_well() -> None:
    assert judge(PI, GOOD, HOST_AGENT) == ()


def state(agent: str) -> DaemonState:
    return DaemonState("edgevit.daemon/1", agent, 7, "pi", "u.service", "2026-01-01T00:00:00Z", None, None, {})


@pytest.mark.parametrize(
    ("changes", "severity", "word", "hint"),
    [
        ({"facts": {"runtimes": ()}}, "error", "no runtime", "edgevit target provision pi4"),
        ({"facts": {"runtimes": ()}, "proved": False}, "error", "no runtime", "edgevit fleet check pi4 --prove"),
        ({"facts": {"signers": 0}}, "error", "nobody may sign", "edgevit key allow pi4"),
        ({"facts": {"ssh_keygen": None}}, "error", "ssh-keygen", "openssh-client"),
        ({"facts": {"machine": "x86_64"}}, "error", "machine: got x86_64", "--profile"),
        ({"facts": {"disk_free_mb": 120}}, "warning", "120 MB", "df -h"),
        ({"clock": Skew(-3600.0, 0.1)}, "warning", "3,600.0 s behind", "timedatectl"),
        ({"clock": Skew(9.0, 0.1)}, "warning", "ahead of", "timedatectl"),
        ({"daemon": {"kind": "system", "unit_state": "failed"}}, "warning", "not at work: failed", "daemon logs pi4"),
        ({"daemon": {"at_work": True, "state": state("f" * 64)}}, "warning", "another agent", "daemon install pi4"),
        ({"daemon": {"spooled": ("r1", "r2")}}, "warning", "2 results wait", "edgevit collect pi4"),
    ],
)
def test_each_thing_that_is_wrong_is_one_finding_with_its_next_command(
    changes: dict[str, object], severity: str, word: str, hint: str
) -> None:
    seen = GOOD
    for name, value in changes.items():
        if isinstance(value, dict):
            value = dataclasses.replace(getattr(seen, name), **value)
        seen = dataclasses.replace(seen, **{name: value})
    (finding,) = judge(PI, seen, HOST_AGENT)
    assert finding.severity == severity
    assert word in finding.message and hint in finding.hint


@pytest.mark.parametrize(
    ("refused", "severity", "word", "hint"),
    [
        ("unknown-signer: …", "warning", "a key that may not sign", "edgevit deploy BUNDLE pi4 with"),
        ("blob-damaged: …", "error", "does not verify any more", "edgevit deploy BUNDLE pi4"),
        ("no-space: making …", "error", "cannot be told: no-space", "edgevit target prune pi4"),
        ("io-error: …", "error", "cannot be told", "dmesg"),
    ],
)
def test_a_device_that_can_verify_nothing_says_nothing_of_what_is_active(
    refused: str, severity: str, word: str, hint: str
) -> None:
    facts = dataclasses.replace(GOOD.facts, active=active("tiny", 1, "2026-01-01T00:00:00Z"), active_refused=refused)
    (finding,) = judge(PI, dataclasses.replace(GOOD, facts=facts), HOST_AGENT)
    assert (finding.severity, word in finding.message, hint in finding.hint) == (severity, True, True), finding


def test_a_skew_that_the_round_trip_explains_is_no_finding() -> None:
    assert judge(PI, dataclasses.replace(GOOD, clock=Skew(9.0, 8.0)), HOST_AGENT) == ()
    running = dataclasses.replace(ABSENT, at_work=True, kind="system", state=state(HOST_AGENT))
    assert judge(PI, dataclasses.replace(GOOD, daemon=running), HOST_AGENT) == ()


def failed(error: Exception, name: str = "off") -> Checked:
    return Checked(Target(name=name, host="192.0.2.9"), None, error, (), 1.0)  # type: ignore[arg-type]


def test_exit_codes_and_words_of_states() -> None:
    well = Checked(PI, GOOD, None, (), 0.5)
    warned = Checked(PI, GOOD, None, (Finding("warning", "w"),), 0.5)
    wrong = Checked(PI, GOOD, None, (Finding("warning", "w"), Finding("error", "e")), 0.5)
    off = failed(Unreachable("off: no route"))
    assert [c.state for c in (well, warned, wrong, off)] == ["ok", "warning", "error", "unreachable"]
    fleets = ([well], [well, warned], [well, wrong], [wrong, off], [failed(UsageError("x"))])
    assert [exit_code_of_check(fleet) for fleet in fleets] == [0, 0, 1, 3, 2]
    words = [failed(e).state for e in (HostKeyError("x"), LoginError("x"), LostLink("x"), NotProvisioned("x"))]
    assert words == ["host key", "no login", "link lost", "no Python"]


def test_the_tables_fit_a_hundred_columns_and_show_every_finding() -> None:
    long = Target(name="a-rather-long-name-of-a-board-in-the-attic", host="192.0.2.4", profile="raspberry-pi-4b")
    everything = dataclasses.replace(
        GOOD,
        facts=dataclasses.replace(GOOD.facts, runtimes=(), signers=0, disk_free_mb=1),
        clock=Skew(-123456.7, 0.5),
        sent_agent=True,
    )
    checked = [
        Checked(PI, GOOD, None, (), 1.0),
        Checked(long, everything, None, judge(long, everything, HOST_AGENT), 1.0),
        failed(Unreachable("off: [bold]no route to host", hint="ping 192.0.2.9")),
    ]
    text = printed(render_check(checked))
    assert max(len(line) for line in text.splitlines()) <= 100
    for said in ("no runtime was proven", "nobody may sign", "1 MB are free", "behind", "[bold]no route", "ping 192.0.2.9"):
        assert said in text.replace("\n", " ")
    values = json_check(checked)
    assert json.loads(json.dumps(values)) == values
    assert [v["state"] for v in values] == ["ok", "error", "unreachable"]


def active(name: str, version: int, at: str) -> Active:
    return Active(Variant(runs.sha(name), "onnx-int8", "onnxruntime", "CPUExecutionProvider", 4), name, version, "test", at)


def deployed(at: str, action: str = "deploy", outcome: str = "done") -> Entry:
    details = {"bundle": "vit", "version": 5, "digest": "d" * 64, "variant": "onnx-int8 in onnxruntime"}
    return Entry(at, "me@here", action, "pi4", (), outcome, "", 1.0, {} if action == "unprovision" else details)


def test_a_device_that_answers_tells_what_is_active_and_what_was_before() -> None:
    facts = runs.facts(active=active("new", 2, "2026-02-01T00:00:00Z"), previous=active("old", 1, "2026-01-01T00:00:00Z"))
    one = from_device("pi4", facts, find_runs([runs.run()]), "2026-03-01T00:00:00Z")
    assert one.source == "device" and one.active is not None and one.previous is not None
    assert (one.active.name, one.active.version, one.previous.name) == ("new", 2, "old")
    assert one.last_run is not None and one.last_run.run_id == runs.run().job.run_id
    text = printed(render_status([one]))
    assert "new v2" in text and "old v1" in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_a_device_that_is_off_shows_the_newer_of_log_and_results_marked_as_such() -> None:
    error = Unreachable("pi4: no route to host", hint="ping pi4")
    past = runs.run()
    past = dataclasses.replace(
        past,
        ended_at="2026-02-01T00:00:00Z",
        facts=dataclasses.replace(past.facts, active=active("measured", 3, "2026-01-20T00:00:00Z")),
    )
    logged = from_here("pi4", error, [deployed("2026-03-01T00:00:00Z")], find_runs([past]))
    assert logged.source == "audit log" and logged.active is not None and logged.active.name == "vit"
    stored = from_here("pi4", error, [deployed("2026-01-01T00:00:00Z")], find_runs([past]))
    assert stored.source == "results" and stored.active is not None and stored.active.name == "measured"
    gone = from_here("pi4", error, [deployed("2026-03-01T00:00:00Z", "unprovision")], find_runs([past]))
    assert gone.active is None
    unknown = from_here("pi4", error, [deployed("2026-03-01T00:00:00Z", outcome="failed")], find_runs([]))
    assert unknown.source == "nothing known" and unknown.last_run is None
    text = printed(render_status([logged, unknown]))
    assert "the audit log says, as of 2026-03-01T00:00:00Z" in text.replace("\n", " ") and "ping pi4" in text
    assert [v["source"] for v in json_status([logged, unknown])] == ["audit log", "nothing known"]


def test_the_last_valid_run_is_told_where_the_last_one_is_not() -> None:
    valid = runs.run(run_id="valid")
    assert judge_run(valid) is not None and judge_run(valid).verdict == "VALID"  # type: ignore[union-attr]
    lost = runs.run(run_id="lost", measurements=(runs.failed(),), ended_at="2026-03-01T00:00:00Z")
    taken: list[str] = []

    def newest_first() -> Iterator[Run]:
        for run in (lost, valid, runs.run(run_id="older")):
            taken.append(run.job.run_id)
            yield run

    one = from_device("pi4", runs.facts(), find_runs(newest_first()), "2026-03-02T00:00:00Z")
    assert taken == ["lost", "valid"], "no more is read than is needed"
    assert one.last_run is not None and (one.last_run.run_id, one.last_run.verdict) == ("lost", "FAILED")
    assert one.last_valid_run is not None and one.last_valid_run.run_id == "valid"
    assert f"{valid.ended_at[:10]}" in printed(render_status([one])) and "VALID" in printed(render_status([one]))
    assert json_status([one])[0]["last_valid_run"]["run_id"] == "valid"
    none = from_device("pi4", runs.facts(), find_runs([lost]), "2026-03-02T00:00:00Z")
    assert "none VALID" in printed(render_status([none])) and json_status([none])[0]["last_valid_run"] is None


def test_a_run_s_verdict_counts_what_failed() -> None:
    assert judge_run(None) is None
    one = judge_run(runs.run(measurements=(runs.measurement(), runs.failed())))
    assert one is not None and one.verdict == "FAILED 1 of 2"


def test_the_audit_table_fits_and_names_details(home: Path) -> None:
    entries = [deployed("2026-03-01T00:00:00Z"), deployed("2026-03-02T00:00:00Z", outcome="failed")]
    text = printed(render_audit(entries))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "vit v5" in text and "failed" in text


def test_audit_on_the_command_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["fleet", "audit"]) == 0
    assert "nothing is recorded yet" in capsys.readouterr().err
    for n, at in enumerate(("2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z")):
        append(places.audit_path(), dataclasses.replace(deployed(at), target=f"gone{n}"))
    with places.audit_path().open("ab") as f:
        f.write(b'{"schema":"edgev')
    assert run_cli(["fleet", "audit", "--json", "--since", "2026-01-15"]) == 0
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert document["schema"] == "edgevit.fleet-audit/1"
    assert [e["target"] for e in document["entries"]] == ["gone1"]
    assert len(document["unreadable"]) == 1 and ":3: torn" in said.err
    assert run_cli(["fleet", "audit", "gone*", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["entries"]) == 2
    assert run_cli(["fleet", "audit", "gnoe1"]) == 2
    assert "did you mean gone1" in capsys.readouterr().err
    assert run_cli(["fleet", "audit", "--since", "soon"]) == 2


def test_an_empty_fleet_is_an_error_that_names_the_next_command(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("check", "status"):
        assert run_cli(["fleet", command]) == 2
        assert "edgevit target add NAME USER@HOST" in capsys.readouterr().err


def test_a_broken_fleet_file_is_refused_with_its_lines(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places.fleet_path().parent.mkdir(parents=True)
    places.fleet_path().write_text("schema: edgevit.fleet/1\ntargets:\n  a: {hots: x}\n  b: {host: y, profile: nope}\n")
    assert run_cli(["fleet", "check"]) == 2
    said = capsys.readouterr().err
    assert f"{places.fleet_path()}:3: " in said and f"{places.fleet_path()}:4: " in said
