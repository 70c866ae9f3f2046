"""Environments of the agent's own: made by the device's Python from wheels that the host sends, and from nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from device_agents import wire
from device_agents.console import Console
from device_agents.environment import MARK, make_mark, python_of, read_mark, version_text
from device_agents.errors import Refused
from device_agents.provision import _run_step, parse_request, unprovision
from device_agents.store import Store
from edgevit.fleet.wheel_index import FoundWheel
from tests.support.agent_bundle import AgentProcess, AgentRefused
from tests.support.wheels import ONNXRUNTIME, as_sent, make_wheel, provision, repack

# No index could be reached, and what a person configured for pip or Python on the device must not matter either.
HOSTILE = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_TARGET": "/nowhere", "http_proxy": "http://127.0.0.1:9"}


@pytest.fixture(scope="module")
def pip(tmp_path_factory: pytest.TempPathFactory) -> FoundWheel:
    return repack("pip", tmp_path_factory.mktemp("pip"))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, pip: FoundWheel) -> list[FoundWheel]:
    """onnxruntime and all it needs."""
    folder = tmp_path_factory.mktemp("real")
    return [pip, *(repack(name, folder) for name in ONNXRUNTIME)]


@pytest.fixture
def agent(tmp_path: Path) -> AgentProcess:
    (tmp_path / "home").mkdir()
    env = {**HOSTILE, "HOME": str(tmp_path / "home"), "PYTHONDONTWRITEBYTECODE": "1"}
    return AgentProcess(tmp_path / "root with a space", env=env).upload()


def run_in(agent: AgentProcess, code: str) -> str:
    python = agent.root / "venv" / "bin" / "python"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout.strip()


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.lstat().st_ino, p.lstat().st_mtime_ns) for p in root.rglob("*") if not p.is_dir()}


def test_from_wheels_to_an_inference_and_away_without_a_trace(
    agent: AgentProcess, real: list[FoundWheel], tmp_path: Path
) -> None:
    result, lines = provision(agent, real, requirements=("onnxruntime>=1.19",), unpacked_bytes=200_000_000)
    assert [(r["runtime"], r["providers"][0]["proven"]) for r in result["runtimes"]] == [("onnxruntime", True)]
    assert result["made"] and result["received_bytes"] == sum(w.size for w in real)
    assert any(line.get("stage") == "install" for line in lines)
    facts = wire.decode(wire.Facts, agent.call("probe"), "facts")
    assert facts.environment is not None
    assert facts.environment.requirements == ("onnxruntime>=1.19",) and facts.environment.wheels == as_sent(real)
    assert facts.soabi and facts.soabi.startswith("cpython-")
    assert not list((agent.root / "blobs").iterdir()), "the wheels lie there a second time"
    before = snapshot(agent.root)
    again, lines = provision(agent, real, requirements=("onnxruntime>=1.19",), unpacked_bytes=200_000_000)
    assert (again["made"], again["received_bytes"], again["runtimes"]) == (False, 0, result["runtimes"])
    assert snapshot(agent.root) == before, "the second provisioning changed something"
    agent.call("unprovision")
    assert not agent.root.exists()
    assert not list((tmp_path / "home").rglob("*")), "pip left something outside the agent's folder"


def test_it_grows_by_what_is_added_alone(agent: AgentProcess, pip: FoundWheel, tmp_path: Path) -> None:
    script = {"one/__init__.py": "x = 1", "one-1.dist-info/entry_points.txt": "[console_scripts]\none = one:main\n"}
    first = make_wheel(tmp_path / "w", "one-1-py3-none-any.whl", files=script)
    second = make_wheel(tmp_path / "w", "two-1-py3-none-any.whl", files={"two.py": "y = 2"})
    provision(agent, [pip, first])
    was = os.path.realpath(agent.root / "venv")
    result, _ = provision(agent, [pip, first, second])
    assert result["received_bytes"] == pip.size + second.size
    now = os.path.realpath(agent.root / "venv")
    assert now != was and run_in(agent, "import one, two; print(one.x + two.y)") == "3"
    one = next(Path(now).glob("lib/*/site-packages/one/__init__.py"))
    assert one.stat().st_ino == next(Path(was).glob("lib/*/site-packages/one/__init__.py")).stat().st_ino
    script_text = (Path(now) / "bin" / "one").read_text()
    assert now in script_text and was not in script_text
    assert not list(Path(was).glob("lib/*/site-packages/two*")), "the environment in use was changed under its applications"
    provision(agent, [pip, second])
    assert run_in(agent, "import importlib.util as u; print(u.find_spec('one'))") == "None"
    assert len(list((agent.root / "venvs").iterdir())) == 2, "the one in use and the one before it"


GC_FIRST = """
import json, os, subprocess
real = subprocess.Popen
def popen(argv, *args, **kwargs):
    if list(argv[1:3]) == ["-m", "venv"]:
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        real(json.loads(os.environ["EDGEVIT_TEST_GC"]), env=env, stdout=subprocess.DEVNULL).wait()
    return real(argv, *args, **kwargs)
