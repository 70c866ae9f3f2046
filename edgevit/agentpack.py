"""The agent as one file: a zip of ``device_agents`` whose bytes depend on its sources alone, and the texts that start it.

Nothing has to be installed on a device to begin with: ``PYTHON -c BOOTSTRAP`` takes the file in, ``PYTHON -c LAUNCHER``
checks its SHA-256 at each start and runs it. Both texts parse under Python 3.4 so that an old Python can say that it is old.
"""

from __future__ import annotations

import functools
import hashlib
import io
import zipfile
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable

EXIT_NO_AGENT = 97
"""The launcher's exit status where the agent is absent or not the one asked for."""

EXIT_OLD_PYTHON = 98
"""The launcher's and bootstrap's exit status under a Python below 3.8, after printing its version."""

EXIT_BAD_UPLOAD = 96
"""The bootstrap's exit status where fewer or other bytes arrived than were announced."""

LAUNCHER = """\
import sys
sys.path = [p for p in sys.path if p]
if sys.version_info < (3, 8):
    print(".".join(str(n) for n in sys.version_info[:3]))
    sys.exit(98)
import hashlib, os
sha, root = sys.argv[1], os.path.abspath(os.path.expanduser(sys.argv[2]))
pyz = os.path.join(root, "agent", sha + ".pyz")
try:
    with open(pyz, "rb") as f:
        same = hashlib.sha256(f.read()).hexdigest() == sha
except OSError:
    same = False
if not same:
    sys.exit(97)
sys.path.insert(0, pyz)
from device_agents.__main__ import main
sys.exit(main([sha, root] + sys.argv[3:]))
"""
"""``PYTHON -c LAUNCHER SHA256 ROOT COMMAND ARGS…``. The current folder leaves ``sys.path``: files there are not modules."""

BOOTSTRAP = """\
import sys
sys.path = [p for p in sys.path if p]
if sys.version_info < (3, 8):
    print(".".join(str(n) for n in sys.version_info[:3]))
    sys.exit(98)
import hashlib, os
sha, size, root = sys.argv[1], int(sys.argv[2]), os.path.abspath(os.path.expanduser(sys.argv[3]))
shared = os.path.isdir(root) and os.stat(root).st_mode & 0o2070 == 0o2070
os.umask(0o007 if shared else 0o077)
folder = os.path.join(root, "agent")
os.makedirs(folder, 0o770, exist_ok=True)
data = b""
while len(data) <= size:
    chunk = sys.stdin.buffer.read(size + 1 - len(data))
    if not chunk:
        break
    data += chunk
if len(data) != size or hashlib.sha256(data).hexdigest() != sha:
    sys.stderr.write("the agent did not arrive whole: %d of %d bytes, or others" % (len(data), size))
    sys.exit(96)
part = os.path.join(folder, sha + "." + str(os.getpid()) + ".part")
flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
with os.fdopen(os.open(part, flags, 0o660), "wb") as f:
    f.write(data)
    f.flush()
    os.fsync(f.fileno())
os.rename(part, os.path.join(folder, sha + ".pyz"))
fd = os.open(folder, os.O_RDONLY)
os.fsync(fd)
os.close(fd)
print("ok")
"""
"""``PYTHON -c BOOTSTRAP SHA256 SIZE ROOT`` with the agent on standard input; prints ``ok`` once it is safely on the disk."""

LAUNCHER_MEMBER = "device_agents/launcher.txt"
"""The launcher travels inside the agent too: it starts its servers and workers with it."""

_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class AgentPack:
    """The agent's bytes and their SHA-256."""

    sha256: str
    data: bytes


@functools.cache
def agent_pyz() -> AgentPack:
    """The agent built from the installed ``device_agents``: sorted members, one fixed time stamp, fixed modes."""
    members = dict(_python_files(resources.files("device_agents"), "device_agents"))
    members[LAUNCHER_MEMBER] = LAUNCHER.encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in sorted(members):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.create_system = 3
            info.external_attr = 0o600 << 16
            # Stored, not deflated: zlib's output differs between its versions, and the file's name is its digest.
            info.compress_type = zipfile.ZIP_STORED
            archive.writestr(info, members[name])
    data = buffer.getvalue()
    return AgentPack(hashlib.sha256(data).hexdigest(), data)


def _python_files(folder: Traversable, prefix: str) -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    for entry in folder.iterdir():
        name = f"{prefix}/{entry.name}"
        if entry.is_dir() and entry.name != "__pycache__":
            found += _python_files(entry, name)
        elif entry.name.endswith(".py"):
            found.append((name, entry.read_bytes()))
    return found
