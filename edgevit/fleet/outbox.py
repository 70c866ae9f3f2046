"""The outbox: measurements that wait on this machine for a device that is off, one file each.

An entry says what is wanted, not what the device will run: which variants fit is known only when it answers. It is on the disk
before the device is first asked and goes away only once the device, or the store, has the run; ``run_id`` is drawn when it is
put here. So a command that is killed anywhere loses nothing, and whoever sends an entry a second time sends the same run,
which a device takes once. Whoever sends an entry holds its lock, which the kernel releases when they die.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from device_agents import wire
from edgevit.durable import only_writer, sync_folder, write_private
from edgevit.errors import BundleError, StoreError, UsageError

if TYPE_CHECKING:
    from edgevit.bundle import Bundle

SCHEMA = "edgevit.outbox/1"
MAX_ENTRY_BYTES = 1_000_000
SUFFIX = ".json"
_NAME = {"pattern": wire.NAME_PATTERN, "max_len": 120}


@dataclass(frozen=True)
class KeptBundle:
    """A bundle by its place on this machine and its digest; ``name`` is for people."""

    path: str = field(metadata={"max_len": 4096})
    digest: str = field(metadata={"pattern": wire.SHA256_PATTERN, "max_len": 64})
    name: str


@dataclass(frozen=True)
class Entry:
    """One job that waits here. ``queued_at``: UTC, ISO 8601; ``owner``: ``user@host`` who wanted it; ``threads``, ``every`` and
    ``memory_limit_mb`` as :class:`edgevit.cli.bench.Wanted` has them."""

    schema: str = field(metadata={"choices": (SCHEMA,)})
    run_id: str = field(metadata=_NAME)
    batch_id: str = field(metadata=_NAME)
    target: str = field(metadata=_NAME)
    queued_at: str
    owner: str
    bundles: tuple[KeptBundle, ...] = field(metadata={"min_items": 1, "max_items": 100})
    plan: wire.RunPlan
    threads: tuple[int, ...] = ()
    every: bool = False
    memory_limit_mb: Optional[float] = None  # noqa: UP045 - the strict reader knows this spelling


@dataclass(frozen=True)
class Listing:
    """What waits here, oldest first; ``unreadable`` names each file that is no entry, with why."""

    entries: tuple[Entry, ...]
    unreadable: tuple[str, ...]


class Hold(enum.Enum):
    """How it stands with an entry that somebody wants to send or take back."""

    MINE = "mine"
    GONE = "gone"
    ELSEWHERE = "another edgevit is sending it"


def put(folder: Path, entry: Entry) -> None:
    """Keep an entry; it is on the disk when this returns. StoreError where it cannot be kept."""
    path = _path(folder, entry.run_id)
    with _mapped(f"keeping run {entry.run_id} for {entry.target}", folder), only_writer(path):
        _sweep(folder)
        write_private(path, wire.dumps(entry))
        sync_folder(folder)


def _sweep(folder: Path) -> None:
    """Remove what killed commands left. Whoever writes holds the folder's lock, so nothing half-written is at work."""
    for left in folder.glob(f".*{SUFFIX}.*"):
        left.unlink(missing_ok=True)
    for mark in folder.glob("*.asked"):
        if not _path(folder, mark.stem).exists():
            mark.unlink(missing_ok=True)


def read(folder: Path) -> Listing:
    """Everything that waits. Files that are no entry (damaged, of a newer edgevit) are named, not fatal."""
    entries: list[Entry] = []
    unreadable: list[str] = []
    with _mapped("reading the outbox", folder):
        names = sorted(p for p in folder.glob(f"*{SUFFIX}") if not p.name.startswith(".")) if folder.is_dir() else []
        for path in names:
            try:
                entries.append(_parse(path, path.read_bytes()))
            except FileNotFoundError:
                continue  # sent since the folder was listed
            except ValueError as e:
                unreadable.append(f"{path}: {e}")
    return Listing(tuple(sorted(entries, key=lambda e: (e.queued_at, e.run_id))), tuple(unreadable))


