"""Blobs on their way in: what is lacking, what of it lies here already, and the rest from standard input.

A blob that a chunk index describes (:mod:`device_agents.chunks`) is put together in its ``.part``, at full length from the
start: chunks that an earlier attempt left there, chunks of blobs that are stored, and what the host sends. Any other blob's
``.part`` is a prefix. Either way the SHA-256 of the whole decides before it is renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Set, Tuple

from device_agents import wire
from device_agents.chunks import MAGIC, MAX_INDEX_BYTES, BlobChunks, check_index, digest_chunk, parse_chunk_index
from device_agents.console import CHUNK, Console, HostGone
from device_agents.errors import Refused, refuse_os_error
from device_agents.root import open_with_mode
from device_agents.store import Store, hash_descriptor

SPARE_BYTES = 16 * 1024 * 1024
"""Left free on the device's disk beyond the blobs themselves."""

IDLE_S = 25.0
"""A host that sends nothing for so long is gone (it gives a silent device up sooner); it resumes where it stopped."""

LOCK_WAIT_S = 40.0
"""Longer than :data:`IDLE_S`, so a predecessor whose link broke has given up by then."""

MOST_OPEN = 32
"""Blobs open at a time while chunks are copied from them."""

Index = Mapping[str, BlobChunks]
Place = Tuple[str, int]
"""A blob's SHA-256 and an offset in it."""

_WRITE_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def locked_blobs(store: Store, console: Console) -> Iterator[None]:
    """One writer of blobs at a time; waits for a predecessor whose link may have broken. Raises ``busy``."""
    store.create()
    deadline = time.monotonic() + LOCK_WAIT_S
    said = False
    while True:
        lock = store.try_lock_blobs()
        if lock is not None:
            break
        if time.monotonic() >= deadline:
            raise Refused("busy", "another deployment has been writing to {} for over {:.0f} s".format(store.root, LOCK_WAIT_S))
        if not said:
            console.progress("waiting", 0, 1, "", "another deployment to this device is at work")
            said = True
        console.alive()
        time.sleep(0.1)
    try:
        yield
    finally:
        os.close(lock)


def take_in(
    store: Store,
    console: Console,
    blobs: Tuple[wire.Blob, ...],
    what: str,
    beyond_bytes: int = 0,
    chunks: Optional[wire.Blob] = None,
) -> Tuple[int, bool]:
    """Say which bytes of ``blobs`` are lacking and receive them: (bytes received, whether nothing was lacking).

    Under the lock of :func:`locked_blobs`. ``beyond_bytes`` must be free as well, where anything is received at all.
    ``chunks`` is the index among ``blobs``: where it is lacking it is asked for first, by a ``need`` that is not the ``last``.
    """
    with console.heartbeat():
        lacking = _find_lacking(store, blobs)
    _check_space(store, lacking, what, beyond_bytes)
    received = 0
    index: Index = {}
    if lacking and chunks is not None:
        if chunks in lacking:
            received = _receive(store, console, [_Incoming(chunks, _rest(store, chunks))], last=lacking == [chunks])
            lacking.remove(chunks)
            if not lacking:
                return received, False
        index = read_index(store, chunks, blobs)
    with console.heartbeat(), contextlib.closing(Assembly(store, index, lacking)) as plan:
        incoming = [plan.prepare(blob, console) for blob in lacking]
    return received + _receive(store, console, incoming, last=True), not lacking


def _find_lacking(store: Store, blobs: Tuple[wire.Blob, ...]) -> List[wire.Blob]:
    """Blobs that are absent or damaged; what is damaged is removed."""
    lacking = []
    for blob in blobs:
        try:
            store.check_blob(blob)
        except Refused as e:
            if e.code not in ("blob-missing", "blob-damaged"):
                raise
            _discard(store.blob_path(blob.sha256))
            lacking.append(blob)
    return lacking


def _check_space(store: Store, lacking: List[wire.Blob], what: str, beyond_bytes: int) -> None:
    wanted = sum(blob.size - _allocated(store, blob) for blob in lacking) + beyond_bytes
    free = store.free_bytes()
    if wanted and wanted + SPARE_BYTES > free:
        raise Refused(
            "no-space",
            "{} needs {:,} bytes and {:,} to spare, {:,} are free in {}".format(what, wanted, SPARE_BYTES, free, store.root),
            "free some space on the device, or remove old bundles with its agent's gc",
        )


