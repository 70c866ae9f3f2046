"""The cache: what is kept comes back byte for byte, what is damaged is said and made anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgevit.cache import Cache, digest_of, hash_file, tool_versions
from edgevit.errors import BuildError


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_what_is_put_comes_back(cache: Cache) -> None:
    cache.put("k", {"a": b"one", "b": b"two"}, {"n": 3})
    entry = Cache(cache.root).get("k")
    assert entry is not None
    assert {name: path.read_bytes() for name, path in entry.files.items()} == {"a": b"one", "b": b"two"}
    assert entry.meta == {"n": 3}


def test_equal_bytes_are_kept_once(cache: Cache) -> None:
    cache.put("k", {"a": b"same"}, {})
    cache.put("l", {"b": b"same"}, {})
    assert len(list((cache.root / "blobs").iterdir())) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "entry"])
def test_damage_is_found_said_and_forgotten(cache: Cache, damage: str) -> None:
    entry = cache.put("k", {"a": b"some bytes"}, {})
    path = entry.files["a"]
    if damage == "flip":
        path.write_bytes(b"sOme bytes")
    elif damage == "cut":
        path.write_bytes(b"some")
    elif damage == "remove":
        path.unlink()
    else:
        (cache.root / "entries" / "k.json").write_text("{not json")
    assert cache.get("k") is None
    assert len(cache.complaints) == 1
    assert cache.get("k") is None
    assert len(cache.complaints) == 1, "a damaged entry must not be found twice"
    assert cache.put("k", {"a": b"some bytes"}, {}).files["a"].read_bytes() == b"some bytes"
    assert cache.get("k") is not None


def test_a_failed_put_leaves_no_entry(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="cannot be written"):
        cache.put("k", {"a": b"one", "b": tmp_path / "absent"}, {})
    assert cache.get("k") is None
    assert not list(cache.root.rglob(".part-*"))


def test_file_digest_follows_the_file(cache: Cache, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    first = cache.file_digest(file)
    assert first == hash_file(file)
    assert cache.file_digest(file) == first
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert cache.file_digest(file) == hash_file(file) != first


def test_blobs_can_be_read_by_others(cache: Cache) -> None:
    path = cache.put("k", {"a": b"one"}, {}).files["a"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_digest_depends_on_every_part_and_not_on_key_order() -> None:
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    assert digest_of(["a", "b"]) != digest_of(["ab"])
    assert digest_of("a", None) != digest_of("a")


def test_tool_versions_name_what_writes_files() -> None:
    assert {"torch", "onnx", "onnxruntime", "timm"} <= set(tool_versions())
