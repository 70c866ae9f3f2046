"""A device takes in only what it holds nowhere: chunks from its other blobs, from an earlier attempt, from the same bundle."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from device_agents import wire
from device_agents.chunks import parse_chunk_index
from edgevit.chunks import make_index
from tests.support.agent_bundle import (
    AgentProcess,
    AgentRefused,
    Signer,
    TinyBundle,
    install_request,
    make_bundle,
    needed_bytes,
)

SIZE = 3_000_000
CHUNK_ENDS = 2 * 2 * wire.MAX_CHUNK_BYTES


def as_it_is(index: bytes) -> bytes:
    return index


WEIGHTS = random.Random(1).randbytes(SIZE)
RETRAINED = WEIGHTS[:2_000_000] + random.Random(2).randbytes(30_000) + WEIGHTS[2_030_000:]


def bundle_of(signer: Signer, weights: bytes, version: int, **more: Any) -> TinyBundle:
    return make_bundle(signer, version=version, extra_blob=weights, **{"chunk_index": as_it_is, **more})


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fixed_bytes(bundle: TinyBundle) -> int:
    """The index itself; everything else but the weights is the same from version to version here."""
    chunks = bundle.manifest.chunks
    return chunks.size if chunks else 0


def have(agent: AgentProcess, bundle: TinyBundle) -> Any:
    chunks = bundle.manifest.chunks
    request: dict[str, Any] = {"blobs": [wire.encode(b) for b in bundle.manifest.blobs()]}
    if chunks:
        request["chunks"] = base64.b64encode(bundle.blobs[chunks.sha256]).decode()
    return agent.call("have", stdin=request)


def left_to_send(agent: AgentProcess, bundle: TinyBundle) -> int:
    told, sizes = have(agent, bundle), {b.sha256: b.size for b in bundle.manifest.blobs()}
    return sum(sizes[s] for s in told["missing"]) - sum(told["partial"].values())


def is_whole(agent: AgentProcess, data: bytes) -> bool:
    return (agent.root / "blobs" / sha256_of(data)).read_bytes() == data


def test_a_retrained_part_sends_itself_and_the_chunks_at_its_ends(agent: AgentProcess, signer: Signer) -> None:
    first, second = bundle_of(signer, WEIGHTS, 1), bundle_of(signer, RETRAINED, 2)
    agent.install(first)
    expected = left_to_send(agent, second)
    told = agent.install(second)
    assert told["received_bytes"] == expected, "the plan said otherwise"
    assert 30_000 < told["received_bytes"] < 30_000 + CHUNK_ENDS + fixed_bytes(second)
    assert is_whole(agent, RETRAINED) and is_whole(agent, WEIGHTS)
    assert agent.install(second) == {"bundle": second.digest, "installed": False, "received_bytes": 0}
    assert have(agent, second)["copied_bytes"] == 0


def test_what_two_blobs_of_one_bundle_share_is_sent_once(agent: AgentProcess, signer: Signer) -> None:
    """Also what a blob holds twice, and with bytes put in, so that nothing lies where it lay."""
    twice = b"another header" + WEIGHTS[:1_000_000] + WEIGHTS[500_000:]
    more = {"tiny-onnx-other": ("int8-weights", _with_padding(twice))}
    bundle = bundle_of(signer, WEIGHTS, 1, more=more)
    assert len({b.sha256 for b in bundle.manifest.blobs() if b.size > SIZE / 2}) == 2
    expected = left_to_send(agent, bundle)
    told = agent.install(bundle)
    assert told["received_bytes"] == expected < SIZE + 40_000 + 3 * CHUNK_ENDS
    for sha256, data in bundle.blobs.items():
        assert (agent.root / "blobs" / sha256).read_bytes() == data


def _with_padding(data: bytes) -> bytes:
    """The tiny model, with a constant that nothing reads: a large ONNX file that runs."""
    import onnx
    from onnx import numpy_helper

    from tests.support.agent_bundle import tiny_onnx

    numpy = pytest.importorskip("numpy")
    model = onnx.load_model_from_string(tiny_onnx())
    model.graph.initializer.append(numpy_helper.from_array(numpy.frombuffer(data, numpy.uint8), "unused"))
    return bytes(model.SerializeToString())


def test_a_damaged_blob_lends_only_what_is_right_of_it(agent: AgentProcess, signer: Signer) -> None:
    """The index beside it is stale then: that costs the bytes of the damaged chunks, and nothing else."""
    first, second = bundle_of(signer, WEIGHTS, 1), bundle_of(signer, RETRAINED, 2)
    agent.install(first)
    path = agent.root / "blobs" / sha256_of(WEIGHTS)
    data = bytearray(WEIGHTS)
    for at in (100_000, 2_500_000):
        data[at] ^= 1
    path.write_bytes(bytes(data))
    expected = left_to_send(agent, second)
    told = agent.install(second)
    assert expected < told["received_bytes"] <= expected + 2 * wire.MAX_CHUNK_BYTES
    assert is_whole(agent, RETRAINED)


@pytest.mark.parametrize("damage", ["index", "blob cut", "blob gone", "blob is a link"])
def test_whatever_the_disk_did_the_blob_is_right_in_the_end(
    agent: AgentProcess, signer: Signer, tmp_path: Path, damage: str
) -> None:
    first, second = bundle_of(signer, WEIGHTS, 1), bundle_of(signer, RETRAINED, 2)
    agent.install(first)
    blob = agent.root / "blobs" / sha256_of(WEIGHTS)
    assert first.manifest.chunks
    if damage == "index":
        path = agent.root / "blobs" / first.manifest.chunks.sha256
        data = bytearray(path.read_bytes())
        data[300:400] = bytes(100)
        path.write_bytes(bytes(data))
    elif damage == "blob cut":
        blob.write_bytes(WEIGHTS[:500_000])
    else:
        blob.unlink()
        if damage == "blob is a link":
            (tmp_path / "elsewhere").write_bytes(WEIGHTS)
            blob.symlink_to(tmp_path / "elsewhere")
    assert agent.install(second)["received_bytes"] == SIZE + fixed_bytes(second)
    assert is_whole(agent, RETRAINED)


def cut_off(agent: AgentProcess, bundle: TinyBundle, after: int) -> None:
    """A host that goes after so many bytes of blobs."""
    process = agent.start("install")
    assert process.stdin and process.stdout
    process.stdin.write(install_request(bundle))
    process.stdin.flush()
    left = after
    for line in process.stdout:
        message = json.loads(line)
        if message["type"] == "need":
            for data in needed_bytes(message, bundle.blobs):
                process.stdin.write(data[:left])
                left -= len(data[:left])
            if left:
                process.stdin.flush()
            else:
                process.stdin.close()
        elif message["type"] in ("result", "refusal"):
            assert message["refusal"]["code"] == "interrupted", message
    process.wait(60)


def test_a_broken_link_costs_less_than_a_chunk(agent: AgentProcess, signer: Signer) -> None:
    bundle = bundle_of(signer, WEIGHTS, 1)
    total = sum(b.size for b in bundle.manifest.blobs())
    cut_off(agent, bundle, 1_500_000)
    left = left_to_send(agent, bundle)
    assert total - 1_500_000 <= left < total - 1_500_000 + wire.MAX_CHUNK_BYTES
    cut_off(agent, bundle, 900_000)
    assert agent.install(bundle)["received_bytes"] < left - 900_000 + wire.MAX_CHUNK_BYTES
    assert is_whole(agent, WEIGHTS)


def test_a_part_that_was_damaged_meanwhile_costs_its_damaged_chunk(agent: AgentProcess, signer: Signer) -> None:
    bundle = bundle_of(signer, WEIGHTS, 1)
    cut_off(agent, bundle, 2_000_000)
    left = left_to_send(agent, bundle)
    part = agent.root / "blobs" / (sha256_of(WEIGHTS) + ".part")
    data = bytearray(part.read_bytes())
    assert len(data) == SIZE
    data[700_000] ^= 1
    part.write_bytes(bytes(data))
    assert left < agent.install(bundle)["received_bytes"] <= left + wire.MAX_CHUNK_BYTES
    assert is_whole(agent, WEIGHTS)


def test_a_part_with_holes_is_not_taken_for_a_prefix(agent: AgentProcess, signer: Signer) -> None:
    """An older bundle of the same blob has no index to check the part by: it is sent whole."""
    cut_off(agent, bundle_of(signer, WEIGHTS, 2), 2_000_000)
    old = make_bundle(signer, extra_blob=WEIGHTS)
    assert agent.install(old)["received_bytes"] > SIZE
    assert is_whole(agent, WEIGHTS)


def test_a_bundle_without_an_index_lends_nothing_and_gets_all(agent: AgentProcess, signer: Signer) -> None:
    agent.install(make_bundle(signer, extra_blob=WEIGHTS))
    new = bundle_of(signer, RETRAINED, 2)
    assert agent.install(new)["received_bytes"] == SIZE + fixed_bytes(new)
    assert agent.install(make_bundle(signer, version=3, extra_blob=RETRAINED + b"x"))["received_bytes"] == SIZE + 1
    last = bundle_of(signer, RETRAINED + b"yz", 4)
    assert agent.install(last)["received_bytes"] < fixed_bytes(last) + wire.MAX_CHUNK_BYTES


def test_copies_need_their_space_before_the_first_byte(agent: AgentProcess, signer: Signer) -> None:
    """A file system of 24 MiB has room for one blob of 5 MB beside what must stay free, not for two that share their chunks."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    blobs = agent.root / "blobs"
    agent.call("gc")
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m,mode=0700", "tmpfs", str(blobs.parent)]
    kept = agent.root.rename(agent.root.with_name("kept"))
    agent.root.mkdir()
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs CAP_SYS_ADMIN")
    try:
        shutil.copytree(kept, agent.root, dirs_exist_ok=True)
        weights = random.Random(3).randbytes(5_000_000)
        agent.install(bundle_of(signer, weights, 1))
        before = sorted(p.name for p in blobs.iterdir())
        with pytest.raises(AgentRefused) as caught:
            agent.install(bundle_of(signer, weights + b"more", 2))
        assert caught.value.code == "no-space" and sorted(p.name for p in blobs.iterdir()) == before
    finally:
        subprocess.run(["umount", str(agent.root)], check=True)


