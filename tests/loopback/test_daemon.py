"""The daemon as a real process: works jobs, survives its death, ends what is cancelled, keeps to its quota, idles cheaply."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_agents import wire
from device_agents.spool import cancel
from device_agents.store import Store
from edgevit.places import local_root
from tests.support.agent_bundle import (
    FAST_PLAN,
    AgentProcess,
    AgentRefused,
    Signer,
    TinyBundle,
    make_bundle,
    make_job,
)
from tests.support.cli import Cli
from tests.support.processes import find_agents, kill
from tests.support.waiting import wait_for

MAX_IDLE_MB = 20.0
SLOW_PLAN = dataclasses.replace(FAST_PLAN, name="slow", min_seconds=30.0, max_seconds=30.0)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory, signer: Signer, bundle: TinyBundle) -> AgentProcess:
    agent = AgentProcess(tmp_path_factory.mktemp("device") / "root").upload()
    agent.allow(signer)
    agent.install(bundle)
    agent.call("probe")
    return agent


@contextlib.contextmanager
def running(agent: AgentProcess, *options: str, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon at work on the agent's root."""
    process = subprocess.Popen(
        agent.argv("daemon", *options), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, **(env or {})}
    )
    try:
        wait_for(lambda: started_by(agent, process) or process.poll() is not None, "the daemon's start")
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(30)
        if process.stderr:
            process.stderr.close()


def started_by(agent: AgentProcess, process: subprocess.Popen[bytes]) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return bool(json.loads((agent.root / "daemon.json").read_text())["pid"] == process.pid)
    return False


def submit(agent: AgentProcess, job: wire.Job) -> None:
    assert agent.call("submit", stdin=wire.encode(job)) == {"run_id": job.run_id, "queued": True}


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def log_of(agent: AgentProcess) -> str:
    with contextlib.suppress(OSError):
        return (agent.root / "log" / "daemon.log").read_text()
    return ""


def servers(agent: AgentProcess) -> list[int]:
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            with contextlib.suppress(OSError):
                words = (place / "cmdline").read_bytes().split(b"\0")
                if str(agent.root).encode() in words and b"--once" in words:
                    found.append(int(place.name))
    return found


def test_works_detached_jobs_by_itself_and_keeps_them_until_they_are_acknowledged(
    agent: AgentProcess, bundle: TinyBundle
) -> None:
    with running(agent) as daemon:
        submit(agent, make_job(bundle, "detached", plan=dataclasses.replace(FAST_PLAN, min_seconds=2.0)))
        (server,) = wait_for(lambda: servers(agent), "a server")
        assert parent_of(server) == daemon.pid, "the job is the daemon's, whoever submitted it"
        wait_for((agent.root / "spool" / "detached.run").exists, "the result")
        assert agent.call("waiting") == {"runs": [{"run_id": "detached", "state": "done"}]}
    run = agent.follow("detached")
    assert run.status == "completed" and run.measurements[0].series[0].golden.passed
    assert agent.call("ack", "detached") == {"acknowledged": True}
    assert agent.call("submit", stdin=wire.encode(run.job)) == {"run_id": "detached", "queued": False}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_job_survives_the_daemons_end(agent: AgentProcess, bundle: TinyBundle, how: signal.Signals) -> None:
    """Asked to end, it lets its server put back a governor that was set; the note names one that no machine has."""
    run_id = f"survives-{how.name}"
    note = agent.root / "tuned.json"
    with running(agent) as daemon:
        submit(agent, make_job(bundle, run_id, plan=dataclasses.replace(FAST_PLAN, min_seconds=2.0)))
        (server,) = wait_for(lambda: servers(agent), "a server")
        wait_for(lambda: "tiny-onnx" in part_of(agent, run_id), "the first job's timing")
        note.write_text(json.dumps({"sys/devices/system/cpu/cpufreq/policy99999/scaling_governor": "ondemand"}))
        daemon.send_signal(how)
        daemon.wait(30)
        if how == signal.SIGKILL:
            os.kill(server, signal.SIGKILL)  # as a power cut ends both
        wait_for(lambda: not servers(agent), "the server's end with its daemon")
        assert note.exists() == (how == signal.SIGKILL)
    with running(agent):
        wait_for((agent.root / "spool" / f"{run_id}.run").exists, "the result")
        run = agent.follow(run_id)
    assert (run.status, run.attempt) == ("completed", 2)
    assert agent.call("ack", run_id) == {"acknowledged": True}
    assert not list((agent.root / "queue").iterdir())


