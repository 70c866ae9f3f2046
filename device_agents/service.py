"""The daemon as a service of a device: installed, looked at, removed.

A *system* unit runs from boot on and needs root once, through ``sudo -n``; where that is refused the exact commands are told.
A *user* unit needs nobody, but lingering (loginctl(1)) to outlive a login.
"""

from __future__ import annotations

import contextlib
import glob
import grp
import os
import pwd
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, Dict, List, Optional, Sequence, Tuple

from device_agents import wire
from device_agents.boards.files import read_text
from device_agents.clock import utc_now
from device_agents.console import Console
from device_agents.errors import Refused
from device_agents.protections import find_protections
from device_agents.root import MAX_LOG_BYTES, SHARED_BITS
from device_agents.servers import launcher_text
from device_agents.spool import read_daemon
from device_agents.store import Store
from device_agents.systemctl import Manager, has_systemd, may_sudo, succeeds
from device_agents.unit import UnitSettings, render_unit, unit_name

STARTS_WITHIN_S = 30.0


def install_daemon(store: Store, console: Console, agent_sha256: str) -> Dict[str, Any]:
    """Write the unit, start it, and return once the daemon says what it runs under. A second time changes nothing it need not.

    Raises ``no-systemd``, ``needs-root`` with the commands to type, ``no-daemon`` where it does not come up: the unit that was
    there before, or none, is then there again.
    """
    request = _parse_request(console.read_json("daemon-install"))
    store.create()
    store.write(store.launch_path, launcher_text().encode("utf-8"))
    _check_systemd(store, agent_sha256)
    kind = request.kind if request.kind != "auto" else ("system" if may_sudo() else "user")
    console.progress("daemon", 0, 1, "", "a {} unit".format(kind))
    with console.heartbeat():
        manager = Manager(kind, unit_name(store.root))
        other = Manager("user" if kind == "system" else "system", manager.unit)
        before = [(one, one.read()) for one in (manager, other)]
        if kind == "user":
            _linger()
        for sandboxed in (True, False):
            text = render_unit(_settings(store, agent_sha256, request, kind, sandboxed))
            if manager.read() == text and _is_up(store, manager):
                break
            if store.has_daemon() and store.queued():
                raise Refused(
                    "busy",
                    "the daemon has {} jobs to do, and another unit would begin the first anew".format(len(store.queued())),
                    "edgevit collect --wait, then install it again",
                )
            manager.write(store, text)
            try:
                other.remove(store)  # only now: whatever is refused leaves the daemon that is there at work
                manager.restart(store)
                if _comes_up(store, manager):
                    break
                if kind == "system" or not sandboxed:
                    what = "{} does not come up; what was there before is there again:\n{}"
                    raise Refused("no-daemon", what.format(manager.unit, manager.log_tail()))
            except Refused:
                _put_back(store, before)
                raise
            console.progress("daemon", 0, 1, "", "this user manager cannot sandbox it; trying without")
    return dict(daemon_status(store), sandboxed=sandboxed)


def _put_back(store: Store, before: Sequence[Tuple[Manager, Optional[str]]]) -> None:
    """What does not come up would be tried every two seconds for good, in the place of what was at work before."""
    for manager, text in before:
        if text is None:
            manager.remove(store)
        elif manager.read() != text:
            manager.write(store, text)
            manager.restart(store)


@dataclass(frozen=True)
class _Request:
    kind: str
    user: Optional[str]
    groups: Tuple[str, ...]
    devices: Tuple[str, ...]
    quota_mb: Optional[int]


