"""Logging in to a real sshd: keys, passphrases, the SSH agent, passwords, jump hosts; and what is said when nothing helps."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edgevit.errors import HostKeyError, LoginError, LostLink, Unreachable, UsageError
from edgevit.loopback_sshd import LoopbackSshd, make_key
from edgevit.transport.hostkeypolicy import HostKeyPolicy
from edgevit.transport.hostkeys import parse_key, pin
from edgevit.transport.prompts import NoPrompts
from edgevit.transport.ssh import SshTransport
from edgevit.transport.sshconfig import SshSettings, resolve
from tests.sshd.conftest import isolated
from tests.support.sshd import PASSWORD, Account, Scripted, running_sshd
from tests.support.waiting import wait_for


def whoami(settings: SshSettings, policy: HostKeyPolicy, prompts: object = None) -> str:
    transport = SshTransport.connect("box", settings, policy, prompts or NoPrompts())  # type: ignore[arg-type]
    try:
        return transport.open(["id", "-un"]).read_line(10).decode()
    finally:
        transport.close()


def test_an_ordinary_account_is_logged_in_with_its_key(settings: SshSettings, policy: HostKeyPolicy, account: Account) -> None:
    assert whoami(settings, policy) == account.name
    if os.getuid() == 0:
        assert account.name != "root"


def test_no_accepted_key_is_a_login_error_that_names_what_was_tried(
    settings: SshSettings, policy: HostKeyPolicy, tmp_path: Path
) -> None:
    stranger = tmp_path / "stranger"
    make_key(stranger)
    with pytest.raises(LoginError) as caught:
        whoami(replace(settings, identity_files=(stranger,)), policy, Scripted(secrets=["never typed"]))
    said = str(caught.value)
    assert str(stranger) in said
    assert parse_key(stranger.with_name("stranger.pub").read_text()).fingerprint in said
    assert "never typed" not in said


def test_too_many_keys_end_in_a_login_error(settings: SshSettings, policy: HostKeyPolicy, tmp_path: Path) -> None:
    keys = [tmp_path / f"key{i}" for i in range(8)]
    for key in keys:
        make_key(key)
    with pytest.raises(LoginError, match="key5"):
        whoami(replace(settings, identity_files=tuple(keys), chosen_key=False), policy)


def test_a_locked_key_is_opened_with_a_passphrase_that_is_asked_for(
    settings: SshSettings, policy: HostKeyPolicy, server: LoopbackSshd, account: Account, tmp_path: Path
) -> None:
    locked = tmp_path / "locked"
    locked.write_bytes(server.client_key.read_bytes())
    locked.chmod(0o600)
    subprocess.run(
        ["ssh-keygen", "-p", "-q", "-P", "", "-N", "open sesame", "-f", str(locked)], check=True, capture_output=True
    )
    person = Scripted(secrets=["wrong one", "open sesame"])
    assert whoami(replace(settings, identity_files=(locked,)), policy, person) == account.name
    assert len(person.asked) == 2
    with pytest.raises(LoginError, match="locked by a passphrase"):
        whoami(replace(settings, identity_files=(locked,)), policy)


def test_keys_of_the_ssh_agent_are_used(
    settings: SshSettings, policy: HostKeyPolicy, server: LoopbackSshd, account: Account, tmp_path: Path
) -> None:
    path = tmp_path / "a"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL)
    try:
        wait_for(path.exists, "an SSH agent that listens", 10)
        env = dict(os.environ, SSH_AUTH_SOCK=str(path))
        subprocess.run(["ssh-add", "-q", str(server.client_key)], env=env, check=True, capture_output=True)
        with_agent = replace(settings, identity_files=(), chosen_key=False, identity_agent=str(path))
        assert whoami(with_agent, policy) == account.name
    finally:
        agent.terminate()
        agent.wait()


def test_a_damaged_key_file_is_named(settings: SshSettings, policy: HostKeyPolicy, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n")
    with pytest.raises(LoginError, match=re.escape(str(bad))):
        whoami(replace(settings, identity_files=(bad,)), policy)


@pytest.fixture(scope="module")
def password_server(account: Account) -> Iterator[LoopbackSshd]:
    if not account.ordinary:
        pytest.skip("an account with a known password can be made only by root")
    with running_sshd(account, extra="PasswordAuthentication yes\nPubkeyAuthentication no") as running:
        yield running


def password_settings(server: LoopbackSshd, account: Account) -> tuple[SshSettings, HostKeyPolicy]:
    settings = isolated(resolve("127.0.0.1", user=account.name, port=server.port, key=str(server.client_key)))
    return settings, HostKeyPolicy(server.folder / "pins", server.fingerprint)


def test_a_typed_password_lets_in_and_is_stored_nowhere(password_server: LoopbackSshd, account: Account) -> None:
    settings, policy = password_settings(password_server, account)
    person = Scripted(secrets=[PASSWORD])
    assert whoami(settings, policy, person) == account.name
    assert person.asked == [f"Password for {account.name}@127.0.0.1"]
    home = Path(os.environ["EDGEVIT_HOME"])
    kept = [p for folder in (home, password_server.folder) for p in folder.rglob("*") if p.is_file()]
    assert not [p for p in kept if PASSWORD.encode() in p.read_bytes()]


def test_a_wrong_password_is_a_login_error_without_the_secret(password_server: LoopbackSshd, account: Account) -> None:
    settings, policy = password_settings(password_server, account)
    with pytest.raises(LoginError, match="password") as caught:
        whoami(settings, policy, Scripted(secrets=["hunter2-wrong"]))
    assert "hunter2" not in str(caught.value)


def test_a_password_that_the_configuration_forbids_is_not_asked_for(password_server: LoopbackSshd, account: Account) -> None:
    settings, policy = password_settings(password_server, account)
    person = Scripted(secrets=[PASSWORD])
    with pytest.raises(LoginError):
        whoami(replace(settings, password_allowed=False), policy, person)
    assert person.asked == []


@pytest.fixture(scope="module")
def jump_server(account: Account) -> Iterator[LoopbackSshd]:
    with running_sshd(account) as running:
        yield running


def through(jump: LoopbackSshd, settings: SshSettings, account: Account, tmp_path: Path) -> SshSettings:
    """Settings that lead through ``jump``, for which the person's ssh has a key in a configuration of its own."""
    return replace(settings, jump=f"{account.name}@127.0.0.1:{jump.port}")


