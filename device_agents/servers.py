"""Starting this same agent once more: servers for a queue, and whatever else runs in a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from typing import Any, List, Optional

from device_agents.clock import utc_now
from device_agents.errors import refuse_os_error
from device_agents.root import MAX_LOG_BYTES, Root, open_log

_BEGINS = "a server begins"
"""What stands before the lines of each server: the log keeps what earlier ones said."""


def launcher_text() -> str:
    """The text that starts this agent, which travels inside it."""
    loader: Any = globals()["__loader__"]
    folder = os.path.dirname(os.path.abspath(__file__))
    return str(loader.get_data(os.path.join(folder, "launcher.txt")).decode("utf-8"))


def agent_argv(python: str, agent_sha256: str, root: Root, *command: str) -> List[str]:
    """How to start this same agent once more."""
    return [python, "-c", launcher_text(), agent_sha256, str(root.root), *command]


def ensure_server(root: Root, agent_sha256: str) -> bool:
    """Start a detached server unless a daemon is at work or another server holds the lock; whether one was started."""
    return not root.has_daemon() and start_server(root, agent_sha256) is not None


def start_server(root: Root, agent_sha256: str) -> "Optional[subprocess.Popen[bytes]]":
    """A server that works the queue until it is empty; None where another one holds the lock.

    The server inherits the lock, so there is no moment at which a second one could be started beside it: on a slow board it
    would compile itself while the first one measures.
    """
    lock = root.try_lock_server()
    if lock is None:
        return None
    try:
        log = open_log(root.log_path, root.file_mode)
        try:
            with contextlib.suppress(OSError):  # a full disk must not keep a server from giving back what fills it
                os.write(log, "{} {}\n".format(utc_now(), _BEGINS).encode("utf-8"))
            return subprocess.Popen(
                agent_argv(sys.executable, agent_sha256, root, "serve", "--once", "--lock", str(lock)),
                pass_fds=(lock,),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd="/",
            )
        finally:
            os.close(log)
    except OSError as e:
        raise refuse_os_error(e, "starting the server") from e
    finally:
        os.close(lock)  # the server's copy still holds it


def read_server_log(root: Root) -> str:
    """What the latest server said, or the end of it. Raises ``io-error``."""
    data = root.read(root.log_path, 64 * MAX_LOG_BYTES) or b""
    said = data.decode("utf-8", "replace").splitlines()
    begins = [number for number, line in enumerate(said) if line.endswith(" " + _BEGINS)]
    return "\n".join(said[begins[-1] + 1 :] if begins else said).strip()
