"""The content-addressed cache: entries keyed by digests of inputs and tool versions, files known by their own SHA-256.

::

    cache/entries/<key>.json     {"schema", "files": {name: [sha256, size]}, "meta": {…}}
    cache/blobs/<sha256>         the bytes, written once whatever the number of entries that name them
    cache/digests/<key>.json     SHA-256 of a person's file, known again by its path, size and modification time

Everything is written to a temporary name, fsynced and renamed, so a killed process leaves no half entry. A blob is hashed
again whenever it is handed out: one that does not match is thrown away and what it held is made anew.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from edgevit import places
from edgevit.errors import BuildError

SCHEMA = "edgevit.cache/1"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Entry:
    """What one key stands for: files by name (each verified just now) and JSON values."""

    key: str
    files: Mapping[str, Path]
    meta: Mapping[str, Any]


@dataclass
class Cache:
    """The cache under ``root``. ``complaints`` collects what was found damaged, for the caller to say."""

    root: Path = field(default_factory=places.cache_dir)
    complaints: list[str] = field(default_factory=list)

    def get(self, key: str) -> Entry | None:
        """The entry under ``key`` with every file's SHA-256 checked, or None where it is absent or damaged."""
        path = self._entry(key)
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            named = {str(n): (str(s), int(size)) for n, (s, size) in document["files"].items()}
            if document["schema"] != SCHEMA:
                return None
            meta = dict(document["meta"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as e:
            self._complain(f"the cache entry {path.name} could not be read ({e}); it is made anew", path)
            return None
        files = {}
        for name, (sha256, size) in named.items():
            blob = self.blob_path(sha256)
            if not blob.is_file() or blob.stat().st_size != size or hash_file(blob) != sha256:
                self._complain(f"the cached file {name} ({sha256[:12]}) is damaged or gone; it is made anew", path, blob)
                return None
            files[name] = blob
        return Entry(key, files, meta)

    def put(self, key: str, files: Mapping[str, Path | bytes], meta: Mapping[str, Any]) -> Entry:
        """Keep ``files`` and ``meta`` under ``key``; the entry is written last."""
        try:
            stored = {name: self.add_blob(content) for name, content in files.items()}
            document = {"schema": SCHEMA, "files": {n: [s, size] for n, (s, size) in stored.items()}, "meta": dict(meta)}
            _write_atomically(self._entry(key), json.dumps(document, sort_keys=True).encode("utf-8"))
        except OSError as e:
            raise BuildError(f"the cache at {self.root} cannot be written: {e}", hint="edgevit doctor") from e
        return Entry(key, {n: self.blob_path(s) for n, (s, _) in stored.items()}, dict(meta))

    def add_blob(self, content: Path | bytes) -> tuple[str, int]:
        """Keep bytes by their SHA-256; returns it with the size in bytes."""
        data = content if isinstance(content, bytes) else content.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        path = self.blob_path(sha256)
        if not path.is_file() or path.stat().st_size != len(data):
            _write_atomically(path, data)
        return sha256, len(data)

    def blob_path(self, sha256: str) -> Path:
        return self.root / "blobs" / sha256

    def file_digest(self, path: Path) -> str:
        """SHA-256 of a person's file, taken from the cache where path, size and modification time are unchanged."""
        status = path.stat()
        stamp = [str(path.absolute()), status.st_size, status.st_mtime_ns]
        memo = self.root / "digests" / f"{digest_of('file', stamp[0])}.json"
        try:
            known = json.loads(memo.read_text(encoding="utf-8"))
            if known["stamp"] == stamp:
                return str(known["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # Not known yet, or unreadable: hashing the file again is the answer to both.
        sha256 = hash_file(path)
        try:
            _write_atomically(memo, json.dumps({"stamp": stamp, "sha256": sha256}).encode("utf-8"))
        except OSError as e:
            raise BuildError(f"the cache at {self.root} cannot be written: {e}", hint="edgevit doctor") from e
        return sha256

    def _entry(self, key: str) -> Path:
        return self.root / "entries" / f"{key}.json"

    def _complain(self, text: str, *gone: Path) -> None:
        self.complaints.append(text)
        for path in gone:
            path.unlink(missing_ok=True)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of(*parts: Any) -> str:
    """SHA-256 over the canonical JSON of ``parts``; paths and other types go in as their text."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


@lru_cache(maxsize=1)
def tool_versions() -> dict[str, str]:
    """Version of every installed tool that can change what a build writes, read without importing any of them."""
    names = [
        "edgevit",
        "torch",
        "torchvision",
        "timm",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "numpy",
        "pillow",
        "litert-torch",
        "ai-edge-litert",
        "ai-edge-quantizer",
        "torch-pruning",
    ]
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o644)  # Bundles hard-link these; a temporary file's own mode is for its owner alone.
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
