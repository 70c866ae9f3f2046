"""The agent's root on disk: where anything lies, how it is written, who may hold which lock.

Whatever is written becomes visible by one ``rename`` after its bytes were fsynced, so a reader, or a start after a power
cut, finds a file whole or not at all. Files are opened by digest or by a checked name, never through a symbolic link.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
from pathlib import Path
from typing import List, Optional

from device_agents.errors import Refused, refuse_os_error
from device_agents.limits import NAME_PATTERN, SHA256_PATTERN

TEMP_PREFIX = ".tmp-"
MAX_LOG_BYTES = 1_000_000
SHARED_BITS = stat.S_ISGID | 0o070
FOLDERS = ("agent", "blobs", "bundles", "queue", "spool", "accuracy", "log", "python", "engines")

_NAME = re.compile(NAME_PATTERN)
SHA256 = re.compile(SHA256_PATTERN)
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class Root:
    """Paths and atomic writes under one root. Every OSError leaves as a :class:`Refused`.

    A root belongs to one user and is closed to all others, unless it was made ``2770`` (set-group-ID, group-writable): then
    its group shares it, as where a daemon's own user measures what another one sends. Nothing under it is open to the world.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def shared(self) -> bool:
        """Whether the root's group shares it."""
        with contextlib.suppress(OSError):
            return self.root.stat().st_mode & SHARED_BITS == SHARED_BITS
        return False

    @property
    def file_mode(self) -> int:
        return 0o660 if self.shared else 0o600

    @property
    def folder_mode(self) -> int:
        return 0o2770 if self.shared else 0o700

    # ---- layout ----------------------------------------------------------------------------------------------------

    def create(self) -> None:
        """Make the folders, private to the user. Raises ``io-error`` where one of them is a link or a file."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in FOLDERS:
                folder = self.root / name
                try:
                    self.make_folder(folder)
                except FileExistsError:
                    if not stat.S_ISDIR(folder.lstat().st_mode):
                        raise Refused("io-error", "{} is not a folder (a symbolic link is refused)".format(folder)) from None
        except OSError as e:
            raise refuse_os_error(e, "making {}".format(self.root)) from e

    def make_folder(self, folder: Path) -> None:
        folder.mkdir(mode=0o700)
        if self.shared:
            folder.chmod(self.folder_mode)  # mkdir's own mode passes through the umask

    def agent_path(self, sha256: str) -> Path:
        return self.root / "agent" / (checked_sha256(sha256) + ".pyz")

    def queue_path(self, run_id: str) -> Path:
        return self.root / "queue" / (checked_name(run_id) + ".json")

    def cancel_path(self, run_id: str) -> Path:
        return self.root / "queue" / (checked_name(run_id) + ".cancel")

    def spool_path(self, run_id: str, suffix: str) -> Path:
        return self.root / "spool" / (checked_name(run_id) + "." + suffix)

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
    def tuned_path(self) -> Path:
        """What a job changed on the system while it runs, to be put back: governors by file."""
        return self.root / "tuned.json"

    @property
    def operator_path(self) -> Path:
        """Who alone may change what is installed and active now: see :mod:`device_agents.operator_lock`."""
        return self.root / "operator.json"

    @property
    def log_path(self) -> Path:
        return self.root / "log" / "serve.log"

    @property
    def daemon_log_path(self) -> Path:
        return self.root / "log" / "daemon.log"

    @property
    def daemon_path(self) -> Path:
        """What the daemon says of itself."""
        return self.root / "daemon.json"

    @property
    def current_agent_path(self) -> Path:
        """The SHA-256 of the agent that submitted last: the one that the daemon starts for its jobs."""
        return self.root / "agent" / "current"

    @property
    def launch_path(self) -> Path:
        """The launcher as a file, for what starts an agent by a path: a systemd unit."""
        return self.root / "agent" / "launch.py"

    @property
    def entry_path(self) -> Path:
        """What applications on the device import and people there call: see :mod:`device_agents.edgevit_device`."""
        return self.root / "python" / "edgevit_device.py"

    @property
    def entry_agent_path(self) -> Path:
        """The SHA-256 of the agent that :attr:`entry_path` starts: the one that activated last."""
        return self.root / "python" / "agent"

    @property
    def venv_folder(self) -> Path:
        """The environment in use: a link, so that one rename changes to another."""
        return self.root / "venv"

    @property
    def environments_folder(self) -> Path:
        """Environments by a name of their own: the one in use, the one before it, and what a killed agent left unfinished."""
        return self.root / "venvs"

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

    def queued(self) -> List[str]:
        """Run ids in the queue, oldest first."""
        found = []
        for name in self.names_in("queue"):
            if name.endswith(".json") and is_run_name(name[:-5]):
                with contextlib.suppress(FileNotFoundError):
                    found.append(((self.root / "queue" / name).lstat().st_mtime_ns, name[:-5]))
        return [run_id for _, run_id in sorted(found)]

    def spooled(self) -> List[str]:
        """Run ids whose results wait for their host."""
        return sorted(n[:-4] for n in self.names_in("spool") if n.endswith(".run") and is_run_name(n[:-4]))

    def names_in(self, folder: str) -> List[str]:
        try:
            return sorted(os.listdir(str(self.root / folder)))
        except FileNotFoundError:
            return []
        except OSError as e:
            raise refuse_os_error(e, "listing {}".format(self.root / folder)) from e

    def used_bytes(self) -> int:
        """What lies under the root on the disk, as ``du`` counts it."""
        total = 0
        for folder, _, files in os.walk(str(self.root)):
            for name in files:
                with contextlib.suppress(OSError):
                    total += os.lstat(os.path.join(folder, name)).st_blocks * 512
        return total

    # ---- writing ---------------------------------------------------------------------------------------------------

    def write(self, path: Path, data: bytes) -> None:
        """Replace ``path`` by ``data`` at once: temporary file, fsync, rename, fsync of the folder."""
        temp = path.parent / temp_name()
        try:
            write_durably(temp, data, self.file_mode)
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

    def discard(self, path: Path) -> None:
        """Remove whatever lies there, a folder too."""
        try:
            if stat.S_ISDIR(path.lstat().st_mode):
                shutil.rmtree(str(path))
                sync_folder(path.parent)
                return
        except FileNotFoundError:
            return
        except OSError as e:
            raise refuse_os_error(e, "removing {}".format(path)) from e
        self.remove(path)

    # ---- locks -----------------------------------------------------------------------------------------------------

    def try_lock_server(self) -> Optional[int]:
        """The lock of the one server of this root, as a descriptor to close; None when another holds it."""
        return self.try_lock(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC)

    def has_server(self) -> bool:
        """Whether a server is at work on this root now."""
        lock = self.try_lock_server()
        if lock is None:
            return True
        os.close(lock)
        return False

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

    def try_lock_daemon(self) -> Optional[int]:
        """The lock that the one daemon of this root holds for as long as it lives."""
        return self.try_lock(self.root / "daemon.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC)

    def has_daemon(self) -> bool:
        """Whether a daemon is at work on this root now."""
        path = self.root / "daemon.lock"
        if not os.path.lexists(str(path)):
            return False
        lock = self.try_lock(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, fcntl.LOCK_SH)
        if lock is None:
            return True
        os.close(lock)
        return False

    def try_lock(self, path: Path, flags: int, kind: int = fcntl.LOCK_EX) -> Optional[int]:
        try:
            fd = open_with_mode(path, flags, self.file_mode)
        except OSError as e:
            raise refuse_os_error(e, "opening the lock {}".format(path)) from e
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except OSError as e:
            os.close(fd)
            raise refuse_os_error(e, "locking {}".format(path)) from e
        return fd


def temp_name() -> str:
    """Of something half-written: it tells which process is at it, so that whoever cleans up asks no clock."""
    return "{}{}-{}-{}".format(TEMP_PREFIX, os.getpid(), started_ticks("self"), os.urandom(8).hex())


def is_abandoned(name: str) -> bool:
    """Whether the process that made this :func:`temp_name` is gone; its number may be another's by now."""
    pid, _, rest = name[len(TEMP_PREFIX) :].partition("-")
    return not pid.isdigit() or started_ticks(pid) != rest.partition("-")[0]


