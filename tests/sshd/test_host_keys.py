"""Host keys against a real sshd: nothing is trusted without being asked for, and what changed is refused."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from edgevit.cli import run_cli
from edgevit.errors import HostKeyError
from edgevit.fleet.connect import pins_path
from edgevit.loopback_sshd import LoopbackSshd, make_key
from edgevit.transport.hostkeypolicy import HostKeyPolicy
from edgevit.transport.hostkeys import HostKey, fingerprint_of, load_known_hosts, parse_key, pin
from edgevit.transport.prompts import NoPrompts
from edgevit.transport.ssh import SshTransport
from edgevit.transport.ssh_connect import approve_host_key
from edgevit.transport.sshconfig import SshSettings, resolve
from tests.support.sshd import Account, Scripted, running_sshd


def connect(settings: SshSettings, policy: HostKeyPolicy, prompts: object = None) -> None:
    SshTransport.connect("box", settings, policy, prompts or NoPrompts()).close()  # type: ignore[arg-type]


def other_key(tmp_path: Path, kind: str = "ed25519") -> HostKey:
    path = tmp_path / f"other_{kind}"
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", str(path)], check=True)
    return parse_key(path.with_name(path.name + ".pub").read_text())


def test_unknown_key_is_asked_about_once_and_then_pinned(settings: SshSettings, server: LoopbackSshd, tmp_path: Path) -> None:
    policy, person = HostKeyPolicy(tmp_path / "pins"), Scripted(trusts=True)
    connect(settings, policy, person)
    assert len(person.asked) == 1
    assert server.fingerprint in person.asked[0]
    assert (tmp_path / "pins").stat().st_mode & 0o777 == 0o600
    connect(settings, policy, NoPrompts())
    assert [line.key.fingerprint for line in load_known_hosts([tmp_path / "pins"])] == [server.fingerprint]


def test_a_person_who_says_no_is_obeyed(settings: SshSettings, tmp_path: Path) -> None:
    with pytest.raises(HostKeyError, match="not approved"):
        connect(settings, HostKeyPolicy(tmp_path / "pins"), Scripted(trusts=False))
    assert not (tmp_path / "pins").exists()


def test_without_a_terminal_the_fingerprint_and_the_next_command_are_named(
    settings: SshSettings, server: LoopbackSshd, tmp_path: Path
) -> None:
    with pytest.raises(HostKeyError) as caught:
        connect(settings, HostKeyPolicy(tmp_path / "pins"))
    assert server.fingerprint in str(caught.value)
    assert caught.value.hint == f"edgevit target trust box --fingerprint {server.fingerprint}"


def test_the_given_fingerprint_is_accepted_without_asking(settings: SshSettings, policy: HostKeyPolicy) -> None:
    connect(settings, policy)


def test_another_fingerprint_than_the_given_one_is_refused_even_for_a_known_key(
    settings: SshSettings, server: LoopbackSshd, policy: HostKeyPolicy
) -> None:
    connect(settings, policy)
    wrong = fingerprint_of(b"another key")
    with pytest.raises(HostKeyError) as caught:
        connect(settings, replace(policy, fingerprint=wrong))
    assert wrong in str(caught.value)
    assert server.fingerprint in str(caught.value)


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_a_changed_key_is_refused_with_both_fingerprints(
    settings: SshSettings, server: LoopbackSshd, tmp_path: Path, kind: str
) -> None:
    """Also where the known key is of a type that the server no longer offers."""
    policy, known = HostKeyPolicy(tmp_path / "pins"), other_key(tmp_path, kind)
    pin(policy.pins, "127.0.0.1", server.port, known)
    person = Scripted(trusts=True)
    with pytest.raises(HostKeyError, match="CHANGED") as caught:
        connect(settings, policy, person)
    assert known.fingerprint in str(caught.value)
    assert server.fingerprint in str(caught.value)
    assert person.asked == []


def test_trust_replaces_a_pin_but_never_overrules_the_persons_own_file(
    settings: SshSettings, server: LoopbackSshd, tmp_path: Path
) -> None:
    policy, known = HostKeyPolicy(tmp_path / "pins", server.fingerprint, replace=True), other_key(tmp_path)
    pin(policy.pins, "127.0.0.1", server.port, known)
    assert approve_host_key("box", settings, policy, NoPrompts()) == server.fingerprint
    connect(settings, HostKeyPolicy(policy.pins))
    own = tmp_path / "known_hosts"
    pin(own, "127.0.0.1", server.port, known)
    with pytest.raises(HostKeyError, match="CHANGED") as caught:
        approve_host_key(
            "box", replace_known(settings, own), HostKeyPolicy(tmp_path / "none", server.fingerprint, True), NoPrompts()
        )
    assert "ssh-keygen -R" in caught.value.hint


def test_trust_asks_for_a_key_of_the_type_that_the_persons_own_file_has(account: Account, tmp_path: Path) -> None:
    """The server has others too, and prefers them: that is no changed key."""
    known, stale = other_key(tmp_path, "ecdsa"), other_key(tmp_path)
    with running_sshd(account, extra=f"HostKey {tmp_path / 'other_ecdsa'}") as server:
        own, pins = tmp_path / "known_hosts", tmp_path / "pins"
        pin(own, "127.0.0.1", server.port, known)
        pin(pins, "127.0.0.1", server.port, stale)
        there = resolve("127.0.0.1", user=account.name, port=server.port, key=str(server.client_key))
        settings = replace_known(there, own)
        assert approve_host_key("box", settings, HostKeyPolicy(pins, replace=True), NoPrompts()) == known.fingerprint
        connect(settings, HostKeyPolicy(pins))


def replace_known(settings: SshSettings, *files: Path) -> SshSettings:
    return replace(settings, known_hosts=files)


def test_revoked_keys_are_refused_whatever_else_is_known(
    settings: SshSettings, server: LoopbackSshd, policy: HostKeyPolicy, tmp_path: Path
) -> None:
    connect(settings, policy)
    own = tmp_path / "known_hosts"
    own.write_text(f"@revoked * {server.known_hosts_line.split(' ', 1)[1]}\n{server.known_hosts_line}\n")
    with pytest.raises(HostKeyError, match=r"@revoked"):
        connect(replace_known(settings, own), policy)


def test_revoked_host_keys_file_is_honoured(
    settings: SshSettings, server: LoopbackSshd, policy: HostKeyPolicy, tmp_path: Path
) -> None:
    listed = tmp_path / "revoked"
    listed.write_text(server.known_hosts_line.split(" ", 1)[1] + "\n")
    with pytest.raises(HostKeyError, match="revoked"):
        connect(replace(settings, revoked_keys=listed), policy)
    listed.write_text(other_key(tmp_path).line + "\n")
    connect(replace(settings, revoked_keys=listed), policy)
    krl = tmp_path / "krl"
    host_key = server.host_key.with_name(server.host_key.name + ".pub")
    subprocess.run(["ssh-keygen", "-q", "-k", "-f", str(krl), str(host_key)], check=True)
    with pytest.raises(HostKeyError, match="revoked"):
        connect(replace(settings, revoked_keys=krl), policy)
    with pytest.raises(HostKeyError, match="cannot be checked"):
        connect(replace(settings, revoked_keys=tmp_path / "absent"), policy)


def test_hashed_names_of_the_persons_own_file_are_honoured(settings: SshSettings, server: LoopbackSshd, tmp_path: Path) -> None:
    own = tmp_path / "known_hosts"
    own.write_text(server.known_hosts_line + "\n")
    subprocess.run(["ssh-keygen", "-H", "-f", str(own)], check=True, capture_output=True)
    assert own.read_text().startswith("|1|")
    connect(replace_known(settings, own), HostKeyPolicy(tmp_path / "pins"))


def test_a_second_key_type_is_no_false_alarm(account, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Known by its RSA key, the server also has the ed25519 key that would be preferred."""
    from edgevit.transport.sshconfig import resolve
    from tests.support.sshd import running_sshd

    rsa = tmp_path / "rsa"
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-N", "", "-f", str(rsa)], check=True)
    with running_sshd(account, extra=f"HostKey {rsa}") as server:
        settings = replace_known(resolve("127.0.0.1", user=account.name, port=server.port, key=str(server.client_key)))
        policy = HostKeyPolicy(tmp_path / "pins")
        pin(policy.pins, "127.0.0.1", server.port, parse_key(rsa.with_name("rsa.pub").read_text()))
        connect(settings, policy)