def part_of(agent: AgentProcess, run_id: str) -> str:
    with contextlib.suppress(OSError):
        return (agent.root / "spool" / f"{run_id}.part").read_text()
    return ""


def test_without_a_daemon_what_a_reboot_left_goes_on_at_the_next_collect(cli: Cli, operator: Signer, tmp_path: Path) -> None:
    """Nobody waits for it or asks for it by name."""
    assert cli("bench", make_bundle(operator).write(tmp_path / "bundle"), "local", "--plan", "quick", "--detach").code == 0
    agent = AgentProcess(local_root())
    wait_for(lambda: servers(agent), "a server")
    kill(find_agents(agent.root))
    wait_for(lambda: not servers(agent), "its end")
    said = cli("collect", "local")
    assert "it goes on" in said.err and ("is running" in said.out or "is queued" in said.out), said
    wait_for(lambda: list((agent.root / "spool").glob("*.run")), "the result of a run that was left to itself")
    said = cli("collect", "local")
    assert "completed" in said.out and "it goes on" not in said.err


def test_what_is_cancelled_comes_home_as_interrupted(agent: AgentProcess, bundle: TinyBundle) -> None:
    """The one at work ends within moments, the one behind it is never begun, and the one behind that is measured."""
    with running(agent):
        for name, plan in (("cancel-running", SLOW_PLAN), ("cancel-queued", SLOW_PLAN), ("not-cancelled", FAST_PLAN)):
            submit(agent, make_job(bundle, name, plan=plan))
        wait_for(lambda: "tiny-onnx" in part_of(agent, "cancel-running"), "the first job's timing")
        assert agent.call("cancel", "cancel-queued") == {"cancelled": True, "state": "queued"}
        assert agent.call("cancel", "cancel-running") == {"cancelled": True, "state": "running"}
        runs = {name: agent.follow(name) for name in ("cancel-running", "cancel-queued", "not-cancelled")}
    assert {name: (run.status, len(run.measurements)) for name, run in runs.items()} == {
        "cancel-running": ("interrupted", 0),
        "cancel-queued": ("interrupted", 0),
        "not-cancelled": ("completed", 1),
    }
    assert runs["cancel-running"].reason == runs["cancel-queued"].reason == "cancelled on request"
    assert agent.call("cancel", "not-cancelled") == {"cancelled": False, "state": "done"}
    with pytest.raises(AgentRefused) as refused:
        agent.call("cancel", "nobody-knows-me")
    assert refused.value.code == "no-such-run"
    for name in runs:
        agent.call("ack", name)
    assert not list((agent.root / "queue").iterdir()), "no mark of a cancellation is left"


def test_a_run_that_ends_while_it_is_being_cancelled_leaves_no_mark(tmp_path: Path) -> None:
    class EndsMeanwhile(Store):
        def write(self, path: Path, data: bytes) -> None:
            super().write(path, data)
            if path == self.cancel_path("ends"):
                super().write(self.spool_path("ends", "run"), b"{}")
                self.remove(self.queue_path("ends"))

    store = EndsMeanwhile(tmp_path / "root")
    store.create()
    store.write(store.queue_path("ends"), b"{}")
    assert cancel(store, "0" * 64, "ends") == {"cancelled": False, "state": "done"}
    assert not store.cancel_path("ends").exists()


