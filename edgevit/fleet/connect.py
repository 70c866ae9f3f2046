"""From a target to an agent that answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgevit import places
from edgevit.fleet.agent import Agent
from edgevit.fleet.inventory import Target
from edgevit.transport.base import Transport
from edgevit.transport.prompts import Prompts


def pins_path() -> Path:
    """edgevit's own known_hosts file."""
    return places.config_dir() / "known_hosts"


def open_transport(target: Target, prompts: Prompts, fingerprint: str = "", *, replace: bool = False) -> Transport:
    """A logged-in connection to the target, or the local transport. Raises what ``SshTransport.connect`` raises."""
    if target.is_local:
        from edgevit.transport.local import LocalTransport

        return LocalTransport(target.name)
    # paramiko is imported only where a box is really spoken to.
    from edgevit.transport.hostkeypolicy import HostKeyPolicy
    from edgevit.transport.ssh import SshTransport
    from edgevit.transport.sshconfig import resolve

    settings = resolve(target.host, user=target.user, port=target.port, key=target.key, jump=target.jump)
    policy = HostKeyPolicy(pins_path(), fingerprint, replace)
    return SshTransport.connect(target.name, settings, policy, prompts)


def open_agent(target: Target, prompts: Prompts) -> Agent:
    """Connect to the agent of ``target``; the caller closes it."""
    transport = open_transport(target, prompts)
    return Agent(transport, target.python, target.root, lambda: open_agent(target, prompts))


@contextmanager
def connect(target: Target, prompts: Prompts) -> Iterator[Agent]:
    """:func:`open_agent`, closed at the end of the block."""
    agent = open_agent(target, prompts)
    try:
        yield agent
    finally:
        agent.close()


def known_fingerprints(target: Target) -> tuple[str, ...]:
    """The host keys by which this machine knows the target today, as ``SHA256:…``; none for ``local``."""
    if target.is_local:
        return ()
    from edgevit.transport.hostkeys import lines_for, load_known_hosts
    from edgevit.transport.sshconfig import resolve

    settings = resolve(target.host, user=target.user, port=target.port, key=target.key, jump=target.jump)
    known = load_known_hosts((pins_path(), *settings.known_hosts))
    found = lines_for(known, settings.known_name, settings.known_port)
    return tuple(dict.fromkeys(line.key.fingerprint for line in found))


def trust(target: Target, prompts: Prompts, fingerprint: str | None = None, *, replace: bool = False, new: bool = False) -> str:
    """Look at the target's host key, have it approved (or compare it with ``fingerprint``), pin it; returns its fingerprint.

    ``replace`` lets it take the place of another key in edgevit's own file; ``new``: the target is in no fleet file yet. Nobody
    logs in for this.
    """
    from edgevit.transport.hostkeypolicy import HostKeyPolicy
    from edgevit.transport.ssh_connect import approve_host_key
    from edgevit.transport.sshconfig import resolve

    settings = resolve(target.host, user=target.user, port=target.port, key=target.key, jump=target.jump)
    policy = HostKeyPolicy(pins_path(), fingerprint or "", replace, "new target" if new else "target")
    return approve_host_key(target.name, settings, policy, prompts)
