"""Blobs on their way in: what is lacking, what of it lies here already, and the rest from standard input.

A blob that a chunk index describes is put together in its ``.part``, at full length from the start: chunks that an earlier
attempt left there, chunks of blobs that are stored (:mod:`device_agents.assembly`), and what the host sends. Any other blob's
``.part`` is a prefix. Either way the SHA-256 of the whole decides before it is renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from typing import Iterator, List, Optional, Tuple

from device_agents import wire
from device_agents.assembly import Assembly, Incoming, Index, Pace, Place, read_index
from device_agents.chunks import digest_chunk
from device_agents.console import CHUNK, Console
from device_agents.errors import Refused
from device_agents.parts import allocated, discard, lacking_rest, open_part, refusing, write_at
from device_agents.store import Store

SPARE_BYTES = 16 * 1024 * 1024
"""Left free on the device's disk beyond the blobs themselves."""

IDLE_S = 25.0
"""A host that sends nothing for so long is gone (it gives a silent device up sooner); it resumes where it stopped."""

LOCK_WAIT_S = 40.0
"""Longer than :data:`IDLE_S`, so a predecessor whose link broke has given up by then."""


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
            received = _receive(store, console, [Incoming(chunks, lacking_rest(store, chunks))], last=lacking == [chunks])
            lacking.remove(chunks)
            if not lacking:
                return received, False
        index = read_index(store, chunks, blobs)
    with console.heartbeat(), contextlib.closing(Assembly(store, index, lacking)) as assembly:
        pace = Pace(console, "reuse")
        incoming = [assembly.prepare(blob, pace) for blob in lacking]
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
            discard(store.blob_path(blob.sha256))
            lacking.append(blob)
    return lacking


def _check_space(store: Store, lacking: List[wire.Blob], what: str, beyond_bytes: int) -> None:
    wanted = sum(blob.size - allocated(store, blob) for blob in lacking) + beyond_bytes
    free = store.free_bytes()
    if wanted and wanted + SPARE_BYTES > free:
        raise Refused(
            "no-space",
            "{} needs {:,} bytes and {:,} to spare, {:,} are free in {}".format(what, wanted, SPARE_BYTES, free, store.root),
            "edgevit target prune TARGET, or make room on the device",
        )


def _receive(store: Store, console: Console, incoming: List[Incoming], last: bool) -> int:
    """Say what is needed, and take it. ``last``: nothing more will be asked for."""
    needs = [one.need() for one in incoming]
    console.emit({"type": "need", "blobs": needs, "free_bytes": store.free_bytes(), "last": last})
    for one in incoming:
        _Receiver(store, console, one).receive()
        console.emit({"type": "stored", "sha256": one.blob.sha256})
    return sum(one.bytes_to_come for one in incoming)


class _Receiver:
    """Completes one blob's ``.part`` from standard input and renames it once its whole digest is right."""

    def __init__(self, store: Store, console: Console, incoming: Incoming) -> None:
        self._store, self._console, self._incoming = store, console, incoming
        self._blob = incoming.blob
        self._digest = hashlib.sha256()
        self._pace = Pace(console, "receive")
        self._came = 0

    def receive(self) -> None:
        """Raises ``interrupted`` (the part stays), ``digest-mismatch`` (the part goes), ``no-space``."""
        part = self._store.part_path(self._blob.sha256)
        with open_part(self._store, self._blob) as fd, refusing(self._blob):
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
                discard(part)
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
            self._pace.tell(start, self._blob)

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
            write_at(fd, chunk, offset)
            offset += len(chunk)
            self._came += len(chunk)
            self._pace.tell(offset, self._blob)

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
        write_at(fd, data, offset)
