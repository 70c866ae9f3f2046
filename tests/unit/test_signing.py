from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from device_agents import sshsig, wire
from edgevit import signing
from edgevit.errors import UsageError


@pytest.fixture
def key(home: Path) -> Path:
    return signing.make_key(signing.default_key_path(), "test")


def test_a_made_key_is_private_and_not_overwritten(key: Path) -> None:
    assert key.stat().st_mode & 0o777 == 0o600
    before = key.read_bytes()
    with pytest.raises(UsageError, match="not overwritten"):
        signing.make_key(key, "again")
    assert key.read_bytes() == before


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_signatures_are_in_the_one_form_that_devices_accept(tmp_path: Path, kind: str) -> None:
    key = tmp_path / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", str(key)], check=True)
    signature = signing.sign(b"a manifest", key)
    parsed = sshsig.parse_signature(signature)
    assert parsed.namespace == wire.SIGNATURE_NAMESPACE
    assert parsed.fingerprint == signing.fingerprint(signing.public_line(key))
    signers = tmp_path / "signers"
    signers.write_text(signing.allowed_signers_line("ann@lab", signing.public_line(key)) + "\n")
    assert sshsig.SshKeygenChecker(signers, tmp_path)(b"a manifest", signature) == "ann@lab"


def test_the_public_half_is_read_from_the_private_file_where_pub_is_gone(key: Path) -> None:
    line = signing.public_line(key).split()[:2]
    key.with_name(key.name + ".pub").unlink()
    assert signing.public_line(key).split()[:2] == line


def test_a_pub_file_of_another_key_is_found_out(key: Path, tmp_path: Path) -> None:
    other = signing.make_key(tmp_path / "other", "other")
    shutil.copy(other.with_name("other.pub"), key.with_name(key.name + ".pub"))
    with pytest.raises(UsageError):
        signing.sign(b"x", key)


def test_a_locked_key_never_prompts_without_a_terminal(key: Path) -> None:
    subprocess.run(["ssh-keygen", "-p", "-q", "-P", "", "-N", "secret words", "-f", str(key)], check=True, capture_output=True)
    with pytest.raises(UsageError) as caught:
        signing.sign(b"x", key)
    assert "ssh-add" in caught.value.hint


def test_a_locked_key_in_the_ssh_agent_signs(key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.PIPE)
    try:
        agent.stdout.readline()  # type: ignore[union-attr]  # it prints its socket once it listens
        monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
        subprocess.run(["ssh-add", "-q", str(key)], check=True, capture_output=True)
        subprocess.run(["ssh-keygen", "-p", "-q", "-P", "", "-N", "secret", "-f", str(key)], check=True, capture_output=True)
        sshsig.parse_signature(signing.sign(b"x", key))
    finally:
        agent.terminate()
        agent.wait()


def test_without_ssh_keygen_the_package_is_named(key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="ssh-keygen is not installed") as caught:
        signing.sign(b"x", key)
    assert caught.value.hint == "sudo apt install openssh-client"


def test_an_absent_key_names_the_command_that_makes_one(home: Path) -> None:
    with pytest.raises(UsageError) as caught:
        signing.public_line(signing.default_key_path())
    assert caught.value.hint == "edgevit key make"


def test_a_place_where_no_key_can_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file/key: no key can be made there: (File exists|Not a directory)"):
        signing.make_key(tmp_path / "file" / "key", "test")


@pytest.mark.parametrize("principal", ["", "two words", "a,b", "*", 'a"b', "a\nb", "#x"])
def test_principals_that_would_change_a_signers_file_are_refused(key: Path, principal: str) -> None:
    with pytest.raises(UsageError):
        signing.allowed_signers_line(principal, signing.public_line(key))


def test_the_signers_line_is_bound_to_the_namespace(key: Path, tmp_path: Path) -> None:
    signers = tmp_path / "signers"
    signers.write_text(signing.allowed_signers_line("ann", signing.public_line(key)) + "\n")
    signed = subprocess.run(
        ["ssh-keygen", "-Y", "sign", "-n", "git", "-f", str(key)],
        input=b"x",
        capture_output=True,
        check=True,
        env=dict(os.environ),
    )
    (tmp_path / "sig").write_bytes(signed.stdout)
    argv = ["ssh-keygen", "-Y", "verify", "-f", str(signers), "-I", "ann", "-n", "git", "-s", str(tmp_path / "sig")]
    assert subprocess.run(argv, input=b"x", capture_output=True, check=False).returncode != 0