def _parse_request(value: Any) -> _Request:
    keys = {"kind", "user", "groups", "devices", "quota_mb"}
    if not isinstance(value, dict) or set(value) != keys or value["kind"] not in ("auto", "system", "user"):
        raise Refused("bad-request", "daemon-install: expected an object with {}".format(", ".join(sorted(keys))))
    user, quota = value["user"], value["quota_mb"]
    if user is not None and (not isinstance(user, str) or value["kind"] == "user"):
        raise Refused("bad-request", "daemon-install: another user goes with a system unit")
    if quota is not None and (isinstance(quota, bool) or not isinstance(quota, int) or quota < 1):
        raise Refused("bad-request", "daemon-install: {!r} is no quota in MB".format(quota))
    for key in ("groups", "devices"):
        if not isinstance(value[key], list) or not all(isinstance(v, str) and len(v) < 200 for v in value[key]):
            raise Refused("bad-request", "daemon-install: {} is a list of texts".format(key))
    if any(not d.startswith("/dev/") or ".." in d or any(c.isspace() for c in d) for d in value["devices"]):
        raise Refused("bad-request", "daemon-install: devices lie under /dev")
    return _Request(value["kind"], user, tuple(value["groups"]), tuple(value["devices"]), quota)


def _settings(store: Store, agent_sha256: str, request: _Request, kind: str, sandboxed: bool) -> UnitSettings:
    login = pwd.getpwuid(os.geteuid()).pw_name
    user = (request.user or login) if kind == "system" else None
    if user not in (None, login):
        check_shared(store.root, login, str(user))
    devices = tuple(sorted(found for pattern in request.devices for found in glob.glob(pattern)))
    return UnitSettings(
        root=store.root.resolve(),
        python=sys.executable,
        agent_sha256=agent_sha256,
        unit=unit_name(store.root),
        user=user,
        groups=tuple(name for name in request.groups if _group_exists(name)),
        devices=devices,
        quota_mb=request.quota_mb,
        shared=store.shared,
        sandboxed=sandboxed,
    )


def check_shared(root: Path, login: str, user: str) -> None:
    """A root that two users work in is ``2770`` and of a group that both are in. Raises ``needs-root`` with the commands."""
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        entry = None
    info = root.stat()
    group = _group_of(info.st_gid)
    wrong = []
    if entry is None:
        wrong.append("there is no user {}".format(user))
    if info.st_mode & SHARED_BITS != SHARED_BITS:
        wrong.append("{} has mode {:o}, expected 2770".format(root, info.st_mode & 0o7777))
    for name in (login, user) if entry is not None else ():
        if not _in_group(name, info.st_gid):
            wrong.append("{} is not in its group {}".format(name, group))
    home = Path(os.path.expanduser("~"))
    if home == root or home in root.parents:
        wrong.append("it lies in the home of {}, which others may not enter".format(login))
    if wrong:
        place = "/var/lib/edgevit" if home == root or home in root.parents else str(root)
        raise Refused(
            "needs-root",
            "{} and {} cannot share {}: {}. On the device, once:\n{}\n"
            "then log in anew with --root {} (edgevit target add), and provision it".format(
                login, user, root, "; ".join(wrong), "\n".join(share_commands(place, login, user)), place
            ),
        )


def share_commands(root: str, login: str, user: str) -> List[str]:
    """What root types to let ``login`` and ``user`` work in one root."""
    return [
        "  id {0} || sudo useradd --system --no-create-home --shell /usr/sbin/nologin --user-group {0}".format(user),
        "  sudo usermod -aG {0} {1}".format(user, login),
        "  sudo install -d -o {1} -g {0} -m 2770 {2}".format(user, login, quote(root)),
    ]


