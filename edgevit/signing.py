"""Signing with the SSH key a person already has: ``ssh-keygen -Y sign`` (SSHSIG, OpenSSH ≥ 8.1).

Secrets stay with ssh-keygen and the SSH agent. Without a terminal nothing is ever asked: a locked key is an error.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import subprocess
import sys
from pathlib import Path

from device_agents import sshsig, wire
from device_agents.errors import Refused
from edgevit.errors import UsageError
from edgevit.places import config_dir

TIMEOUT_S = 60.0
TYPING_TIMEOUT_S = 600.0
PRINCIPAL_FORM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,199}")


def default_key_path() -> Path:
    """edgevit's own signing key."""
    return config_dir() / "signing_key"


def default_signers_path() -> Path:
    """The keys whose bundles this operator believes, in ssh-keygen's allowed_signers format."""
    return config_dir() / "allowed_signers"


def make_key(path: Path, comment: str) -> Path:
    """A new ed25519 key without passphrase, mode 600, and ``path``.pub beside it. UsageError where either is there already."""
    try:
        for existing in (path, _public_path(path)):
            if existing.exists() or existing.is_symlink():
                raise UsageError(f"{existing} is there already; a signing key is not overwritten", hint="edgevit key show")
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as e:
        raise UsageError(f"{path}: no key can be made there: {e.strerror}", hint=f"ls -ld {path.parent}") from e
    _run(["-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)], b"", f"making the key {path}")
    path.chmod(0o600)
    return path


def public_line(key: Path) -> str:
    """``type base64 [comment]`` of a key: from the ``.pub`` beside it, else from the private file itself.

    ``key`` may also name a ``.pub`` whose private half is in the SSH agent or on a token.
    """
    for candidate in (_public_path(key), key):
        try:
            line = candidate.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError):
            continue
        if _blob(line) is not None and "\n" not in line:
            return line
    if not key.exists():
        raise UsageError(f"there is no SSH key {key}", hint="edgevit key make")
    # The type and base64 stay the same on one line whatever comment ssh-keygen puts after them.
    return _run(["-y", "-f", str(key)], b"", f"reading the public half of {key}").decode("utf-8", "replace").strip()


def fingerprint(public: str) -> str:
    """``SHA256:…`` of a public key line, as ``ssh-keygen -l`` prints it. UsageError where it is none."""
    from edgevit.transport.hostkeys import fingerprint_of

    blob = _blob(public)
    if blob is None:
        raise UsageError(f"not a public key: {public[:80]!r}", hint="edgevit key show")
    return fingerprint_of(blob)


def allowed_signers_line(principal: str, public: str) -> str:
    """One line of an allowed_signers file: ``principal`` may sign edgevit bundles with this key, and nothing else."""
    if PRINCIPAL_FORM.fullmatch(principal) is None:
        raise UsageError(f"signer: got {principal[:80]!r}, expected letters, digits and . _ @ + - (such as ann@lab)")
    if _blob(public) is None:
        raise UsageError(f"not a public key: {public[:80]!r}", hint="edgevit key show")
    kind, text, *_ = public.split()
    return f'{principal} namespaces="{wire.SIGNATURE_NAMESPACE}" {kind} {text}'


def read_signers(path: Path) -> list[str]:
    """The lines of an allowed_signers file. UsageError naming the first that holds no key, or where there is none."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} cannot be read: {e}", hint=f"ls -l {path}") from e
    found = []
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        try:
            found.append(sshsig.parse_signer_line(line))
        except Refused as e:
            raise UsageError(f"{path}:{number}: {e}", hint="edgevit key show prints such a line") from e
    if not found:
        raise UsageError(f"{path} names no signer", hint="edgevit key show prints a line for it")
    return found


def sign(data: bytes, key: Path) -> bytes:
    """The detached signature of ``data`` for the namespace ``edgevit-bundle``, in the one spelling that devices accept.

    A key in the SSH agent is used from there; a locked key file asks on a terminal, and is a UsageError without one.
    """
    public = _blob(public_line(key))
    said = _run(["-Y", "sign", "-n", wire.SIGNATURE_NAMESPACE, "-f", str(key)], data, f"signing with {key}")
    signature = _canonical(said, key)
    used = sshsig.parse_signature(signature)
    if used.public_key != public:
        raise UsageError(
            f"{_public_path(key)} does not belong to {key}: it signed as {used.fingerprint}", hint=f"ssh-keygen -lf {key}"
        )
    return signature


def _canonical(armoured: bytes, key: Path) -> bytes:
    """Whatever line lengths this ssh-keygen writes → 70 columns; checked by the reader that devices use."""
    try:
        lines = armoured.strip().splitlines()
        blob = base64.b64decode(b"".join(line.strip() for line in lines[1:-1]), validate=True)
        text = base64.b64encode(blob)
        width = sshsig.LINE_WIDTH
        body = b"".join(text[i : i + width] + b"\n" for i in range(0, len(text), width))
        signature = sshsig.BEGIN + body + sshsig.END
        sshsig.parse_signature(signature)
    except (binascii.Error, Refused) as e:
        raise UsageError(f"ssh-keygen wrote a signature with {key} that devices would refuse: {e}", hint="ssh -V") from e
    return signature


def _blob(public: str) -> bytes | None:
    from edgevit.transport.hostkeys import parse_key

    try:
        return parse_key(public).blob
    except ValueError:
        return None


def _public_path(key: Path) -> Path:
    return key if key.suffix == ".pub" else key.with_name(key.name + ".pub")


def _run(arguments: list[str], data: bytes, doing: str) -> bytes:
    typing = sys.stdin is not None and sys.stdin.isatty()
    environment = dict(os.environ, LC_ALL="C")
    if not typing:
        environment["SSH_ASKPASS_REQUIRE"] = "never"
    try:
        done = subprocess.run(
            ["ssh-keygen", *arguments],
            input=data,
            capture_output=True,
            env=environment,
            # In a session of its own it has no terminal to ask on.
            start_new_session=not typing,
            timeout=TYPING_TIMEOUT_S if typing else TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as e:
        raise UsageError(f"{doing}: ssh-keygen is not installed", hint="sudo apt install openssh-client") from e
    except subprocess.TimeoutExpired as e:
        raise UsageError(f"{doing}: ssh-keygen did not end within {e.timeout:.0f} s", hint="ssh-add -l") from e
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip()[-1000:] or f"exit status {done.returncode}"
        locked = "passphrase" in said
        raise UsageError(
            f"{doing}: {said}" + ("; the key is locked and there is no terminal to ask on" if locked and not typing else ""),
            hint="ssh-add KEY, then try again" if locked else "edgevit key make",
        )
    return done.stdout