subprocess.Popen = popen
"""


def test_garbage_collected_meanwhile_takes_no_wheel_away(agent: AgentProcess, pip: FoundWheel, tmp_path: Path) -> None:
    """A deployment with --prune, or the daemon over its quota, while the environment is being made."""
    (tmp_path / "sitecustomize.py").write_text(GC_FIRST)
    env = {**(agent.env or {}), "PYTHONPATH": str(tmp_path), "EDGEVIT_TEST_GC": json.dumps(agent.argv("gc"))}
    made = make_wheel(tmp_path / "w", "one-1-py3-none-any.whl", files={"one/__init__.py": "x = 1"})
    provision(dataclasses.replace(agent, env=env), [pip, made])
    assert run_in(agent, "import one; print(one.x)") == "1"
    assert not list((agent.root / "blobs").iterdir()), "nothing was collected, so nothing was tested"


def test_an_environment_without_packages_in_place_of_an_older_agent_s_folder(agent: AgentProcess) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(agent.root / "venv")], check=True)
    result, _ = provision(agent)
    assert result["runtimes"] == [] and "no-numpy" in result["absent"]["onnxruntime"]
    assert (agent.root / "venv").is_symlink() and not list(agent.root.glob(".tmp-*"))
    facts = agent.call("probe")
    assert facts["environment"]["wheels"] == []
    assert facts["numpy"] is None and facts["runtime_python"].startswith("3."), "the agent's own Python was used instead"
    # One that was finished just before a kill is taken as it is.
    (agent.root / "venv").unlink()
    assert not provision(agent)[0]["made"] and (agent.root / "venv" / "bin" / "python").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"interpreter": "/opt/python3.9"}, "made by /opt/python3.9"),
        ({"environment": {"python": "3.4.0"}}, "missing"),
        ({"environment": {"requirements": [], "system_site": False, "python": "3.4.0", "wheels": []}}, "made for Python 3.4.0"),
        (None, "did not finish"),
    ],
    ids=("interpreter", "damaged", "version", "unfinished"),
)
def test_an_environment_that_is_not_this_python_s_does_not_count(
    change: dict[str, Any] | None, reason: str, tmp_path: Path
) -> None:
    environment = wire.Environment((), False, version_text(), ())
    python_of(tmp_path).parent.mkdir()
    python_of(tmp_path).touch()
    (tmp_path / MARK).write_bytes(make_mark(environment))
    assert read_mark(Store(tmp_path), tmp_path) == (environment, "")
    if change is None:
        (tmp_path / MARK).unlink()
    else:
        (tmp_path / MARK).write_text(json.dumps({**json.loads(make_mark(environment)), **change}))
    found, why = read_mark(Store(tmp_path), tmp_path)
    assert found is None and reason in why


# ---- broken off ------------------------------------------------------------------------------------------------------


def test_what_arrived_before_a_kill_is_not_sent_again(agent: AgentProcess, pip: FoundWheel) -> None:
    half = pip.size // 2
    provision(agent, [pip], stop_after=half)
    (part,) = (agent.root / "blobs").glob("*.part")
    assert 0 < part.stat().st_size <= half
    kept = part.stat().st_size
    assert provision(agent, [pip])[0]["received_bytes"] == pip.size - kept


def test_killed_while_it_installs_it_leaves_the_one_in_use_alone_and_goes_on(
    agent: AgentProcess, pip: FoundWheel, tmp_path: Path
) -> None:
    first = make_wheel(tmp_path / "w", "one-1-py3-none-any.whl", files={"one.py": "x = 1"})
    provision(agent, [pip, first])
    many = make_wheel(tmp_path / "w", "two-1-py3-none-any.whl", files={f"two/m{i}.py": "" for i in range(1500)})
    process = agent.start("provision")
    assert process.stdin and process.stdout
    process.stdin.write(wire.dumps(wire.EnvironmentRequest((), False, as_sent([pip, many]), 0)))
    process.stdin.flush()
    for raw in process.stdout:
        message = json.loads(raw)
        if message["type"] == "need":
            by_digest = {w.sha256: w.path for w in (pip, many)}
            process.stdin.write(b"".join(by_digest[n["sha256"]].read_bytes() for n in message["blobs"]))
            process.stdin.flush()
        if message.get("stage") == "install" and "Installing" in message["text"]:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run_in(agent, "import one; print(one.x)") == "1"
    result, _ = provision(agent, [pip, many])
    assert result["made"] and result["received_bytes"] == 0, "wheels that were there were sent again"
    assert run_in(agent, "import two.m1499; print(2)") == "2"


def test_nothing_is_built_under_a_running_job(agent: AgentProcess) -> None:
    agent.call("probe")
    Store(agent.root).create()
    lock = Store(agent.root).try_lock_server()
    assert lock is not None
    try:
        with pytest.raises(AgentRefused) as caught:
            provision(agent)
        assert caught.value.code == "busy"
    finally:
        os.close(lock)


def test_nothing_is_taken_away_under_a_running_job_and_no_daemon_ended(
    agent: AgentProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job may be the daemon's own, and another operator's: stopping the unit would end it before anyone is refused."""
    stopped: list[Store] = []
    monkeypatch.setattr("device_agents.provision.remove_daemon", stopped.append)
    store, sink = Store(agent.root), os.open(os.devnull, os.O_RDWR)
    store.create()
    lock = store.try_lock_server()
    try:
        with pytest.raises(Refused, match="a job is being measured"):
            unprovision(store, Console(sink, sink))
        assert lock is not None and not stopped and agent.root.exists()
        os.close(lock)
        assert unprovision(store, Console(sink, sink)) == {"removed": True} and stopped == [store]
    finally:
        os.close(sink)


