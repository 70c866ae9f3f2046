from __future__ import annotations

import getpass
from pathlib import Path

import pytest

from edgevit.errors import UsageError
from edgevit.transport.sshconfig import (
    check_host,
    parse_hop,
    parse_ssh_g,
    read_without_client,
    resolve,
    settings_from,
)


def test_openssh_itself_resolves_and_what_is_explicit_wins(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("x")
    settings = resolve("box.invalid", user="pi", port=2222, key=str(key), jump="gate")
    assert (settings.hostname, settings.port, settings.user) == ("box.invalid", 2222, "pi")
    assert (settings.identity_files, settings.chosen_key, settings.jump) == ((key,), True, "gate")
    assert settings.known_hosts


def test_include_and_match_are_followed_by_openssh(tmp_path: Path) -> None:
    """The very things that paramiko's reader cannot do, through the real ssh -G."""
    import shutil
    import subprocess

    (tmp_path / "more").write_text("Host box\n  HostName 192.0.2.7\n  HostKeyAlias the-box\n")
    (tmp_path / "config").write_text(f"Include {tmp_path}/more\nMatch host 192.0.2.7 user pi\n  Port 2200\n  ProxyJump gate\n")
    ssh = shutil.which("ssh")
    assert ssh, "install openssh-client"
    said = subprocess.run(
        [ssh, "-F", str(tmp_path / "config"), "-G", "-l", "pi", "box"], check=True, capture_output=True, text=True
    )
    settings = settings_from(parse_ssh_g(said.stdout), "box", user="pi", port=None)
    assert (settings.hostname, settings.port, settings.jump) == ("192.0.2.7", 2200, "gate")
    assert (settings.known_name, settings.known_port) == ("the-box", 22)


def test_every_keyword_lands_where_it_is_used() -> None:
    text = """\
user pi
hostname 192.0.2.1
port 2222
identitiesonly yes
identityfile ~/.ssh/a
identityfile %d/b
identityagent none
userknownhostsfile /k1 /k2
globalknownhostsfile /k3
revokedhostkeys /revoked
proxycommand nc %h %p
connecttimeout 7
serveraliveinterval 3
passwordauthentication no
kbdinteractiveauthentication no
pubkeyauthentication false
ciphers aes128-ctr,aes256-ctr
addressfamily inet
"""
    settings = settings_from(parse_ssh_g(text), "box", user=None, port=None)
    assert settings.identity_files == (Path.home() / ".ssh/a", Path.home() / "b")
    assert settings.known_hosts == (Path("/k1"), Path("/k2"), Path("/k3"))
    assert settings.revoked_keys == Path("/revoked")
    assert settings.proxy_command == "nc 192.0.2.1 2222"
    assert (settings.connect_timeout_s, settings.alive_interval_s) == (7.0, 3.0)
    assert settings.identities_only
    assert settings.identity_agent == "none"
    assert not settings.password_allowed
    assert not settings.public_key_allowed
    assert settings.ciphers == ("aes128-ctr", "aes256-ctr")
    assert settings.address_family == "inet"


def test_what_cannot_be_followed_is_an_error() -> None:
    with pytest.raises(UsageError, match="KnownHostsCommand"):
        settings_from({"knownhostscommand": ["/bin/x"]}, "box", user=None, port=None)
    with pytest.raises(UsageError, match="%Z"):
        settings_from({"proxycommand": ["x %Z"]}, "box", user=None, port=None)


def test_without_a_client_the_files_are_read_by_paramiko(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("Host box\n  HostName 192.0.2.9\n  User pi\n  IdentityFile /k\n  ForwardAgent yes\nHost *\n  Port=2022\n")
    settings = settings_from(read_without_client("box", [config]), "box", user=None, port=None)
    assert (settings.hostname, settings.user, settings.port) == ("192.0.2.9", "pi", 2022)
    assert settings.identity_files == (Path("/k"),)
    nothing = settings_from(read_without_client("box", [tmp_path / "absent"]), "box", user=None, port=None)
    assert (nothing.hostname, nothing.user, nothing.port) == ("box", getpass.getuser(), 22)
    assert Path.home() / ".ssh/known_hosts" in nothing.known_hosts


@pytest.mark.parametrize(
    "line",
    ["Include other", "Match exec true", "Match tagged x", "KnownHostsCommand x", "RevokedHostKeys /x",
     "Ciphers aes128-ctr", "HostKeyAlgorithms ssh-rsa", "IdentityAgent $SOCK", "PKCS11Provider x", "CertificateFile x",
     "Nonsense yes", "include=other"],
)  # fmt: skip
def test_without_a_client_a_keyword_that_is_not_implemented_is_an_error_with_its_line(tmp_path: Path, line: str) -> None:
    config = tmp_path / "config"
    config.write_text(f"# a comment\nHost *\n  User pi\n{line}\n")
    with pytest.raises(UsageError, match=r"config:4: ") as caught:
        read_without_client("box", [config])
    assert caught.value.hint == "sudo apt install openssh-client"


@pytest.mark.parametrize("host", ["", "-oProxyCommand=x", "a b", "a;b", "$(x)", "a\nb", "x" * 300, "../x"])
def test_hosts_that_could_be_options_or_shell_text_are_refused(host: str) -> None:
    with pytest.raises(UsageError):
        check_host(host)


@pytest.mark.parametrize("user", ["-x", "a b", "", "a;b"])
def test_odd_users_are_refused(user: str) -> None:
    with pytest.raises(UsageError):
        resolve("box", user=user)


@pytest.mark.parametrize(
    ("text", "hop"),
    [
        ("gate", (None, "gate", None)),
        ("me@gate:2222", ("me", "gate", 2222)),
        ("ssh://me@gate:22", ("me", "gate", 22)),
        ("me@[fe80::1]:22", ("me", "fe80::1", 22)),
        ("192.0.2.1", (None, "192.0.2.1", None)),
    ],
)
def test_hops(text: str, hop: tuple[str | None, str, int | None]) -> None:
    assert parse_hop(text) == hop


@pytest.mark.parametrize("text", ["", "a b", "@x", "gate:port", "-x"])
def test_odd_hops_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_hop(text)


def test_a_key_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no-key"):
        resolve("box", key=str(tmp_path / "no-key"))