def _allocated(store: Store, blob: wire.Blob) -> int:
    """Bytes of the disk that the blob's part has taken already."""
    try:
        return min(store.part_path(blob.sha256).lstat().st_blocks * 512, blob.size)
    except OSError:
        return 0


def read_index(store: Store, chunks: wire.Blob, blobs: Tuple[wire.Blob, ...]) -> Index:
    """A stored chunk index that fits ``blobs``. Raises ``bad-chunks``."""
    try:
        return check_index(store.read_blob(chunks), {blob.sha256: blob.size for blob in blobs})
    except wire.WireError as e:
        raise Refused("bad-chunks", "blob {}: {}".format(chunks.sha256, e), "build the bundle again") from e


# ---- what lies here already ------------------------------------------------------------------------------------------


class _Incoming:
    """One blob to be received: ``runs`` are the (offset, length) that the host sends, ``copies`` the chunks, as (offset,
    length, digest, place), to be copied from where they will lie by then: in a blob that comes before it, or further up in
    this one."""

    def __init__(self, blob: wire.Blob, runs: List[Tuple[int, int]]) -> None:
        self.blob = blob
        self.runs = runs
        self.copies: List[Tuple[int, int, bytes, Place]] = []
        self.in_chunks = False

    def add_run(self, offset: int, length: int) -> None:
        """Runs that touch become one."""
        if self.runs and sum(self.runs[-1]) == offset:
            self.runs[-1] = (self.runs[-1][0], self.runs[-1][1] + length)
        else:
            self.runs.append((offset, length))

    @property
    def bytes_to_come(self) -> int:
        return sum(length for _, length in self.runs)

    def need(self) -> Dict[str, Any]:
        if self.in_chunks:
            return {"sha256": self.blob.sha256, "ranges": [[offset, length] for offset, length in self.runs]}
        return {"sha256": self.blob.sha256, "offset": self.runs[0][0] if self.runs else self.blob.size}


class Assembly:
    """Finds the chunks of lacking blobs in what is stored, by the indexes that are stored beside it.

    No blob is hashed for that: an index says what lies where, and a chunk is compared by its digest when it is copied. An index
    that is wrong about its blob costs bytes, which the host then sends, and nothing else.
    """

    def __init__(self, store: Store, index: Index, lacking: List[wire.Blob]) -> None:
        self._store, self._index = store, index
        self._open: Dict[str, int] = {}
        self._said = time.monotonic()
        wanted: Set[bytes] = set()
        for blob in lacking:
            wanted.update(digest for _, _, digest in index.get(blob.sha256, ()))
        self._places = find_chunks(store, wanted)
        self._coming: Dict[bytes, Place] = {}

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def prepare(self, blob: wire.Blob, console: Console) -> _Incoming:
        """Copy what lies here into the blob's part, and say what is still to come."""
        cut = self._index.get(blob.sha256)
        if cut is None:
            return _Incoming(blob, _rest(self._store, blob))
        incoming = _Incoming(blob, [])
        incoming.in_chunks = True
        with _open_part(self._store, blob) as fd, _refusing(blob):
            kept = os.fstat(fd).st_size > 0
            os.ftruncate(fd, blob.size)
            for offset, length, digest in cut:
                if not (kept and _holds(fd, offset, length, digest)) and not self._copy(fd, offset, length, digest):
                    self._await(incoming, offset, length, digest)
                self._coming.setdefault(digest, (blob.sha256, offset))
                self._tell(console, "reuse", offset + length, blob)
        return incoming

    def survey(self, blob: wire.Blob) -> Tuple[int, int]:
        """(Bytes of it that need not be sent, those of them that would be copied), by what the indexes say; changes nothing."""
        cut = self._index.get(blob.sha256)
        if cut is None:
            there = _part_size(self._store, blob)
            return (there if there < blob.size else 0), 0
        held = copied = 0
        fd: Optional[int] = None
        with contextlib.suppress(FileNotFoundError, Refused):
            fd = self._store.open_regular(self._store.part_path(blob.sha256))
        try:
            for offset, length, digest in cut:
                if fd is not None and _holds(fd, offset, length, digest):
                    held += length
                elif digest in self._places or digest in self._coming:
                    copied += length
                self._coming.setdefault(digest, (blob.sha256, offset))
        except OSError as e:
            raise refuse_os_error(e, "reading the part of blob {}".format(blob.sha256)) from e
        finally:
            if fd is not None:
                os.close(fd)
        return held + copied, copied

    def _copy(self, fd: int, offset: int, length: int, digest: bytes) -> bool:
        place = self._places.get(digest)
        if place is None:
            return False
        data = b""
        with contextlib.suppress(OSError, Refused):  # a blob that went or cannot be read: the host sends the chunk
            data = os.pread(self._descriptor(place[0]), length, place[1])
        if len(data) != length or digest_chunk(data) != digest:
            del self._places[digest]
            return False
        _write_at(fd, data, offset)
        return True

    def _descriptor(self, sha256: str) -> int:
        if sha256 not in self._open:
            if len(self._open) >= MOST_OPEN:
                self.close()
            self._open[sha256] = self._store.open_regular(self._store.blob_path(sha256))
        return self._open[sha256]

    def _await(self, incoming: _Incoming, offset: int, length: int, digest: bytes) -> None:
        """What an earlier blob of the same request will hold, or this one further up, is copied from there once it stands."""
        before = self._coming.get(digest)
        if before is None:
            incoming.add_run(offset, length)
        else:
            incoming.copies.append((offset, length, digest, before))

    def _tell(self, console: Console, stage: str, done: int, blob: wire.Blob) -> None:
        now = time.monotonic()
        if now - self._said >= 0.25:
            self._said = now
            _say(console, stage, done, blob)


