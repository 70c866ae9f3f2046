"""Which protections a process really runs under, as the kernel tells it: a unit file only says which were asked for.

Sources: proc(5) (status, mountinfo), systemd.exec(5). systemd leaves out silently what a kernel, a container or a user manager
does not offer, so nothing here reads the unit.
"""

from __future__ import annotations

import errno
import grp
import os
import socket
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from device_agents.boards.files import read_text

Mount = Tuple[str, str, str]
"""(mount point, the folder of the file system that is mounted there, options)."""


def find_protections(root: Path, store_root: Path, devices: Tuple[str, ...]) -> Dict[str, str]:
    """Protection → ``yes``, ``no``, or what was found. ``root`` holds ``proc``; ``devices`` are files the sensors need."""
    status = parse_status(read_text(root / "proc/self/status") or "")
    mounts = parse_mountinfo(read_text(root / "proc/self/mountinfo", 4_000_000) or "")
    found = {
        "unprivileged user": _word(status.get("Uid", "0").split()[:1] != ["0"]),
        "no new privileges": _word(status.get("NoNewPrivs") == "1"),
        "no capabilities": _capabilities(status),
        "system calls filtered": _word(status.get("Seccomp") == "2"),
        "system read-only": _word(is_read_only(mounts, "/usr")),
        "homes read-only": _word(is_read_only(mounts, "/home")),
        "private /tmp": _word(any(at == "/tmp" and "systemd-private" in source for at, source, _ in mounts)),
        "kernel settings read-only": _word(is_read_only(mounts, "/proc/sys")),
        "no network": _no_network(),
        "memory cgroup": _memory_cgroup(root),
        "groups": ",".join(_group_names()) or "none",
    }
    if is_read_only(mounts, str(store_root)):
        found["store"] = "read-only: nothing can be measured"
    for device in devices:
        found["device " + device] = _reach(device)
    return {name: value[:400] for name, value in found.items()}


def parse_status(text: str) -> Dict[str, str]:
    """``/proc/self/status`` by field."""
    fields = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields[name] = value.strip()
    return fields


def parse_mountinfo(text: str) -> List[Mount]:
    """``/proc/self/mountinfo`` in its order, in which a later mount hides an earlier one at the same place."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 6:
            found.append((_unescape(words[4]), _unescape(words[3]), words[5]))
    return found


def is_read_only(mounts: List[Mount], path: str) -> Optional[bool]:
    """Whether the mount that ``path`` lies on is read-only; None where no mount holds it."""
    best: Optional[Mount] = None
    for mount in mounts:
        at = mount[0].rstrip("/")
        covers = path == mount[0] or path.startswith(at + "/")
        if covers and (best is None or len(at) >= len(best[0].rstrip("/"))):
            best = mount
    return None if best is None else "ro" in best[2].split(",")


def _unescape(text: str) -> str:
    """Spaces and the like are octal in mountinfo."""
    for code in ("040", "011", "012", "134"):
        text = text.replace("\\" + code, chr(int(code, 8)))
    return text


def _word(value: Optional[bool]) -> str:
    return "unknown" if value is None else "yes" if value else "no"


def _capabilities(status: Dict[str, str]) -> str:
    effective = status.get("CapEff", "")
    try:
        return "yes" if int(effective, 16) == 0 else "no: " + effective
    except ValueError:
        return "unknown"


def _no_network() -> str:
    """By trying: a socket that cannot be made cannot be used."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.socket(family, socket.SOCK_STREAM).close()
            return "no"
        except OSError as e:
            if e.errno not in (errno.EAFNOSUPPORT, errno.EPERM, errno.EACCES):
                return "unknown: {}".format(e)
    return "yes"


def _memory_cgroup(root: Path) -> str:
    """Whether the kernel counts memory by cgroup at all. Where not, the daemon's own watch over its workers is the only one."""
    for line in (read_text(root / "proc/cgroups") or "").splitlines():
        words = line.split()
        if len(words) == 4 and words[0] == "memory":
            return "yes" if words[3] == "1" else "off in this kernel; workers are watched by the agent itself"
    controllers = read_text(root / "sys/fs/cgroup/cgroup.controllers")
    if controllers is not None and "memory" in controllers.split():
        return "yes"
    return "off in this kernel; workers are watched by the agent itself"


def _group_names() -> List[str]:
    found = []
    for number in sorted(set(os.getgroups())):
        try:
            found.append(grp.getgrgid(number).gr_name)
        except KeyError:
            found.append(str(number))
    return found


def _reach(device: str) -> str:
    if not os.path.exists(device):
        return "absent"
    return "yes" if os.access(device, os.R_OK | os.W_OK) else "no: not readable and writable for this user"