def of_target(listing: Listing, target: str) -> tuple[Entry, ...]:
    """What waits for one target, oldest first."""
    return tuple(entry for entry in listing.entries if entry.target == target)


@contextlib.contextmanager
def hold(folder: Path, run_id: str, *, wait: bool) -> Iterator[Hold]:
    """Keep every other command from sending this entry meanwhile; with ``wait`` until whoever does is done with it."""
    path = _path(folder, run_id)
    with _mapped(f"locking run {run_id}", folder):
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            handle = -1
    if handle < 0:
        yield Hold.GONE
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            standing = Hold.ELSEWHERE
        else:
            # Removed while the lock was waited for: what is locked then is a file without a name.
            standing = Hold.MINE if os.fstat(handle).st_nlink else Hold.GONE
        yield standing
    finally:
        os.close(handle)


def remove(folder: Path, run_id: str) -> None:
    """Forget an entry that is held; harmless where it is gone."""
    with _mapped(f"removing run {run_id}", folder):
        _path(folder, run_id).unlink(missing_ok=True)
        _mark(folder, run_id).unlink(missing_ok=True)
        sync_folder(folder)


def note_asked(folder: Path, run_id: str) -> None:
    """Remember that a device is being sent this entry: from then on only it can tell whether it has the run."""
    with _mapped(f"marking run {run_id}", folder):
        _mark(folder, run_id).touch(mode=0o600)


def was_asked(folder: Path, run_id: str) -> bool:
    """Whether a device may have the run already although its answer never came."""
    return _mark(folder, run_id).exists()


def take_back(folder: Path, run_ids: Sequence[str]) -> list[str]:
    """Remove those of ``run_ids`` that wait here and that no device can have; which they were."""
    taken = []
    for run_id in dict.fromkeys(run_ids):
        if re.fullmatch(wire.NAME_PATTERN, run_id) is None:
            continue  # no name that a run can have, so no file of it
        with hold(folder, run_id, wait=True) as standing:
            if standing is Hold.MINE and not was_asked(folder, run_id):
                remove(folder, run_id)
                taken.append(run_id)
    return taken


def open_kept(entry: Entry) -> list[Bundle]:
    """The bundles of an entry, whole and unchanged. BundleError naming the one that vanished or changed since."""
    from edgevit.bundle import open_bundle

    found = []
    for kept in entry.bundles:
        hint = f"put it back, or give the job up: edgevit collect --cancel {entry.run_id}"
        try:
            bundle = open_bundle(Path(kept.path), None)
        except (UsageError, BundleError) as e:
            raise BundleError(
                f"run {entry.run_id} for {entry.target}: {kept.name} is not at {kept.path} any more as it was on "
                f"{entry.queued_at}: {e}",
                hint=hint,
            ) from e
        if bundle.digest != kept.digest:
            raise BundleError(
                f"run {entry.run_id} for {entry.target}: {kept.path} is another bundle now, got {bundle.digest[:16]}…, not "
                f"{kept.name} {kept.digest[:16]}… as on {entry.queued_at}",
                hint=hint,
            )
        found.append(bundle)
    return found


def _path(folder: Path, run_id: str) -> Path:
    return folder / f"{run_id}{SUFFIX}"


def _mark(folder: Path, run_id: str) -> Path:
    return folder / f"{run_id}.asked"


def _parse(path: Path, data: bytes) -> Entry:
    try:
        entry = wire.loads(Entry, data, "outbox entry", MAX_ENTRY_BYTES)
    except wire.WireError as e:
        raise ValueError(f"no entry of the outbox: {e}") from e
    if path.name != f"{entry.run_id}{SUFFIX}":
        raise ValueError(f"it holds the entry of run {entry.run_id}")
    return entry


@contextlib.contextmanager
def _mapped(doing: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise StoreError(
            f"{doing}: the outbox {folder} said: {e.strerror or e}", hint=f"ls -ld {folder}; df -h {folder}"
        ) from e
