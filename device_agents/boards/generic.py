"""Any Linux board: what the kernel itself tells. Every reader takes the root of the file tree, so recorded boards can be read.

Sources: Documentation/ABI/testing/sysfs-class-thermal (m°C), Documentation/admin-guide/pm/cpufreq.rst (kHz),
Documentation/devicetree/usage-model.rst (the model string), all of the Linux kernel.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Dict, FrozenSet, List, Optional, Sequence, Tuple

from device_agents.boards.files import read_number, read_text
from device_agents.boards.rapl import Rapl, find_rapl

ARM_PARTS = {
    "0xd03": "Cortex-A53",
    "0xd04": "Cortex-A35",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76",
    "0xd42": "Cortex-A78AE",
    "0x003": "Denver 2",
    "0x004": "Carmel",
}
"""CPU part numbers of the boards there are profiles for (arm64 Linux prints the number alone)."""


@dataclass(frozen=True)
class PowerScope:
    """What a board's power figure is of: one of :data:`~device_agents.wire.POWER_SCOPES`, and in words what it covers."""

    scope: str
    covers: str


class GenericBoard:
    """Readers of one board. ``root`` is ``/`` on a device and a recorded tree in tests.

    Where files lie is looked up once; whether they can be read, at every reading: a sensor that goes away reads as None.
    ``programs_cpu_s`` is the CPU time of the programs asked so far, ``asking_cpu_s`` what starting them took in this process.
    """

    name = "generic"

    def __init__(self, root: Path) -> None:
        self.root = root
        self.programs_cpu_s = 0.0
        self.asking_cpu_s = 0.0

    @property
    def asks_programs(self) -> FrozenSet[str]:
        """What a program has to be started for: of ``throttle`` and ``power``."""
        return frozenset()

    @classmethod
    def recognises(cls, model: str) -> bool:
        """Whether a board with this model string is of this kind."""
        return True

    # ---- what it is ------------------------------------------------------------------------------------------------

    def model(self) -> Optional[str]:
        """The board's own model string: device tree first, then what a PC's firmware says."""
        for place in ("proc/device-tree/model", "sys/firmware/devicetree/base/model", "sys/class/dmi/id/product_name"):
            text = read_text(self.root / place)
            if text:
                return text[:400]
        return None

    def jetpack(self) -> Optional[str]:
        """The vendor's software release where there is such a thing."""
        return None

    def cpu(self) -> Tuple[Optional[str], Tuple[str, ...]]:
        """(CPU model, ISA features as the kernel names them)."""
        text = read_text(self.root / "proc/cpuinfo", 1_000_000) or ""
        fields = dict(re.findall(r"^([^\n:\t]+?)\s*:[ \t]*(.*)$", text, re.MULTILINE))
        model = fields.get("model name") or ARM_PARTS.get(fields.get("CPU part", "")) or fields.get("Hardware")
        features = (fields.get("Features") or fields.get("flags") or "").split()
        return (model or None), tuple(f[:60] for f in features[:1000])

    # ---- temperature and clocks ------------------------------------------------------------------------------------

    @cached_property
    def zones(self) -> List[Tuple[str, Path]]:
        """(type, file) of each thermal zone, in the order of their numbers."""
        folders = sorted((self.root / "sys/class/thermal").glob("thermal_zone[0-9]*"), key=_number_in_name)
        return [(read_text(folder / "type") or folder.name, folder / "temp") for folder in folders]

    def temperature_c(self) -> Optional[float]:
        """The hottest zone of the processor in °C; the hottest of all where none is named for one."""
        values = [(name.lower(), read_number(path)) for name, path in self.zones]
        known = [(name, value / 1000.0) for name, value in values if value is not None and -100e3 < value < 300e3]
        of_cpu = [value for name, value in known if "cpu" in name or "pkg" in name or "soc" in name]
        return max(of_cpu or [value for _, value in known], default=None)

    @cached_property
    def _clusters(self) -> List[Tuple[str, Path]]:
        """(name, file) of each clock: a cpufreq policy, or each CPU alone where the kernel shows no policies."""
        cpus = self.root / "sys/devices/system/cpu"
        policies = sorted((cpus / "cpufreq").glob("policy[0-9]*"), key=_number_in_name)
        if policies:
            return [(_cluster_name(p), p / "scaling_cur_freq") for p in policies]
        alone = sorted(cpus.glob("cpu[0-9]*/cpufreq"), key=lambda folder: _number_in_name(folder.parent))
        return [(folder.parent.name, folder / "scaling_cur_freq") for folder in alone]

    def clusters_mhz(self) -> Tuple[Tuple[str, float], ...]:
        """(name, MHz) of each CPU cluster's clock now; clusters that are switched off are left out."""
        values = [(name, read_number(path)) for name, path in self._clusters]
        return tuple((name, value / 1000.0) for name, value in values if value is not None and value >= 0)

    def frequency_mhz(self) -> Optional[float]:
        """The fastest cluster's clock now, in MHz: the one that works."""
        return max((mhz for _, mhz in self.clusters_mhz()), default=None)

    def governor(self) -> Optional[str]:
        """The frequency governors of all clusters, joined where they differ."""
        names = {read_text(path.with_name("scaling_governor")) for _, path in self._clusters}
        return "+".join(sorted(name for name in names if name))[:60] or None

    def gpu(self) -> Tuple[Optional[float], Optional[float]]:
        """(load as a share of 1, clock in MHz) of the board's GPU; None each where it does not tell."""
        return None, None

    # ---- limits ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A measurement begins now: what limited the board, or was used, before does not belong to it."""
        if self._rapl is not None:
            self._rapl.begin(time.monotonic())

    def throttle(self) -> Optional[Tuple[str, ...]]:
        """What limits the board now; None where this kind of board does not tell."""
        return None

    # ---- power -----------------------------------------------------------------------------------------------------

    @cached_property
    def _rapl(self) -> Optional[Rapl]:
        return find_rapl(self.root)

    def rails_mw(self) -> Tuple[Tuple[str, float], ...]:
        """(name, mW) of each rail that can be read; of counters, the mean since the last look."""
        return () if self._rapl is None else self._rapl.look(time.monotonic())

    def total_mw(self, rails: Sequence[Tuple[str, float]]) -> Optional[float]:
        """Of ``rails``, as :meth:`rails_mw` gave them, the power of the board's :meth:`power_scope`."""
        return None if self._rapl is None else self._rapl.total_mw(rails)

    def counted_mw(self) -> Optional[float]:
        """The mean power since :meth:`begin` by a counter of energy; None where the board has none."""
        return None if self._rapl is None else self._rapl.mean_mw()

    def power_scope(self) -> Optional[PowerScope]:
        """What :meth:`total_mw` is of; None where the board cannot tell its power, and :meth:`power_absent` says why."""
        if self._rapl is None or self._rapl.absent:
            return None
        return PowerScope("package", "RAPL counters of the CPU packages; leaves out memory modules, disks, fans and the supply")

    def power_absent(self) -> str:
        if self._rapl is None:
            return "this machine has no sensor of power that is known here (no RAPL counters)"
        return self._rapl.absent

    # ---- what there is ---------------------------------------------------------------------------------------------

    def sensors(self) -> Tuple[str, ...]:
        """What :class:`~device_agents.wire.Reading` will hold on this board, by name."""
        found = ["temperature:" + name for name, path in self.zones if read_number(path) is not None]
        found += ["frequency:" + name for name, _ in self.clusters_mhz()]
        if self.throttle() is not None:
            found.append("throttle")
        load, clock = self.gpu()
        found += ["gpu-load"] * (load is not None) + ["gpu-frequency"] * (clock is not None)
        scope = self.power_scope()
        if scope is not None:
            found.append("power:" + scope.scope)
        found += ["rail:" + name for name, _ in self.rails_mw()]
        return tuple(name[:200] for name in found)

    def absent(self) -> Dict[str, str]:
        """Why what is not among :meth:`sensors` is not, by the name of the reading."""
        reasons = {}
        if self.temperature_c() is None:
            reasons["temperature"] = "no thermal zone is readable"
        if self.frequency_mhz() is None:
            reasons["frequency"] = "no CPU tells its clock (cpufreq)"
        if self.governor() is None:
            reasons["governor"] = "no CPU tells its frequency governor (cpufreq)"
        if self.throttle() is None:
            reasons["throttle"] = self.throttle_absent()
        if self.gpu() == (None, None):
            reasons["gpu"] = self.gpu_absent()
        if self.power_scope() is None:
            reasons["power"] = self.power_absent()
        return reasons

    def throttle_absent(self) -> str:
        return "this kind of board ({}) does not tell what limits it".format(self.name)

    def gpu_absent(self) -> str:
        return "this kind of board ({}) has no reader of a GPU".format(self.name)


def _number_in_name(path: Path) -> Tuple[int, str]:
    """``policy4`` before ``policy10``."""
    digits = re.search(r"\d+", path.name)
    return (int(digits.group()) if digits else 0, path.name)


def _cluster_name(policy: Path) -> str:
    """``cpu0-3`` from the policy's ``related_cpus``, which are ``0 1 2 3``; the policy's own name where it has none."""
    cpus = [word for word in (read_text(policy / "related_cpus") or "").split() if word.isdigit()]
    if not cpus:
        return policy.name
    return "cpu" + cpus[0] + ("-" + cpus[-1] if len(cpus) > 1 else "")
