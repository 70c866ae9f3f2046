"""Jobs through a real agent: queue, server, workers, spool; measured once and brought home once, whatever dies in between."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from device_agents import wire
from device_agents.spool import _state
from device_agents.store import Store
from device_agents.verdict import judge
from edgevit.places import local_root
from tests.support.agent_bundle import (
    FAST_PLAN,
    GOLDEN,
    AgentProcess,
    AgentRefused,
    Signer,
    TinyBundle,
    blob_of,
    make_bundle,
    make_job,
    make_signer,
    npy,
    outputs_onnx,
    tiny_images,
    tiny_onnx,
)
from tests.support.cli import Cli
from tests.support.golden_faults import GOLDEN_FAULTS
from tests.support.waiting import wait_for

LONG_PLAN = dataclasses.replace(FAST_PLAN, name="long", min_seconds=60.0, max_seconds=60.0)


@pytest.fixture(scope="module")
def bundle(signer: Signer) -> TinyBundle:
    return make_bundle(signer, tflite=True)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory, signer: Signer, bundle: TinyBundle) -> AgentProcess:
    """One root for all: what a run leaves behind must not disturb the next."""
    agent = AgentProcess(tmp_path_factory.mktemp("device") / "root").upload()
    agent.allow(signer)
    agent.install(bundle)
    agent.call("probe")
    return agent


def run(agent: AgentProcess, job: wire.Job) -> wire.Run:
    assert agent.call("submit", stdin=wire.encode(job)) == {"run_id": job.run_id, "queued": True}
    return agent.follow(job.run_id)


def processes(agent: AgentProcess, command: str) -> list[int]:
    """Living agent processes of this root that run ``command``."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                words = (place / "cmdline").read_bytes().split(b"\0")
                state = (place / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if str(agent.root).encode() in words and command.encode() in words and state != "Z":
                found.append(int(place.name))
    return found


def test_two_formats_measured_interleaved(agent: AgentProcess, bundle: TinyBundle) -> None:
    plan = dataclasses.replace(FAST_PLAN, processes=2, warmup_iterations=3)
    variants = (bundle.variant(), bundle.variant("tiny-tflite-fp32", "litert"))
    result = run(agent, make_job(bundle, "interleaved", *variants, plan=plan))
    assert (result.status, result.reason, result.attempt) == ("completed", "", 1)
    assert [m.variant for m in result.measurements] == list(variants)
    for m in result.measurements:
        assert m.failure is None and len(m.series) == 2
        for s in m.series:
            assert len(s.samples_ns) == plan.min_samples and len(s.warmup_ns) == 3 and min(s.samples_ns) > 0
            assert s.golden.passed and s.golden.images == GOLDEN and s.init_time_ns > 0 and s.first_inference_ns > 0
            assert s.peak_memory_mb and s.memory_before_mb and s.peak_memory_mb >= s.memory_before_mb > 1
        assert m.accuracy and m.accuracy.images == 32
    onnx, tflite = result.measurements
    started = [s.started_at for pair in zip(onnx.series, tflite.series, strict=True) for s in pair]
    assert started == sorted(started), "rounds were not interleaved"
    assert onnx.accuracy and onnx.accuracy.correct == 29, "labels are the model's own answers, three of them wrong"
    assert result.facts.cpu_count >= 1 and result.job.run_id == "interleaved"
    agent.call("ack", "interleaved")


def test_a_proof_killed_for_want_of_memory_is_not_remembered(tmp_path: Path) -> None:
    agent = AgentProcess(tmp_path / "root").upload()
    probe = agent.start("probe")
    for pid in wait_for(lambda: processes(agent, "worker"), "a proof"):
        os.kill(pid, signal.SIGKILL)
    out, _ = probe.communicate(timeout=120)
    first = json.loads(out.splitlines()[-1])["value"]
    assert "SIGKILL" in first["absent"]["onnxruntime"]
    assert "onnxruntime" in [r["runtime"] for r in agent.call("probe")["runtimes"]], "the runtime stays absent for ever"


def test_a_device_without_numpy_says_so(tmp_path: Path, signer: Signer, bundle: TinyBundle) -> None:
    venv = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=60)
    agent = AgentProcess(tmp_path / "root", str(venv / "bin" / "python")).upload()
    agent.allow(signer)
    agent.install(bundle)
    (m,) = run(agent, make_job(bundle, "bare")).measurements
    assert m.failure and m.failure.code == "no-numpy", m.failure


