"""Waiting for a temperature, and governors set and put back, on a made-up file tree."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agents import conditions, provision, wire
from device_agents.conditions import cool_down, governor_files, restore_system, tune_system
from device_agents.console import Console
from device_agents.errors import Refused
from device_agents.store import Store

PLAN = wire.RunPlan("p", 1, 0, 0.0, 1, 0.0, 1.0, False)


class Board:
    """Cools by a degree at each look, down to ``floor``."""

    def __init__(self, now: float | None, floor: float = -100.0) -> None:
        self.now, self.floor, self.looks = now, floor, 0

    def read(self) -> float | None:
        self.looks += 1
        if self.now is not None and self.looks > 1:
            self.now = max(self.now - 1.0, self.floor)
        return self.now


def cool(
    board: Board, idle: float | None = None, limit: float = 60.0, **plan: float
) -> tuple[wire.Cooling | None, list[float]]:
    said: list[float] = []
    wanted = dataclasses.replace(PLAN, **plan)
    return cool_down(board.read, wanted, idle, lambda now, target, waited: said.append(now), limit, 0.0), said


def test_a_plan_that_wants_nothing_waits_for_nothing() -> None:
    board = Board(80.0)
    assert cool(board) == (None, []) and board.looks == 0


@given(st.floats(20.0, 90.0), st.floats(20.0, 90.0))
def test_it_waits_until_the_board_is_that_cool(start: float, target: float) -> None:
    found, said = cool(Board(start), cool_to_c=target)
    assert found and found.outcome == "reached" and found.at_c is not None and found.at_c <= target
    assert (found.from_c, found.to_c) == (start, target)
    assert all(c > target for c in said) and len(said) == (0 if start <= target else len(said))
    assert wire.loads(wire.Cooling, wire.dumps(found), "x", 9999) == found


def test_above_idle() -> None:
    found, _ = cool(Board(60.0), idle=45.0, cool_within_c=5.0)
    assert found and (found.outcome, found.to_c, found.at_c) == ("reached", 50.0, 50.0)


def test_the_limit_is_held_and_recorded() -> None:
    found, _ = cool(Board(60.0, floor=55.0), limit=0.05, cool_to_c=40.0)
    assert found and (found.outcome, found.at_c) == ("limit", 55.0) and 0.05 <= found.seconds < 5.0


@pytest.mark.parametrize(("now", "idle", "plan"), [(None, None, {"cool_to_c": 40.0}), (50.0, None, {"cool_within_c": 5.0})])
def test_without_a_sensor_it_says_so_and_goes_on(now: float | None, idle: float | None, plan: dict[str, float]) -> None:
    found, said = cool(Board(now), idle=idle, **plan)
    assert found and found.outcome == "no-sensor" and said == []


def test_a_sensor_that_vanishes_meanwhile() -> None:
    answers = iter([60.0, 59.0, None])
    found = cool_down(lambda: next(answers), dataclasses.replace(PLAN, cool_to_c=40.0), None, lambda *a: None, 60.0, 0.0)
    assert found and (found.outcome, found.from_c, found.at_c) == ("no-sensor", 60.0, None)


# ---- governors ------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "agent")
    store.create()
    return store


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A board of two clusters."""
    for number, governor in ((0, "ondemand"), (4, "schedutil")):
        policy = tmp_path / "board/sys/devices/system/cpu/cpufreq" / f"policy{number}"
        policy.mkdir(parents=True)
        (policy / "scaling_governor").write_text(governor + "\n")
    return tmp_path / "board"


def governors(root: Path) -> list[str]:
    return [path.read_text().strip() for path in governor_files(root)]


def test_set_and_put_back(store: Store, root: Path) -> None:
    assert tune_system(store, root) == "ondemand+schedutil"
    assert governors(root) == ["performance", "performance"] and store.tuned_path.exists()
    assert restore_system(store, root) == "" and governors(root) == ["ondemand", "schedutil"]
    assert not store.tuned_path.exists() and restore_system(store, root) == ""


def test_put_back_after_a_kill_by_whoever_starts_next(store: Store, root: Path) -> None:
    """The first one never came to putting back; the second one must not take ``performance`` for what was there."""
    tune_system(store, root)
    assert tune_system(Store(store.root), root) == "ondemand+schedutil"
    assert restore_system(Store(store.root), root) == "" and governors(root) == ["ondemand", "schedutil"]