def started_ticks(pid: str) -> str:
    """When a process began, in ticks since boot (proc(5), field 22 of stat); empty where there is none."""
    try:
        with open("/proc/{}/stat".format(pid), "rb") as f:
            return f.read().rpartition(b")")[2].split()[19].decode("ascii")
    except (OSError, IndexError):
        return ""


def open_log(path: Path, mode: int) -> int:
    """A descriptor that appends to a log, which takes at most twice MAX_LOG_BYTES with its predecessor, ``.1``. OSError."""
    with contextlib.suppress(FileNotFoundError):
        if path.lstat().st_size > MAX_LOG_BYTES:
            os.replace(str(path), str(path) + ".1")
    return open_with_mode(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, mode)


def open_with_mode(path: Path, flags: int, mode: int) -> int:
    """``os.open`` that gives a file it makes exactly ``mode``, whatever the umask; others' files stay as they are."""
    fd = os.open(str(path), flags, 0o600)
    if mode != 0o600 and flags & os.O_CREAT:
        info = os.fstat(fd)
        if stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid() and stat.S_IMODE(info.st_mode) != mode:
            os.fchmod(fd, mode)
    return fd


def write_durably(path: Path, data: bytes, mode: int = 0o600) -> None:
    """A new file of this mode whose bytes are on the disk when this returns."""
    fd = open_with_mode(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
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


def checked_sha256(value: str) -> str:
    if SHA256.fullmatch(value) is None:
        raise Refused("bad-request", "{!r} is not a SHA-256 digest".format(value[:80]))
    return value


def is_run_name(value: str) -> bool:
    """Whether the wire would carry it as a run's id. A file of another name is none of the queue's or the spool's."""
    return len(value) <= 120 and _NAME.fullmatch(value) is not None


def checked_name(value: str) -> str:
    if not is_run_name(value):
        raise Refused("bad-request", "{!r} is not a run's name".format(value[:80]))
    return value
