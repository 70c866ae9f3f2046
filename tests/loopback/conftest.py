from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.agent_bundle import AgentProcess, Signer


@pytest.fixture
def agent(tmp_path: Path, signer: Signer) -> AgentProcess:
    """An agent of this machine with nothing on it but ``signer``'s right to sign for it."""
    agent = AgentProcess(tmp_path / "root").upload()
    agent.allow(signer)
    return agent
