"""Where blobs are cut, and the index of it: the same everywhere, and strict about every number."""

from __future__ import annotations

import hashlib
import random
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_agents import chunks as device
from device_agents.codec import WireError
from edgevit.chunks import MAX_BYTES, MIN_BYTES, NORMAL_BYTES, find_cuts, gear_table, make_index


def cut_plainly(data: bytes) -> list[int]:
    """FastCDC as its paper writes it, a byte at a time."""
    gear, cuts, start = [int(word) for word in gear_table()], [], 0
    while len(data) - start > MIN_BYTES:
        most = min(MAX_BYTES, len(data) - start)
        end, word = start + most, 0
        for at in range(start + MIN_BYTES - 32, start + most - 1):
            word = (word << 1) + gear[data[at]] & 0xFFFFFFFF
            length = at + 1 - start
            if length >= MIN_BYTES and word >> (16 if length < NORMAL_BYTES else 20) == 0:
                end = at + 1
                break
        cuts.append(end)
        start = end
    return cuts if start == len(data) else [*cuts, len(data)]


def test_the_cuts_are_those_of_the_plain_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the data spans several of the blocks in which it is hashed, and where it repeats."""
    monkeypatch.setattr("edgevit.chunks.BLOCK_BYTES", 100_000)
    data = random.Random(5).randbytes(400_000) + bytes(150_000) + b"edge" * 20_000
    assert find_cuts(data) == cut_plainly(data)


def test_the_gear_table_is_fixed() -> None:
    """Another table would cut everything elsewhere, and devices would share nothing with what they hold."""
    assert hashlib.sha256(gear_table().astype("<u4").tobytes()).hexdigest()[:16] == GEAR_DIGEST


GEAR_DIGEST = "5ced72da381e20ee"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 300_000), st.integers(1, 256))
def test_chunks_lie_end_to_end_and_keep_their_limits(seed: int, size: int, letters: int) -> None:
    draw = random.Random(seed)
    data = bytes(draw.choices(range(letters), k=size)) if letters < 256 else draw.randbytes(size)
    cuts = find_cuts(data)
    lengths = [end - start for start, end in zip([0, *cuts], cuts, strict=False)]
    assert cuts[-1] == size and all(MIN_BYTES <= n <= MAX_BYTES for n in lengths[:-1]) and 0 < lengths[-1] <= MAX_BYTES


def test_bytes_put_in_move_all_later_cuts_with_them() -> None:
    data = random.Random(1).randbytes(2_000_000)
    moved = {end - 7 for end in find_cuts(data[:1000] + b"foreign" + data[1000:])}
    same = moved & set(find_cuts(data))
    assert len(same) >= len(find_cuts(data)) - 3


blobs = st.dictionaries(st.binary(min_size=1, max_size=9_000), st.none(), min_size=1, max_size=6)


def index_of(contents: dict[bytes, None]) -> bytes:
    return make_index({hashlib.sha256(data).hexdigest(): data for data in contents})


@settings(max_examples=40, deadline=None)
@given(blobs)
def test_an_index_reads_back_as_what_the_bytes_are(contents: dict[bytes, None]) -> None:
    index = device.parse_chunk_index(index_of(contents))
    assert set(index) == {hashlib.sha256(data).hexdigest() for data in contents}
    for data in contents:
        cut = index[hashlib.sha256(data).hexdigest()]
        assert cut.size == len(data)
        assert b"".join(data[at : at + n] for at, n, _ in cut) == data
        assert all(device.digest_chunk(data[at : at + n]) == digest for at, n, digest in cut)


@settings(max_examples=300, deadline=None)
@given(blobs, st.data())
def test_a_damaged_index_is_refused_or_still_holds_its_limits(contents: dict[bytes, None], data: st.DataObject) -> None:
    damaged = bytearray(index_of(contents))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
        if not damaged:
            break
    try:
        index = device.parse_chunk_index(bytes(damaged))
    except WireError:
        return
    for cut in index.values():
        end = 0
        for offset, length, digest in cut:
            assert offset == end and 0 < length <= device.MAX_CHUNK_BYTES and len(digest) == device.DIGEST_BYTES
            end += length
        assert end == cut.size > 0


def entry(sha256: bytes, size: int, *lengths: int, count: int | None = None) -> bytes:
    head = struct.pack("<32sQI", sha256, size, len(lengths) if count is None else count)
    return head + b"".join(struct.pack("<16sI", b"d" * 16, n) for n in lengths)


A, B = b"a" * 32, b"b" * 32


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "begins with"),
        (b"EDGEVIT-CHUNKS2\n", "begins with"),
        (device.MAGIC + entry(A, 5, 2, 2), "sum to 4"),
        (device.MAGIC + entry(A, 0), "sum to 0"),
        (device.MAGIC + entry(A, 2**63, *[65536] * 3), "sum to"),
        (device.MAGIC + entry(A, 5, 5, 0), "0 bytes"),
        (device.MAGIC + entry(A, 65537, 65537), "65,537 bytes"),
        (device.MAGIC + entry(A, 5, 5, count=2), "more than the index holds"),
        (device.MAGIC + entry(A, 5, 5, count=2**32 - 1), "more than the index holds"),
        (device.MAGIC + entry(A, 5, 5) + b"x", "ends within an entry"),
        (device.MAGIC + entry(B, 5, 5) + entry(A, 5, 5), "out of order"),
        (device.MAGIC + entry(A, 5, 5) + entry(A, 5, 5), "named twice"),
        (device.MAGIC + bytes(device.MAX_INDEX_BYTES), "at most"),
    ],
)
def test_an_index_with_a_wrong_number_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(WireError, match=says):
        device.parse_chunk_index(data)


def test_an_index_speaks_of_the_manifest_s_blobs_alone() -> None:
    data = device.MAGIC + entry(A, 5, 5)
    assert len(device.check_index(data, {A.hex(): 5})[A.hex()]) == 1
    for sizes in ({A.hex(): 6}, {B.hex(): 5}, {}):
        with pytest.raises(WireError, match="none of the manifest's"):
            device.check_index(data, sizes)


def test_a_file_is_cut_as_its_bytes_are(tmp_path: Path) -> None:
    data = random.Random(2).randbytes(100_000)
    (tmp_path / "blob").write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    assert make_index({sha256: tmp_path / "blob"}) == make_index({sha256: data})
