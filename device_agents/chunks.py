"""The chunk index of a bundle: how each of its blobs is cut, so that a device is sent only chunks that it holds nowhere.

A blob like any other, named by the manifest, so that the manifest's signature covers it::

    b"EDGEVIT-CHUNKS1\\n"                          16 bytes
    for each blob, by rising digest:
        SHA-256 (32 bytes), size (u64), chunks (u32)
        for each chunk, in order: the first 16 bytes of its SHA-256, its length (u32)

All numbers are little-endian. Chunks lie end to end from offset 0, so that offsets rise and cannot overlap. The index only
tells where to look: chunks are compared by digest when they are copied, and the SHA-256 of the whole blob decides what is
stored.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Dict, Iterable, Iterator, List, Mapping, Tuple

from device_agents.codec import WireError

MAGIC = b"EDGEVIT-CHUNKS1\n"
MAX_CHUNK_BYTES = 64 * 1024
MAX_INDEX_BYTES = 16 * 1024 * 1024
DIGEST_BYTES = 16

_HEAD = struct.Struct("<32sQI")
_CHUNK = struct.Struct("<16sI")


class BlobChunks:
    """How one blob is cut. Iterating gives (offset, length, digest) of each chunk, offsets rising from 0 to ``size``."""

    def __init__(self, size: int, table: bytes) -> None:
        self.size = size
        self._table = table

    def __iter__(self) -> Iterator[Tuple[int, int, bytes]]:
        offset = 0
        for digest, length in _CHUNK.iter_unpack(self._table):
            yield offset, length, digest
            offset += length

    def __len__(self) -> int:
        return len(self._table) // _CHUNK.size


def digest_chunk(data: bytes) -> bytes:
    """What the index knows a chunk by: the first 16 bytes of its SHA-256."""
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]


def pack_chunk_index(cuts: Mapping[str, Iterable[Tuple[int, bytes]]]) -> bytes:
    """(length, digest) of each chunk, by the blob's SHA-256 → the index's bytes."""
    parts: List[bytes] = [MAGIC]
    for sha256 in sorted(cuts):
        chunks = list(cuts[sha256])
        parts.append(_HEAD.pack(bytes.fromhex(sha256), sum(length for length, _ in chunks), len(chunks)))
        parts += [_CHUNK.pack(digest, length) for length, digest in chunks]
    return b"".join(parts)


def parse_chunk_index(data: bytes) -> Dict[str, BlobChunks]:
    """Untrusted bytes → how each blob is cut, by its SHA-256; :class:`WireError` where anything is out of its limits."""
    if len(data) > MAX_INDEX_BYTES:
        raise WireError("chunk index", "{:,} bytes, at most {:,} are accepted".format(len(data), MAX_INDEX_BYTES))
    if data[: len(MAGIC)] != MAGIC:
        raise WireError("chunk index", "begins with {!r}, expected {!r}".format(data[: len(MAGIC)], MAGIC))
    found: Dict[str, BlobChunks] = {}
    at, last = len(MAGIC), b""
    while at < len(data):
        if len(data) - at < _HEAD.size:
            raise WireError("chunk index", "ends within an entry at byte {:,}".format(at))
        sha256, size, count = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        name = sha256.hex()
        if sha256 <= last:
            raise WireError("chunk index", "blob {} is out of order or named twice".format(name))
        if count * _CHUNK.size > len(data) - at:
            raise WireError("chunk index", "blob {} has {:,} chunks, more than the index holds".format(name, count))
        chunks = BlobChunks(size, data[at : at + count * _CHUNK.size])
        _check_lengths(name, chunks)
        found[name], last = chunks, sha256
        at += count * _CHUNK.size
    return found


def check_index(data: bytes, sizes: Mapping[str, int]) -> Dict[str, BlobChunks]:
    """:func:`parse_chunk_index` for an index that may speak of no other blobs than these, of these sizes."""
    index = parse_chunk_index(data)
    for name, chunks in index.items():
        if sizes.get(name) != chunks.size:
            raise WireError("chunk index", "blob {} of {:,} bytes is none of the manifest's".format(name, chunks.size))
    return index


def _check_lengths(name: str, chunks: BlobChunks) -> None:
    end = 0
    for offset, length, _ in chunks:
        if not 0 < length <= MAX_CHUNK_BYTES:
            raise WireError(
                "chunk index", "blob {}: a chunk of {:,} bytes, expected 1 to {:,}".format(name, length, MAX_CHUNK_BYTES)
            )
        end = offset + length
    if end != chunks.size or not end:
        raise WireError("chunk index", "blob {}: its chunks sum to {:,} bytes, its size is {:,}".format(name, end, chunks.size))
