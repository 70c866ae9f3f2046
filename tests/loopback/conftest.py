from __future__ import annotations

from pathlib import Path

import pytest

from edgevit import signing
from edgevit.cli import run_cli
from tests.support.agent_bundle import AgentProcess, Signer
from tests.support.cli import Cli, Said


@pytest.fixture
def agent(tmp_path: Path, signer: Signer) -> AgentProcess:
    """An agent of this machine with nothing on it but ``signer``'s right to sign for it."""
    agent = AgentProcess(tmp_path / "root").upload()
    agent.allow(signer)
    return agent


@pytest.fixture
def cli(home: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*argv: object) -> Said:
        code = run_cli([str(a) for a in argv])
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return call


@pytest.fixture
def operator(home: Path) -> Signer:
    """The operator's own key, in the place where the commands look for it."""
    key = signing.default_key_path()
    signing.make_key(key, "an operator")
    return Signer(key)