@pytest.fixture
def agent_with_keys(
    server: LoopbackSshd, jump_server: LoopbackSshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    path = tmp_path / "b"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL)
    try:
        wait_for(path.exists, "an SSH agent that listens", 10)
        monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
        subprocess.run(["ssh-add", "-q", str(jump_server.client_key)], check=True, capture_output=True)
        yield
    finally:
        agent.terminate()
        agent.wait()


@pytest.mark.usefixtures("agent_with_keys")
def test_a_jump_host_is_gone_through_and_its_key_is_checked_too(
    settings: SshSettings, policy: HostKeyPolicy, jump_server: LoopbackSshd, account: Account, tmp_path: Path
) -> None:
    there = through(jump_server, settings, account, tmp_path)
    with pytest.raises(HostKeyError, match="jump host") as caught:
        whoami(there, policy)
    assert jump_server.fingerprint in str(caught.value)
    assert caught.value.hint.startswith(f"ssh -p {jump_server.port} {account.name}@127.0.0.1 once"), "no target has its name"
    pin(policy.pins, "127.0.0.1", jump_server.port, parse_key(jump_server.known_hosts_line.split(" ", 1)[1]))
    assert whoami(there, policy) == account.name
    transport = SshTransport.connect("box", there, policy, NoPrompts())
    channel = transport.open(["sleep", "600"])
    assert jump_server.kill_connections() > 0
    with pytest.raises(LostLink):
        channel.read_line(60)
    transport.close()


@pytest.mark.usefixtures("agent_with_keys")
def test_a_host_that_the_jump_host_cannot_reach_is_unreachable(
    settings: SshSettings, policy: HostKeyPolicy, jump_server: LoopbackSshd, account: Account, tmp_path: Path
) -> None:
    pin(policy.pins, "127.0.0.1", jump_server.port, parse_key(jump_server.known_hosts_line.split(" ", 1)[1]))
    with pytest.raises(Unreachable, match="through"):
        whoami(replace(through(jump_server, settings, account, tmp_path), port=free_port()), policy)


def test_a_proxy_command_carries_the_connection(settings: SshSettings, policy: HostKeyPolicy, account: Account) -> None:
    import sys

    program = (
        "import os,select,socket,sys;s=socket.create_connection(('127.0.0.1',int(sys.argv[1])))\n"
        "while 1:\n r=select.select([0,s],[],[])[0]\n"
        " if s in r:\n  d=s.recv(65536)\n  if not d: break\n  os.write(1,d)\n"
        " if 0 in r:\n  d=os.read(0,65536)\n  if not d: break\n  s.sendall(d)\n"
    )
    script = Path(os.environ["EDGEVIT_HOME"]).parent / "proxy.py"
    script.write_text(program)
    assert whoami(replace(settings, proxy_command=f"{sys.executable} {script} {settings.port}"), policy) == account.name


def test_a_listener_that_never_says_anything_is_unreachable_in_time(settings: SshSettings, policy: HostKeyPolicy) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        silent = replace(settings, port=listener.getsockname()[1], connect_timeout_s=1.0)
        started = time.monotonic()
        with pytest.raises(Unreachable):
            whoami(silent, policy)
        assert time.monotonic() - started < 8


def test_what_is_not_ssh_is_unreachable(settings: SshSettings, policy: HostKeyPolicy) -> None:
    import threading

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def answer() -> None:
            one, _ = listener.accept()
            with one:
                one.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(Unreachable):
            whoami(replace(settings, port=listener.getsockname()[1], connect_timeout_s=2.0), policy)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_a_closed_port_and_an_unknown_name_are_unreachable(settings: SshSettings, policy: HostKeyPolicy) -> None:
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1"):
        whoami(replace(settings, port=free_port()), policy)
    with pytest.raises(Unreachable, match="not found"):
        whoami(replace(settings, hostname="no-such-host.invalid"), policy)


def test_a_configuration_that_allows_no_common_cipher_says_so(settings: SshSettings, policy: HostKeyPolicy) -> None:
    with pytest.raises(UsageError, match="cipher"):
        whoami(replace(settings, ciphers=("chacha20-poly1305@openssh.com",)), policy)
