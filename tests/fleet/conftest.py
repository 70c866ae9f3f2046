"""A fleet of real sshds: one a network namespace where that is allowed, plain ones elsewhere. The session says which."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgevit.fleet.connect import connect, trust
from edgevit.fleet.inventory import add_target
from edgevit.places import config_dir, fleet_path
from edgevit.plans import PLANS
from edgevit.transport.prompts import NoPrompts
from tests.support.agent_bundle import FAST_PLAN, Signer, make_signer
from tests.support.fleet import Device, Runtime, namespaces_absent, running_device
from tests.support.sshd import Account, test_account

test_account.__test__ = False  # type: ignore[attr-defined]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    why = namespaces_absent()
    how = f"plain sshds on 127.0.0.1 ({why})" if why else "one sshd per network namespace"
    terminalreporter.write_line(f"tests/fleet: {how}")


@pytest.fixture(scope="session")
def account() -> Iterator[Account]:
    with test_account() as made:
        yield made


@pytest.fixture(scope="session")
def runtime(account: Account) -> Runtime:
    return Runtime(account)


@pytest.fixture(scope="session")
def servers(account: Account) -> Iterator[list[Device]]:
    import contextlib

    with contextlib.ExitStack() as opened:
        yield [opened.enter_context(running_device(account, number)) for number in range(3)]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEVIT_HOME", str(tmp_path / "edgevit"))
    for name in ("SSH_AUTH_SOCK", "EDGEVIT_DB", "EDGEVIT_FLEET"):
        monkeypatch.delenv(name, raising=False)
    # How long is measured is no matter of these tests.
    monkeypatch.setitem(PLANS, "quick", FAST_PLAN)


@pytest.fixture
def quick_to_give_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent peer is given up after seconds, not after half a minute."""
    from edgevit.transport import sockets, ssh_connection, sshconfig

    monkeypatch.setattr(sshconfig, "CONNECT_TIMEOUT_S", 2.0)
    monkeypatch.setattr(sockets, "USER_TIMEOUT_S", 2)
    monkeypatch.setattr(ssh_connection, "ALIVE_INTERVAL_S", 0.5)
    monkeypatch.setattr(ssh_connection, "ALIVE_DEADLINE_S", 3.0)


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    """The operator's own signing key, where edgevit looks for it."""
    return make_signer(config_dir(), "signing_key")


def prepare(device: Device, runtime: Runtime, signer: Signer) -> None:
    """In the fleet file, its host key pinned, with a runtime; it believes the operator's key."""
    if runtime.problem:
        pytest.fail(f"the devices of these tests need a runtime: {runtime.problem}")
    runtime.lend(device)
    trust(device.target, NoPrompts(), device.server.fingerprint)
    add_target(fleet_path(), device.target)
    with connect(device.target, NoPrompts()) as agent:
        agent.allow([signer.line()], replace=True)


@pytest.fixture
def fleet(servers: list[Device], runtime: Runtime, signer: Signer) -> Iterator[list[Device]]:
    """Three devices, ready to measure."""
    for device in servers:
        prepare(device, runtime, signer)
    yield servers
    for device in servers:
        device.clear()


@pytest.fixture
def box(servers: list[Device], runtime: Runtime, signer: Signer) -> Iterator[Device]:
    """One device, ready to measure."""
    prepare(servers[0], runtime, signer)
    yield servers[0]
    servers[0].clear()