def test_hostile_files_in_the_queue_are_removed_and_named(agent: AgentProcess, bundle: TinyBundle) -> None:
    """Garbage, an oversized file, a folder, a link, a pipe, another run's job: none stops the queue, none is followed."""
    queue = agent.root / "queue"
    secret = agent.root.parent / "secret"
    secret.write_text("untouched")
    (queue / "a-garbage.json").write_bytes(random.Random(5).randbytes(4096))
    (queue / "b-huge.json").write_bytes(b" " * (wire.MAX_JOB_BYTES + 1))
    (queue / "c-folder.json").mkdir()
    (queue / "c-folder.json" / "inside").write_text("x")
    (queue / "d-link.json").symlink_to(secret)
    os.mkfifo(queue / "e-pipe.json")
    (queue / "f-other.json").write_bytes(wire.dumps(make_job(bundle, "another-name")))
    (queue / "..json").write_text("{}")
    (queue / "g name with spaces.json").write_text("{}")
    too_long = "h" * 200
    (queue / f"{too_long}.json").write_text("{}")
    (agent.root / "spool" / f"{too_long}.run").write_text("{}")
    with running(agent):
        wait_for(
            lambda: not (queue / "f-other.json").exists() and not servers(agent), "the end of the server that removes them"
        )
        submit(agent, make_job(bundle, "honest"))
        wait_for((agent.root / "spool" / "honest.run").exists, "the honest job's result of the next server")
        log = (agent.root / "log" / "serve.log").read_text()
    assert sorted(p.name for p in queue.iterdir()) == ["..json", "g name with spaces.json", f"{too_long}.json"], (
        "names that are none are left alone"
    )
    assert agent.call("waiting") == {"runs": [{"run_id": "honest", "state": "done"}]}
    assert wire.decode(wire.Facts, agent.call("probe"), "facts").waiting_runs == ("honest",)
    assert secret.read_text() == "untouched"
    for name in ("a-garbage", "b-huge", "c-folder", "d-link", "e-pipe", "f-other"):
        assert f"job {name}: removed" in log
        with pytest.raises(AgentRefused) as refused:
            agent.call("follow", name)
        assert refused.value.code == "no-such-run"
    agent.call("ack", "honest")
    for path in (*queue.iterdir(), agent.root / "spool" / f"{too_long}.run"):
        path.unlink()


def test_one_daemon_a_root(agent: AgentProcess) -> None:
    with running(agent):
        second = subprocess.run(agent.argv("daemon"), capture_output=True, timeout=60, check=False)
    assert second.returncode == 1
    assert b"busy: another daemon serves" in second.stderr


def test_wrong_options_are_refused(agent: AgentProcess) -> None:
    for options in (["--quota-mb", "0"], ["--quota-mb"], ["--device", "relative"], ["--what", "x"]):
        done = subprocess.run(agent.argv("daemon", *options), capture_output=True, timeout=60, check=False)
        assert done.returncode == 1 and b"bad-request" in done.stderr, options


def test_idles_cheaply_and_tells_what_it_is(agent: AgentProcess) -> None:
    with running(agent, "--unit", "x.service", "--device", "/dev/no-such-device") as daemon:
        status = wire.decode(wire.DaemonStatus, agent.call("daemon-status"), "status")
        maps = Path(f"/proc/{daemon.pid}/maps").read_text()
    assert status.at_work and status.state is not None and status.state.pid == daemon.pid
    assert status.resident_mb is not None and status.resident_mb <= MAX_IDLE_MB
    assert "numpy" not in maps and "libcrypto" not in maps
    assert status.state.unit == "x.service"
    assert status.state.protections["device /dev/no-such-device"] == "absent"
    assert status.state.protections["unprivileged user"] == ("no" if os.geteuid() == 0 else "yes")
    assert status.state.protections["no network"] == "no"
    after = wire.decode(wire.DaemonStatus, agent.call("daemon-status"), "status")
    assert not after.at_work and after.state == status.state


