"""What a root stores for longer than a job: blobs known by their digests, and bundles.

A bundle appears and disappears by one ``rename``; blobs lie apart from it, so bundles share them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

from device_agents import wire
from device_agents.errors import Refused, refuse_os_error
from device_agents.root import (
    FOLDERS,
    SHA256,
    TEMP_PREFIX,
    Root,
    checked_sha256,
    is_abandoned,
    sync_folder,
    temp_name,
    write_durably,
)

CHUNK = 1024 * 1024


class Store(Root):
    """Blobs and bundles under one root. Every OSError leaves as a :class:`Refused`."""

    def blob_path(self, sha256: str) -> Path:
        return self.root / "blobs" / checked_sha256(sha256)

    def part_path(self, sha256: str) -> Path:
        return self.root / "blobs" / (checked_sha256(sha256) + ".part")

    def bundle_folder(self, digest: str) -> Path:
        return self.root / "bundles" / checked_sha256(digest)

    def engines_folder(self, sha256: str) -> Path:
        """What providers compiled of one artifact."""
        return self.root / "engines" / checked_sha256(sha256)

    def accuracy_path(self, sha256: str, key: str) -> Path:
        """What was counted of one artifact; ``key`` covers all that it depends on."""
        return self.root / "accuracy" / "{}-{}.json".format(checked_sha256(sha256), checked_sha256(key))

    def open_blob(self, blob: wire.Blob) -> int:
        """A descriptor of a blob whose size is right. Raises ``blob-missing`` or ``blob-damaged``."""
        path = self.blob_path(blob.sha256)
        try:
            fd = self.open_regular(path)
        except FileNotFoundError:
            raise Refused(
                "blob-missing", "blob {} is not on the device".format(blob.sha256), "deploy the bundle again"
            ) from None
        except Refused as e:
            raise Refused("blob-damaged", str(e), "deploy the bundle again") from e
        size = os.fstat(fd).st_size
        if size != blob.size:
            os.close(fd)
            raise Refused(
                "blob-damaged",
                "blob {}: {:,} bytes on the device, the manifest says {:,}".format(blob.sha256, size, blob.size),
                "deploy the bundle again",
            )
        return fd

    def read_blob(self, blob: wire.Blob) -> bytes:
        """A blob's bytes; its size is checked, its digest is not (see :meth:`check_blob`)."""
        with os.fdopen(self.open_blob(blob), "rb") as f:
            try:
                return f.read()
            except OSError as e:
                raise refuse_os_error(e, "reading blob {}".format(blob.sha256)) from e

    def check_blob(self, blob: wire.Blob) -> None:
        """Hash a blob. Raises ``blob-missing`` or ``blob-damaged``, naming both digests."""
        fd = self.open_blob(blob)
        try:
            got = hash_descriptor(fd)
        except OSError as e:
            raise Refused("blob-damaged", "reading blob {}: {}".format(blob.sha256, e), "deploy the bundle again") from e
        finally:
            os.close(fd)
        if got != blob.sha256:
            raise Refused(
                "blob-damaged",
                "blob {} holds other bytes: their SHA-256 is {}".format(blob.sha256, got),
                "deploy the bundle again",
            )

    def bundle_bytes(self, digest: str) -> Tuple[bytes, bytes]:
        """(manifest, signature) of an installed bundle, as stored. Raises ``not-installed``."""
        folder = self.bundle_folder(digest)
        manifest = self.read(folder / "manifest.json", wire.MAX_MANIFEST_BYTES)
        signature = self.read(folder / "manifest.json.sig", wire.MAX_SIGNATURE_BYTES)
        if manifest is None or signature is None:
            raise Refused("not-installed", "bundle {} is not installed".format(digest), "deploy the bundle")
        return manifest, signature

    def bundle_digests(self) -> List[str]:
        return [n for n in self.names_in("bundles") if SHA256.fullmatch(n)]

    def free_bytes(self) -> int:
        """Bytes that an ordinary user may still write where the root lies, or will lie."""
        place = self.root
        while not place.exists() and place != place.parent:
            place = place.parent
        try:
            s = os.statvfs(str(place))
        except OSError as e:
            raise refuse_os_error(e, "asking for the free space of {}".format(place)) from e
        return s.f_bavail * s.f_frsize

    def commit_bundle(self, digest: str, manifest: bytes, signature: bytes) -> None:
        """Make a bundle visible in one rename, its two files and their folder being on disk before."""
        folder = self.bundle_folder(digest)
        staging = folder.parent / temp_name()
        try:
            sync_folder(self.root / "blobs")
            self.make_folder(staging)
            write_durably(staging / "manifest.json", manifest, self.file_mode)
            write_durably(staging / "manifest.json.sig", signature, self.file_mode)
            sync_folder(staging)
            if folder.exists() or folder.is_symlink():  # found damaged: a folder cannot be renamed onto a full one
                os.rename(str(folder), str(folder.parent / temp_name()))
            os.rename(str(staging), str(folder))
            sync_folder(folder.parent)
        except OSError as e:
            raise refuse_os_error(e, "writing bundle {}".format(digest)) from e

    def remove_bundle(self, digest: str) -> None:
        """The inverse: invisible in one rename, then removed."""
        folder = self.bundle_folder(digest)
        doomed = folder.parent / temp_name()
        try:
            os.rename(str(folder), str(doomed))
            sync_folder(folder.parent)
            shutil.rmtree(str(doomed))
        except OSError as e:
            raise refuse_os_error(e, "removing bundle {}".format(digest)) from e

    def clean_temporaries(self) -> None:
        """Remove what a killed agent left half-written. What belongs to one at work is left."""
        for folder in ("",) + FOLDERS:
            for name in self.names_in(folder):
                path = self.root / folder / name
                if not name.startswith(TEMP_PREFIX) or not is_abandoned(name):
                    continue
                with contextlib.suppress(OSError):
                    if stat.S_ISDIR(path.lstat().st_mode):
                        shutil.rmtree(str(path))
                    else:
                        path.unlink()

    def try_lock_blobs(self) -> Optional[int]:
        """The lock of whoever writes or removes blobs and bundles."""
        return self.try_lock(self.root / "blobs", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A private folder for a moment."""
        folder = self.root / temp_name()
        try:
            self.make_folder(folder)
        except OSError as e:
            raise refuse_os_error(e, "making {}".format(folder)) from e
        try:
            yield folder
        finally:
            shutil.rmtree(str(folder), ignore_errors=True)

    def inventory(self) -> Dict[str, int]:
        """Blobs that are there whole, by digest, with their size in bytes; by name and size alone."""
        found = {}
        for name in self.names_in("blobs"):
            if SHA256.fullmatch(name):
                with contextlib.suppress(FileNotFoundError):
                    info = (self.root / "blobs" / name).lstat()
                    if stat.S_ISREG(info.st_mode):
                        found[name] = info.st_size
        return found


def hash_descriptor(fd: int) -> str:
    """SHA-256 of a whole file from its start, in chunks of 1 MiB."""
    digest = hashlib.sha256()
    os.lseek(fd, 0, os.SEEK_SET)
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    with os.fdopen(os.dup(fd), "rb", buffering=0) as f:
        while True:
            n = f.readinto(view)
            if not n:
                return digest.hexdigest()
            digest.update(view[:n])