def _group_of(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _in_group(name: str, number: int) -> bool:
    with contextlib.suppress(KeyError):
        if pwd.getpwnam(name).pw_gid == number or name in grp.getgrgid(number).gr_mem:
            return True
    return False


def _group_exists(name: str) -> bool:
    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True


def _check_systemd(store: Store, agent_sha256: str) -> None:
    if not has_systemd():
        command = [sys.executable, "-I", str(store.launch_path), agent_sha256, str(store.root), "daemon"]
        raise Refused(
            "no-systemd",
            "systemd does not run this device (no /run/systemd/system)",
            "let what does start it, such as this line of crontab -e there: @reboot {}".format(
                " ".join(map(quote, command)).replace("%", "\\%")  # crontab(5): a bare one ends the line
            ),
        )


def _linger() -> None:
    """A user manager ends with the last login unless its user lingers."""
    name = pwd.getpwuid(os.geteuid()).pw_name
    if os.path.exists("/var/lib/systemd/linger/" + name):
        return
    for argv in (["loginctl", "enable-linger"], ["sudo", "-n", "loginctl", "enable-linger", name]):
        if succeeds(argv) and os.path.exists("/var/lib/systemd/linger/" + name):
            return
    raise Refused(
        "needs-root",
        "without lingering a daemon of {0} ends with its last login. On the device, once:\n"
        "  sudo loginctl enable-linger {0}".format(name),
    )


def _comes_up(store: Store, manager: Manager) -> bool:
    """Whether a daemon of this unit holds the lock and told what it is, within the time that starting takes."""
    deadline = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < deadline:
        if _is_up(store, manager):
            return True
        if manager.state().startswith("failed"):
            return False
        time.sleep(0.2)
    return False


def _is_up(store: Store, manager: Manager) -> bool:
    state = read_daemon(store)
    here = state is not None and state.unit == manager.unit and os.path.exists("/proc/{}".format(state.pid))
    return here and store.has_daemon() and manager.state().startswith("active")


def remove_daemon(store: Store) -> bool:
    """Stop the daemon and remove its units; False where there was none. Raises ``needs-root``."""
    removed = [Manager(kind, unit_name(store.root)).remove(store) for kind in ("system", "user") if has_systemd()]
    if any(removed):
        store.remove(store.daemon_path)
    return any(removed)


def daemon_status(store: Store) -> Dict[str, Any]:
    """:class:`~device_agents.wire.DaemonStatus` as plain values."""
    at_work = store.has_daemon()
    state = read_daemon(store)
    unit = unit_name(store.root)
    kind, unit_state = "", "absent"
    for one in ("system", "user") if has_systemd() else ():
        found = Manager(one, unit).state()
        if found != "absent":
            kind, unit_state = one, found
            break
    memory, cpu = _usage(state.pid) if at_work and state is not None else (None, None)
    status = wire.DaemonStatus(
        at_work=at_work,
        state=state,
        unit=unit,
        kind=kind,
        unit_state=unit_state if has_systemd() else "no systemd here",
        resident_mb=memory,
        cpu_seconds=cpu,
        queued=tuple(store.queued()),
        spooled=tuple(store.spooled()),
        used_mb=store.used_bytes() // 10**6,
    )
    return dict(wire.encode(status))


def describe_daemon(store: Store, agent_sha256: str, arguments: Sequence[str]) -> None:
    """Write what a daemon says of itself: its process, unit, quota in MB (0: none) and devices come as arguments.

    A process that the daemon started runs under its protections.
    """
    pid, unit, quota, *devices = arguments
    boot_id = read_text(Path("/proc/sys/kernel/random/boot_id"))
    state = wire.DaemonState(
        schema=wire.DAEMON_SCHEMA,
        agent_sha256=agent_sha256,
        pid=int(pid),
        user=pwd.getpwuid(os.geteuid()).pw_name,
        unit=unit,
        started_at=utc_now(),
        boot_id=boot_id,
        quota_mb=int(quota) or None,
        protections=find_protections(Path("/"), store.root, tuple(devices)),
    )
    store.write(store.daemon_path, wire.dumps(state))


def read_log(store: Store, lines: int) -> Dict[str, Any]:
    """The last lines of the daemon's log and of its servers'."""
    return {"daemon": _last_lines(store, store.daemon_log_path, lines), "server": _last_lines(store, store.log_path, lines)}


def _last_lines(store: Store, path: Path, lines: int) -> List[str]:
    found: List[str] = []
    for name in (str(path) + ".1", str(path)):
        data = store.read(Path(name), 64 * MAX_LOG_BYTES) or b""
        found += data.decode("utf-8", "replace").splitlines()
    return found[-lines:]


def _usage(pid: int) -> Tuple[Optional[float], Optional[float]]:
    """(resident MB, CPU seconds) of a process, from proc(5)."""
    try:
        pages = int(Path("/proc", str(pid), "statm").read_text().split()[1])
        ticks = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError, IndexError):
        return None, None
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK")
