"""Bundles on disk: ``DIR/manifest.json``, ``DIR/manifest.json.sig`` and ``DIR/blobs/<sha256>``; nothing else, and no links.

A bundle is written beside its place and moved there whole. Opening one checks everything before anything of it is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from device_agents import sshsig, wire
from device_agents.errors import Refused
from device_agents.verify import parse_manifest, verify_manifest
from edgevit.durable import sync_folder
from edgevit.errors import BundleError, UsageError

MANIFEST, SIGNATURE, BLOBS = "manifest.json", "manifest.json.sig", "blobs"
AGAIN = "copy or build the bundle again"
CHUNK = 1 << 20


@dataclass(frozen=True)
class Bundle:
    """A bundle whose every file was checked. ``digest`` is the SHA-256 of ``manifest_bytes`` and its identity everywhere.

    ``signer`` is the name that the signers file gives the key, or empty where no signers were asked about.
    """

    path: Path
    manifest: wire.Manifest
    manifest_bytes: bytes
    signature: bytes
    digest: str
    signer: str = ""

    def blob_path(self, sha256: str) -> Path:
        """Where a blob of the manifest lies. BundleError for any other digest."""
        if sha256 not in {blob.sha256 for blob in self.manifest.blobs()}:
            raise BundleError(f"{self.path}: the manifest has no blob {sha256[:80]!r}")
        return self.path / BLOBS / sha256

    def read_chunk_index(self) -> bytes:
        """The chunk index; empty where the bundle is of before there was one."""
        if self.manifest.chunks is None:
            return b""
        return _read_file(self.blob_path(self.manifest.chunks.sha256), self.manifest.chunks.size)


# --------------------------------------------------------------------------------------------------------------------
# Opening
# --------------------------------------------------------------------------------------------------------------------


def open_bundle(path: Path, signers: Path | None) -> Bundle:
    """Read and check a bundle: sizes, the signature's form, the signature against ``signers`` where given, every digest.

    BundleError names the file and what is wrong with it; UsageError where ``path`` holds no bundle or several.
    """
    _check_is_bundle(path)
    manifest_bytes = _read_file(path / MANIFEST, wire.MAX_MANIFEST_BYTES)
    signature = _read_file(path / SIGNATURE, wire.MAX_SIGNATURE_BYTES)
    manifest, signer = _verify(path, manifest_bytes, signature, signers)
    _check_entries(path, {MANIFEST, SIGNATURE, BLOBS})
    folder = path / BLOBS
    if not stat.S_ISDIR(_lstat(folder).st_mode):
        raise BundleError(f"{folder}: not a directory")
    _check_entries(folder, {blob.sha256 for blob in manifest.blobs()})
    for blob in manifest.blobs():
        _check_blob(folder / blob.sha256, blob)
    _check_chunk_index(folder, manifest)
    return Bundle(path, manifest, manifest_bytes, signature, hashlib.sha256(manifest_bytes).hexdigest(), signer)


def _check_is_bundle(path: Path) -> None:
    if not path.is_dir():
        raise UsageError(f"{path}: no such bundle directory", hint="edgevit build … -o DIR")
    if os.path.lexists(path / MANIFEST):
        return
    inside = sorted(p.parent for p in path.glob(f"*/{MANIFEST}"))
    if inside:
        listed = ", ".join(str(p) for p in inside[:20])
        raise UsageError(f"{path} holds {len(inside)} bundle(s), not one: {listed}", hint=f"name one of them: {inside[0]}")
    raise UsageError(f"{path}: no bundle there (there is no {MANIFEST})", hint="edgevit build … -o DIR")


def _verify(path: Path, manifest_bytes: bytes, signature: bytes, signers: Path | None) -> tuple[wire.Manifest, str]:
    try:
        if signers is None:
            sshsig.parse_signature(signature)
            return parse_manifest(manifest_bytes), ""
        with tempfile.TemporaryDirectory(prefix="edgevit-") as scratch:
            checker = sshsig.SshKeygenChecker(signers, Path(scratch))
            verified = verify_manifest(manifest_bytes, signature, checker)
        return verified.manifest, verified.signer
    except Refused as e:
        if e.code == "no-ssh-keygen":
            raise UsageError(str(e), hint="sudo apt install openssh-client") from e
        if e.code == "no-signers":
            raise UsageError(f"{signers} names no signer", hint="edgevit key make") from e
        raise BundleError(f"{path}: {e.code}: {e}", hint=_HINTS.get(e.code, e.hint)) from e


_HINTS = {
    "unknown-signer": "if you trust that key, add its line to the signers file: edgevit verify BUNDLE --signers FILE",
    "bad-signature": AGAIN,
    "bad-manifest": AGAIN,
    "newer-schema": "pip install --upgrade edgevit",
    "agent-too-old": "pip install --upgrade edgevit",
}


def _lstat(path: Path) -> os.stat_result:
    try:
        return path.lstat()
    except FileNotFoundError as e:
        raise BundleError(f"{path}: missing", hint=AGAIN) from e
    except OSError as e:
        raise BundleError(f"{path}: {e.strerror}") from e


def _open_regular(path: Path) -> int:
    """A descriptor of a regular file that is no link; O_NONBLOCK so that a FIFO put there cannot hold us."""
    if not stat.S_ISREG(_lstat(path).st_mode):
        raise BundleError(f"{path}: not a regular file (a link, folder or device has no place in a bundle)", hint=AGAIN)
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        raise BundleError(f"{path}: cannot be read: {e.strerror}") from e


def _read_file(path: Path, limit: int) -> bytes:
    with os.fdopen(_open_regular(path), "rb") as f:
        size = os.fstat(f.fileno()).st_size
        data = f.read(limit + 1) if size <= limit else b""
    if size > limit or len(data) > limit:
        raise BundleError(f"{path}: {size:,} bytes, at most {limit:,} are read", hint=AGAIN)
    return data


def _check_entries(folder: Path, expected: set[str]) -> None:
    try:
        found = {entry.name for entry in os.scandir(folder)}
    except OSError as e:
        raise BundleError(f"{folder}: cannot be listed: {e.strerror}") from e
    foreign, missing = sorted(found - expected), sorted(expected - found)
    if missing:
        raise BundleError(f"{folder}: missing: {', '.join(missing[:5])}", hint=AGAIN)
    if foreign:
        raise BundleError(f"{folder}: files that the manifest does not name: {', '.join(foreign[:5])}", hint="remove them")


def _check_blob(path: Path, blob: wire.Blob) -> None:
    with os.fdopen(_open_regular(path), "rb") as f:
        size = os.fstat(f.fileno()).st_size
        if size != blob.size:
            raise BundleError(f"{path}: {size:,} bytes, the manifest says {blob.size:,}", hint=AGAIN)
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != blob.sha256:
        raise BundleError(f"{path}: its SHA-256 is {digest}, not what its name and the manifest say", hint=AGAIN)


def _check_chunk_index(folder: Path, manifest: wire.Manifest) -> None:
    if manifest.chunks is None:
        return
    path = folder / manifest.chunks.sha256
    try:
        wire.check_index(_read_file(path, wire.MAX_INDEX_BYTES), {blob.sha256: blob.size for blob in manifest.blobs()})
    except wire.WireError as e:
        raise BundleError(f"{path}: {e}", hint="build the bundle again") from e


# --------------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------------


def write_bundle(
    out: Path, manifest: wire.Manifest, blobs: Mapping[str, Path | bytes], sign: Callable[[bytes], bytes]
) -> Bundle:
    """Write a signed bundle to the directory ``out``; it appears there whole or not at all.

    ``blobs`` maps each digest of the manifest to its bytes or to a file that holds them (hard-linked where that works).
    Where ``out`` holds a bundle with the same manifest but for ``version``, it is left as it is and returned, signed anew where
    another key signs now; an older bundle of the same name is replaced; anything else there is a UsageError. BundleError where
    a blob is not what the manifest says.
    """
    wanted = manifest.blobs()
    missing = [blob.sha256 for blob in wanted if blob.sha256 not in blobs]
    if missing:
        raise BundleError(f"{out}: the manifest names blobs that were not made: {', '.join(missing[:5])}")
    existing = _existing(out, manifest)
    if existing is not None and _same_but_version(existing.manifest, manifest):
        return _signed(existing, sign)
    manifest_bytes = wire.dumps(manifest)
    if len(manifest_bytes) > wire.MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{out}: the manifest has {len(manifest_bytes):,} bytes, at most {wire.MAX_MANIFEST_BYTES:,} can be shipped"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.part-"))
    except OSError as e:
        raise BundleError(f"{out}: cannot be written: {e.strerror or e}", hint="give another -o DIR") from e
    try:
        part.chmod(0o755)
        (part / BLOBS).mkdir()
        for blob in wanted:
            _place(part / BLOBS / blob.sha256, blobs[blob.sha256])
            _check_blob(part / BLOBS / blob.sha256, blob)
        signature = sign(manifest_bytes)
        _write_synced(part / SIGNATURE, signature)
        _write_synced(part / MANIFEST, manifest_bytes)
        for folder in (part / BLOBS, part):
            sync_folder(folder)
        _move_into_place(part, out)
    except OSError as e:
        raise BundleError(f"{out}: cannot be written: {e.strerror or e}", hint=f"df -h {out.parent}") from e
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Bundle(out, manifest, manifest_bytes, signature, hashlib.sha256(manifest_bytes).hexdigest())


def _signed(existing: Bundle, sign: Callable[[bytes], bytes]) -> Bundle:
    """``existing`` with the signature that ``sign`` gives, in one rename where it has another."""
    signature = sign(existing.manifest_bytes)
    if signature == existing.signature:
        return existing
    out = existing.path
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.part-") as part:
            _write_synced(Path(part) / SIGNATURE, signature)
            (Path(part) / SIGNATURE).replace(out / SIGNATURE)
        sync_folder(out)
    except OSError as e:
        raise BundleError(f"{out}: cannot be written: {e.strerror or e}", hint="give another -o DIR") from e
    return dataclasses.replace(existing, signature=signature)


def verify_place(out: Path, name: str) -> None:
    """Raises UsageError where ``out`` is neither free nor the place of a bundle called ``name``, which may be replaced."""
    if not os.path.lexists(out):
        return
    if not out.is_dir() or out.is_symlink():
        raise UsageError(f"{out} is there and is not a directory", hint="give another -o DIR")
    if not any(out.iterdir()):
        return
    foreign = sorted({entry.name for entry in out.iterdir()} - {MANIFEST, SIGNATURE, BLOBS})
    try:
        older = parse_manifest(_read_file(out / MANIFEST, wire.MAX_MANIFEST_BYTES))
    except (BundleError, Refused) as e:
        raise UsageError(f"{out} is not empty and holds no bundle that may be replaced: {e}", hint="give another -o DIR") from e
    if foreign:
        raise UsageError(f"{out} holds files that belong to no bundle: {', '.join(foreign[:5])}", hint="give another -o DIR")
    if older.name != name:
        raise UsageError(f"{out} holds the bundle {older.name!r}, not {name!r}", hint="give another -o DIR")


def _existing(out: Path, manifest: wire.Manifest) -> Bundle | None:
    """The bundle in ``out``; None where it is free or holds a damaged one of the same name; else UsageError."""
    verify_place(out, manifest.name)
    if not os.path.lexists(out) or not any(out.iterdir()):
        return None
    try:
        return open_bundle(out, None)
    except BundleError:
        return None


def _same_but_version(a: wire.Manifest, b: wire.Manifest) -> bool:
    return dataclasses.replace(a, version=1) == dataclasses.replace(b, version=1)


def _place(path: Path, source: Path | bytes) -> None:
    if isinstance(source, bytes):
        _write_synced(path, source)
        return
    # A link is as good as a copy: blobs are never changed, and each is hashed right after this.
    with contextlib.suppress(OSError):
        os.link(source, path, follow_symlinks=False)
        if stat.S_ISREG(path.lstat().st_mode):
            return
        path.unlink()
    with source.open("rb") as from_file, path.open("xb") as to_file:
        shutil.copyfileobj(from_file, to_file, CHUNK)
        to_file.flush()
        os.fsync(to_file.fileno())


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _move_into_place(part: Path, out: Path) -> None:
    """Rename; an older bundle is moved aside first and goes only once the new one stands."""
    if out.is_dir() and any(out.iterdir()):
        aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old-"))
        out.rename(aside / "old")
        part.rename(out)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        part.rename(out)
    sync_folder(out.parent)
