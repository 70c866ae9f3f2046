"""Signatures have one spelling, and only the keys allowed count. Everything through the real ssh-keygen."""

from __future__ import annotations

import base64
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from device_agents import sshsig
from device_agents.errors import Refused
from tests.support.agent_bundle import Signer, make_signer

DATA = b'{"some": "manifest"}\n'


@pytest.fixture
def check(tmp_path: Path, signer: Signer) -> Callable[[bytes, bytes], str]:
    (tmp_path / "allowed").write_text(signer.line() + "\n")
    return sshsig.SshKeygenChecker(tmp_path / "allowed", tmp_path)


def refusal(check: Callable[[bytes, bytes], str], data: bytes, signature: bytes) -> Refused:
    with pytest.raises(Refused) as caught:
        check(data, signature)
    return caught.value


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_what_ssh_keygen_writes_is_canonical_and_verifies(tmp_path: Path, kind: str) -> None:
    signer = make_signer(tmp_path, kind=kind)
    (tmp_path / "allowed").write_text(signer.line("ann") + "\n")
    assert sshsig.SshKeygenChecker(tmp_path / "allowed", tmp_path)(DATA, signer.sign(DATA)) == "ann"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["allowed", "key", "key.pub"], "a signature file was left behind"


def test_every_single_bit_flip_of_a_signature_file_is_refused(signer: Signer) -> None:
    """Armour and base64 alone, without asking ssh-keygen: what still parses must be told apart by its bytes."""
    good = signer.sign(DATA)
    parsed = sshsig.parse_signature(good)
    seen = set()
    for at in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[at] ^= 1 << bit
            try:
                other = sshsig.parse_signature(bytes(bad))
            except Refused as e:
                assert e.code == "bad-signature"
                continue
            assert other != parsed, f"flipping bit {bit} of byte {at} leaves the same signature in another spelling"
            seen.add((other.public_key, other.signature, other.hash_algorithm))
    assert len(seen) > 100, "flips inside key and signature must reach ssh-keygen"


def test_flips_that_parse_are_refused_by_ssh_keygen(signer: Signer, check: Callable[[bytes, bytes], str]) -> None:
    good = signer.sign(DATA)
    tried = 0
    for at in range(len(sshsig.BEGIN), len(good) - len(sshsig.END), 7):
        bad = bytearray(good)
        bad[at] ^= 1
        error = refusal(check, DATA, bytes(bad))
        assert error.code in ("bad-signature", "unknown-signer"), f"byte {at}: {error}"
        tried += 1
    assert tried > 30


def with_width(signature: bytes, width: int) -> bytes:
    text = b"".join(signature.splitlines()[1:-1])
    return sshsig.BEGIN + b"".join(text[i : i + width] + b"\n" for i in range(0, len(text), width)) + sshsig.END


def slack_bits(signature: bytes) -> bytes:
    """The last base64 character before the padding has bits that decode to nothing: set one."""
    lines = signature.splitlines(keepends=True)
    body = b"".join(lines[1:-1]).rstrip(b"\n")
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    at = len(body.rstrip(b"=")) - 1
    assert body.endswith(b"="), "this signature has no padding, hence no slack"
    changed = body[:at] + alphabet[alphabet.index(body[at : at + 1]) ^ 1 :][:1] + body[at + 1 :]
    assert base64.b64decode(changed.replace(b"\n", b"")) == base64.b64decode(body.replace(b"\n", b""))
    return sshsig.BEGIN + changed + b"\n" + sshsig.END


SPELLINGS: dict[str, Callable[[bytes], bytes]] = {
    "other line width": lambda s: with_width(s, 64),
    "trailing newline": lambda s: s + b"\n",
    "no trailing newline": lambda s: s[:-1],
    "trailing space in a line": lambda s: s.replace(b"\n", b" \n", 2),
    "CRLF": lambda s: s.replace(b"\n", b"\r\n"),
    "leading newline": lambda s: b"\n" + s,
    "empty line inside": lambda s: s.replace(b"\n", b"\n\n", 1),
    "empty": lambda s: b"",
    "binary": lambda s: bytes(range(256)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_another_spelling_is_refused(signer: Signer, check: Callable[[bytes, bytes], str], name: str) -> None:
    assert refusal(check, DATA, SPELLINGS[name](signer.sign(DATA))).code == "bad-signature"


def test_slack_bits_of_base64_are_refused(tmp_path: Path) -> None:
    for number in range(8):
        signature = make_signer(tmp_path, f"key{number}", "ecdsa").sign(DATA)
        if b"=" in signature:
            with pytest.raises(Refused, match="canonical"):
                sshsig.parse_signature(slack_bits(signature))
            return
    pytest.fail("no ecdsa signature of eight had base64 padding")


def test_other_data_namespace_and_signer(signer: Signer, check: Callable[[bytes, bytes], str], tmp_path: Path) -> None:
    error = refusal(check, DATA + b" ", signer.sign(DATA))
    assert error.code == "bad-signature" and "does not belong" in str(error)
    error = refusal(check, DATA, signer.sign(DATA, "git"))
    assert error.code == "bad-signature" and "git" in str(error)
    stranger = make_signer(tmp_path, "stranger")
    signature = stranger.sign(DATA)
    error = refusal(check, DATA, signature)
    assert error.code == "unknown-signer"
    assert sshsig.parse_signature(signature).fingerprint in str(error)


@pytest.mark.parametrize("option", ['namespaces="git"', 'valid-before="20200101"'])
def test_a_key_that_may_not_sign_this_is_unknown_not_bad(signer: Signer, tmp_path: Path, option: str) -> None:
    name, key = signer.line().split(" ", 1)
    (tmp_path / "allowed").write_text(f"{name} {option} {key}\n")
    assert refusal(sshsig.SshKeygenChecker(tmp_path / "allowed", tmp_path), DATA, signer.sign(DATA)).code == "unknown-signer"


@pytest.mark.parametrize("content", [None, "", "# nobody yet\n\n"])
def test_no_signers(signer: Signer, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "allowed").write_text(content)
    assert refusal(sshsig.SshKeygenChecker(tmp_path / "allowed", tmp_path), DATA, signer.sign(DATA)).code == "no-signers"


def test_an_ssh_keygen_that_is_old_or_absent(signer: Signer, tmp_path: Path) -> None:
    (tmp_path / "allowed").write_text(signer.line() + "\n")
    old = tmp_path / "old-ssh-keygen"
    old.write_text("#!/bin/sh\necho 'unknown option -- Y' >&2; echo 'usage: ssh-keygen' >&2; exit 1\n")
    old.chmod(stat.S_IRWXU)
    for program in (str(old), str(tmp_path / "absent")):
        error = refusal(sshsig.SshKeygenChecker(tmp_path / "allowed", tmp_path, program), DATA, signer.sign(DATA))
        assert error.code == "no-ssh-keygen" and "8.1" in error.hint


def test_signer_lines(signer: Signer) -> None:
    assert sshsig.parse_signer_line("  " + signer.line() + " a comment ") == signer.line() + " a comment"
    name, key = signer.line().split(" ", 1)
    sshsig.parse_signer_line(f'{name} namespaces="edgevit-bundle" {key}')
    for bad in ("", "ann", "ann ssh-ed25519", "ann ssh-ed25519 AAAA", f"ann ssh-rsa {key.split()[1]}", f"a\x00nn {key}"):
        with pytest.raises(Refused):
            sshsig.parse_signer_line(bad)
