"""Environments of the agent's own, made by the device's Python; no package index is asked here."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from device_agents.console import Console
from device_agents.errors import Refused
from device_agents.provision import _run_step
from device_agents.store import Store
from tests.support.agent_bundle import AgentProcess, AgentRefused

OFFLINE = {"PIP_NO_INDEX": "1"}


@pytest.fixture
def agent(tmp_path: Path) -> AgentProcess:
    return AgentProcess(tmp_path / "root", env=OFFLINE).upload()


def test_an_environment_is_made_once(agent: AgentProcess) -> None:
    first = agent.messages("provision", stdin=b'{"requirements":[],"system_site":false}\n')
    assert first[-1]["value"]["runtimes"] == [] and "no-numpy" in first[-1]["value"]["absent"]["onnxruntime"]
    python = agent.root / "venv" / "bin" / "python"
    made = python.lstat().st_mtime_ns
    agent.call("provision", stdin={"requirements": [], "system_site": False})
    assert python.lstat().st_mtime_ns == made, "the second provisioning built anew"
    facts = agent.call("probe")
    assert facts["numpy"] is None and facts["runtime_python"].startswith("3."), "the agent's own Python was used instead"
    agent.call("unprovision")
    assert not agent.root.exists()


def test_killed_just_before_the_end_is_made_again(agent: AgentProcess) -> None:
    """The mark is written, the other file is still there: such an environment is not used, so it must not count as made."""
    request = {"requirements": [], "system_site": False}
    agent.call("provision", stdin=request)
    (agent.root / "venv.unfinished").write_bytes(b"")
    lock = Store(agent.root).try_lock_server()
    assert lock is not None
    try:
        with pytest.raises(AgentRefused) as caught:
            agent.call("provision", stdin=request)
        assert caught.value.code == "busy", "the environment was rebuilt under a running job"
    finally:
        os.close(lock)
    agent.call("provision", stdin=request)
    assert not (agent.root / "venv.unfinished").exists()


def test_a_step_that_hangs_in_silence_is_ended() -> None:
    sink = os.open(os.devnull, os.O_RDWR)
    began = time.monotonic()
    try:
        with pytest.raises(Refused, match="took over 1 s, in silence"):
            _run_step(["sh", "-c", "sleep 60 & sleep 60"], Console(sink, sink), "install", "no-runtime", 1.0)
    finally:
        os.close(sink)
    assert time.monotonic() - began < 30


def test_a_failed_installation_leaves_nothing_in_use(agent: AgentProcess) -> None:
    with pytest.raises(AgentRefused) as caught:
        agent.call("provision", stdin={"requirements": ["numpy>=1.26,<3"], "system_site": False})
    assert caught.value.code == "no-runtime" and "numpy" in caught.value.message
    assert (agent.root / "venv.unfinished").exists()
    assert agent.call("probe", "--quick")["runtime_python"], "the probe needs an interpreter still"
    assert agent.call("provision", stdin={"requirements": [], "system_site": False})["runtimes"] == []
    assert not (agent.root / "venv.unfinished").exists()


@pytest.mark.parametrize(
    "bad", ["--index-url=http://x", "-r /etc/passwd", "numpy; import os", "a b", "git+https://x/y", "../x", ""]
)
def test_requirements_are_names_and_versions_only(agent: AgentProcess, bad: str) -> None:
    with pytest.raises(AgentRefused) as caught:
        agent.call("provision", stdin={"requirements": [bad], "system_site": False})
    assert caught.value.code == "bad-request" and not (agent.root / "venv").exists()


@pytest.mark.parametrize("good", ["numpy", "numpy>=1.26,<2", "onnxruntime==1.19.2", "ai-edge-litert~=2.1", "x[y]==1.*"])
def test_ordinary_requirements_are_understood(good: str) -> None:
    from device_agents.provision import parse_requirements

    assert parse_requirements({"requirements": [good]}) == ([good], False)
