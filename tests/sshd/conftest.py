from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edgevit.fleet.inventory import Target
from edgevit.loopback_sshd import LoopbackSshd, find_sshd
from edgevit.transport.hostkeypolicy import HostKeyPolicy
from edgevit.transport.ssh import SshTransport
from edgevit.transport.sshconfig import SshSettings, resolve
from tests.support.sshd import Account, running_sshd, target_of, test_account

test_account.__test__ = False  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def account() -> Iterator[Account]:
    if find_sshd() is None:
        pytest.fail("these tests need a real OpenSSH server: sudo apt install openssh-server")
    with test_account() as made:
        yield made


@pytest.fixture(scope="session")
def server(account: Account) -> Iterator[LoopbackSshd]:
    with running_sshd(account) as running:
        yield running


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEVIT_HOME", str(tmp_path / "edgevit"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


@pytest.fixture
def settings(server: LoopbackSshd, account: Account) -> SshSettings:
    """For this server alone: the known_hosts files of whoever runs the tests do not matter."""
    return isolated(resolve("127.0.0.1", user=account.name, port=server.port, key=str(server.client_key)))


def isolated(settings: SshSettings) -> SshSettings:
    return replace(settings, known_hosts=())


@pytest.fixture
def policy(server: LoopbackSshd, tmp_path: Path) -> HostKeyPolicy:
    return HostKeyPolicy(tmp_path / "pins", server.fingerprint)


@pytest.fixture
def transport(settings: SshSettings, policy: HostKeyPolicy) -> Iterator[SshTransport]:
    from edgevit.transport.prompts import NoPrompts

    one = SshTransport.connect("box", settings, policy, NoPrompts())
    yield one
    one.close()


@pytest.fixture
def box(server: LoopbackSshd, account: Account) -> Iterator[Target]:
    """A target with an empty root, its host key trusted."""
    import shutil

    from edgevit.fleet.connect import trust
    from edgevit.transport.prompts import NoPrompts

    target = target_of(server, account)
    trust(target, NoPrompts(), server.fingerprint)
    yield target
    shutil.rmtree(target.root, ignore_errors=True)
