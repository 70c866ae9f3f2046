"""Any Linux board: what the kernel itself tells. Every reader takes the root of the file tree, so recorded boards can be read.

Sources: Documentation/ABI/testing/sysfs-class-thermal (m°C), Documentation/admin-guide/pm/cpufreq.rst (kHz),
Documentation/devicetree/usage-model.rst (the model string), all of the Linux kernel.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import List, Optional, Tuple

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


def read_text(path: Path, max_bytes: int = 65_536) -> Optional[str]:
    """A small file of the kernel's, stripped of white space and NULs; None where it cannot be read."""
    try:
        with open(str(path), "rb") as f:
            return f.read(max_bytes).decode("utf-8", "replace").strip("\0 \n\t")
    except OSError:
        return None


def read_number(path: Path) -> Optional[float]:
    """A file that holds one number; None where it cannot be read or holds something else."""
    text = read_text(path)
    try:
        return float(text) if text else None
    except ValueError:
        return None


class GenericBoard:
    """Readers of one board. ``root`` is ``/`` on a device and a recorded tree in tests."""

    name = "generic"

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def recognises(cls, model: str) -> bool:
        """Whether a board with this model string is of this kind."""
        return True

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

    def zones(self) -> List[Tuple[str, Path]]:
        """(type, file) of each thermal zone, in the order of their numbers."""
        found = []
        for zone in sorted((self.root / "sys/class/thermal").glob("thermal_zone*")):
            found.append((read_text(zone / "type") or zone.name, zone / "temp"))
        return found

    def temperature_c(self) -> Optional[float]:
        """The hottest zone of the processor in °C; the hottest of all where none is named for one."""
        values = [(name.lower(), read_number(path)) for name, path in self.zones()]
        known = [(name, value / 1000.0) for name, value in values if value is not None and -100e3 < value < 300e3]
        of_cpu = [value for name, value in known if "cpu" in name or "pkg" in name or "soc" in name]
        return max(of_cpu or [value for _, value in known], default=None)

    def frequency_mhz(self) -> Optional[float]:
        """The fastest CPU's clock now, in MHz: the one that works."""
        files = (self.root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
        known = [value / 1000.0 for value in map(read_number, files) if value is not None]
        return max(known, default=None)

    def governor(self) -> Optional[str]:
        """The frequency governors of all CPUs, joined where they differ."""
        files = (self.root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
        names = sorted({text for text in map(read_text, files) if text})
        return "+".join(names)[:60] or None

    def begin(self) -> None:
        """A measurement begins now: what limited the board before does not belong to it. Boards that count events override."""

    def throttle(self) -> Optional[Tuple[str, ...]]:
        """What limits the board now; None where this kind of board does not tell."""
        return None

    def sensors(self) -> Tuple[str, ...]:
        """What :class:`~device_agents.wire.Reading` will hold on this board, by name."""
        found = ["temperature:" + name for name, path in self.zones() if read_number(path) is not None]
        if self.frequency_mhz() is not None:
            found.append("frequency")
        if self.throttle() is not None:
            found.append("throttle")
        return tuple(name[:200] for name in found)
