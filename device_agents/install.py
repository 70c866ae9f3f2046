"""``have`` and ``install``: bundles arrive on standard input, are hashed meanwhile, and appear at once or not at all."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

from device_agents import wire
from device_agents.console import CHUNK, Console, HostGone
from device_agents.errors import Refused, refuse_os_error
from device_agents.root import open_with_mode
from device_agents.sshsig import SshKeygenChecker
from device_agents.store import Store
from device_agents.verify import VerifiedManifest, check_version, verify_manifest

SPARE_BYTES = 16 * 1024 * 1024
"""Left free on the device's disk beyond the blobs themselves."""

IDLE_S = 60.0
"""A host that sends nothing for so long is gone; it resumes where it stopped."""

LOCK_WAIT_S = 75.0
"""Longer than :data:`IDLE_S`, so a predecessor whose link broke has given up by then."""

_REQUEST_BYTES = (wire.MAX_MANIFEST_BYTES + wire.MAX_SIGNATURE_BYTES) * 4 // 3 + 4096


def have(store: Store, console: Console) -> Dict[str, Any]:
    """Which of the blobs asked for are missing, how much of each lies here already, and the free space in bytes."""
    request = console.read_json("have", wire.MAX_MANIFEST_BYTES)
    if not isinstance(request, dict) or set(request) != {"blobs"} or not isinstance(request["blobs"], list):
        raise Refused("bad-request", 'have: expected {"blobs": [{"sha256": …, "size": …}, …]}')
    try:
        blobs = [wire.decode(wire.Blob, b, "have.blobs") for b in request["blobs"]]
    except wire.WireError as e:
        raise Refused("bad-request", str(e)) from e
    there = store.inventory()
    missing = [b.sha256 for b in blobs if there.get(b.sha256) != b.size]
    partial = {}
    for sha256 in missing:
        with contextlib.suppress(OSError):
            partial[sha256] = store.part_path(sha256).lstat().st_size
    return {"missing": missing, "partial": partial, "free_bytes": store.free_bytes()}


def verify_bundle(store: Store, manifest: bytes, signature: bytes) -> VerifiedManifest:
    """Steps 1 to 5 of :mod:`device_agents.verify` with this root's signers."""
    store.create()
    if store.read(store.signers_path, wire.MAX_JOB_BYTES) is None:
        raise Refused("no-signers", "nobody may sign bundles for this device yet", "edgevit key allow")
    with store.scratch() as scratch:
        return verify_manifest(manifest, signature, SshKeygenChecker(store.signers_path, scratch))


def verify_installed(store: Store, digest: str) -> VerifiedManifest:
    """An installed bundle's manifest, its signature verified anew. Raises ``not-installed`` and all that verifying raises."""
    manifest, signature = store.bundle_bytes(digest)
    verified = verify_bundle(store, manifest, signature)
    if verified.digest != digest:
        raise Refused(
            "blob-damaged", "bundle {} holds another manifest: {}".format(digest, verified.digest), "deploy the bundle again"
        )
    return verified


def install(store: Store, console: Console) -> Dict[str, Any]:
    """Verify a manifest, take in the blobs it lacks, and make the bundle visible. See the contract of the wire."""
    from device_agents.activate import read_active

    manifest_bytes, signature, allow_older = _parse_request(console.read_line(_REQUEST_BYTES, "install", IDLE_S))
    verified = verify_bundle(store, manifest_bytes, signature)
    state = read_active(store, allow_older)
    check_version(verified.manifest, state.active if state else None, allow_older)
    with locked_blobs(store, console):
        store.clean_temporaries()
        received, complete = take_in(store, console, verified.manifest.blobs(), "the bundle")
        fresh = not _is_installed(store, verified)
        if fresh:
            with console.heartbeat():
                store.commit_bundle(verified.digest, manifest_bytes, signature)
    return {"bundle": verified.digest, "installed": fresh or not complete, "received_bytes": received}


def _parse_request(line: bytes) -> Tuple[bytes, bytes, bool]:
    try:
        request = wire.parse_json(line, "install", _REQUEST_BYTES)
        if not isinstance(request, dict) or not set(request) <= {"manifest", "signature", "allow_older"}:
            raise Refused("bad-request", "install: expected the keys manifest, signature, allow_older")
        allow_older = request.get("allow_older", False)
        if not isinstance(allow_older, bool):
            raise Refused("bad-request", "install: allow_older is neither true nor false")
        manifest, signature = (base64.b64decode(str(request.get(k, "")), validate=True) for k in ("manifest", "signature"))
    except (wire.WireError, binascii.Error, ValueError) as e:
        raise Refused("bad-request", "install: {}".format(e)) from e
    return manifest, signature, allow_older


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


def take_in(store: Store, console: Console, blobs: Tuple[wire.Blob, ...], what: str, beyond_bytes: int = 0) -> Tuple[int, bool]:
    """Say which bytes of ``blobs`` are lacking and receive them: (bytes received, whether nothing was lacking).

    Under the lock of :func:`locked_blobs`. ``beyond_bytes`` must be free as well, where anything is received at all.
    """
    with console.heartbeat():
        needed = _find_needed(store, blobs)
    _check_space(store, needed, what, beyond_bytes)
    console.emit(
        {
            "type": "need",
            "blobs": [{"sha256": blob.sha256, "offset": offset} for blob, offset in needed],
            "free_bytes": store.free_bytes(),
        }
    )
    received = 0
    for blob, offset in needed:
        received += _Receiver(store, console, blob, offset).receive()
        console.emit({"type": "stored", "sha256": blob.sha256})
    return received, not needed