def test_a_step_that_hangs_in_silence_is_ended() -> None:
    sink = os.open(os.devnull, os.O_RDWR)
    began = time.monotonic()
    try:
        with pytest.raises(Refused, match="took over 1 s, in silence"):
            _run_step(["sh", "-c", "sleep 60 & sleep 60"], Console(sink, sink), "install", "no-runtime", 1.0)
    finally:
        os.close(sink)
    assert time.monotonic() - began < 30


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_a_runtime_that_does_not_work_changes_nothing(agent: AgentProcess, pip: FoundWheel, tmp_path: Path) -> None:
    good = make_wheel(tmp_path / "w", "one-1-py3-none-any.whl", files={"one.py": "x = 1"})
    provision(agent, [pip, good])
    broken = make_wheel(tmp_path / "w", "onnxruntime-9-py3-none-any.whl", files={"onnxruntime.py": "1/0"})
    numpy = make_wheel(tmp_path / "w", "numpy-9-py3-none-any.whl", files={"numpy.py": "__version__ = '9.0'"})
    with pytest.raises(AgentRefused) as caught:
        provision(agent, [pip, broken, numpy])
    assert caught.value.code == "no-runtime" and "nothing was changed" in caught.value.message
    assert "ZeroDivisionError" in caught.value.message
    assert run_in(agent, "import one; print(one.x)") == "1"
    assert len(list((agent.root / "venvs").iterdir())) == 1, "what failed lies there still"


def test_the_board_s_own_runtime_must_go_on_working(agent: AgentProcess) -> None:
    with pytest.raises(AgentRefused, match="onnxruntime/CUDAExecutionProvider passed no inference") as caught:
        provision(agent, keep=("onnxruntime/CUDAExecutionProvider",))
    assert caught.value.code == "no-runtime" and not (agent.root / "venv").exists()


@pytest.fixture
def vendor(tmp_path: Path) -> Iterator[AgentProcess]:
    """A device whose system has numpy and onnxruntime already, outside every environment."""
    base = Path(sys.base_prefix) / "bin" / "python{}.{}".format(*sys.version_info[:2])
    site = tmp_path / "system" / "lib" / base.name / "site-packages"
    site.mkdir(parents=True)
    for name in ("numpy", "onnxruntime", "flatbuffers", "google", "packaging"):
        for path in Path(next(p for p in sys.path if p.endswith("site-packages"))).glob(f"{name}*"):
            (site / path.name).symlink_to(path)
    env = {**HOSTILE, "PYTHONUSERBASE": str(tmp_path / "system"), "PYTHONDONTWRITEBYTECODE": "1"}
    yield AgentProcess(tmp_path / "root", str(base), env).upload()


