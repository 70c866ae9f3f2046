"""Processes of this machine, by what /proc says of them."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path


def find_agents(*roots: str | Path) -> list[int]:
    """Process ids of everything that works one of these agents' roots: its commands, its server, its worker."""
    wanted = {os.fsencode(root) for root in roots}
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = entry.read_bytes().split(b"\0")
            if b"-c" in words and not wanted.isdisjoint(words):
                found.append(int(entry.parent.name))
    return found


def kill(pids: Iterable[int]) -> int:
    """``kill -9`` each; how many of them were there."""
    count = 0
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            count += 1
    return count


def is_alive(pid: int) -> bool:
    """Whether it still runs: not gone, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
