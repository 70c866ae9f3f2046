"""Whether to go on with the key that a host showed. Strict always: ``StrictHostKeyChecking no`` is not followed."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgevit.errors import HostKeyError
from edgevit.transport.hostkeys import (
    HostKey,
    Judgement,
    KeyStanding,
    KnownLine,
    judge,
    known_types,
    load_known_hosts,
    lookup_name,
    parse_key,
    pin,
)
from edgevit.transport.prompts import Prompts
from edgevit.transport.sshconfig import SshSettings

KRL_MAGIC = b"SSHKRL\n\0"


@dataclass(frozen=True)
class HostKeyPolicy:
    """``pins`` is edgevit's own known_hosts file. ``fingerprint`` is one that a person vouches for (``SHA256:…``).

    ``replace`` (only ``edgevit target trust``) lets an approved key take the place of another one in ``pins``;
    what the person's own known_hosts files say is never overruled. ``role`` tells what can be typed where a key is refused:
    only a target that is in the fleet file can be trusted by its name.
    """

    pins: Path
    fingerprint: str = ""
    replace: bool = False
    role: Literal["target", "new target", "jump host"] = "target"

    def known(self, settings: SshSettings) -> tuple[KnownLine, ...]:
        return load_known_hosts((self.pins, *settings.known_hosts))


def wanted_types(policy: HostKeyPolicy, settings: SshSettings) -> tuple[str, ...]:
    """The key types to negotiate: those known for the host, or () for any. Where pins are to be replaced they do not count:
    what the person's own files say does, or a key of another type than theirs would look like a changed one."""
    known = load_known_hosts(settings.known_hosts) if policy.replace else policy.known(settings)
    return known_types(known, settings.known_name, settings.known_port)


def check_host_key(name: str, settings: SshSettings, key: HostKey, policy: HostKeyPolicy, prompts: Prompts) -> None:
    """Return when ``key`` may be used (a newly approved one is pinned first); raise HostKeyError otherwise."""
    where = f"{settings.known_name} port {settings.port}"
    judgement = judge(policy.known(settings), settings.known_name, settings.known_port, key)
    if judgement.standing is KeyStanding.REVOKED:
        raise HostKeyError(
            f"{name}: {where} shows the key {key.fingerprint}, which {judgement.lines[0].where} marks as @revoked",
            hint="do not connect; give the host a new key (ssh-keygen -A there), then approve that one",
        )
    if settings.revoked_keys is not None:
        _check_revocation_list(name, settings.revoked_keys, key)
    if policy.fingerprint and policy.fingerprint != key.fingerprint:
        raise HostKeyError(
            f"{name}: {where} shows the {key.type} key {key.fingerprint}, but --fingerprint says {policy.fingerprint}",
            hint=f"read it on the device itself: ssh-keygen -lf /etc/ssh/ssh_host_{short_type(key.type)}_key.pub",
        )
    if judgement.standing is KeyStanding.KNOWN:
        if policy.replace:
            pin(policy.pins, settings.known_name, settings.known_port, key)
        return
    if judgement.standing is KeyStanding.CHANGED and not _may_replace(policy, judgement):
        raise changed(name, settings, key, judgement.lines, policy)
    _approve(name, settings, key, judgement, policy, prompts)
    pin(policy.pins, settings.known_name, settings.known_port, key)


def _may_replace(policy: HostKeyPolicy, judgement: Judgement) -> bool:
    return policy.replace and all(line.where.rpartition(":")[0] == str(policy.pins) for line in judgement.lines)


def _approve(
    name: str, settings: SshSettings, key: HostKey, judgement: Judgement, policy: HostKeyPolicy, prompts: Prompts
) -> None:
    if policy.fingerprint:
        return
    where = f"{settings.known_name} port {settings.port}"
    was = f"; until now it was {judgement.lines[0].key.fingerprint}" if judgement.lines else ""
    answer = prompts.trust_host_key(
        f"{name}: {where} shows the {key.type} key\n  {key.fingerprint}\nwhich is not known here{was}. "
        f"Compare it with the device's own:\n  ssh-keygen -lf /etc/ssh/ssh_host_{short_type(key.type)}_key.pub"
    )
    if not answer:
        why = "nobody can be asked without a terminal" if answer is None else "it was not approved"
        raise HostKeyError(
            f"{name}: the {key.type} key {key.fingerprint} of {where} is not known here{was}, and {why}",
            hint=_approval(name, settings, key, policy),
        )


def _approval(name: str, settings: SshSettings, key: HostKey, policy: HostKeyPolicy) -> str:
    """What to type to approve ``key``."""
    if policy.role == "jump host":
        return f"ssh -p {settings.port} {settings.user}@{settings.host} once: it asks, and what it keeps is believed here too"
    if policy.role == "new target":
        return f"the same command with --fingerprint {key.fingerprint}"
    return f"edgevit target trust {name} --fingerprint {key.fingerprint}"


def changed(
    name: str, settings: SshSettings, key: HostKey, lines: tuple[KnownLine, ...], policy: HostKeyPolicy
) -> HostKeyError:
    """The refusal of a changed key: both fingerprints, and which file said what."""
    known = ", ".join(f"{line.key.fingerprint} ({line.key.type}, {line.where})" for line in lines)
    files = dict.fromkeys(line.where.rpartition(":")[0] for line in lines)
    foreign = [file for file in files if file != str(policy.pins)]
    if foreign or policy.role != "target":
        own_name = lookup_name(settings.known_name, settings.known_port)
        line = shlex.join(["ssh-keygen", "-R", own_name, "-f", (foreign or [*files])[0]])
        hint = f"if the device was set up anew: {line}, then try again"
    else:
        hint = f"if the device was set up anew: {_approval(name, settings, key, policy)}"
    return HostKeyError(
        f"{name}: the host key of {settings.known_name} port {settings.port} has CHANGED: "
        f"it shows {key.fingerprint} ({key.type}), known is {known}. Someone may be listening in, or it was set up anew",
        hint=hint,
    )


def _check_revocation_list(name: str, path: Path, key: HostKey) -> None:
    """``RevokedHostKeys``: a text of public keys, or a KRL, which ssh-keygen reads. What cannot be checked is refused."""
    try:
        with path.open("rb") as f:
            is_krl = f.read(len(KRL_MAGIC)) == KRL_MAGIC
        if is_krl:
            revoked = _is_in_krl(path, key)
        else:
            lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
            revoked = any(parse_key(line).blob == key.blob for line in lines if line and not line.startswith("#"))
    except (OSError, ValueError, subprocess.SubprocessError) as e:
        raise HostKeyError(f"{name}: RevokedHostKeys {path} cannot be checked: {e}", hint=f"ls -l {path}") from e
    if revoked:
        raise HostKeyError(f"{name}: the host key {key.fingerprint} is revoked by {path}", hint=f"do not connect; see {path}")


def _is_in_krl(path: Path, key: HostKey) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        offered = Path(folder) / "key.pub"
        offered.write_text(key.line + "\n")
        argv = ["ssh-keygen", "-Q", "-f", str(path), str(offered)]
        done = subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL, timeout=30, check=False)
    # Its status is 1 for a revoked key and 255 for a list it cannot read; neither key may be used.
    return done.returncode != 0


def short_type(key_type: str) -> str:
    """``ssh-ed25519`` → ``ed25519``, as in the names of host key files."""
    return "ecdsa" if key_type.startswith("ecdsa") else key_type.removeprefix("ssh-")
