"""What of lacking blobs lies here already, by the chunk indexes among what is stored (:mod:`device_agents.chunks`)."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any, Dict, List, Mapping, Optional, Set, Tuple

from device_agents import wire
from device_agents.chunks import MAGIC, MAX_INDEX_BYTES, BlobChunks, check_index, digest_chunk, parse_chunk_index
from device_agents.console import Console, HostGone
from device_agents.errors import Refused, refuse_os_error
from device_agents.parts import lacking_rest, open_part, part_size, refusing, write_at
from device_agents.store import Store

MOST_OPEN = 32
"""Blobs open at a time while chunks are copied from them."""

SAY_EVERY_S = 0.25

Index = Mapping[str, BlobChunks]
Place = Tuple[str, int]
"""A blob's SHA-256 and an offset in it."""


class Pace:
    """Tells the host how far a blob is, every :data:`SAY_EVERY_S` at most. Raises ``interrupted`` where the host is gone."""

    def __init__(self, console: Console, stage: str) -> None:
        self._console, self._stage = console, stage
        self._said = time.monotonic()

    def tell(self, done: int, blob: wire.Blob) -> None:
        now = time.monotonic()
        if now - self._said < SAY_EVERY_S:
            return
        self._said = now
        try:
            self._console.progress(self._stage, done, blob.size, "bytes", blob.sha256[:12])
        except HostGone as e:
            raise Refused("interrupted", "the host is gone: {}".format(e)) from e


def read_index(store: Store, chunks: wire.Blob, blobs: Tuple[wire.Blob, ...]) -> Index:
    """A stored chunk index that fits ``blobs``. Raises ``bad-chunks``."""
    try:
        return check_index(store.read_blob(chunks), {blob.sha256: blob.size for blob in blobs})
    except wire.WireError as e:
        raise Refused("bad-chunks", "blob {}: {}".format(chunks.sha256, e), "build the bundle again") from e


class Incoming:
    """One blob to be received: ``runs`` are the (offset, length) that the host sends, ``copies`` the chunks, as (offset,
    length, digest, place), to be copied from where they will lie by then: in a blob that comes before it, or further up in
    this one. ``in_chunks``: its part has its full length already; else it is a prefix, and there is one run at most."""

    def __init__(self, blob: wire.Blob, runs: List[Tuple[int, int]], *, in_chunks: bool = False) -> None:
        self.blob = blob
        self.runs = runs
        self.copies: List[Tuple[int, int, bytes, Place]] = []
        self.in_chunks = in_chunks

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
        wanted: Set[bytes] = set()
        for blob in lacking:
            wanted.update(digest for _, _, digest in index.get(blob.sha256, ()))
        self._places = find_chunks(store, wanted)
        self._coming: Dict[bytes, Place] = {}

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def prepare(self, blob: wire.Blob, pace: Pace) -> Incoming:
        """Copy what lies here into the blob's part, and say what is still to come."""
        cut = self._index.get(blob.sha256)
        if cut is None:
            return Incoming(blob, lacking_rest(self._store, blob))
        incoming = Incoming(blob, [], in_chunks=True)
        with open_part(self._store, blob) as fd, refusing(blob):
            kept = os.fstat(fd).st_size > 0
            os.ftruncate(fd, blob.size)
            for offset, length, digest in cut:
                if not (kept and _holds(fd, offset, length, digest)) and not self._copy(fd, offset, length, digest):
                    self._await(incoming, offset, length, digest)
                self._coming.setdefault(digest, (blob.sha256, offset))
                pace.tell(offset + length, blob)
        return incoming

    def survey(self, blob: wire.Blob) -> Tuple[int, int]:
        """(Bytes of it that need not be sent, those of them that would be copied), by what the indexes say; changes nothing."""
        cut = self._index.get(blob.sha256)
        if cut is None:
            there = part_size(self._store, blob)
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
        write_at(fd, data, offset)
        return True

    def _descriptor(self, sha256: str) -> int:
        if sha256 not in self._open:
            if len(self._open) >= MOST_OPEN:
                self.close()
            self._open[sha256] = self._store.open_regular(self._store.blob_path(sha256))
        return self._open[sha256]

    def _await(self, incoming: Incoming, offset: int, length: int, digest: bytes) -> None:
        """What an earlier blob of the same request will hold, or this one further up, is copied from there once it stands."""
        before = self._coming.get(digest)
        if before is None:
            incoming.add_run(offset, length)
        else:
            incoming.copies.append((offset, length, digest, before))


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
