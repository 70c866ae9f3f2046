from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from edgevit.errors import UsageError
from edgevit.transport.hostkeys import (
    HostKey,
    KeyStanding,
    judge,
    known_types,
    load_known_hosts,
    lookup_name,
    parse_key,
    parse_known_hosts,
    pin,
    unpin,
)


def key(kind: str = "ssh-ed25519", tail: bytes = b"1") -> HostKey:
    return HostKey(kind, len(kind).to_bytes(4, "big") + kind.encode() + tail * 32)


ONE, TWO, RSA = key(), key(tail=b"2"), key("ssh-rsa")


def known(*lines: str) -> tuple:  # type: ignore[type-arg]
    return parse_known_hosts("\n".join(lines), "f")


@pytest.mark.parametrize(
    ("patterns", "host", "port", "matches"),
    [
        ("pi", "pi", 22, True),
        ("pi", "PI", 22, True),
        ("pi", "pix", 22, False),
        ("a,pi,b", "pi", 22, True),
        ("p?", "pi", 22, True),
        ("*.lab", "pi.lab", 22, True),
        ("*.lab,!pi.lab", "pi.lab", 22, False),
        ("[pi]:2222", "pi", 2222, True),
        ("[pi]:2222", "pi", 22, False),
        ("[pi]:*", "pi", 2222, True),
        ("p[i]", "pi", 22, False),
        ("::1", "::1", 22, True),
    ],
)
def test_names_match_as_openssh_matches_them(patterns: str, host: str, port: int, matches: bool) -> None:
    found = judge(known(f"{patterns} {ONE.line}"), host, port, ONE).standing
    assert found is (KeyStanding.KNOWN if matches else KeyStanding.UNKNOWN)


def test_hashed_names_match_what_ssh_keygen_hashed(tmp_path: Path) -> None:
    path = tmp_path / "known_hosts"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "k")], check=True)
    real = parse_key((tmp_path / "k.pub").read_text())
    path.write_text(f"pi.lab {real.line}\n[pi.lab]:2222 {real.line}\n")
    subprocess.run(["ssh-keygen", "-H", "-f", str(path)], check=True, capture_output=True)
    lines = load_known_hosts([path])
    assert len(lines) == 2
    assert judge(lines, "pi.lab", 22, real).standing is KeyStanding.KNOWN
    assert judge(lines, "pi.lab", 2222, real).standing is KeyStanding.KNOWN
    assert judge(lines, "other", 22, real).standing is KeyStanding.UNKNOWN


def test_another_key_is_changed_and_names_what_was_known() -> None:
    judgement = judge(known(f"pi {ONE.line}", f"pi {RSA.line}"), "pi", 22, TWO)
    assert judgement.standing is KeyStanding.CHANGED
    assert [line.key for line in judgement.lines] == [ONE, RSA]
    assert [line.where for line in judgement.lines] == ["f:1", "f:2"]


def test_any_of_several_known_keys_will_do() -> None:
    assert judge(known(f"pi {ONE.line}", f"pi {TWO.line}"), "pi", 22, TWO).standing is KeyStanding.KNOWN


def test_revocation_wins_over_everything() -> None:
    assert judge(known(f"pi {ONE.line}", f"@revoked * {ONE.line}"), "pi", 22, ONE).standing is KeyStanding.REVOKED
    assert judge(known(f"@revoked pi {ONE.line}"), "pi", 2222, ONE).standing is KeyStanding.REVOKED
    assert judge(known(f"pi {ONE.line}", f"@revoked other {ONE.line}"), "pi", 22, ONE).standing is KeyStanding.KNOWN
    assert judge(known(f"pi {TWO.line}", f"@revoked * {ONE.line}"), "pi", 22, TWO).standing is KeyStanding.KNOWN


def test_tabs_part_the_words_of_a_line_as_blanks_do() -> None:
    kind, text = ONE.line.split()
    assert judge(known(f"pi\t{kind}\t{text}"), "pi", 22, TWO).standing is KeyStanding.CHANGED
    assert judge(known(f"pi {ONE.line}", f"@revoked\t*\t{kind} {text}"), "pi", 22, ONE).standing is KeyStanding.REVOKED
    with pytest.raises(UsageError, match="@revoked"):
        known("@revoked\t*\tssh-ed25519 AAAA")


def test_a_certificate_authority_is_no_host_key() -> None:
    assert judge(known(f"@cert-authority * {ONE.line}"), "pi", 22, ONE).standing is KeyStanding.UNKNOWN


def test_off_port_22_the_very_same_key_of_the_plain_host_is_known_and_another_is_no_alarm() -> None:
    assert judge(known(f"pi {ONE.line}"), "pi", 2222, ONE).standing is KeyStanding.KNOWN
    assert judge(known(f"pi {ONE.line}"), "pi", 2222, TWO).standing is KeyStanding.UNKNOWN


def test_only_known_types_are_negotiated() -> None:
    assert known_types(known(f"pi {RSA.line}", f"pi {ONE.line}", f"other {TWO.line}"), "pi", 22) == ("ssh-rsa", "ssh-ed25519")
    assert known_types((), "pi", 22) == ()


def test_lines_that_cannot_be_read_are_skipped_but_never_a_revocation() -> None:
    assert (
        known("", "# x", "pi", "pi ssh-ed25519", "pi ssh-ed25519 !!!", "pi ssh-rsa " + ONE.line.split()[1], "@odd pi x y") == ()
    )
    with pytest.raises(UsageError, match=r"f:2.*@revoked"):
        known(f"pi {ONE.line}", "@revoked * ssh-ed25519 AAAA")


def test_pins_are_private_replaced_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "config" / "known_hosts"
    pin(path, "pi", 22, ONE)
    pin(path, "pi", 2222, ONE)
    pin(path, "pi", 22, TWO)
    assert path.read_text() == f"[pi]:2222 {ONE.line}\npi {TWO.line}\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert unpin(path, "pi", 22)
    assert not unpin(path, "pi", 22)
    assert path.read_text() == f"[pi]:2222 {ONE.line}\n"
    assert list(path.parent.iterdir()) == [path]


def test_openssh_reads_our_pins(tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "k")], check=True)
    real = parse_key((tmp_path / "k.pub").read_text())
    pin(tmp_path / "pins", "pi", 2222, real)
    said = subprocess.run(
        ["ssh-keygen", "-l", "-F", "[pi]:2222", "-f", str(tmp_path / "pins")], check=True, capture_output=True, text=True
    )
    assert real.fingerprint in said.stdout


def test_an_unreadable_file_is_an_error_and_an_absent_one_is_not(tmp_path: Path) -> None:
    assert load_known_hosts([tmp_path / "absent", tmp_path / "absent" / "below"]) == ()
    with pytest.raises(UsageError):
        load_known_hosts([tmp_path])


def test_lookup_names() -> None:
    assert (lookup_name("Pi", 22), lookup_name("pi", 2222)) == ("pi", "[pi]:2222")


def test_pins_written_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: pin(tmp_path / "pins", f"box{i}", 22, ONE), range(40)))
    assert len(load_known_hosts([tmp_path / "pins"])) == 40