def test_a_device_is_not_left_tuned_by_the_agents_removal(store: Store, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provision, "root_of_boards", lambda: root)
    (store.root / "agent").mkdir(exist_ok=True)
    tune_system(store, root)
    with monkeypatch.context() as patched:
        patched.setattr(conditions, "_write", refuse_to_write)
        with pytest.raises(Refused, match=r"echo ondemand \| sudo tee .*; then unprovision again"):
            provision.unprovision(store, Console())
    assert store.tuned_path.exists(), "what would put it back must not be removed"
    assert provision.unprovision(store, Console()) == {"removed": True}
    assert governors(root) == ["ondemand", "schedutil"] and not store.root.exists()


def refuse_to_write(path: Path, text: str) -> None:
    raise PermissionError(13, "Permission denied", str(path))


@pytest.mark.parametrize("cut", ["before the first", "between"])
def test_killed_while_setting(store: Store, root: Path, monkeypatch: pytest.MonkeyPatch, cut: str) -> None:
    class Killed(BaseException):
        pass

    writes: list[Path] = []

    def write(path: Path, text: str) -> None:
        writes.append(path)
        if len(writes) == (1 if cut == "before the first" else 2):
            raise Killed
        path.write_text(text)

    with monkeypatch.context() as patched:
        patched.setattr(conditions, "_write", write)
        with pytest.raises(Killed):
            tune_system(store, root)
    restore_system(store, root)
    assert governors(root) == ["ondemand", "schedutil"] and not store.tuned_path.exists()


def test_where_it_is_not_permitted_nothing_is_left_changed(store: Store, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, text: str) -> None:
        if "policy4" in str(path) and text == "performance":
            raise PermissionError(13, "Permission denied", str(path))
        path.write_text(text)

    monkeypatch.setattr(conditions, "_write", write)
    with pytest.raises(Refused) as caught:
        tune_system(store, root)
    command = f"echo performance | sudo tee {root}/sys/devices/system/cpu/cpufreq/*/scaling_governor"
    assert caught.value.code == "needs-root" and command in str(caught.value)
    assert governors(root) == ["ondemand", "schedutil"] and not store.tuned_path.exists()


def test_a_kernel_that_takes_the_word_and_not_the_deed(store: Store, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "_write", lambda path, text: None)
    with pytest.raises(Refused, match="holds ondemand afterwards"):
        tune_system(store, root)


def test_what_cannot_be_put_back_is_told_and_kept_for_the_next_time(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune_system(store, root)
    with monkeypatch.context() as patched:
        patched.setattr(conditions, "_write", refuse_to_write)
        problem = restore_system(store, root)
        with pytest.raises(Refused, match="still tuned by an earlier job"):
            tune_system(store, root)
    assert "echo ondemand | sudo tee" in problem and store.tuned_path.exists()
    assert restore_system(store, root) == "" and governors(root) == ["ondemand", "schedutil"]


def test_a_board_without_governors_or_at_performance_already(store: Store, root: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no frequency governor"):
        tune_system(store, tmp_path / "nothing")
    for path in governor_files(root):
        path.write_text("performance\n")
    assert tune_system(store, root) == "performance" and not store.tuned_path.exists()


def test_an_older_kernels_files(store: Store, tmp_path: Path) -> None:
    for number in (0, 1):
        folder = tmp_path / "old/sys/devices/system/cpu" / f"cpu{number}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_governor").write_text("interactive")
    assert tune_system(store, tmp_path / "old") == "interactive"
    assert governors(tmp_path / "old") == ["performance"] * 2 and restore_system(store, tmp_path / "old") == ""


@pytest.mark.parametrize(
    "note",
    [
        {"etc/passwd": "root"},
        {"../outside": "ondemand"},
        {"sys/devices/system/cpu/cpufreq/policy0/../../../../../../outside": "ondemand"},
        {"sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "on demand; rm"},
        {"sys/devices/system/cpu/cpufreq/policy0/scaling_governor": 7},
        ["x"],
        "not json",
    ],
)
def test_a_note_cannot_make_it_write_elsewhere(store: Store, root: Path, note: object) -> None:
    outside = root.parent / "outside"
    outside.write_text("mine")
    (root / "etc").mkdir()
    (root / "etc/passwd").write_text("mine")
    store.tuned_path.write_text(note if isinstance(note, str) else json.dumps(note))
    assert restore_system(store, root) == "" and not store.tuned_path.exists()
    assert outside.read_text() == (root / "etc/passwd").read_text() == "mine"
    assert governors(root) == ["ondemand", "schedutil"]


def test_a_cpu_that_went_away_stops_nothing(store: Store, root: Path) -> None:
    tune_system(store, root)
    os.unlink(governor_files(root)[1])
    assert restore_system(store, root) == "" and governors(root) == ["ondemand"]