def find_chunks(store: Store, wanted: Set[bytes]) -> Dict[bytes, Place]:
    """Where chunks lie, as the indexes among the stored blobs tell, whichever bundle each came with."""
    found: Dict[bytes, Place] = {}
    if not wanted:
        return found
    there = store.inventory()
    for name, size in there.items():
        if not len(MAGIC) <= size <= MAX_INDEX_BYTES:
            continue
        for sha256, cut in _index_in(store, wire.Blob(name, size)).items():
            if there.get(sha256) == cut.size:
                for offset, _, digest in cut:
                    if digest in wanted:
                        found.setdefault(digest, (sha256, offset))
    return found


def _index_in(store: Store, blob: wire.Blob) -> Index:
    """The index that a stored blob is; empty where it is something else, or damaged: verifying its bundle will tell that."""
    try:
        with os.fdopen(store.open_blob(blob), "rb") as f:
            head = f.read(len(MAGIC))
            return parse_chunk_index(head + f.read(blob.size)) if head == MAGIC else {}
    except (OSError, Refused, wire.WireError):
        return {}


def _holds(fd: int, offset: int, length: int, digest: bytes) -> bool:
    data = os.pread(fd, length, offset)
    return len(data) == length and digest_chunk(data) == digest


# ---- parts -----------------------------------------------------------------------------------------------------------


def _part_size(store: Store, blob: wire.Blob) -> int:
    """The length of a part that is a regular file, else 0."""
    try:
        fd = store.open_regular(store.part_path(blob.sha256))
    except (FileNotFoundError, Refused):
        return 0
    try:
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


def _rest(store: Store, blob: wire.Blob) -> List[Tuple[int, int]]:
    """What a prefix lacks. A part that is no regular file, or longer than the blob, goes; so does one of full length that is
    not the blob: one that was put together from chunks, with holes."""
    part = store.part_path(blob.sha256)
    try:
        fd = store.open_regular(part)
    except FileNotFoundError:
        return [(0, blob.size)]
    except Refused:
        _discard(part)
        return [(0, blob.size)]
    try:
        size = os.fstat(fd).st_size
        whole = size == blob.size and hash_descriptor(fd) == blob.sha256
    except OSError as e:
        raise refuse_os_error(e, "reading {}".format(part)) from e
    finally:
        os.close(fd)
    if whole:
        return []
    if size >= blob.size:
        _discard(part)
        return [(0, blob.size)]
    return [(size, blob.size - size)]


@contextlib.contextmanager
def _open_part(store: Store, blob: wire.Blob) -> Iterator[int]:
    """A descriptor of the blob's part; whatever else lies in its place goes first."""
    part = store.part_path(blob.sha256)
    if os.path.lexists(str(part)) and (part.is_symlink() or not part.is_file()):
        _discard(part)
    try:
        fd = open_with_mode(part, _WRITE_FLAGS, store.file_mode)
    except OSError as e:
        raise refuse_os_error(e, "opening {}".format(part)) from e
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _refusing(blob: wire.Blob) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise refuse_os_error(e, "storing blob {}".format(blob.sha256)) from e


def _discard(path: Path) -> None:
    try:
        path.unlink()
    except FileNotFoundError:
        pass
    except OSError as e:
        raise refuse_os_error(e, "removing {}".format(path)) from e


