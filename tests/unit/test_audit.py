"""The audit log: one whole line an action, whatever happens; no secret in it; what is torn is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgevit import places
from edgevit.errors import StoreError, Unreachable, UsageError
from edgevit.fleet.audit import (
    Action,
    Entry,
    append,
    clean,
    last_activation,
    parse_entry,
    parse_since,
    read_log,
    recording,
    since,
)
from edgevit.fleet.inventory import Target, local_target

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
SECRET = "hunter2-planted"


def entry(action: str = "deploy", target: str = "pi", outcome: str = "done", at: str = "2026-01-31T12:00:00Z") -> Entry:
    return Entry(at, "me@here", action, target, ("SHA256:x",), outcome, "", 1.5, {"bundle": "vit", "version": 2})


def test_an_action_that_ends_well_is_one_line_with_what_became_known(home: Path) -> None:
    with recording(Action("deploy", {"bundle": "vit"}), local_target()) as record:
        record.note(version=3)
    log = read_log(places.audit_path())
    assert log.unreadable == ()
    (one,) = log.entries
    assert (one.action, one.target, one.outcome, one.error) == ("deploy", "local", "done", "")
    assert one.details == {"bundle": "vit", "version": 3}
    assert "@" in one.who and one.seconds >= 0
    assert places.audit_path().stat().st_mode & 0o777 == 0o600


def test_an_action_that_fails_is_a_line_too_and_the_error_goes_on(home: Path) -> None:
    with pytest.raises(Unreachable), recording(Action("rollback"), local_target()):
        raise Unreachable("pi: no route\nsecond line")
    with pytest.raises(KeyboardInterrupt), recording(Action("deploy"), local_target()):
        raise KeyboardInterrupt
    assert [(e.outcome, e.error) for e in read_log(places.audit_path()).entries] == [
        ("failed", "pi: no route"),
        ("failed", "KeyboardInterrupt"),
    ]


def test_what_cannot_be_recorded_is_not_begun(home: Path) -> None:
    places.audit_path().mkdir(parents=True)
    begun = []
    with pytest.raises(StoreError, match="nothing was begun"), recording(Action("deploy"), local_target()):
        begun.append(1)
    assert not begun


def test_the_pinned_host_key_is_kept_with_the_action(home: Path) -> None:
    from edgevit.fleet.connect import pins_path
    from edgevit.transport.hostkeys import parse_key, pin

    text = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl"
    pin(pins_path(), "192.0.2.7", 22, parse_key(text))
    with recording(Action("target remove"), Target(name="pi", host="192.0.2.7", port=22, user="pi")):
        pass
    assert read_log(places.audit_path()).entries[0].host_keys == (parse_key(text).fingerprint,)


def test_a_planted_secret_is_nowhere_in_the_log(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"https://me:{SECRET}@index.example/simple")
    with pytest.raises(Unreachable), recording(Action("provision", {"host": f"x password={SECRET}"}), local_target()) as record:
        record.note(requirements=f"numpy @ https://{SECRET}@index.example/numpy.whl")
        raise Unreachable(f"https://me:{SECRET}@index.example/simple did not answer; token: {SECRET}")
    data = places.audit_path().read_bytes()
    assert SECRET.encode() not in data
    assert b"index.example" in data


@given(st.text(max_size=200))
def test_whatever_an_error_says_stays_one_line_without_control_characters(said: str) -> None:
    kept = clean(said)
    assert len(kept) <= 400
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in kept)


def test_a_torn_last_line_is_named_and_the_next_entry_stands_on_its_own(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    append(path, entry())
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    log = read_log(path)
    assert len(log.entries) == 1
    assert log.unreadable == (f"{path}:2: torn: whoever wrote it was stopped in the middle",)
    append(path, entry(action="rollback"))
    again = read_log(path)
    assert [e.action for e in again.entries] == ["deploy", "rollback"]
    assert len(again.unreadable) == 1 and f"{path}:2: not an entry" in again.unreadable[0]


@given(st.data())
def test_cut_anywhere_all_whole_lines_are_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("cut") / "audit.jsonl"
    for n in range(3):
        append(path, entry(target=f"t{n}"))
    written = path.read_bytes()
    cut = data.draw(st.integers(0, len(written)))
    path.write_bytes(written[:cut])
    log = read_log(path)
    whole = written[:cut].count(b"\n")
    # A last line that lacks only its newline is whole.
    assert len(log.entries) in (whole, whole + 1)
    assert len(log.entries) + len(log.unreadable) == whole + (not (cut == 0 or written[:cut].endswith(b"\n")))


def test_many_processes_at_once_lose_and_mix_no_line(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    code = (
        "import sys\nfrom pathlib import Path\nfrom edgevit.fleet.audit import Entry, append\n"
        "for n in range(20):\n"
        "    name = f't{sys.argv[2]}-{n}'\n"
        "    line = Entry('2026-01-31T12:00:00Z', 'w', 'deploy', name, (), 'done', '', 0.0, {'x': 'y' * 300})\n"
        "    append(Path(sys.argv[1]), line)\n"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code, str(path), str(k)]) for k in range(3)]
    assert [w.wait(60) for w in workers] == [0, 0, 0]
    log = read_log(path)
    assert log.unreadable == ()
    assert {e.target for e in log.entries} == {f"t{k}-{n}" for k in range(3) for n in range(20)}


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "edgevit.audit/2"}, {"at": "yesterday"}, {"seconds": True}, {"details": {"a": None}}, {"host_keys": "x"},
        {"at": "9999-12-31T23:00:00-05:00"}, {"seconds": 10**400}, {"seconds": float("nan")},
    ],
)  # fmt: skip
def test_what_is_no_entry_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    append(tmp_path / "log", entry())
    value = json.loads((tmp_path / "log").read_text())
    assert parse_entry(json.dumps(value).encode()) == entry()
    with pytest.raises(ValueError):
        parse_entry(json.dumps({**value, **change}).encode())
    with pytest.raises(ValueError, match="nested"):
        parse_entry(b"[" * 100_000)


def test_what_is_active_follows_the_last_action_that_was_done() -> None:
    log = [entry(), entry("rollback"), entry("deploy", outcome="failed"), entry("deploy", target="other"), entry("key allow")]
    assert last_activation(log, "pi") == log[1]
    assert last_activation([*log, entry("unprovision")], "pi") is None
    assert last_activation([], "pi") is None


@given(st.integers(1, 9999), st.sampled_from([("m", "minutes"), ("h", "hours"), ("d", "days"), ("w", "weeks")]))
def test_spans_count_back_from_now(count: int, unit: tuple[str, str]) -> None:
    assert parse_since(f"{count}{unit[0]}", NOW) == NOW - timedelta(**{unit[1]: count})


def test_since_takes_dates_and_refuses_the_rest() -> None:
    assert parse_since("2026-01-31", NOW) == datetime(2026, 1, 31, tzinfo=UTC)
    assert parse_since("2026-01-31T12:00:00+02:00", NOW) == datetime(2026, 1, 31, 10, tzinfo=UTC)
    for wrong in ("", "yesterday", "7", "7y", "-3d", "0001-01-01T00:00:00+05:00"):
        with pytest.raises(UsageError, match="--since"):
            parse_since(wrong, NOW)
    log = [entry(at="2026-01-30T23:59:59Z"), entry(at="2026-01-31T00:00:00Z")]
    assert since(log, datetime(2026, 1, 31, tzinfo=UTC)) == log[1:]


def test_a_full_disk_is_said_with_what_was_not_recorded(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    (tmp_path / "log").symlink_to("/dev/full")
    with pytest.raises(StoreError, match="deploy of pi"):
        append(tmp_path / "log", entry())
