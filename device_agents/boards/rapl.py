"""Intel's and AMD's counters of energy, as the kernel's power capping framework shows them.

Source: Documentation/power/powercap/powercap.rst of the Linux kernel: ``energy_uj`` counts µJ and starts again at 0 after
``max_energy_range_uj``. A top zone is a CPU package (``package-0``) or the platform (``psys``); zones below it are parts of it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from device_agents.boards.files import read_number, read_text


class Zone(NamedTuple):
    """One counter: a name that tells it from the others, its file, and where it starts again (None where it does not say)."""

    name: str
    path: Path
    wraps_uj: Optional[float]


def find_rapl(root: Path) -> "Optional[Rapl]":
    """The counters under ``root``; None where there are none at all. Those that cannot be read have their reason."""
    folder = root / "sys/class/powercap"
    zones: List[Zone] = []
    names: Dict[str, str] = {}
    for zone in sorted(folder.glob("intel-rapl:*"), key=lambda path: (path.name.count(":"), path.name)):
        name = read_text(zone / "name")
        if name:
            above = names.get(zone.name.rpartition(":")[0])
            names[zone.name] = above + "/" + name if above else name
            zones.append(Zone(names[zone.name][:60], zone / "energy_uj", read_number(zone / "max_energy_range_uj")))
    return Rapl(tuple(zones)) if zones else None


class Rapl:
    """Counters since the last look and since a measurement began. Whole numbers of µJ, so nothing is lost to rounding."""

    def __init__(self, zones: Tuple[Zone, ...]) -> None:
        self._zones = zones
        self._packages = frozenset(z.name for z in zones if re.fullmatch(r"package-\d+", z.name))
        self._last: Dict[str, float] = {}
        self._last_s: Optional[float] = None
        self._since_s = 0.0
        self._since_uj: Optional[float] = None
        readable = [z for z in zones if z.name in self._packages and read_number(z.path) is not None]
        self.absent = ""
        if not self._packages:
            self.absent = "the RAPL counters name no CPU package"
        elif len(readable) < len(self._packages):
            self.absent = (
                "the RAPL counters can be read by root alone; on the device, until it restarts: "
                "sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj"
            )

    def begin(self, now_s: float) -> None:
        """What is counted from here on belongs to a measurement. ``now_s``: any clock in seconds that never steps."""
        self.look(now_s)
        self._since_s, self._since_uj = now_s, 0.0

    def look(self, now_s: float) -> Tuple[Tuple[str, float], ...]:
        """(zone, mean mW since the last look) of each zone that can be read; none at the first look."""
        seconds = now_s - self._last_s if self._last_s is not None else 0.0
        found: List[Tuple[str, float]] = []
        counted: Optional[float] = 0.0
        now: Dict[str, float] = {}
        for zone in self._zones:
            value = read_number(zone.path)
            used = None
            if value is not None:
                now[zone.name] = value
                used = _used_uj(self._last.get(zone.name), value, zone.wraps_uj)
            if used is not None and seconds > 0:
                found.append((zone.name, used / seconds / 1000.0))
            if zone.name in self._packages:
                counted = None if used is None or counted is None else counted + used
        if self._since_uj is not None:
            # One look that failed leaves a gap in the sum, and a sum with a gap is none.
            self._since_uj = None if counted is None else self._since_uj + counted
        self._last, self._last_s = now, now_s
        return tuple(found)

    def total_mw(self, rails: Sequence[Tuple[str, float]]) -> Optional[float]:
        """The packages' share of ``rails``; None unless all of them are there."""
        known = [mw for name, mw in rails if name in self._packages]
        return sum(known) if known and len(known) == len(self._packages) else None

    def mean_mw(self) -> Optional[float]:
        """All packages' mean power from :meth:`begin` to the last look."""
        seconds = (self._last_s or 0.0) - self._since_s
        return self._since_uj / seconds / 1000.0 if self._since_uj is not None and seconds > 0 else None


def _used_uj(before: Optional[float], now: float, wraps_uj: Optional[float]) -> Optional[float]:
    """µJ from one look to the next; None where that cannot be told. A counter is looked at far more often than it wraps."""
    if before is None:
        return None
    if now >= before:
        return now - before
    return now + wraps_uj - before if wraps_uj is not None and wraps_uj >= before else None
