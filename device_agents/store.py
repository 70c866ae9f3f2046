"""The agent's root on disk: the only file that knows where anything lies.

Whatever is written becomes visible by one ``rename`` after its bytes were fsynced, so a reader, or a start after a power
cut, finds a file whole or not at all. Files are opened by digest or by a checked name, never through a symbolic link.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import stat
import time
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

from device_agents import wire
from device_agents.errors import Refused, refuse_os_error

CHUNK = 1024 * 1024
TEMP_PREFIX = ".tmp-"
STALE_TEMP_S = 3600.0
FOLDERS = ("agent", "blobs", "bundles", "queue", "spool", "accuracy", "log")

_NAME = re.compile(wire.NAME_PATTERN)
_SHA256 = re.compile(wire.SHA256_PATTERN)
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class Store:
    """Paths and atomic writes under one root. Every OSError leaves as a :class:`Refused`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    # ---- layout ----------------------------------------------------------------------------------------------------

    def create(self) -> None:
        """Make the folders, private to the user. Raises ``io-error`` where one of them is a link or a file."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in FOLDERS:
                folder = self.root / name
                try:
                    folder.mkdir(mode=0o700)
                except FileExistsError:
                    if not stat.S_ISDIR(folder.lstat().st_mode):
                        raise Refused("io-error", "{} is not a folder (a symbolic link is refused)".format(folder)) from None
        except OSError as e:
            raise refuse_os_error(e, "making {}".format(self.root)) from e

    def agent_path(self, sha256: str) -> Path:
        return self.root / "agent" / (_checked_sha256(sha256) + ".pyz")

    def blob_path(self, sha256: str) -> Path:
        return self.root / "blobs" / _checked_sha256(sha256)

    def part_path(self, sha256: str) -> Path:
        return self.root / "blobs" / (_checked_sha256(sha256) + ".part")

    def bundle_folder(self, digest: str) -> Path:
        return self.root / "bundles" / _checked_sha256(digest)

    def accuracy_path(self, key: str) -> Path:
        return self.root / "accuracy" / (_checked_sha256(key) + ".json")

    def queue_path(self, run_id: str) -> Path:
        return self.root / "queue" / (_checked_name(run_id) + ".json")

    def spool_path(self, run_id: str, suffix: str) -> Path:
        return self.root / "spool" / (_checked_name(run_id) + "." + suffix)

    @property
    def active_path(self) -> Path:
        return self.root / "active.json"

    @property
    def signers_path(self) -> Path:
        return self.root / "allowed_signers"

    @property
    def runtimes_path(self) -> Path:
        """What the last probe proved, so that the next one need not."""
        return self.root / "runtimes.json"

    @property
    def log_path(self) -> Path:
        return self.root / "log" / "serve.log"

    @property
    def venv_folder(self) -> Path:
        return self.root / "venv"

    @property
    def venv_unfinished_path(self) -> Path:
        """Lies there while ``provision`` builds the environment; such an environment is not used."""
        return self.root / "venv.unfinished"

    # ---- reading ---------------------------------------------------------------------------------------------------

    def open_regular(self, path: Path) -> int:
        """A descriptor of a regular file that is no symbolic link. Raises FileNotFoundError or :class:`Refused` io-error."""
        try:
            fd = os.open(str(path), _READ_FLAGS)
        except FileNotFoundError:
            raise
        except OSError as e:
            raise Refused("io-error", "{} is refused: {} (a symbolic link is never followed)".format(path, e)) from e
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise Refused("io-error", "{} is not a regular file".format(path))
        return fd

    def read(self, path: Path, max_bytes: int) -> Optional[bytes]:
        """The bytes of a small file, None where there is none; ``io-error`` when it is over ``max_bytes``."""
        try:
            fd = self.open_regular(path)
        except FileNotFoundError:
            return None
        with os.fdopen(fd, "rb") as f:
            try:
                data = f.read(max_bytes + 1)
            except OSError as e:
                raise refuse_os_error(e, "reading {}".format(path)) from e
        if len(data) > max_bytes:
            raise Refused("io-error", "{} is over {:,} bytes".format(path, max_bytes))
        return data

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
        return [n for n in self._names("bundles") if _SHA256.fullmatch(n)]

    def queued(self) -> List[str]:
        """Run ids in the queue, oldest first."""
        found = []
        for name in self._names("queue"):
            if name.endswith(".json") and _NAME.fullmatch(name[:-5]):
                with contextlib.suppress(FileNotFoundError):
                    found.append(((self.root / "queue" / name).lstat().st_mtime_ns, name[:-5]))
        return [run_id for _, run_id in sorted(found)]

    def spooled(self) -> List[str]:
        """Run ids whose results wait for their host."""
        return sorted(n[:-4] for n in self._names("spool") if n.endswith(".run") and _NAME.fullmatch(n[:-4]))

    def _names(self, folder: str) -> List[str]:
        try:
            return sorted(os.listdir(str(self.root / folder)))
        except FileNotFoundError:
            return []
        except OSError as e:
            raise refuse_os_error(e, "listing {}".format(self.root / folder)) from e

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

    # ---- writing ---------------------------------------------------------------------------------------------------

    def write(self, path: Path, data: bytes) -> None:
        """Replace ``path`` by ``data`` at once: temporary file, fsync, rename, fsync of the folder; mode 0600."""
        temp = path.parent / temp_name()
        try:
            write_durably(temp, data)
            os.rename(str(temp), str(path))
            sync_folder(path.parent)
        except OSError as e:
            with contextlib.suppress(OSError):
                os.unlink(str(temp))
            raise refuse_os_error(e, "writing {}".format(path)) from e

    def remove(self, path: Path) -> bool:
        """Remove a file for good; False where there was none."""
        try:
            os.unlink(str(path))
            sync_folder(path.parent)
        except FileNotFoundError:
            return False
        except OSError as e:
            raise refuse_os_error(e, "removing {}".format(path)) from e
        return True

    def commit_bundle(self, digest: str, manifest: bytes, signature: bytes) -> None:
        """Make a bundle visible in one rename, its two files and their folder being on disk before."""
        folder = self.bundle_folder(digest)
        staging = folder.parent / temp_name()
        try:
            sync_folder(self.root / "blobs")
            staging.mkdir(mode=0o700)
            write_durably(staging / "manifest.json", manifest)
            write_durably(staging / "manifest.json.sig", signature)
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

    def clean_temporaries(self, older_than_s: float = STALE_TEMP_S) -> None:
        """Remove what a killed agent left half-written. Young ones may belong to an agent at work and are left."""
        now = time.time()
        for folder in ("",) + FOLDERS:
            for name in self._names(folder):
                path = self.root / folder / name
                if not name.startswith(TEMP_PREFIX):
                    continue
                with contextlib.suppress(OSError):
                    info = path.lstat()
                    if now - info.st_mtime < older_than_s and _process_lives(name):
                        continue
                    if stat.S_ISDIR(info.st_mode):
                        shutil.rmtree(str(path))
                    else:
                        path.unlink()

    # ---- locks -----------------------------------------------------------------------------------------------------

    def try_lock_server(self) -> Optional[int]:
        """The lock of the one server of this root, as a descriptor to close; None when another holds it."""
        return self._try_lock(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC)

    def adopt_server_lock(self, fd: int) -> int:
        """``fd`` as :meth:`try_lock_server` would give it, from a parent that held the lock. Raises ``bad-request`` for another
        file, ``busy`` where it is not locked and another holds it."""
        try:
            os.set_inheritable(fd, False)
            same = os.path.samestat(os.fstat(fd), os.stat(str(self.root / "lock")))
        except OSError as e:
            raise Refused("bad-request", "descriptor {} is not the server's lock: {}".format(fd, e)) from e
        if not same:
            raise Refused("bad-request", "descriptor {} is not the lock of {}".format(fd, self.root))
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of no effect where it is held through this descriptor already
        except OSError as e:
            raise Refused("busy", "another server holds the lock of {}: {}".format(self.root, e)) from e
        return fd

    def try_lock_blobs(self) -> Optional[int]:
        """The lock of whoever writes or removes blobs and bundles."""
        return self._try_lock(self.root / "blobs", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def _try_lock(self, path: Path, flags: int) -> Optional[int]:
        try:
            fd = os.open(str(path), flags, 0o600)
        except OSError as e:
            raise refuse_os_error(e, "opening the lock {}".format(path)) from e
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except OSError as e:
            os.close(fd)
            raise refuse_os_error(e, "locking {}".format(path)) from e
        return fd

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A private folder for a moment."""
        folder = self.root / temp_name()
        try:
            folder.mkdir(mode=0o700)
        except OSError as e:
            raise refuse_os_error(e, "making {}".format(folder)) from e
        try:
            yield folder
        finally:
            shutil.rmtree(str(folder), ignore_errors=True)

    def inventory(self) -> Dict[str, int]:
        """Blobs that are there whole, by digest, with their size in bytes; by name and size alone."""
        found = {}
        for name in self._names("blobs"):
            if _SHA256.fullmatch(name):
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


def temp_name() -> str:
    return "{}{}-{}".format(TEMP_PREFIX, os.getpid(), os.urandom(8).hex())


def write_durably(path: Path, data: bytes) -> None:
    """A new file of mode 0600 whose bytes are on the disk when this returns."""
    fd = os.open(str(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Names in a folder survive a power cut only after an fsync of the folder itself."""
    fd = os.open(str(folder), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _process_lives(name: str) -> bool:
    pid = name[len(TEMP_PREFIX) :].partition("-")[0]
    return pid.isdigit() and Path("/proc", pid).exists()


def _checked_sha256(value: str) -> str:
    if _SHA256.fullmatch(value) is None:
        raise Refused("bad-request", "{!r} is not a SHA-256 digest".format(value[:80]))
    return value


def _checked_name(value: str) -> str:
    if _NAME.fullmatch(value) is None or len(value) > 120:
        raise Refused("bad-request", "{!r} is not a run's name".format(value[:80]))
    return value