def of_others(index: bytes) -> bytes:
    return make_index({sha256_of(b"foreign"): b"foreign"})


def of_other_bytes(index: bytes) -> bytes:
    """A signed lie: the weights' entry is that of other bytes of the same length."""
    other = parse_chunk_index(make_index({sha256_of(RETRAINED): RETRAINED}))[sha256_of(RETRAINED)]
    cuts = {name: [(n, digest) for _, n, digest in cut] for name, cut in parse_chunk_index(index).items()}
    return wire.pack_chunk_index({**cuts, sha256_of(WEIGHTS): [(n, digest) for _, n, digest in other]})


@pytest.mark.parametrize(
    ("make", "code"),
    [(of_others, "bad-chunks"), (lambda index: index + b"x", "bad-chunks"), (lambda index: b"junk", "bad-chunks")],
)
def test_an_index_that_is_wrong_in_itself_is_refused(agent: AgentProcess, signer: Signer, make: Any, code: str) -> None:
    agent.install(bundle_of(signer, RETRAINED, 1))
    bundle = bundle_of(signer, WEIGHTS, 2, chunk_index=make)
    with pytest.raises(AgentRefused) as caught:
        agent.install(bundle)
    assert caught.value.code == code
    assert not (agent.root / "bundles" / bundle.digest).exists()


def test_an_index_that_lies_cannot_make_a_blob_wrong(agent: AgentProcess, signer: Signer) -> None:
    agent.install(bundle_of(signer, RETRAINED, 1))
    bundle = bundle_of(signer, WEIGHTS, 2, chunk_index=of_other_bytes)
    with pytest.raises(AgentRefused) as caught:
        agent.install(bundle)
    assert caught.value.code == "digest-mismatch"
    assert not (agent.root / "blobs" / sha256_of(WEIGHTS)).exists()
    assert not (agent.root / "bundles" / bundle.digest).exists()
    good = bundle_of(signer, WEIGHTS, 3)
    agent.install(good)
    assert is_whole(agent, WEIGHTS)


def test_questions_with_a_strange_index_are_refused(agent: AgentProcess, signer: Signer) -> None:
    blobs = [wire.encode(b) for b in bundle_of(signer, WEIGHTS, 1).manifest.blobs()]
    for chunks in ("@", base64.b64encode(b"junk").decode(), base64.b64encode(of_others(b"")).decode(), 5, None):
        with pytest.raises(AgentRefused) as caught:
            agent.call("have", stdin={"blobs": blobs, "chunks": chunks})
        assert caught.value.code == "bad-request"