def test_accuracy_is_counted_once(agent: AgentProcess, bundle: TinyBundle) -> None:
    found = []
    for number in range(2):
        job = make_job(bundle, f"accuracy-{number}")
        found.append(run(agent, job).measurements[0].accuracy)
        agent.call("ack", job.run_id)
    assert found[0] and found[1] and found[1].reused
    assert dataclasses.replace(found[0], reused=True) == found[1]


def test_what_was_counted_of_an_artifact_goes_with_it(tmp_path: Path, signer: Signer) -> None:
    """A search leaves a file of every candidate else, and no quota could be kept."""
    agent = AgentProcess(tmp_path / "root").upload()
    agent.allow(signer)
    stays = make_bundle(signer)
    goes = make_bundle(signer, name="goes", more={"second": ("fp32", tiny_onnx(5))})
    for made in (stays, goes):
        agent.install(made)
    run(agent, make_job(stays, "both", stays.variant(), goes.variant("second")))

    def counted_of() -> set[str]:
        return {path.name.partition("-")[0] for path in (agent.root / "accuracy").iterdir()}

    first, second = (blob_of(tiny_onnx(seed)).sha256 for seed in (0, 5))
    assert counted_of() == {first, second}
    agent.call("uninstall", stdin={"bundles": [goes.digest]})
    assert counted_of() == {first}
    (agent.root / "accuracy" / f"{second}-{'0' * 64}.json").write_text("{}")
    agent.call("gc")
    assert counted_of() == {first}


def test_accuracy_is_counted_anew_where_the_same_file_gets_other_inputs(
    agent: AgentProcess, signer: Signer, bundle: TinyBundle
) -> None:
    def other_mean(document: dict[str, Any]) -> None:
        document["preprocessing"]["mean"] = [0.9, 0.0, 0.9]
        for artifact in document["artifacts"]:
            artifact["golden"]["tolerance"] = {"max_relative": None, "min_cosine": -1.0, "top1_margin": 1e9}

    other = make_bundle(signer, version=7, change=other_mean)
    agent.install(other)
    plain = run(agent, make_job(bundle, "one-mean")).measurements[0].accuracy
    shifted = run(agent, make_job(other, "another-mean")).measurements[0].accuracy
    assert plain and shifted and not shifted.reused, "the accuracy of another preprocessing was given"


def test_outputs_that_are_no_numbers_are_no_answers(agent: AgentProcess, signer: Signer) -> None:
    def overflow(document: dict[str, Any]) -> None:
        document["preprocessing"]["std"] = [1e-40] * 3

    broken = make_bundle(signer, version=8, change=overflow)
    agent.install(broken)
    pixels = npy(tiny_images(2))
    header = {"variant": wire.encode(broken.variant()), "count": 2, "bytes": len(pixels)}
    with pytest.raises(AgentRefused, match="not a number or infinite in 2 of 2 images"):
        agent.call("predict", stdin=json.dumps(header).encode() + b"\n" + pixels)


def test_accuracy_left_out_says_why(agent: AgentProcess, signer: Signer, bundle: TinyBundle) -> None:
    without = make_bundle(signer, evaluation=False, version=5)
    agent.install(without)
    (m,) = run(agent, make_job(without, "no-labels")).measurements
    assert m.accuracy is None and m.accuracy_absent == "no labelled images were given"
    (m,) = run(agent, make_job(bundle, "not-asked", plan=dataclasses.replace(FAST_PLAN, accuracy=False))).measurements
    assert m.accuracy is None and "leaves accuracy out" in m.accuracy_absent


def test_exactly_once(agent: AgentProcess, bundle: TinyBundle) -> None:
    job = make_job(bundle, "once")
    first = run(agent, job)
    assert agent.call("submit", stdin=wire.encode(job))["queued"] is False
    assert agent.follow("once") == first, "a result stays the same until it is acknowledged"
    assert {"run_id": "once", "state": "done"} in agent.call("waiting")["runs"]
    assert agent.call("ack", "once") == {"acknowledged": True}
    assert agent.call("ack", "once") == {"acknowledged": False}
    assert agent.call("submit", stdin=wire.encode(job))["queued"] is False, "an acknowledged run was queued again"
    assert all(r["run_id"] != "once" for r in agent.call("waiting")["runs"])
    for command in ("follow", "ack"):
        with pytest.raises(AgentRefused) as caught:
            agent.call(command, "never-heard-of")
        assert caught.value.code == "no-such-run"


