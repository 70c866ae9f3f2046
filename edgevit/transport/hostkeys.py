"""Host keys in OpenSSH's own format: reading ``known_hosts`` files, judging an offered key, and edgevit's pins.

Follows sshd(8) "SSH_KNOWN_HOSTS FILE FORMAT": comma lists with ``*``, ``?`` and ``!``, hashed names (HMAC-SHA1 over the
name with a salt), ``[host]:port``, ``@revoked``. ``@cert-authority`` lines are read but never satisfy a check, since host
certificates are not asked for. Knows nothing of paramiko: a key is its type and its wire bytes.
"""

from __future__ import annotations

import base64
import binascii
import enum
import fnmatch
import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgevit.durable import only_writer, write_private
from edgevit.errors import UsageError

MAX_KNOWN_HOSTS_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class HostKey:
    """A public key: its type (``ssh-ed25519``) and its bytes as they go over the wire."""

    type: str
    blob: bytes

    @property
    def fingerprint(self) -> str:
        """``SHA256:`` and unpadded base64, as ``ssh-keygen -l`` prints it."""
        return fingerprint_of(self.blob)

    @property
    def line(self) -> str:
        return f"{self.type} {base64.b64encode(self.blob).decode('ascii')}"


def fingerprint_of(blob: bytes) -> str:
    """``SHA256:`` and the unpadded base64 of the digest of ``blob``."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode("ascii").rstrip("=")


def parse_key(type_and_base64: str) -> HostKey:
    """``ssh-ed25519 AAAA… [comment]`` → HostKey; ValueError where the two parts do not agree."""
    parts = type_and_base64.split()
    if len(parts) < 2:
        raise ValueError("expected a key type and its base64 text")
    try:
        blob = base64.b64decode(parts[1], validate=True)
    except binascii.Error as e:
        raise ValueError(f"the key is not base64: {e}") from e
    length = int.from_bytes(blob[:4], "big")
    if length > 100 or blob[4 : 4 + length] != parts[0].encode("ascii", "replace"):
        raise ValueError(f"the key inside is not of the type {parts[0]!r}")
    return HostKey(parts[0], blob)


@dataclass(frozen=True)
class KnownLine:
    """One line of a known_hosts file; ``where`` is ``file:line``."""

    marker: str
    patterns: str
    key: HostKey
    where: str

    def names(self, name: str) -> bool:
        """Whether the line speaks of ``name`` (``host`` or ``[host]:port``)."""
        if self.patterns.startswith("|1|"):
            return _matches_hashed(self.patterns, name)
        found = False
        for pattern in self.patterns.split(","):
            negated = pattern.startswith("!")
            if fnmatch.fnmatchcase(name.lower(), _literal_brackets(pattern[negated:].lower())):
                if negated:
                    return False
                found = True
        return found


def _literal_brackets(pattern: str) -> str:
    """OpenSSH knows only ``*`` and ``?``; to fnmatch a bracket would open a set."""
    return pattern.replace("[", "[[]")


def _matches_hashed(pattern: str, name: str) -> bool:
    parts = pattern.split("|")
    if len(parts) != 4:
        return False
    try:
        salt, want = base64.b64decode(parts[2], validate=True), base64.b64decode(parts[3], validate=True)
    except binascii.Error:
        return False
    return hmac.compare_digest(hmac.new(salt, name.lower().encode("utf-8"), hashlib.sha1).digest(), want)


def parse_known_hosts(text: str, where: str) -> tuple[KnownLine, ...]:
    """The lines of a known_hosts file. Lines that OpenSSH would skip (unknown marker, unreadable key) are skipped here too,
    except that a damaged ``@revoked`` line is a UsageError: skipping it would trust what someone withdrew."""
    lines = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        marker = ""
        if line.startswith("@"):
            marker, line = _first_word(line)
        patterns, rest = _first_word(line)
        try:
            key = parse_key(rest)
        except ValueError as e:
            if marker == "@revoked":
                raise UsageError(f"{where}:{number}: a @revoked line that cannot be read: {e}", hint=f"edit {where}") from e
            continue
        if marker in ("", "@revoked", "@cert-authority"):
            lines.append(KnownLine(marker, patterns, key, f"{where}:{number}"))
    return tuple(lines)


def _first_word(line: str) -> tuple[str, str]:
    """The first word and what follows it; OpenSSH parts words by tabs as well."""
    first, rest = [*line.split(None, 1), "", ""][:2]
    return first, rest


def load_known_hosts(paths: Iterable[Path]) -> tuple[KnownLine, ...]:
    """Every line of the files that exist, in order; an unreadable file is a UsageError, an absent one holds nothing."""
    lines: list[KnownLine] = []
    for path in paths:
        try:
            if path.stat().st_size > MAX_KNOWN_HOSTS_BYTES:
                raise UsageError(f"{path}: {path.stat().st_size:,} bytes, at most {MAX_KNOWN_HOSTS_BYTES:,} are read")
            text = path.read_text("utf-8", errors="surrogateescape")
        except FileNotFoundError:
            continue
        except NotADirectoryError:
            continue
        except OSError as e:
            raise UsageError(f"{path}: host keys cannot be read: {e.strerror}", hint=f"ls -l {path}") from e
        lines.extend(parse_known_hosts(text, str(path)))
    return tuple(lines)


def lookup_name(host: str, port: int) -> str:
    """How known_hosts calls a host: ``host``, or ``[host]:port`` off port 22."""
    return host.lower() if port == 22 else f"[{host.lower()}]:{port}"


class KeyStanding(enum.Enum):
    """What the known_hosts files say of an offered key."""

    KNOWN = "known"
    UNKNOWN = "unknown"
    CHANGED = "changed"
    REVOKED = "revoked"


@dataclass(frozen=True)
class Judgement:
    """``lines`` are the lines that decided it."""

    standing: KeyStanding
    lines: tuple[KnownLine, ...]


def lines_for(known: Sequence[KnownLine], host: str, port: int) -> tuple[KnownLine, ...]:
    """The plain lines for this host and port."""
    name = lookup_name(host, port)
    return tuple(line for line in known if line.marker == "" and line.names(name))


def known_types(known: Sequence[KnownLine], host: str, port: int) -> tuple[str, ...]:
    """Key types known for this host, so that only those are negotiated and another type is no false alarm."""
    return tuple(dict.fromkeys(line.key.type for line in lines_for(known, host, port)))


def judge(known: Sequence[KnownLine], host: str, port: int, key: HostKey) -> Judgement:
    """What is known of ``key`` offered by ``host``.

    Revocation wins over everything. As in OpenSSH, a host off port 22 that has no line of its own is accepted
    when the very same key is known for the host without a port, but another key there is no alarm.
    """
    name = lookup_name(host, port)
    revoked = tuple(
        line
        for line in known
        if line.marker == "@revoked" and line.key.blob == key.blob and (line.names(name) or line.names(host))
    )
    if revoked:
        return Judgement(KeyStanding.REVOKED, revoked)
    lines = lines_for(known, host, port)
    same = tuple(line for line in lines if line.key.blob == key.blob)
    if same:
        return Judgement(KeyStanding.KNOWN, same)
    if lines:
        return Judgement(KeyStanding.CHANGED, lines)
    if port != 22:
        plain = tuple(line for line in lines_for(known, host, 22) if line.key.blob == key.blob)
        if plain:
            return Judgement(KeyStanding.KNOWN, plain)
    return Judgement(KeyStanding.UNKNOWN, ())


def pin(path: Path, host: str, port: int, key: HostKey) -> None:
    """Make ``key`` the one key that edgevit's own file knows for this host. Written anew, mode 600, in one rename. UsageError
    where it cannot be written."""
    _rewrite(path, host, port, [f"{lookup_name(host, port)} {key.line}"])


def unpin(path: Path, host: str, port: int) -> bool:
    """Forget the host in edgevit's own file; False where it was not there."""
    return _rewrite(path, host, port, [])


def _rewrite(path: Path, host: str, port: int, added: list[str]) -> bool:
    name = lookup_name(host, port)
    try:
        with only_writer(path):
            old = path.read_text("utf-8").splitlines() if path.exists() else []
            kept = [line for line in old if not _speaks_of(line, name)]
            if len(kept) == len(old) and not added:
                return False
            write_private(path, "".join(line + "\n" for line in kept + added).encode("utf-8"))
    except OSError as e:
        raise UsageError(
            f"{path}: host keys cannot be kept: {e.strerror}", hint=f"ls -ld {path.parent}; df -h {path.parent}"
        ) from e
    return len(kept) != len(old)


def _speaks_of(line: str, name: str) -> bool:
    return any(known.marker == "" and known.names(name) for known in parse_known_hosts(line, "pins"))
