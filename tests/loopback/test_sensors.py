"""A whole job, real workers and all, on a board whose sensors are a recorded case; and with sensors that go away meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from device_agents import wire
from device_agents.boards import detect_board
from device_agents.boards.generic import GenericBoard
from device_agents.job import JobWorker
from device_agents.sampling import BoardSampler
from device_agents.spool import PartWriter
from device_agents.store import Store
from device_agents.verdict import judge
from edgevit.agentpack import LAUNCHER, agent_pyz
from edgevit.results.stats import summarize_all
from tests.support.agent_bundle import AgentProcess, TinyBundle, make_bundle, make_job, make_signer
from tests.support.boards import lay_out_case

PLAN = wire.RunPlan("quick", 1, 1, 0.0, 8, 1.5, 5.0, False, max_foreign_cpu=1000.0, max_waiting=1.0)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TinyBundle]:
    """An agent's root that holds the tiny bundle."""
    tmp_path = tmp_path_factory.mktemp("device")
    signer = make_signer(tmp_path / "keys")
    made = make_bundle(signer)
    agent = AgentProcess(tmp_path / "root").upload()
    agent.allow(signer)
    agent.install(made)
    return tmp_path / "root", made


def work_on(board: Path, installed: tuple[Path, TinyBundle], monkeypatch: pytest.MonkeyPatch) -> wire.Run:
    """The run of one job whose server takes ``board`` for the device's file tree."""
    root, made = installed
    for module in ("job", "probe"):
        monkeypatch.setattr(f"device_agents.{module}.root_of_boards", lambda: board)
    monkeypatch.setattr("device_agents.servers.launcher_text", lambda: LAUNCHER)
    job = make_job(made, board.parent.name, made.variant(), plan=PLAN)
    store = Store(root)
    part = PartWriter(store, job.run_id)
    try:
        return JobWorker(store, agent_pyz().sha256, job, part, 1, lambda: None).work()
    finally:
        part.close()


def test_a_job_on_a_jetson_tells_power_gpu_and_energy(
    tmp_path: Path, installed: tuple[Path, TinyBundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    board = lay_out_case("jetson-orin-nano", tmp_path / "board")
    current = next(board.rglob("curr1_input"))
    start: Callable[[BoardSampler], None] = BoardSampler.start

    def load(sampler: BoardSampler) -> None:
        current.write_text("2200\n")  # idle it was 1200 mA
        start(sampler)

    monkeypatch.setattr(BoardSampler, "start", load)
    run = work_on(board, installed, monkeypatch)
    (series,) = run.measurements[0].series
    assert "power:board" in run.facts.sensors and "power" not in run.facts.absent
    assert series.power is not None and series.power.idle_mw == pytest.approx(6048.0)
    assert {r.power_mw for r in series.readings} == {11088.0} and series.sampling is not None
    (summary,) = summarize_all([run])
    assert (summary.power_mw, summary.idle_power_mw) == (pytest.approx(11088.0), pytest.approx(6048.0))
    assert summary.energy_scope == "board"
    seconds = series.sampling.wall_ms / 1000
    assert summary.energy_mj == pytest.approx(5040.0 * seconds / len(series.samples_ns))
    assert summary.gpu_load == (0.215, 0.215)


def test_sensors_that_go_away_in_mid_run_end_nothing(
    tmp_path: Path, installed: tuple[Path, TinyBundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    board = lay_out_case("jetson-orin-nano", tmp_path / "board")
    start: Callable[[BoardSampler], None] = BoardSampler.start

    def unplug(sampler: BoardSampler) -> None:
        start(sampler)

        def away() -> None:
            while not sampler.readings():
                threading.Event().wait(0.01)
            for path in [*board.rglob("curr*_input"), *board.rglob("temp"), *board.rglob("oc*_event_cnt")]:
                path.unlink()

        threading.Thread(target=away).start()

    monkeypatch.setattr(BoardSampler, "start", unplug)
    run = work_on(board, installed, monkeypatch)
    (series,) = run.measurements[0].series
    assert run.status == "completed" and series.samples_ns
    assert series.readings[0].power_mw == 6048.0 and series.readings[-1].power_mw is None
    (warning,) = [w for w in judge(run, run.measurements[0]).warnings if "stopped being readable" in w]
    assert "power, temperature, throttle" in warning


def test_the_boards_of_this_machine_are_read_like_any_other() -> None:
    assert isinstance(detect_board(Path("/")), GenericBoard)