def test_a_vendor_s_runtime_keeps_the_numpy_it_was_built_for(vendor: AgentProcess, pip: FoundWheel, tmp_path: Path) -> None:
    facts = wire.decode(wire.Facts, vendor.call("probe"), "facts")
    assert facts.numpy and [r.runtime for r in facts.runtimes] == ["onnxruntime"], facts.absent
    extra = make_wheel(tmp_path / "w", "one-1-py3-none-any.whl", files={"one.py": "x = 1"})
    keep = ("onnxruntime/CPUExecutionProvider",)
    result, _ = provision(vendor, [pip, extra], system_site=True, keep=keep)
    assert result["runtimes"][0]["runtime"] == "onnxruntime"
    after = wire.decode(wire.Facts, vendor.call("probe"), "facts")
    assert (after.numpy, after.runtimes) == (facts.numpy, facts.runtimes)
    assert not list((vendor.root / "venv").glob("lib/*/site-packages/numpy*")), "numpy was installed over the system's"
    other = make_wheel(tmp_path / "w", "numpy-9-py3-none-any.whl", files={"numpy.py": "__version__ = '9.0'"})
    with pytest.raises(AgentRefused, match="nothing was changed"):
        provision(vendor, [pip, extra, other], system_site=True, keep=keep)
    assert wire.decode(wire.Facts, vendor.call("probe"), "facts").numpy == facts.numpy


@pytest.mark.parametrize(
    "name",
    [
        "../x-1-py3-none-any.whl",
        "/tmp/x-1-py3-none-any.whl",
        "x-1-py3-none-any",
        "x.whl",
        "a\n-1-py3-none-any.whl",
        "..-1-a-b-c.whl",
        "",
    ],
)
def test_a_name_that_is_no_wheel_s_is_refused(agent: AgentProcess, name: str) -> None:
    wheel = {"name": name, "sha256": "0" * 64, "size": 1}
    request = {"requirements": [], "system_site": False, "wheels": [wheel], "unpacked_bytes": 0}
    with pytest.raises(AgentRefused) as caught:
        agent.call("provision", stdin=request)
    assert caught.value.code == "bad-request" and not (agent.root / "venvs").exists()


def wheel(name: str = "x-1-py3-none-any.whl") -> dict[str, Any]:
    return {"name": name, "sha256": "0" * 64, "size": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"wheels": [wheel()]},
        {"wheels": [wheel(), wheel("X-2-py3-none-any.whl"), wheel("pip-1-py3-none-any.whl")]},
        {"wheels": [{**wheel("pip-1-py3-none-any.whl"), "size": 0}]},
        {"unpacked_bytes": -1},
        {"keep": ["--index-url"]},
        {"system_site": "yes"},
        {"index_url": "http://x"},
        {"requirements": ["x" * 401]},
    ],
    ids=lambda value: ",".join(value),
)
def test_a_request_out_of_bounds_is_refused(changes: dict[str, Any]) -> None:
    request = {"requirements": [], "system_site": False, "wheels": [], "unpacked_bytes": 0, **changes}
    with pytest.raises(Refused) as caught:
        parse_request(json.dumps(request).encode())
    assert caught.value.code == "bad-request"


def test_other_bytes_than_announced_are_refused(agent: AgentProcess, pip: FoundWheel, tmp_path: Path) -> None:
    from dataclasses import replace

    other = tmp_path / "other.whl"
    other.write_bytes(b"x" * pip.size)
    with pytest.raises(AgentRefused) as caught:
        provision(agent, [replace(pip, path=other)])
    assert caught.value.code == "digest-mismatch" and not list((agent.root / "blobs").iterdir())


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(agent: AgentProcess, pip: FoundWheel) -> None:
    with pytest.raises(AgentRefused) as caught:
        provision(agent, [pip], unpacked_bytes=10**12)
    assert caught.value.code == "no-space" and "the environment needs 1,000,0" in caught.value.message
    assert not list((agent.root / "blobs").iterdir())


def test_a_wheel_that_reaches_out_of_the_environment_is_refused(agent: AgentProcess, pip: FoundWheel, tmp_path: Path) -> None:
    evil = make_wheel(tmp_path / "w", "evil-1-py3-none-any.whl", files={"../../../../../../evil.txt": "x"})
    with pytest.raises(AgentRefused) as caught:
        provision(agent, [pip, evil])
    assert caught.value.code == "no-runtime" and "evil" in caught.value.message
    assert not list(tmp_path.rglob("evil.txt")) and not (agent.root / "venv").exists()