def test_two_follow_and_two_submit_at_once(agent: AgentProcess, bundle: TinyBundle) -> None:
    job = make_job(bundle, "crowd")
    answers: list[Any] = []

    def both() -> None:
        queued = agent.call("submit", stdin=wire.encode(job))["queued"]
        answers.append((queued, agent.follow("crowd")))

    threads = [threading.Thread(target=both) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(answers) == 2 and answers[0][1] == answers[1][1]
    assert not list((agent.root / "queue").glob("crowd*"))
    agent.call("ack", "crowd")


@pytest.mark.parametrize("victim", ["serve", "worker", "follow"])
def test_kill_in_the_middle_of_a_run(agent: AgentProcess, bundle: TinyBundle, victim: str) -> None:
    """A killed server starts again and says so; a killed worker is a failure that names the signal; a follower is nobody."""
    plan = dataclasses.replace(FAST_PLAN, min_seconds=1.5, max_seconds=10.0)
    job = make_job(bundle, f"kill-{victim}", plan=plan)
    agent.call("submit", stdin=wire.encode(job))
    follower = agent.start("follow", job.run_id)
    wait_for(lambda: processes(agent, "worker"), "a worker")
    wait_for(lambda: (agent.root / "spool" / f"{job.run_id}.part").read_text().count("tiny-onnx"), "a series")
    for pid in processes(agent, victim):
        os.kill(pid, signal.SIGKILL)
    if victim == "serve":
        wait_for(lambda: len(processes(agent, "worker")) <= 1, "the orphaned worker's end")
    follower.kill()
    follower.communicate()
    result = agent.follow(job.run_id)
    assert result.attempt == (2 if victim == "serve" else 1)
    if victim == "worker":
        (m,) = result.measurements
        assert m.failure and m.failure.code == "worker-died" and "SIGKILL" in m.failure.message
        assert result.status == "failed" and not judge(result, m).valid
    else:
        assert result.status == "completed" and len(result.measurements[0].series) == 1
    assert len(list((agent.root / "spool").glob(f"{job.run_id}.*"))) == 1, "one run, one file"
    assert agent.call("ack", job.run_id)["acknowledged"]


def test_a_run_that_kills_its_server_each_time_ends(agent: AgentProcess, bundle: TinyBundle) -> None:
    job = make_job(bundle, "cursed", plan=LONG_PLAN)
    agent.call("submit", stdin=wire.encode(job))
    part = agent.root / "spool" / "cursed.part"
    for attempt in (1, 2, 3):
        wait_for(lambda a=attempt: part.exists() and part.read_text().count('"type":"attempt"') >= a, f"attempt {attempt}")
        for pid in wait_for(lambda: processes(agent, "serve"), "a server"):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not processes(agent, "serve"), "its end")
        agent.call("submit", stdin=wire.encode(job))
    result = agent.follow("cursed")
    assert result.status == "interrupted" and result.attempt == 3 and "lost" in result.reason
    agent.call("ack", "cursed")


def test_no_second_server_starts_while_the_first_one_does(agent: AgentProcess, bundle: TinyBundle) -> None:
    """Also before the first one has come as far as its own code: the lock is handed over, not taken anew."""
    wait_for(lambda: not processes(agent, "serve"), "the end of earlier servers")
    job = make_job(bundle, "single")
    agent.call("submit", stdin=wire.encode(job))
    lock = Store(agent.root).try_lock_server()
    if lock is not None:
        os.close(lock)
    assert lock is None, "nobody held the lock after submit"
    assert agent.follow("single").status == "completed"
    agent.call("ack", "single")
    with pytest.raises(AgentRefused, match="not the server's lock"):
        agent.call("serve", "--once", "--lock", "77")


def test_a_run_that_moves_on_while_it_is_looked_for_is_not_lost(tmp_path: Path) -> None:
    """The server writes the result and removes the job, the host acknowledges, just between two looks."""

    class Moving(Store):
        def __init__(self, root: Path, at: str) -> None:
            super().__init__(root)
            self.at = at

        def _move(self, where: str) -> None:
            if where == self.at == "queue":
                Store.spool_path(self, "r", "run").write_bytes(b"{}")
                Store.queue_path(self, "r").unlink()
            elif where == self.at == "run":
                Store.spool_path(self, "r", "acked").write_bytes(b"{}")
                Store.spool_path(self, "r", "run").unlink()
            else:
                return
            self.at = ""

        def queue_path(self, run_id: str) -> Path:
            self._move("queue")
            return super().queue_path(run_id)

        def spool_path(self, run_id: str, suffix: str) -> Path:
            self._move(suffix)
            return super().spool_path(run_id, suffix)

    store = Moving(tmp_path / "root", "queue")
    store.create()
    Store.queue_path(store, "r").write_bytes(b"{}")
    assert _state(store, "r") == "done"
    store.at = "run"
    assert _state(store, "r") == "acked"
    assert _state(store, "other") is None