def test_tells_systemd_that_it_is_ready_alive_and_stopping(agent: AgentProcess, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        said = []
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "3000000"}
        with running(agent, env=env):
            said += [manager.recv(100) for _ in range(3)]
        said.append(manager.recv(100))
        while said[-1] == b"WATCHDOG=1":
            said.append(manager.recv(100))
    assert said[0] == b"READY=1" and said[1] == said[2] == b"WATCHDOG=1" and said[-1] == b"STOPPING=1"


def test_a_job_of_a_newer_host_is_served_by_that_hosts_agent(agent: AgentProcess, bundle: TinyBundle) -> None:
    """The daemon starts the agent that submitted, not its own, so it need not be installed anew with each edgevit."""
    with running(agent):
        submit(agent, make_job(bundle, "whose-agent"))
        run = agent.follow("whose-agent")
        named = (agent.root / "agent" / "current").read_text().strip()
    assert run.facts.agent_sha256 == named
    agent.call("ack", "whose-agent")


def test_over_its_quota_garbage_goes_and_no_more_jobs_are_taken(tmp_path: Path, signer: Signer, bundle: TinyBundle) -> None:
    """The active bundle stays, and so do results that nobody brought home; a job more is refused, saying what to do."""
    agent = AgentProcess(tmp_path / "root").upload()
    agent.allow(signer)
    for version in (1, 2, 3):
        filler = os.urandom(3_000_000)
        agent.install(made := make_bundle(signer, version=version, extra_blob=filler))
        if version == 1:
            active = made
            agent.call("activate", stdin={"variant": wire.encode(made.variant()), "policy": "test", "allow_older": False})
    before = Store(agent.root).used_bytes()
    with running(agent, "--quota-mb", "8"):
        wait_for(lambda: "collected garbage, " in log_of(agent), "the collection")
        kept = {p.name for p in (agent.root / "bundles").iterdir()}
        assert active.digest in kept and made.digest in kept and len(kept) == 2, "active and newest stay, the one between goes"
        assert Store(agent.root).used_bytes() < before
        filler_file = agent.root / "spool" / "waits.run"
        filler_file.write_bytes(b"x" * 8_000_000)
        with pytest.raises(AgentRefused) as refused:
            agent.call("submit", stdin=wire.encode(make_job(active, "one-more")))
        assert refused.value.code == "no-space" and "1 results wait" in str(refused.value)
        assert not (agent.root / "queue" / "one-more.json").exists()


def test_detached_by_command_collected_later_one_of_them_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands that a person types, with a daemon on this machine's own agent."""
    from edgevit import signing

    monkeypatch.setenv("EDGEVIT_HOME", str(tmp_path))
    key = tmp_path / "config" / "signing_key"
    key.parent.mkdir(parents=True)
    signing.make_key(key, "test")
    folder = make_bundle(Signer(key)).write(tmp_path / "bundle")

    def edgevit(*words: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "edgevit", *words], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    assert "nothing waits" in edgevit("collect", "local")
    agent = AgentProcess(tmp_path / "data" / "local-agent")
    with running(agent):
        submitted = [edgevit("bench", str(folder), "local", "--plan", "standard", "--detach") for _ in range(2)]
        first, second = (text.split("run ")[1].split()[0] for text in submitted)
        assert "at work" in edgevit("target", "daemon", "status", "local")
        said = edgevit("collect", "local", "--cancel", second)
        assert f"{second} measured" in said and "interrupted" in said
        assert f"{first} is running" in said or f"{first} measured" in said
        edgevit("collect", "local", "--wait")
        assert "nothing waits" in edgevit("collect", "local")
        assert "no run unknown is queued or running" in edgevit("collect", "local", "--cancel", "unknown", status=2)
        said = edgevit("target", "daemon", "logs", "local")
        assert "started, agent" in said and "Z a server begins" in said
        assert '"alive"' not in said, "nobody listens to a server, and each line is written to the card while it measures"
    assert edgevit("results", "list").count("bench tiny on local") == 2
