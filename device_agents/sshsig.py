"""The signature checker: SSHSIG through the device's own ``ssh-keygen -Y`` (OpenSSH ≥ 8.1), nothing to install.

The format is OpenSSH's ``PROTOCOL.sshsig``. Its armour and base64 leave slack: white space, line widths and the unused
bits of the last base64 character can change without breaking the signature. A bundle's signature therefore has one form
only, the one ``ssh-keygen -Y sign`` writes, and :func:`parse_signature` refuses every other.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import List, Tuple

from device_agents import wire
from device_agents.errors import Refused, printable, refuse_os_error

BEGIN = b"-----BEGIN SSH SIGNATURE-----\n"
END = b"-----END SSH SIGNATURE-----\n"
MAGIC = b"SSHSIG"
LINE_WIDTH = 70
HASHES = ("sha256", "sha512")
TIMEOUT_S = 30.0
NEEDS = "install openssh-client 8.1 or newer on the machine that verifies"


@dataclass(frozen=True)
class SshSignature:
    """A parsed signature. ``public_key`` and ``signature`` in SSH wire format."""

    public_key: bytes
    namespace: str
    hash_algorithm: str
    signature: bytes

    @property
    def fingerprint(self) -> str:
        """The signing key's, as ``ssh-keygen -l`` prints it."""
        return _fingerprint(self.public_key)


def parse_signature(data: bytes) -> SshSignature:
    """Armoured bytes → the signature in them, refused as ``bad-signature`` unless they are exactly the canonical ones."""
    if not (data.startswith(BEGIN) and data.endswith(END)):
        raise Refused("bad-signature", "the signature is not an SSH signature in canonical form (its first or last line)")
    try:
        blob = base64.b64decode(data[len(BEGIN) : -len(END)].replace(b"\n", b""), validate=True)
    except (binascii.Error, ValueError) as e:
        raise Refused("bad-signature", "the signature is not base64: {}".format(e)) from e
    parsed = _parse_blob(blob)
    if armour(parsed) != data:
        raise Refused("bad-signature", "the signature is not in canonical form: the same signature has only one spelling")
    return parsed


def armour(signature: SshSignature) -> bytes:
    """The canonical spelling: 70 columns, one newline at the end of each line, as ``ssh-keygen -Y sign`` writes it."""
    blob = MAGIC + struct.pack(">I", 1)
    for part in (
        signature.public_key,
        signature.namespace.encode(),
        b"",
        signature.hash_algorithm.encode(),
        signature.signature,
    ):
        blob += struct.pack(">I", len(part)) + part
    text = base64.b64encode(blob)
    lines = [text[i : i + LINE_WIDTH] + b"\n" for i in range(0, len(text), LINE_WIDTH)]
    return BEGIN + b"".join(lines) + END


def _parse_blob(blob: bytes) -> SshSignature:
    if blob[: len(MAGIC)] != MAGIC:
        raise Refused("bad-signature", "the signature does not begin with SSHSIG")
    rest = blob[len(MAGIC) :]
    if rest[:4] != b"\0\0\0\1":
        raise Refused("bad-signature", "the signature has an unknown version, expected 1")
    rest = rest[4:]
    public_key, rest = _take(rest, "public key")
    namespace, rest = _take(rest, "namespace")
    reserved, rest = _take(rest, "reserved field")
    algorithm, rest = _take(rest, "hash algorithm")
    signature, rest = _take(rest, "signature")
    if rest:
        raise Refused("bad-signature", "{} bytes follow the signature".format(len(rest)))
    if namespace != wire.SIGNATURE_NAMESPACE.encode():
        raise Refused(
            "bad-signature",
            "the signature was made for {!r}, expected {!r}".format(namespace[:80], wire.SIGNATURE_NAMESPACE),
        )
    if reserved:
        raise Refused("bad-signature", "the signature's reserved field is not empty")
    if algorithm not in [h.encode() for h in HASHES]:
        raise Refused("bad-signature", "the signature uses the hash {!r}, expected one of {}".format(algorithm[:80], HASHES))
    return SshSignature(public_key, wire.SIGNATURE_NAMESPACE, algorithm.decode(), signature)


def _take(data: bytes, what: str) -> Tuple[bytes, bytes]:
    if len(data) < 4:
        raise Refused("bad-signature", "the signature ends before its {}".format(what))
    size = struct.unpack(">I", data[:4])[0]
    if size > len(data) - 4:
        raise Refused("bad-signature", "the signature's {} is cut short".format(what))
    return data[4 : 4 + size], data[4 + size :]


