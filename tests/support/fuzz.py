"""Hostile bytes for everything on the device that reads what came from elsewhere: documents, signatures, arrays, job files.

Inputs are valid ones, damaged: bytes flipped, cut, doubled; JSON values exchanged for others, keys dropped, added, nested.
Whatever comes, the answer is a value or the reader's own error, soon, and nothing is written.
"""

from __future__ import annotations

import io
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from device_agents import wire
from device_agents.chunks import parse_chunk_index
from device_agents.errors import Refused
from device_agents.pixels import parse_npy
from device_agents.serve import _read_job
from device_agents.store import Store
from device_agents.verify import parse_manifest
from edgevit.chunks import make_index
from tests.support.agent_bundle import Signer, make_bundle, make_job

SLOW_S = 2.0
LONG = "0123456789abcdef" * 4
LIMIT = 1 << 20
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 2**63, 2**200, -(2**63), 1e308, -0.0, 5e-324, "", "\0", "\ud800", "é" * 500, "../../etc/passwd",
    "a" * 100_000, [], {}, [[]], {"": {}}, [None] * 2000, "NaN", "/dev/zero", "x\n{}", 0.1, "1", {"schema": "edgevit.job/1"},
)  # fmt: skip


@dataclass
class Tally:
    """How inputs were answered; ``problems`` must be empty."""

    answers: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    def text(self) -> str:
        counts = ", ".join(f"{what} {n:,}" for what, n in sorted(self.answers.items()))
        return f"{self.answers.total():,} inputs: {counts}; the slowest took {self.slowest_s:.2f} s"


@dataclass(frozen=True)
class Reader:
    """What reads, what it may raise, and valid inputs to begin with."""

    name: str
    read: Callable[[bytes], Any]
    raises: tuple[type[Exception], ...]
    seeds: tuple[bytes, ...]


def make_readers(folder: Path, signer: Signer) -> list[Reader]:
    """Every reader of untrusted bytes; ``folder`` holds a store whose queue takes job files."""
    bundle = make_bundle(signer)
    job = wire.dumps(make_job(bundle, "fuzzed"))
    store = Store(folder / "root")
    store.create()

    def read_job(data: bytes) -> Any:
        store.queue_path("fuzzed").write_bytes(data)
        found, problem = _read_job(store, "fuzzed")
        if (found is None) == (problem == ""):
            raise AssertionError(f"neither a job nor a problem: {found!r}, {problem!r}")
        return found

    return [
        Reader("job", lambda d: wire.loads(wire.Job, d, "job", LIMIT), (wire.WireError,), (job,)),
        Reader("job file", read_job, (), (job,)),
        Reader("manifest", parse_manifest, (Refused,), (bundle.manifest_bytes,)),
        Reader(
            "any document", lambda d: wire.parse_json(d, "document", LIMIT), (wire.WireError,), (job, bundle.manifest_bytes)
        ),
        Reader(
            "chunk index", parse_chunk_index, (wire.WireError,), (make_index(bundle.blobs), make_index({LONG: bytes(300_000)}))
        ),
        Reader("array", lambda d: parse_npy(d, "array"), (Refused,), tuple(_arrays())),
    ]


def _arrays() -> list[bytes]:
    found = []
    for array in (np.zeros((2, 4, 4, 3), np.uint8), np.arange(10, dtype=np.int64), np.ones((3, 5), np.float32)):
        buffer = io.BytesIO()
        np.save(buffer, array)
        found.append(buffer.getvalue())
    return found


def fuzz(readers: list[Reader], seed: int, count: int) -> Tally:
    """Feed ``count`` damaged inputs to the readers in turn."""
    draw, tally = random.Random(seed), Tally()
    for number in range(count):
        reader = readers[number % len(readers)]
        data = damage(draw, draw.choice(reader.seeds))
        began = time.monotonic()
        try:
            reader.read(data)
            tally.answers[f"{reader.name} read"] += 1
        except reader.raises:
            tally.answers[f"{reader.name} refused"] += 1
        except Exception as e:  # noqa: BLE001 - that anything else is raised is what is looked for
            tally.problems.append(f"{reader.name}, input {number}: {type(e).__name__}: {str(e)[:300]}: {data[:200]!r}")
        spent = time.monotonic() - began
        tally.slowest_s = max(tally.slowest_s, spent)
        if spent > SLOW_S:
            tally.problems.append(f"{reader.name}, input {number}: {spent:.1f} s: {data[:200]!r}")
    return tally


def damage(draw: random.Random, data: bytes) -> bytes:
    """A valid input, or one of its kind, made wrong in one to four ways."""
    if draw.random() < 0.5:
        try:
            value = json.loads(data)
        except ValueError:
            value = None
        if value is not None:
            for _ in range(draw.randint(1, 4)):
                value = change(draw, value)
            return json.dumps(value).encode("utf-8", "surrogatepass")
    found = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        damage_bytes(draw, found)
    return bytes(found)


def damage_bytes(draw: random.Random, data: bytearray) -> None:
    at = draw.randrange(len(data) + 1)
    how = draw.randrange(6)
    if how == 0 and at < len(data):
        data[at] ^= 1 << draw.randrange(8)
    elif how == 1:
        del data[at:]
    elif how == 2:
        del data[at : at + draw.randrange(1, 20)]
    elif how == 3:
        data[at:at] = draw.randbytes(draw.randrange(1, 20))
    elif how == 4:
        end = min(len(data), at + draw.randrange(1, 200))
        data[at:at] = data[at:end]
    else:
        data[at:at] = draw.choice((b"[", b"{", b'"', b"\\", b"\0", b"\xff\xfe", b"[" * 5000, b'{"a":' * 500, b"1e999", b"NaN"))


def change(draw: random.Random, value: Any) -> Any:
    """One place of a JSON value made something else."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value, key=str))
        how = draw.random()
        out = dict(value)
        if how < 0.1:
            del out[key]
        elif how < 0.2:
            out[str(draw.choice(STRANGE))[:500]] = draw.choice(STRANGE)
        else:
            out[key] = change(draw, value[key])
        return out
    if isinstance(value, list) and value and draw.random() < 0.8:
        out_list = list(value)
        at = draw.randrange(len(value))
        if draw.random() < 0.2:
            out_list[at:at] = [draw.choice(STRANGE)] * draw.choice((1, 2, 1000))
        else:
            out_list[at] = change(draw, value[at])
        return out_list
    return draw.choice(STRANGE)