def _write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n


def _say(console: Console, stage: str, done: int, blob: wire.Blob) -> None:
    try:
        console.progress(stage, done, blob.size, "bytes", blob.sha256[:12])
    except HostGone as e:
        raise Refused("interrupted", "the host is gone: {}".format(e)) from e


# ---- receiving -------------------------------------------------------------------------------------------------------


def _receive(store: Store, console: Console, incoming: List[_Incoming], last: bool) -> int:
    """Say what is needed, and take it. ``last``: nothing more will be asked for."""
    needs = [one.need() for one in incoming]
    console.emit({"type": "need", "blobs": needs, "free_bytes": store.free_bytes(), "last": last})
    for one in incoming:
        _Receiver(store, console, one).receive()
        console.emit({"type": "stored", "sha256": one.blob.sha256})
    return sum(one.bytes_to_come for one in incoming)


class _Receiver:
    """Completes one blob's ``.part`` from standard input and renames it once its whole digest is right."""

    def __init__(self, store: Store, console: Console, incoming: _Incoming) -> None:
        self._store, self._console, self._incoming = store, console, incoming
        self._blob = incoming.blob
        self._digest = hashlib.sha256()
        self._said = time.monotonic()
        self._came = 0

    def receive(self) -> None:
        """Raises ``interrupted`` (the part stays), ``digest-mismatch`` (the part goes), ``no-space``."""
        part = self._store.part_path(self._blob.sha256)
        with _open_part(self._store, self._blob) as fd, _refusing(self._blob):
            hashed = 0
            for offset, length, digest, place in self._steps():
                self._hash_held(fd, hashed, offset)
                if place is None:
                    self._take(fd, offset, length)
                else:
                    self._copy(fd, offset, length, digest, place)
                hashed = offset + length
            self._hash_held(fd, hashed, self._blob.size)
            if self._digest.hexdigest() != self._blob.sha256:
                _discard(part)
                raise Refused(
                    "digest-mismatch",
                    "blob {}: the bytes that arrived have the SHA-256 {}".format(self._blob.sha256, self._digest.hexdigest()),
                    "verify the bundle on the host, then deploy it again",
                )
            with self._console.heartbeat():  # a slow card may take longer to write than the host waits in silence
                os.fsync(fd)
            os.rename(str(part), str(self._store.blob_path(self._blob.sha256)))

    def _steps(self) -> Iterator[Tuple[int, int, bytes, Optional[Place]]]:
        """What is to be taken (no place) or copied, by offset."""
        runs: List[Tuple[int, int, bytes, Optional[Place]]] = [(at, length, b"", None) for at, length in self._incoming.runs]
        return iter(sorted(runs + list(self._incoming.copies), key=lambda step: step[0]))

    def _hash_held(self, fd: int, start: int, end: int) -> None:
        while start < end:
            chunk = os.pread(fd, min(CHUNK, end - start), start)
            if not chunk:
                raise Refused("io-error", "{}.part shrank while it was read".format(self._blob.sha256))
            self._digest.update(chunk)
            start += len(chunk)
            self._tell(start)

    def _take(self, fd: int, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            chunk = self._console.read_some(min(CHUNK, end - offset), "receiving a blob", IDLE_S)
            if not chunk:
                raise Refused(
                    "interrupted",
                    "the host stopped after {:,} of {:,} bytes of blob {}".format(
                        self._came, self._incoming.bytes_to_come, self._blob.sha256
                    ),
                    "deploy again: what arrived is kept",
                )
            self._digest.update(chunk)
            _write_at(fd, chunk, offset)
            offset += len(chunk)
            self._came += len(chunk)
            self._tell(offset)

    def _copy(self, fd: int, offset: int, length: int, digest: bytes, place: Place) -> None:
        sha256, at = place
        if sha256 == self._blob.sha256:
            data = os.pread(fd, length, at)
        else:
            source = self._store.open_regular(self._store.blob_path(sha256))
            try:
                data = os.pread(source, length, at)
            finally:
                os.close(source)
        if len(data) != length or digest_chunk(data) != digest:
            raise Refused(
                "bad-chunks",
                "blob {} does not hold at byte {:,} what the chunk index says".format(sha256, at),
                "build the bundle again",
            )
        self._digest.update(data)
        _write_at(fd, data, offset)

    def _tell(self, done: int) -> None:
        now = time.monotonic()
        if now - self._said >= 0.25:
            self._said = now
            _say(self._console, "receive", done, self._blob)
