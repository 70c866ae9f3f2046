"""The audit log: who did what to which target from this machine, when, and how it ended.

One JSON object a line, only ever added to, each line on the disk before the command says that it is done. What happened on
the device is the device's to say; this is what this machine's operators did. A person who owns the file can change it: it
answers "what did we do", not "who forged what".
"""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevit import places
from edgevit.durable import sync_folder
from edgevit.errors import StoreError, UsageError

if TYPE_CHECKING:
    from edgevit.fleet.inventory import Target

SCHEMA = "edgevit.audit/1"
MAX_TEXT = 400

Detail = str | int | bool

_URL_SECRET = re.compile(r"(?<=://)[^\s/@]+@")
_NAMED_SECRET = re.compile(r"(?i)\b(password|passphrase|passwd|token|secret|api[_-]?key)(\s*[=:]\s*)\S+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SPAN = re.compile(r"(\d{1,4})\s*([mhdw])")
_SPAN_SECONDS = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@dataclass(frozen=True)
class Action:
    """What a command is about to do to its targets, for the log: ``what`` as the command is called, and its details."""

    what: str
    details: Mapping[str, Detail] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One action on one target. ``at``: its beginning, UTC, ISO 8601; ``seconds``: how long it took; ``host_keys``: those this
    machine knew the target by when it ended; ``outcome``: done or failed, then with the first line of ``error``."""

    at: str
    who: str
    action: str
    target: str
    host_keys: tuple[str, ...]
    outcome: str
    error: str
    seconds: float
    details: Mapping[str, Detail]


@dataclass(frozen=True)
class Log:
    """``unreadable`` names each line that is not an entry, with why."""

    entries: tuple[Entry, ...]
    unreadable: tuple[str, ...]


class Record:
    """What is known of an action while it goes on."""

    def __init__(self, details: Mapping[str, Detail]) -> None:
        self.details = dict(details)

    def note(self, **details: Detail) -> None:
        """Add what became known."""
        self.details.update(details)


@contextmanager
def recording(action: Action, target: Target) -> Iterator[Record]:
    """Write one line when the block ends, however it ends.

    StoreError before the block where the log cannot be written: what cannot be recorded is not begun.
    """
    path = places.audit_path()
    _require_writable(path)
    record = Record(action.details)
    at, started = _now(), time.monotonic()

    def entry(outcome: str, error: str) -> Entry:
        seconds = round(time.monotonic() - started, 3)
        return Entry(at, operator(), action.what, target.name, _host_keys(target), outcome, error, seconds, record.details)

    try:
        yield record
    except BaseException as error:
        try:
            append(path, entry("failed", first_line(error)))
        except StoreError as unwritten:
            raise StoreError(f"{error}; and {unwritten}", hint=unwritten.hint) from error
        raise
    append(path, entry("done", ""))


def operator() -> str:
    """``user@host``."""
    return f"{getpass.getuser()}@{socket.gethostname()}"


def first_line(error: BaseException) -> str:
    """What an error says, in one line without secrets; its kind where it says nothing."""
    said = str(error).strip()
    return clean(said.splitlines()[0] if said else type(error).__name__)


def clean(text: str) -> str:
    """``text`` as it may be kept: no credentials of URLs, no values of passwords or tokens, no control characters."""
    text = _URL_SECRET.sub("***@", text)
    text = _NAMED_SECRET.sub(r"\1\2***", text)
    return _CONTROL.sub("?", text)[:MAX_TEXT]


def _host_keys(target: Target) -> tuple[str, ...]:
    from edgevit.fleet.connect import known_fingerprints

    try:
        return known_fingerprints(target)
    except UsageError:
        # An SSH configuration that cannot be read has stopped the action itself already.
        return ()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# --------------------------------------------------------------------------------------------------------------------
# The file
# --------------------------------------------------------------------------------------------------------------------


def append(path: Path, entry: Entry) -> None:
    """Add one line and flush it to the disk. A line that a killed process left torn is closed first, so that none is glued to
    it. StoreError where it cannot be written."""
    details = {k: clean(v) if isinstance(v, str) else v for k, v in entry.details.items()}
    document = {"schema": SCHEMA, **asdict(entry), "error": clean(entry.error), "details": details}
    line = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8") + b"\n"
    try:
        is_new = not path.exists()
        handle = _open_log(path)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            size = os.fstat(handle).st_size
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            _write_all(handle, b"\n" + line if torn else line)
            os.fsync(handle)
        finally:
            os.close(handle)
        if is_new:
            sync_folder(path.parent)
    except OSError as e:
        raise StoreError(
            f"the audit log {path} could not be written: {e.strerror}; not recorded: {entry.action} of {entry.target}, "
            f"{entry.outcome}",
            hint=f"ls -l {path}; df -h {path.parent}",
        ) from e


def _open_log(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _require_writable(path: Path) -> None:
    try:
        os.close(_open_log(path))
    except OSError as e:
        raise StoreError(
            f"the audit log {path} cannot be written: {e.strerror}; nothing was begun", hint=f"ls -ld {path} {path.parent}"
        ) from e


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def read_log(path: Path) -> Log:
    """Every entry, oldest first. Lines that are none (torn by a kill, damaged) are named, not fatal; no file: no entries."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Log((), ())
    except OSError as e:
        raise StoreError(f"the audit log {path} cannot be read: {e.strerror}", hint=f"ls -l {path}") from e
    entries: list[Entry] = []
    unreadable: list[str] = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            entries.append(parse_entry(line))
        except ValueError as e:
            is_torn = number == len(lines)
            why = "torn: whoever wrote it was stopped in the middle" if is_torn else f"not an entry: {e}"
            unreadable.append(f"{path}:{number}: {why}")
    return Log(tuple(entries), tuple(unreadable))


def parse_entry(line: bytes) -> Entry:
    """One line → Entry; ValueError where it is none."""
    try:
        value = json.loads(line.decode("utf-8"))
    except RecursionError as e:
        raise ValueError("nested too deeply") from e
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        raise ValueError(f"expected an object of the schema {SCHEMA}")
    texts = {key: _typed(value, key, str) for key in ("at", "who", "action", "target", "outcome", "error")}
    seconds, details, keys = value.get("seconds"), _typed(value, "details", dict), _typed(value, "host_keys", list)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 1e12:
        raise ValueError("seconds is not a number of seconds")
    if not all(isinstance(v, str | int) for v in details.values()) or not all(isinstance(k, str) for k in keys):
        raise ValueError("details or host_keys hold what they cannot")
    _instant(texts["at"])
    return Entry(**texts, host_keys=tuple(keys), seconds=float(seconds), details=details)


def _typed(value: Mapping[str, Any], key: str, kind: type) -> Any:
    found = value.get(key)
    if not isinstance(found, kind):
        raise ValueError(f"{key} is not of the type {kind.__name__}")
    return found


# --------------------------------------------------------------------------------------------------------------------
# Asking it
# --------------------------------------------------------------------------------------------------------------------


def last_activation(entries: Sequence[Entry], target: str) -> Entry | None:
    """The last deployment or rollback of ``target`` that was done from here; None also where it was unprovisioned since."""
    for entry in reversed(entries):
        if entry.target != target or entry.outcome != "done":
            continue
        if entry.action == "unprovision":
            return None
        if entry.action in ("deploy", "rollback"):
            return entry
    return None


def parse_since(text: str, now: datetime, option: str = "--since", hint: str = "edgevit fleet audit") -> datetime:
    """``30m``, ``12h``, ``7d``, ``2w`` before ``now``, or an ISO date or time (UTC where it names no zone). UsageError else,
    naming the ``option`` it was given to."""
    span = _SPAN.fullmatch(text.strip().lower())
    if span:
        return now - timedelta(seconds=int(span[1]) * _SPAN_SECONDS[span[2]])
    try:
        return _instant(text.strip())
    except ValueError as e:
        raise UsageError(
            f"{option}: got {text!r}, expected a span such as 12h or 7d, or a date such as 2026-01-31",
            hint=hint,
        ) from e


def since(entries: Sequence[Entry], moment: datetime) -> list[Entry]:
    """The entries that began at ``moment`` or later."""
    return [entry for entry in entries if _instant(entry.at) >= moment]


def _instant(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    try:
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError as e:
        raise ValueError(f"{text} is in no year from 1 to 9999 of UTC") from e


def as_values(entry: Entry) -> dict[str, Any]:
    """Plain JSON values."""
    return {**asdict(entry), "host_keys": list(entry.host_keys)}