def test_killed_between_result_and_queue(agent: AgentProcess, bundle: TinyBundle) -> None:
    """The moment after the result is on the disk and before the queue file is gone."""
    job = make_job(bundle, "between")
    first = run(agent, job)
    wait_for(lambda: not processes(agent, "serve"), "the first server's end")
    (agent.root / "queue" / "between.json").write_bytes(wire.dumps(job))
    assert agent.call("serve", "--once")["served"] == 1
    assert agent.follow("between") == first
    assert not (agent.root / "queue" / "between.json").exists()
    agent.call("ack", "between")


def test_a_worker_that_takes_too_long(agent: AgentProcess, bundle: TinyBundle) -> None:
    """It is ended; the other variant, which is quick to refuse, is still reported."""
    absent = bundle.variant(provider="CUDAExecutionProvider")
    result = run(agent, make_job(bundle, "slow", bundle.variant(), absent, plan=LONG_PLAN, timeout=6.0))
    slow, missing = result.measurements
    assert slow.failure and slow.failure.code == "worker-timeout"
    assert missing.failure and missing.failure.code == "provider-missing" and "CPUExecutionProvider" in missing.failure.message
    assert result.status == "failed" and not processes(agent, "worker")
    agent.call("ack", "slow")


def test_the_device_is_locked_over_roots(agent: AgentProcess, bundle: TinyBundle) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as lock:
        wait_for(lambda: _bind(lock), "the device's lock")
        job = make_job(bundle, "locked-out")
        agent.call("submit", stdin=wire.encode(job))
        part = agent.root / "spool" / "locked-out.part"
        wait_for(lambda: part.exists() and '"waiting"' in part.read_text(), "waiting for the lock")
        assert not processes(agent, "worker")
    assert agent.follow("locked-out").status == "completed"
    agent.call("ack", "locked-out")


def _bind(lock: socket.socket) -> bool:
    try:
        lock.bind("\0edgevit-device-lock")
    except OSError:
        return False
    return True


def test_follow_says_that_it_is_alive(agent: AgentProcess, bundle: TinyBundle) -> None:
    plan = dataclasses.replace(FAST_PLAN, min_seconds=3.0, max_seconds=4.0, accuracy=False)
    agent.call("submit", stdin=wire.encode(make_job(bundle, "silent", plan=plan)))
    process = agent.start("follow", "silent")
    assert process.stdout
    longest, last = 0.0, time.monotonic()
    for _ in process.stdout:
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    process.wait()
    assert longest < 2.5, f"{longest:.1f} s without a word"
    agent.call("ack", "silent")


# ---- golden outputs -------------------------------------------------------------------------------------------------


def transposed(document: dict[str, Any]) -> None:
    document["artifacts"][0]["input"]["layout"] = "NHWC"


FAULTS = {**GOLDEN_FAULTS, "other weights": {"onnx_model": tiny_onnx(seed=5)}}


@pytest.mark.parametrize("name", FAULTS)
def test_golden_check_finds(agent: AgentProcess, signer: Signer, name: str) -> None:
    bad = make_bundle(signer, version=100 + list(FAULTS).index(name), **FAULTS[name])
    agent.install(bad)
    result = run(agent, make_job(bad, f"golden-{list(FAULTS).index(name)}"))
    (m,) = result.measurements
    assert m.failure and m.failure.code == "golden-mismatch" and m.series == () and m.accuracy is None
    assert not judge(result, m).valid


def test_a_wrong_layout_is_a_failure_not_a_number(agent: AgentProcess, signer: Signer) -> None:
    bad = make_bundle(signer, version=200, change=transposed)
    agent.install(bad)
    (m,) = run(agent, make_job(bad, "layout")).measurements
    assert m.failure and m.failure.code == "worker-failed"


def test_a_truncated_model_is_a_failure(agent: AgentProcess, signer: Signer) -> None:
    bad = make_bundle(signer, version=201, onnx_model=tiny_onnx()[:-200])
    agent.install(bad)
    (m,) = run(agent, make_job(bad, "truncated")).measurements
    assert m.failure and m.failure.code == "worker-failed"


def test_a_damaged_blob_fails_its_variant_alone(tmp_path: Path, signer: Signer, bundle: TinyBundle) -> None:
    agent = AgentProcess(tmp_path / "root").upload()
    agent.allow(signer)
    agent.install(bundle)
    blob = agent.root / "blobs" / bundle.manifest.artifacts[0].blob.sha256
    blob.write_bytes(blob.read_bytes()[::-1])
    variants = (bundle.variant(), bundle.variant("tiny-tflite-fp32", "litert"))
    result = run(agent, make_job(bundle, "damaged", *variants))
    assert [m.failure and m.failure.code for m in result.measurements] == ["blob-damaged", None]


