"""A device that vanishes in the middle of an upload is given up within the deadline, and taken up again where it stopped."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edgevit import signing
from edgevit.bundle import Bundle
from edgevit.errors import LostLink
from edgevit.fleet.agent import Agent
from edgevit.loopback_sshd import LoopbackSshd
from edgevit.progress import Quiet
from edgevit.transport import sockets, ssh_connect, ssh_connection
from edgevit.transport.hostkeypolicy import HostKeyPolicy
from edgevit.transport.hostkeys import parse_key, pin
from edgevit.transport.prompts import NoPrompts
from edgevit.transport.ssh import SshTransport
from edgevit.transport.sshconfig import SshSettings, resolve
from tests.sshd.conftest import isolated
from tests.support.bundles import make_bundle
from tests.support.fleet import namespaces_absent, running_device
from tests.support.relay import Relay
from tests.support.sshd import Account, running_sshd
from tests.support.waiting import wait_for

BIG = 24_000_000
RATE_MBIT = BIG * 8e-6 / 3.0
"""Three seconds for the whole: progress is told ten times a second, and an upload that is over sooner is never cut."""


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_connection, "ALIVE_DEADLINE_S", 2.0)
    monkeypatch.setattr(ssh_connection, "ALIVE_INTERVAL_S", 0.3)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return signing.make_key(tmp_path / "signing_key", "tester")


@pytest.fixture
def bundle(tmp_path: Path, key: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", key, model_bytes=BIG)


@pytest.fixture
def relay(server: LoopbackSshd) -> Iterator[Relay]:
    with Relay(("127.0.0.1", server.port)) as made:
        yield made


class Once(Quiet):
    """Does something once when so many bytes are under way."""

    def __init__(self, act: object, after: float = 5e6) -> None:
        self._act, self._after, self.at = act, after, 0.0

    def advance(self, key: str, done: float, text: str = "") -> None:
        if not self.at and done > self._after:
            self.at = time.monotonic()
            self._act()  # type: ignore[operator]


def agent_over(settings: SshSettings, policy: HostKeyPolicy, account: Account) -> Agent:
    # A ServerAliveInterval against a sleepy NAT, as many have one for all hosts, must not put the deadline off.
    transport = SshTransport.connect("box", replace(settings, alive_interval_s=300.0), policy, NoPrompts())
    agent = Agent(transport, account.python, str(account.home / "vanishing"))
    agent.max_rate_mbit = RATE_MBIT
    return agent


def give_up_and_resume(
    settings: SshSettings, policy: HostKeyPolicy, account: Account, relay: Relay, bundle: Bundle, key: Path
) -> None:
    total = sum(blob.size for blob in bundle.manifest.blobs())
    agent = agent_over(settings, policy, account)
    agent.allow([signing.allowed_signers_line("tester", signing.public_line(key))])
    silence = Once(relay.fall_silent)
    # Of the device itself, and not of a jump host that still answers.
    with pytest.raises(LostLink, match="box: the connection was lost: nothing was heard"):
        agent.install(bundle, silence)
    assert 1.5 < time.monotonic() - silence.at < 15
    agent.close()
    relay.speak()
    again = agent_over(settings, policy, account)
    done = again.install(bundle)
    assert done.newly and done.received_bytes < total - 1e6, "what the device held was sent again"
    again.unprovision()
    again.close()


def test_a_device_that_falls_silent_in_an_upload_is_given_up_and_resumed(
    settings: SshSettings, policy: HostKeyPolicy, account: Account, relay: Relay, bundle: Bundle, key: Path
) -> None:
    there = replace(settings, port=relay.port)
    give_up_and_resume(there, policy, account, relay, bundle, key)


@pytest.fixture
def gate(account: Account, policy: HostKeyPolicy, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackSshd]:
    """A jump host."""
    with running_sshd(account) as gate:
        pin(policy.pins, "127.0.0.1", gate.port, parse_key(gate.known_hosts_line.split(" ", 1)[1]))
        to_gate = isolated(resolve("127.0.0.1", user=account.name, port=gate.port, key=str(gate.client_key)))
        monkeypatch.setattr(ssh_connect, "resolve", lambda *_args, **_options: to_gate)
        yield gate


def behind(gate: LoopbackSshd, settings: SshSettings, account: Account, port: int) -> SshSettings:
    return replace(settings, port=port, jump=f"{account.name}@127.0.0.1:{gate.port}")


def test_so_it_is_behind_a_jump_host_that_still_answers(
    gate: LoopbackSshd,
    settings: SshSettings,
    policy: HostKeyPolicy,
    account: Account,
    relay: Relay,
    bundle: Bundle,
    key: Path,
) -> None:
    """There the socket is a channel of the jump host's connection, which is well: the kernel has nothing to time out."""
    give_up_and_resume(behind(gate, settings, account, relay.port), policy, account, relay, bundle, key)


def test_a_connection_over_which_others_only_send_is_asked_for(
    settings: SshSettings, policy: HostKeyPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a jump host's is, by what a device that vanished behind it is asked: nothing of that is answered."""
    monkeypatch.setattr(ssh_connection, "ALIVE_DEADLINE_S", 100.0)
    link = ssh_connect.dial("box", settings, policy, NoPrompts())
    began = time.monotonic()

    def heard_while_sending() -> bool:
        link.connection.send_ignore(8)
        return link.connection._packets.last_heard > began + 1.0

    wait_for(heard_while_sending, "a sign of life of the other side", 15)
    link.close()


def test_a_jump_host_that_is_lost_is_named(
    gate: LoopbackSshd, settings: SshSettings, policy: HostKeyPolicy, account: Account, server: LoopbackSshd, bundle: Bundle,
    key: Path,
) -> None:  # fmt: skip
    agent = agent_over(behind(gate, settings, account, server.port), policy, account)
    agent.allow([signing.allowed_signers_line("tester", signing.public_line(key))])
    with pytest.raises(LostLink, match="its jump host is lost: the connection was closed"):
        agent.install(bundle, Once(gate.kill_connections))
    agent.close()
    again = agent_over(replace(settings, port=server.port), policy, account)
    again.unprovision()
    again.close()


def test_an_unplugged_device_is_given_up_by_the_kernel(
    account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: Bundle, key: Path
) -> None:
    """Its link goes down, no packet comes back: TCP_USER_TIMEOUT ends the upload, long before the deadline of our own."""
    if namespaces_absent():
        pytest.skip(f"a link that can be unplugged needs a network namespace: {namespaces_absent()}")
    monkeypatch.setattr(ssh_connection, "ALIVE_DEADLINE_S", 300.0)
    monkeypatch.setattr(sockets, "USER_TIMEOUT_S", 2)
    with running_device(account, 90) as device:
        target, server = device.target, device.server
        settings = isolated(resolve(server.host, user=account.name, port=server.port, key=str(server.client_key)))
        agent = agent_over(settings, HostKeyPolicy(tmp_path / "pins", server.fingerprint), account)
        agent.root = target.root
        agent.allow([signing.allowed_signers_line("tester", signing.public_line(key))])
        unplug = ["ip", "-n", device.namespace, "link", "set", "eth0", "down"]
        pulled = Once(lambda: subprocess.run(unplug, check=True))
        with pytest.raises(LostLink, match=r"closed, \d+ s after the last word"):
            agent.install(bundle, pulled)
        assert 1.5 < time.monotonic() - pulled.at < 20
        agent.close()
