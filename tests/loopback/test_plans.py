"""Plans through a real agent: what was asked for is done, recorded, and shown."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import edgevit.bench
from device_agents import wire
from device_agents.errors import Refused
from device_agents.job import JobWorker
from device_agents.spool import PartWriter
from device_agents.store import Store
from device_agents.verdict import judge
from edgevit.agentpack import agent_pyz
from edgevit.fleet.agent import Agent
from edgevit.plans import PLANS
from edgevit.results.sustained import describe_sustained
from tests.loopback.test_variants import slow_onnx
from tests.support.agent_bundle import (
    FAST_PLAN,
    AgentProcess,
    Signer,
    TinyBundle,
    make_bundle,
    make_job,
    make_signer,
)
from tests.support.cli import Cli

SLOW = "tiny-onnx-int8-dynamic"
CPUS = sorted(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Signer, TinyBundle]:
    key = make_signer(tmp_path_factory.mktemp("keys"))
    return key, make_bundle(key, tflite=True, more={SLOW: ("int8-dynamic", slow_onnx())})


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory, bundle: tuple[Signer, TinyBundle]) -> AgentProcess:
    agent = AgentProcess(tmp_path_factory.mktemp("device") / "root").upload()
    agent.allow(bundle[0])
    agent.install(bundle[1])
    return agent


def run(agent: AgentProcess, job: wire.Job) -> wire.Run:
    agent.call("submit", stdin=wire.encode(job))
    result = agent.follow(job.run_id)
    agent.call("ack", job.run_id)
    return result


def plan(**changes: Any) -> wire.RunPlan:
    return dataclasses.replace(FAST_PLAN, accuracy=False, **changes)


def test_mirrored_rounds_run_backwards_every_other_time(agent: AgentProcess, bundle: tuple[Signer, TinyBundle]) -> None:
    made = bundle[1]
    fast, slow = made.variant(), made.variant(SLOW)
    job = make_job(made, "abba", fast, slow, plan=plan(processes=4, order="mirrored"))
    agent.call("submit", stdin=wire.encode(job))
    lines = agent.messages("follow", "abba")
    order = [m["text"].split(" on ")[0] for m in lines if m["type"] == "progress" and " on onnxruntime" in m["text"]]
    a, b = fast.artifact, slow.artifact
    assert order == [a, b, b, a, a, b, b, a]
    result = wire.decode(wire.Run, lines[-1]["value"], "run")
    agent.call("ack", "abba")
    assert [[s.process for s in m.series] for m in result.measurements] == [list(range(4))] * 2


def test_a_sustained_series_has_a_window_for_each_second(agent: AgentProcess, bundle: tuple[Signer, TinyBundle]) -> None:
    sustained = plan(name="sustained", sustained=True, min_samples=1, min_seconds=2.5, max_seconds=2.5, max_raw_samples=500)
    (m,) = run(agent, make_job(bundle[1], "minutes", plan=sustained)).measurements
    (one,) = m.series
    assert len(one.windows) == 3 and len(one.samples_ns) <= 501 and one.stride >= 2
    inferences = sum(w.count for w in one.windows)
    assert (inferences - 1) // one.stride + 1 == len(one.samples_ns), "kept samples are every stride-th of all"
    told = describe_sustained(one)
    assert told and told.inferences == inferences and "two minutes are needed" in told.retention_absent
    assert len(one.readings) in (0, *range(3, 6)), "a reading a second, where there is a sensor"


def test_what_was_asked_for_is_recorded(agent: AgentProcess, bundle: tuple[Signer, TinyBundle]) -> None:
    (m,) = run(agent, make_job(bundle[1], "kept-to", plan=plan(affinity=(CPUS[-1],), cool_to_c=149.0))).measurements
    (one,) = m.series
    assert one.affinity == (CPUS[-1],)
    assert one.cooling and one.cooling.outcome in ("reached", "no-sensor")
    assert (one.cooling.outcome == "no-sensor") == (one.cooling.from_c is None)
    (m,) = run(agent, make_job(bundle[1], "anywhere", plan=plan(min_samples=3))).measurements
    assert m.series[0].affinity == tuple(CPUS) and m.series[0].cooling is None


def test_a_cpu_that_is_not_there_is_refused_by_name(agent: AgentProcess, bundle: tuple[Signer, TinyBundle]) -> None:
    (m,) = run(agent, make_job(bundle[1], "no-cpu", plan=plan(affinity=(CPUS[0], 99_999)))).measurements
    assert m.failure and m.failure.code == "bad-job" and "99999" in m.failure.message


def test_a_memory_limit_ends_the_worker_and_names_both_figures(agent: AgentProcess, bundle: tuple[Signer, TinyBundle]) -> None:
    job = make_job(bundle[1], "too-much", plan=plan(min_seconds=2.0, max_seconds=30.0))
    result = run(agent, dataclasses.replace(job, memory_limit_mb=15.0))
    (m,) = result.measurements
    assert m.failure and m.failure.code == "worker-memory" and "at most 15 MB" in m.failure.message
    assert result.status == "failed"


def test_operators_are_timed_where_the_runtime_offers_it(agent: AgentProcess, bundle: tuple[Signer, TinyBundle]) -> None:
    made = bundle[1]
    variants = (made.variant(), made.variant("tiny-tflite-fp32", "litert"))
    onnx, tflite = run(agent, make_job(made, "operators", *variants, plan=plan(profile_ops=True))).measurements
    assert onnx.profile and onnx.profile_absent == "" and onnx.profile.inferences >= 1
    kinds = [o.kind for o in onnx.profile.operators]
    assert {"Conv", "Gemm"} <= set(kinds) and onnx.profile.profiler.startswith("ONNX Runtime ")
    assert [o.total_ns for o in onnx.profile.operators] == sorted((o.total_ns for o in onnx.profile.operators), reverse=True)
    assert all(o.calls == onnx.profile.inferences for o in onnx.profile.operators)
    assert tflite.profile is None and tflite.profile_absent.startswith("no-profiler: litert")
    assert not list((agent.root).glob("*profile*")), "the profiler's file was left behind"


def test_a_system_left_tuned_by_a_killed_server_is_put_back_by_the_next(
    agent: AgentProcess, bundle: tuple[Signer, TinyBundle]
) -> None:
    """The note names a governor of a CPU that no machine has: what is shown is that the next server takes it up."""
    note = agent.root / "tuned.json"
    note.write_text(json.dumps({"sys/devices/system/cpu/cpufreq/policy99999/scaling_governor": "ondemand"}))
    run(agent, make_job(bundle[1], "after-a-kill", plan=plan(min_samples=1)))
    assert not note.exists()


@contextlib.contextmanager
def hogs(count: int) -> Iterator[None]:
    """Processes that do nothing but take CPUs, each in a session of its own: a kernel with autogroups (sched(7)) shares CPUs
    out by session first, and many hogs in one would leave the worker's session its whole core."""
    argv = [sys.executable, "-c", "while True: pass"]
    started = [subprocess.Popen(argv, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_a_cpu_hog_on_every_cpu_makes_it_invalid(agent: AgentProcess, bundle: tuple[Signer, TinyBundle]) -> None:
    with hogs(2 * len(CPUS)):
        result = run(agent, make_job(bundle[1], "hogs", plan=plan(min_seconds=1.5, max_seconds=20.0)))
    (m,) = result.measurements
    verdict = judge(result, m)
    assert not verdict.valid and verdict.rules == 2
    assert any("others kept" in r or "waited for a CPU" in r for r in verdict.reasons), verdict


def test_a_runtime_that_chatters_on_standard_output_spoils_nothing(tmp_path: Path, bundle: tuple[Signer, TinyBundle]) -> None:
    """5 MB straight to descriptor 1 while it is imported, and a line at each end of the process."""
    (tmp_path / "chatty").mkdir()
    (tmp_path / "chatty" / "sitecustomize.py").write_text(
        "import atexit, os, sys\n"
        "class Chatter:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'onnxruntime':\n"
        "            for _ in range(100): os.write(1, b'loading kernels ' * 3200 + b'\\n')\n"
        '            print(\'{"type":"result","value":{}}\', flush=True)\n'
        "            atexit.register(print, 'good-bye')\n"
        "sys.meta_path.insert(0, Chatter())\n"
    )
    chatty = AgentProcess(tmp_path / "root", env={"PYTHONPATH": str(tmp_path / "chatty")}).upload()
    chatty.allow(bundle[0])
    chatty.install(bundle[1])
    result = run(chatty, make_job(bundle[1], "chatty", plan=plan()))
    assert result.status == "completed" and len(result.measurements[0].series[0].samples_ns) == FAST_PLAN.min_samples


def test_a_worker_that_hangs_takes_none_of_the_hours_meant_for_accuracy(
    agent: AgentProcess, bundle: tuple[Signer, TinyBundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []

    def hang(argv: Any, request: Any, timeout_s: float, *_: Any, **__: Any) -> Any:
        given.append(timeout_s)
        raise Refused("worker-timeout", "no result")

    monkeypatch.setattr("device_agents.job.run_worker", hang)
    monkeypatch.setattr("device_agents.job.agent_argv", lambda *_: [])
    store = Store(agent.root)
    for images in (0, 100_000):
        made = edgevit.bench.make_job("local", "batch", PLANS["standard"], [bundle[1].variant()], images=images)
        part = PartWriter(store, "hangs")
        worker = JobWorker(store, agent_pyz().sha256, made, part, 1, lambda: None)
        worker._time_all(worker._open_variants())
        part.close()
    assert given[0] == pytest.approx(given[1], abs=5) and given[1] < 1500 < made.timeout_seconds - 100_000
    (agent.root / "spool" / "hangs.part").unlink()


# ---- through the command line ---------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that end at once and whose limits nothing on this machine exceeds."""
    calm = {"max_waiting": 1.0, "max_foreign_cpu": 1e6, "max_frequency_drift": 1.0, "accuracy": False}
    fast = {"min_samples": 30, "min_seconds": 0.0, "warmup_seconds": 0.0, **calm}
    monkeypatch.setitem(PLANS, "compare", dataclasses.replace(PLANS["compare"], **fast))
    monkeypatch.setitem(PLANS, "quick", dataclasses.replace(PLANS["quick"], **fast))
    monkeypatch.setitem(PLANS, "sustained", dataclasses.replace(PLANS["sustained"], **calm))


def test_against_another_bundle(cli: Cli, operator: Signer, tmp_path: Path, short: None) -> None:
    one = make_bundle(operator, name="plain", version=1).write(tmp_path / "a")
    other = make_bundle(operator, name="slowed", version=1, onnx_model=slow_onnx()).write(tmp_path / "b")
    said = cli("bench", one, "--against", other, "local", "--blocks", 3, "--threads", 1)
    assert said.code == 0, said.err
    assert "B ÷ A" in said.out and "A is " in said.out and "times as fast" in said.out
    assert max(map(len, said.out.splitlines())) <= 100
    shown = json.loads(cli("results", "show", "--json").out)
    (found,) = shown["comparisons"]
    assert found["ratio"] > 1.5 and found["interval"][0] > 1.0 and found["blocks"] == 3 and found["left_out"] == []
    assert "B ÷ A" in cli("results", "show").out
    cli("deploy", one, "local", "--select", "fastest").refused(1, "was not measured there yet", "--variants")
    cli("bench", one, "--against", one, "local").refused(2, "nothing to compare", "edgevit bench")
    cli("bench", one, "--against", other, "local", "--plan", "quick").refused(2, "by the plan compare", "leave --plan out")
    cli("bench", one, "local", "--plan", "compare").refused(2, "needs a second bundle", "--against")


def test_the_time_limit_covers_the_images_to_be_scored(
    cli: Cli, operator: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few thousand images take a board longer than its plan does: top-1 would be missing."""
    jobs: list[wire.Job] = []
    monkeypatch.setattr(Agent, "submit", lambda _, job: jobs.append(job))
    bundle = make_bundle(operator, tflite=True)
    said = cli("bench", bundle.write(tmp_path / "a"), "local", "--plan", "quick", "--threads", 1, "--detach")
    assert said.code == 0, said.err
    (job,) = jobs
    without = edgevit.bench.make_job("local", "batch", PLANS["quick"], job.variants)
    assert len(job.variants) == 2 and job.timeout_seconds == without.timeout_seconds + 2 * 32 * edgevit.bench.SCORE_S


def test_minutes_and_operators_from_the_command_line(
    cli: Cli,
    operator: Signer,
    tmp_path: Path,
    short: None,
) -> None:
    one = make_bundle(operator).write(tmp_path / "a")
    said = cli("bench", one, "local", "--plan", "sustained", "--minutes", 0.02, "--threads", 1)
    assert said.code == 0, said.err
    assert "s were timed, two minutes are needed" in " ".join(said.out.split())
    row = json.loads(cli("results", "show", "--json").out)["rows"][0]
    assert row["sustained"]["seconds"] > 1 and row["images_per_s"] > 0 and row["verdict"]["rules"] == 2
    cli("results", "show", "--ops").refused(2, "no operator was timed", "--profile-ops")
    said = cli("bench", one, "local", "--plan", "quick", "--profile-ops", "--affinity", CPUS[0], "--threads", 1)
    assert said.code == 0 and "operators by ONNX Runtime" in said.out and "Gemm" in said.out, said.err
    assert "Gemm" in cli("results", "show", "--ops").out and "Gemm" not in cli("results", "show").out
    assert json.loads(cli("results", "show", "--json").out)["rows"][0]["affinity"] == [CPUS[0]]
    cli("bench", one, "local", "--plan", "quick", "--minutes", 5).refused(2, "--minutes is for --plan sustained", "edgevit")
