"""Environments of the agent's own, made by the device's Python; no package index is asked here."""

from __future__ import annotations

from pathlib import Path

import pytest

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