class SshKeygenChecker:
    """Checks signatures against an ``allowed_signers`` file. ``scratch`` is a private folder for the signature's file."""

    def __init__(self, allowed_signers: Path, scratch: Path, program: str = "ssh-keygen") -> None:
        self._signers = allowed_signers
        self._scratch = scratch
        self._program = program

    def __call__(self, manifest: bytes, signature: bytes) -> str:
        """The signer's principal. Raises ``bad-signature``, ``unknown-signer``, ``no-signers`` or ``no-ssh-keygen``."""
        parsed = parse_signature(signature)
        if not self._has_signers():
            raise Refused(
                "no-signers", "nobody may sign bundles here yet: {} names no key".format(self._signers), "edgevit key allow"
            )
        path = self._scratch / "signature-{}".format(os.urandom(8).hex())
        try:
            path.write_bytes(signature)
            return self._check(parsed, manifest, path)
        except OSError as e:
            raise refuse_os_error(e, "checking a signature in {}".format(self._scratch)) from e
        finally:
            if path.exists():
                path.unlink()

    def _has_signers(self) -> bool:
        try:
            lines = self._signers.read_text("utf-8", "replace").splitlines()
        except FileNotFoundError:
            return False
        except OSError as e:
            raise Refused("io-error", "reading the signers in {}: {}".format(self._signers, e)) from e
        return any(line.strip() and not line.lstrip().startswith("#") for line in lines)

    def _check(self, parsed: SshSignature, manifest: bytes, path: Path) -> str:
        status, out, err = self._run(["find-principals", "-s", str(path), "-f", str(self._signers)], b"")
        principal = out.splitlines()[0].split(",")[0].strip() if status == 0 and out.strip() else ""
        if not principal:
            raise self._unknown(parsed, err)
        verify = ["verify", "-f", str(self._signers), "-I", principal, "-n", parsed.namespace, "-s", str(path)]
        status, _, err = self._run(verify, manifest)
        if status == 0:
            return principal
        # A good signature by a key that expired, or may not sign for this namespace, is not a damaged one.
        if self._run(["check-novalidate", "-n", parsed.namespace, "-s", str(path)], manifest)[0] == 0:
            raise self._unknown(parsed, err)
        raise Refused(
            "bad-signature",
            "the signature by {} ({}) does not belong to this manifest: {}".format(principal, parsed.fingerprint, err),
            "build or copy the bundle again",
        )

    def _unknown(self, parsed: SshSignature, detail: str) -> Refused:
        return Refused(
            "unknown-signer",
            "the bundle was signed by the key {}, which may not sign bundles here{}".format(
                parsed.fingerprint, ": " + detail if detail else ""
            ),
            "edgevit key allow",
        )

    def _run(self, args: List[str], data: bytes) -> Tuple[int, str, str]:
        try:
            done = subprocess.run(
                [self._program, "-Y"] + args,
                input=data,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                timeout=TIMEOUT_S,
                env=dict(os.environ, LC_ALL="C"),
                check=False,
            )
        except FileNotFoundError as e:
            raise Refused("no-ssh-keygen", "there is no {} here: {}".format(self._program, e), NEEDS) from e
        except subprocess.TimeoutExpired as e:
            raise Refused("bad-signature", "{} gave no answer within {:.0f} s".format(self._program, TIMEOUT_S)) from e
        err = printable(done.stderr.decode("utf-8", "replace").strip())  # it ends its lines with CR LF
        if done.returncode != 0 and ("unknown option" in err or "illegal option" in err or "usage:" in err.lower()):
            raise Refused("no-ssh-keygen", "this {} knows no -Y: {}".format(self._program, err[:200]), NEEDS)
        return done.returncode, done.stdout.decode("utf-8", "replace"), err[:400]


def parse_signer_line(line: str) -> str:
    """One line of an ``allowed_signers`` file, checked: principals, options, key type, base64 key of that type.

    Returns the line without outer white space. Raises ``bad-request``.
    """
    _key_of_line(line)
    return line.strip()


def fingerprint_of_signer(line: str) -> str:
    """``SHA256:…`` of the key in a line of an ``allowed_signers`` file. Raises ``bad-request``."""
    return _fingerprint(_key_of_line(line))


def _fingerprint(public_key: bytes) -> str:
    return "SHA256:" + base64.b64encode(hashlib.sha256(public_key).digest()).decode("ascii").rstrip("=")


def _key_of_line(line: str) -> bytes:
    line = line.strip()
    if not line or len(line) > 20_000 or any(ord(c) < 32 for c in line):
        raise Refused("bad-request", "{!r} is not a line of an allowed_signers file".format(line[:80]))
    words = line.split()
    for at in range(1, len(words) - 1):
        try:
            key = base64.b64decode(words[at + 1], validate=True)
            kind, _ = _take(key, "key type")
        except (binascii.Error, ValueError, Refused):
            continue
        if kind == words[at].encode():
            return key
    raise Refused("bad-request", "{!r} holds no public key; expected: principal key-type base64-key".format(line[:80]))
