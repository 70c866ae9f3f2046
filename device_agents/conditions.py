"""What the board is to be like while something is timed: as cool as the plan says, and at the governor it asks for.

Governors are files of the kernel (Documentation/admin-guide/pm/cpufreq.rst). What they held is on the disk before they are
changed, so that whoever starts next puts them back, also after a ``kill -9``.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Callable, Dict, List, Optional

from device_agents import wire
from device_agents.boards.files import read_text
from device_agents.errors import Refused
from device_agents.store import Store

COOL_EVERY_S = 1.0
GOVERNOR = "performance"
MAX_NOTE_BYTES = 1_000_000

_GOVERNOR_FILE = re.compile(r"sys/devices/system/cpu/(cpufreq/policy\d+|cpu\d+/cpufreq)/scaling_governor")
_GOVERNOR_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")


def cool_down(
    read_c: Callable[[], Optional[float]],
    plan: wire.RunPlan,
    idle_c: Optional[float],
    say: Callable[[float, float, float], None],
    limit_s: float,
    every_s: float = COOL_EVERY_S,
) -> Optional[wire.Cooling]:
    """Wait until ``read_c`` (°C) is down to what the plan wants, at most ``limit_s``; None where it wants nothing.

    ``idle_c`` is what the board had when the job began, for plans that ask for so much above it. ``say`` is told (°C now,
    °C wanted, seconds waited) at every look.
    """
    if plan.cool_to_c is None and plan.cool_within_c is None:
        return None
    start = time.monotonic()
    first = now = read_c()
    target = plan.cool_to_c
    if target is None and idle_c is not None and plan.cool_within_c is not None:
        target = idle_c + plan.cool_within_c
    while True:
        waited = time.monotonic() - start
        if now is None or target is None:
            return wire.Cooling("no-sensor", first, target, now, waited)
        if now <= target:
            return wire.Cooling("reached", first, target, now, waited)
        if waited >= limit_s:
            return wire.Cooling("limit", first, target, now, waited)
        say(now, target, waited)
        time.sleep(min(every_s, max(limit_s - waited, 0.001)))
        now = read_c()


def governor_files(root: Path) -> List[Path]:
    """One for each group of CPUs that share a clock; in the order of their names."""
    cpus = root / "sys/devices/system/cpu"
    found = sorted(cpus.glob("cpufreq/policy[0-9]*/scaling_governor"))
    return found or sorted(cpus.glob("cpu[0-9]*/cpufreq/scaling_governor"))


def tune_system(store: Store, root: Path) -> str:
    """Set every governor to ``performance``; what they were, joined where they differ. :func:`restore_system` puts them back.

    Raises ``bad-job`` where there is none, ``needs-root`` with the command to type where this user may not.
    """
    problem = restore_system(store, root)
    if problem:  # what an earlier job found must not be overwritten by what it left
        raise Refused("needs-root", "the system is still tuned by an earlier job: {}".format(problem))
    files = governor_files(root)
    before = {str(path.relative_to(root)): read_text(path) or "" for path in files}
    if not files or not all(_GOVERNOR_NAME.fullmatch(name) for name in before.values()):
        raise Refused("bad-job", "this device has no frequency governor that could be set", "leave --tune-system out")
    if set(before.values()) == {GOVERNOR}:
        return GOVERNOR
    store.write(store.tuned_path, json.dumps(before).encode("utf-8"))
    try:
        for path in files:
            _write(path, GOVERNOR)
            if read_text(path) != GOVERNOR:
                raise OSError("{} holds {} afterwards".format(path, read_text(path)))
    except OSError as e:
        restore_system(store, root)
        command = "echo {} | sudo tee {}".format(GOVERNOR, files[0].parent.parent / "*" / "scaling_governor")
        if "/cpufreq/policy" not in str(files[0]):
            command = "echo {} | sudo tee {}".format(GOVERNOR, root / "sys/devices/system/cpu/cpu*/cpufreq/scaling_governor")
        raise Refused(
            "needs-root",
            "the frequency governor cannot be set by this user ({}); on the device: {}; then leave --tune-system out".format(
                e, command
            ),
            command,
        ) from e
    return "+".join(sorted(set(before.values())))[:60]


def restore_system(store: Store, root: Path) -> str:
    """Put back what :func:`tune_system` changed, whoever called it and however it ended. What could not be put back, with the
    command to type, else empty; the note then stays for the next time."""
    data = store.read(store.tuned_path, MAX_NOTE_BYTES)
    if data is None:
        return ""
    problems = []
    for name, governor in _parse_note(data).items():
        path = root / name
        if read_text(path) in (governor, None):  # None: the CPU is gone since
            continue
        try:
            _write(path, governor)
        except OSError as e:
            problems.append("{} is not put back to {}: {}; echo {} | sudo tee {}".format(path, governor, e, governor, path))
    if not problems:
        store.remove(store.tuned_path)
    return "; ".join(problems)


def _parse_note(data: bytes) -> Dict[str, str]:
    """Only governors of the kernel's own files, whatever the note says: it must not become a way to write elsewhere."""
    try:
        note = json.loads(data.decode("utf-8"))
    except ValueError:
        return {}
    if not isinstance(note, dict):
        return {}
    return {
        name: governor
        for name, governor in note.items()
        if isinstance(governor, str) and _GOVERNOR_FILE.fullmatch(name) and _GOVERNOR_NAME.fullmatch(governor)
    }


def _write(path: Path, text: str) -> None:
    with open(str(path), "w", encoding="ascii") as f:
        f.write(text)
