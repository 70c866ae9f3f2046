"""Programs on a real sshd: streams, exit status, signals, floods, silence and cut links."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time

import pytest

from edgevit.errors import LostLink
from edgevit.loopback_sshd import LoopbackSshd
from edgevit.transport import ssh_connection
from edgevit.transport.hostkeypolicy import HostKeyPolicy
from edgevit.transport.prompts import NoPrompts
from edgevit.transport.ssh import SshTransport
from edgevit.transport.sshconfig import SshSettings
from tests.support.sshd import Account


def test_arguments_arrive_as_they_are(transport: SshTransport, account: Account) -> None:
    odd = ["", " ", "a b", "'", '"', "$HOME", "`id`", "*", "\\", "a\nb", "--", "ü", ";", "&&"]
    channel = transport.open([account.python, "-c", "import sys,json;print(json.dumps(sys.argv[1:]))", *odd])
    import json

    assert json.loads(channel.read_line(10)) == odd
    assert channel.read_line(10) == b""
    assert channel.wait(10) == 0


def test_bytes_arrive_whole_and_the_exit_status_comes_back(transport: SshTransport, account: Account) -> None:
    data = random.Random(7).randbytes(9_000_001)
    program = "import hashlib,sys;print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest());sys.exit(7)"
    channel = transport.open([account.python, "-c", program])
    channel.write(data)
    channel.close_input()
    assert channel.read_line(20).decode() == hashlib.sha256(data).hexdigest()
    assert channel.wait(10) == 7


def test_a_flood_on_standard_error_blocks_nothing_and_its_end_is_kept(transport: SshTransport, account: Account) -> None:
    program = "import sys\nfor i in range(3000): sys.stderr.write('x'*9999+'\\n')\nsys.stderr.write('the end')\nprint('done')"
    channel = transport.open([account.python, "-c", program])
    assert channel.read_line(20) == b"done"
    assert channel.wait(20) == 0
    assert channel.error_text().endswith("the end")
    assert len(channel.error_text()) <= 65536


def test_a_flood_on_standard_output_while_we_write_blocks_nothing(transport: SshTransport, account: Account) -> None:
    program = "import sys\nfor i in range(300): print('y'*99999)\nsys.stdout.flush()\nprint(len(sys.stdin.buffer.read()))"
    channel = transport.open([account.python, "-c", program])
    channel.write(b"z" * 8_000_000)
    channel.close_input()
    lines = [channel.read_line(20) for _ in range(301)]
    assert lines[-1] == b"8000000"


def test_a_killed_program_is_a_lost_link_that_names_the_signal(transport: SshTransport) -> None:
    channel = transport.open(["sh", "-c", "kill -9 $$"])
    with pytest.raises(LostLink, match="SIGKILL"):
        channel.wait(10)


def test_silence_is_a_lost_link(transport: SshTransport) -> None:
    channel = transport.open(["sleep", "60"])
    started = time.monotonic()
    with pytest.raises(LostLink, match="said nothing"):
        channel.read_line(0.5)
    assert time.monotonic() - started < 5
    with pytest.raises(LostLink, match="did not end"):
        channel.wait(0.3)
    channel.close()


def test_a_line_without_end_is_a_lost_link_not_a_memory_problem(transport: SshTransport, account: Account) -> None:
    program = "import sys\nwhile True: sys.stdout.write('x'*1000000)"
    channel = transport.open([account.python, "-c", program])
    with pytest.raises(LostLink, match="line of more than"):
        channel.read_line(30)
    channel.close()


def test_writing_to_a_program_that_ended_is_a_lost_link(transport: SshTransport) -> None:
    channel = transport.open(["true"])
    channel.wait(10)
    with pytest.raises(LostLink):
        for _ in range(1000):
            channel.write(b"x" * 100_000)


def test_a_missing_program_has_exit_status_127(transport: SshTransport) -> None:
    channel = transport.open(["no-such-program-here"])
    assert channel.read_line(10) == b""
    assert channel.wait(10) == 127


def test_a_killed_connection_is_a_lost_link_within_seconds(
    server: LoopbackSshd, settings: SshSettings, policy: HostKeyPolicy
) -> None:
    transport = SshTransport.connect("box", settings, policy, NoPrompts())
    channel = transport.open(["sleep", "600"])
    assert server.kill_connections() > 0
    started = time.monotonic()
    with pytest.raises(LostLink):
        channel.read_line(60)
    with pytest.raises(LostLink):
        channel.wait(60)
    with pytest.raises(LostLink):
        transport.open(["true"])
    assert time.monotonic() - started < 5
    transport.close()
    transport.close()


def test_a_peer_that_falls_silent_is_given_up_by_our_own_deadline(
    server: LoopbackSshd, settings: SshSettings, policy: HostKeyPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is stopped, not killed: its kernel still answers, so only the keep-alive deadline can tell."""
    monkeypatch.setattr(ssh_connection, "ALIVE_DEADLINE_S", 2.0)
    transport = SshTransport.connect("box", settings_with(settings, 0.3), policy, NoPrompts())
    channel = transport.open(["sleep", "600"])
    stopped = server.connections()
    for pid in stopped:
        for one in (pid, *ssh_children(pid)):
            os.kill(one, signal.SIGSTOP)
    try:
        started = time.monotonic()
        with pytest.raises(LostLink, match="nothing was heard"):
            channel.read_line(60)
        assert time.monotonic() - started < 15
    finally:
        server.kill_connections()
    transport.close()


def ssh_children(pid: int) -> list[int]:
    from edgevit.loopback_sshd import _children, _is_sshd

    return [child for child in _children(pid) if _is_sshd(child)]


def settings_with(settings: SshSettings, interval: float) -> SshSettings:
    from dataclasses import replace

    return replace(settings, alive_interval_s=interval)


def test_a_quiet_program_is_not_mistaken_for_a_silent_peer(
    settings: SshSettings, policy: HostKeyPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_connection, "ALIVE_DEADLINE_S", 1.5)
    transport = SshTransport.connect("box", settings_with(settings, 0.3), policy, NoPrompts())
    channel = transport.open(["sh", "-c", "sleep 4; echo awake"])
    assert channel.read_line(20) == b"awake"
    transport.close()


def test_aes_gcm_is_what_is_spoken(transport: SshTransport) -> None:
    assert "gcm" in transport._link.connection.local_cipher


def test_nothing_is_forwarded(transport: SshTransport) -> None:
    channel = transport.open(["sh", "-c", 'echo "[$DISPLAY$SSH_AUTH_SOCK]"'])
    assert channel.read_line(10) == b"[]"