def test_a_bundle_whose_signer_was_taken_away_is_not_run(tmp_path: Path, signer: Signer, bundle: TinyBundle) -> None:
    agent = AgentProcess(tmp_path / "root").upload()
    agent.allow(signer)
    agent.install(bundle)
    stranger = make_signer(tmp_path, "other")
    agent.call("allow", stdin={"lines": [stranger.line()], "replace": True})
    result = run(agent, make_job(bundle, "revoked"))
    assert result.status == "failed" and "unknown-signer" in result.reason


def test_predict(agent: AgentProcess, bundle: TinyBundle) -> None:
    images = tiny_images(3, 9)
    data = npy(images)

    def ask(variant: wire.Variant | None, count: int = 3) -> Any:
        header = json.dumps({"variant": wire.encode(variant), "count": count, "bytes": len(data)}).encode() + b"\n"
        return agent.call("predict", stdin=header + data)

    agent.call("activate", stdin={"variant": wire.encode(bundle.variant()), "policy": "test", "allow_older": True})
    expected = outputs_onnx(tiny_onnx(), images).argmax(1).tolist()
    for variant in (None, bundle.variant()):
        value = ask(variant)
        assert [row[0]["index"] for row in value["predictions"]] == expected
        assert value["predictions"][0][0]["label"] == f"class {expected[0]}" and len(value["predictions"][0]) == 5
    with pytest.raises(AgentRefused) as caught:
        ask(None, 4)
    assert caught.value.code == "bad-request"


def test_probe_proves_by_inference_and_remembers(agent: AgentProcess) -> None:
    facts = wire.decode(wire.Facts, agent.call("probe"), "facts")
    proven = {r.runtime: {p.name: p.proven for p in r.providers} for r in facts.runtimes}
    assert proven["onnxruntime"]["CPUExecutionProvider"] and proven["litert"]["XNNPACK"]
    assert not proven["onnxruntime"].get("AzureExecutionProvider"), "compiled in, yet it computes nothing here"
    optional = [f.name for f in dataclasses.fields(facts) if getattr(facts, f.name) is None]
    assert set(optional) <= set(facts.absent), "a None without its reason"
    (agent.root / "runtimes.json").write_text("{}")
    quick = wire.decode(wire.Facts, agent.call("probe", "--quick"), "facts")
    assert quick.runtimes == () and "probe" in quick.absent["runtimes"]
    assert wire.decode(wire.Facts, agent.call("probe"), "facts").runtimes == facts.runtimes


def test_who_asks_what_works_is_told_what_works_now(cli: Cli) -> None:
    """A library that was lacking is there by now, another one went: neither shows in the packages that remembering goes by."""
    assert cli("target", "probe", "local").code == 0
    remembered = local_root() / "runtimes.json"
    document = json.loads(remembered.read_text())
    failed = {**document, "runtimes": [], "absent": {"onnxruntime": "no-runtime: libgomp.so.1: cannot open shared object file"}}
    old = {**document, "runtimes": [{**r, "version": "0.0.1"} for r in document["runtimes"]]}
    for stale, asked in ((failed, ("target", "probe", "local")), (old, ("fleet", "check", "local", "--prove"))):
        remembered.write_text(json.dumps(stale))
        assert "onnxruntime 1." not in cli("fleet", "check", "local").out, "nobody asked for an inference"
        said = cli(*asked)
        assert "onnxruntime 1." in said.out and "0.0.1" not in said.out, (asked, said)


def test_proving_anew_loads_nothing_beside_what_is_measured(tmp_path: Path) -> None:
    agent = AgentProcess(tmp_path / "root").upload()
    agent.call("probe")
    remembered = agent.root / "runtimes.json"
    document = json.loads(remembered.read_text())
    remembered.write_text(json.dumps({**document, "runtimes": [{**r, "version": "0.0.1"} for r in document["runtimes"]]}))
    lock = Store(agent.root).try_lock_server()
    assert lock is not None
    try:
        assert {r["version"] for r in agent.call("probe", "--anew")["runtimes"]} == {"0.0.1"}, "a runtime was loaded"
    finally:
        os.close(lock)


def test_nothing_is_left_running(agent: AgentProcess) -> None:
    wait_for(lambda: not processes(agent, "serve"), "the server's end")
    assert not processes(agent, "worker")
    assert subprocess.run(agent.argv("waiting"), capture_output=True).returncode == 0