def _find_needed(store: Store, blobs: Tuple[wire.Blob, ...]) -> List[Tuple[wire.Blob, int]]:
    """Blobs that are absent or damaged, with the length of what an earlier attempt left of each."""
    needed = []
    for blob in blobs:
        try:
            store.check_blob(blob)
        except Refused as e:
            if e.code not in ("blob-missing", "blob-damaged"):
                raise
            _discard(store.blob_path(blob.sha256))
            needed.append((blob, _resume_at(store, blob)))
    return needed


def _resume_at(store: Store, blob: wire.Blob) -> int:
    part = store.part_path(blob.sha256)
    try:
        fd = store.open_regular(part)
    except FileNotFoundError:
        return 0
    except Refused:
        _discard(part)
        return 0
    size = os.fstat(fd).st_size
    os.close(fd)
    if size > blob.size:
        _discard(part)
        return 0
    return size


def _discard(path: Path) -> None:
    try:
        path.unlink()
    except FileNotFoundError:
        pass
    except OSError as e:
        raise refuse_os_error(e, "removing {}".format(path)) from e


def _check_space(store: Store, needed: List[Tuple[wire.Blob, int]], what: str, beyond_bytes: int) -> None:
    wanted = sum(blob.size - offset for blob, offset in needed) + beyond_bytes
    free = store.free_bytes()
    if wanted and wanted + SPARE_BYTES > free:
        raise Refused(
            "no-space",
            "{} needs {:,} bytes and {:,} to spare, {:,} are free in {}".format(what, wanted, SPARE_BYTES, free, store.root),
            "free some space on the device, or remove old bundles with its agent's gc",
        )


def _is_installed(store: Store, verified: VerifiedManifest) -> bool:
    try:
        return store.bundle_bytes(verified.digest) == (verified.manifest_bytes, verified.signature)
    except Refused:
        return False


class _Receiver:
    """Takes one blob from standard input into its ``.part`` and renames it once its whole digest is right."""

    def __init__(self, store: Store, console: Console, blob: wire.Blob, offset: int) -> None:
        self._store, self._console, self._blob, self._offset = store, console, blob, offset
        self._digest = hashlib.sha256()
        self._said = time.monotonic()

    def receive(self) -> int:
        """Bytes received. Raises ``interrupted`` (the part stays), ``digest-mismatch`` (the part goes), ``no-space``."""
        part = self._store.part_path(self._blob.sha256)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = open_with_mode(part, flags, self._store.file_mode)
        except OSError as e:
            raise refuse_os_error(e, "opening {}".format(part)) from e
        try:
            self._hash_start(fd)
            self._take_rest(fd)
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
        except OSError as e:
            raise refuse_os_error(e, "storing blob {}".format(self._blob.sha256)) from e
        finally:
            os.close(fd)
        return self._blob.size - self._offset

    def _hash_start(self, fd: int) -> None:
        left = self._offset
        while left:
            chunk = os.read(fd, min(CHUNK, left))
            if not chunk:
                raise Refused("io-error", "{}.part shrank while it was read".format(self._blob.sha256))
            self._digest.update(chunk)
            left -= len(chunk)
            self._tell(self._offset - left)

    def _take_rest(self, fd: int) -> None:
        done = self._offset
        while done < self._blob.size:
            chunk = self._console.read_some(min(CHUNK, self._blob.size - done), "receiving a blob", IDLE_S)
            if not chunk:
                raise Refused(
                    "interrupted",
                    "the host stopped after {:,} of {:,} bytes of blob {}".format(done, self._blob.size, self._blob.sha256),
                    "deploy again: what arrived is kept",
                )
            self._digest.update(chunk)
            view = memoryview(chunk)
            while view:
                view = view[os.write(fd, view) :]
            done += len(chunk)
            self._tell(done)

    def _tell(self, done: int) -> None:
        now = time.monotonic()
        if now - self._said >= 0.25:
            self._said = now
            try:
                self._console.progress("receive", done, self._blob.size, "bytes", self._blob.sha256[:12])
            except HostGone as e:
                raise Refused("interrupted", "the host is gone: {}".format(e)) from e


def find_installed(store: Store) -> Tuple[List[wire.InstalledBundle], Dict[str, str]]:
    """Installed bundles as their manifests say, unverified, for listing alone; and why some could not be read."""
    from device_agents.verify import parse_manifest

    found, absent = [], {}
    for digest in store.bundle_digests():
        try:
            manifest = parse_manifest(store.bundle_bytes(digest)[0])
            found.append(wire.InstalledBundle(digest, manifest.name, manifest.version))
        except Refused as e:
            absent["bundles/" + digest[:12]] = str(e)[:400]
    return found, absent


def artifact_of(manifest: wire.Manifest, variant: wire.Variant) -> wire.Artifact:
    """The artifact a variant names. Raises ``no-such-artifact``, ``does-not-fit`` or ``scheme-refused``."""
    artifact: Optional[wire.Artifact] = manifest.artifact(variant.artifact)
    if artifact is None:
        raise Refused(
            "no-such-artifact",
            "bundle {!r} has no artifact {!r}; it has {}".format(
                manifest.name, variant.artifact, ", ".join(a.name for a in manifest.artifacts)
            ),
        )
    if variant.runtime not in wire.RUNTIMES_OF_FORMAT[artifact.format]:
        raise Refused(
            "does-not-fit",
            "artifact {!r} is {}, which {} does not run; {} does".format(
                artifact.name, artifact.format, variant.runtime, " or ".join(wire.RUNTIMES_OF_FORMAT[artifact.format])
            ),
        )
    from device_agents.runtimes import check_scheme

    check_scheme(variant.runtime, artifact.scheme)
    return artifact