def test_make_key_makes_what_ssh_keygen_reads(tmp_path: Path) -> None:
    make_key(tmp_path / "key")
    said = subprocess.run(["ssh-keygen", "-lf", str(tmp_path / "key.pub")], check=True, capture_output=True, text=True).stdout
    assert parse_key((tmp_path / "key.pub").read_text()).fingerprint in said


def test_what_target_add_says_to_type_can_be_typed_before_the_target_is_in_the_fleet_file(
    server: LoopbackSshd, account: Account, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def add(*more: str) -> tuple[int, str]:
        words = ["--port", str(server.port), "--key", str(server.client_key), "--python", account.python, "--no-provision"]
        capsys.readouterr()
        where = [f"{account.name}@127.0.0.1", "--root", str(account.home / "added"), *words]
        return run_cli(["target", "add", "board", *where, *more]), capsys.readouterr().err

    vouched = ("--fingerprint", server.fingerprint)
    code, said = add()
    assert code == 3 and f"next:  the same command with {' '.join(vouched)}\n" in said
    pin(pins_path(), "127.0.0.1", server.port, other_key(tmp_path))  # of a board that had this address before
    code, said = add(*vouched)
    assert code == 3 and "has CHANGED" in said
    typed = said.partition("set up anew: ")[2].partition(", then try again")[0]
    subprocess.run(shlex.split(typed), check=True, capture_output=True)
    code, said = add(*vouched)
    shutil.rmtree(account.home / "added")
    assert code == 0, said
