"""NVIDIA Jetson: power by rail from its INA3221 monitors, the GPU's load and clock, over-current events, release, power mode.

Sources: NVIDIA Jetson Linux developer guide, "Platform power and performance" (rails, ``soctherm_oc``, nvpmodel);
Documentation/hwmon/ina3221.rst of the Linux kernel (mV and mA); Documentation/ABI/testing/sysfs-class-devfreq (Hz). JetPack 4
shows the same monitors through NVIDIA's own ``ina3221x`` driver. Power mode numbers and rails differ by board, so both are
looked up by name; jetson-stats is not used.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from device_agents.boards.files import read_number, read_text
from device_agents.boards.generic import GenericBoard, PowerScope

BOARD_RAILS = ("VDD_IN", "POM_5V_IN")
"""The rail everything else hangs on, by JetPack."""

SUMMED_RAILS = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")
"""AGX Orin monitors no such rail; these three stand side by side and everything else of the module hangs on one of them."""

GPU_NODES = ("gpu", "gp10b", "gv11b", "ga10b")
"""Names in the device tree: Nano, TX2, Xavier, Orin (JetPack 6 calls it gpu again)."""


class Rail(NamedTuple):
    name: str
    millivolts: Path
    milliamperes: Path


class Jetson(GenericBoard):
    """Counters of throttle events only ever rise: what rose since the last look limits the board now."""

    name = "jetson"

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._seen: Dict[str, float] = {}

    @classmethod
    def recognises(cls, model: str) -> bool:
        return "Jetson" in model or model.startswith(("NVIDIA Orin", "quill"))

    def jetpack(self) -> Optional[str]:
        """``L4T 35.4.1`` from ``/etc/nv_tegra_release``."""
        text = read_text(self.root / "etc/nv_tegra_release") or ""
        found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text)
        return "L4T {}.{}".format(*found.groups()) if found else None

    def power_mode(self) -> Optional[str]:
        """The name of the power mode now, such as ``MAXN`` or ``15W``."""
        status = re.search(r"pmode:(\d+)", read_text(self.root / "var/lib/nvpmodel/status") or "")
        if not status:
            return None
        modes = re.findall(
            r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", read_text(self.root / "etc/nvpmodel.conf", 1_000_000) or ""
        )
        return {int(number): name for number, name in modes}.get(int(status.group(1)))

    # ---- limits ----------------------------------------------------------------------------------------------------

    @cached_property
    def _events(self) -> List[Tuple[str, Path]]:
        return [
            (path.name.split("_")[0], path)
            for hwmon in sorted((self.root / "sys/class/hwmon").glob("hwmon*"))
            if read_text(hwmon / "name") == "soctherm_oc"
            for path in sorted(hwmon.glob("oc*_event_cnt"))
        ]

    def begin(self) -> None:
        self.throttle()  # events up to now are seen

    def throttle(self) -> Optional[Tuple[str, ...]]:
        counts = [(name, read_number(path)) for name, path in self._events]
        now = {name: count for name, count in counts if count is not None}
        if not now:
            return None
        risen = tuple("over-current-" + name for name, count in now.items() if count > self._seen.get(name, count))
        self._seen = now
        return risen

    def throttle_absent(self) -> str:
        return "this release counts no over-current events (no hwmon named soctherm_oc)"

    # ---- GPU -------------------------------------------------------------------------------------------------------

    @cached_property
    def _gpu(self) -> Optional[Path]:
        """The devfreq folder of the GPU: its own name differs by release, the device tree's does not."""
        for folder in sorted((self.root / "sys/class/devfreq").glob("*")):
            if read_text(folder / "device/of_node/name") in GPU_NODES:
                return folder
        return None

    def gpu(self) -> Tuple[Optional[float], Optional[float]]:
        if self._gpu is None:
            return None, None
        load, clock = read_number(self._gpu / "device/load"), read_number(self._gpu / "cur_freq")
        return (
            None if load is None else min(max(load / 1000.0, 0.0), 1.0),
            None if clock is None or clock < 0 else clock / 1e6,
        )

    def gpu_absent(self) -> str:
        return "no devfreq folder belongs to a GPU known here ({})".format(", ".join(GPU_NODES))

    # ---- power -----------------------------------------------------------------------------------------------------

    @cached_property
    def _rails(self) -> List[Rail]:
        drivers = self.root / "sys/bus/i2c/drivers"
        found = []
        for folder in sorted((drivers / "ina3221").glob("*/hwmon/hwmon*")):  # JetPack 5 and later
            for n in (1, 2, 3):
                files = [folder / name.format(n) for name in ("in{}_label", "in{}_input", "curr{}_input")]
                found.append(Rail(read_text(files[0]) or "", files[1], files[2]))
        for folder in sorted((drivers / "ina3221x").glob("*/iio:device*")):  # JetPack 4
            for n in (0, 1, 2):
                files = [folder / name.format(n) for name in ("rail_name_{}", "in_voltage{}_input", "in_current{}_input")]
                found.append(Rail(read_text(files[0]) or "", files[1], files[2]))
        return [rail for rail in found if rail.name not in ("", "NC")]

    def rails_mw(self) -> Tuple[Tuple[str, float], ...]:
        values = [(rail.name, read_number(rail.millivolts), read_number(rail.milliamperes)) for rail in self._rails]
        return tuple((name[:60], mv * ma / 1000.0) for name, mv, ma in values if mv is not None and ma is not None)

    @cached_property
    def _total(self) -> Tuple[str, ...]:
        """The rails whose sum is the total: one, three, or none where no total is known."""
        names = {rail.name for rail in self._rails}
        for rail in BOARD_RAILS:
            if rail in names:
                return (rail,)
        return SUMMED_RAILS if names.issuperset(SUMMED_RAILS) else ()

    def total_mw(self, rails: Sequence[Tuple[str, float]]) -> Optional[float]:
        known = [mw for name, mw in rails if name in self._total]
        return sum(known) if known and len(known) == len(self._total) else None

    def power_scope(self) -> Optional[PowerScope]:
        if not self._total:
            return None
        if len(self._total) == 1:
            return PowerScope("board", "the rail {} that feeds the module".format(self._total[0]))
        return PowerScope("rails", "{}; the module has no monitor of its whole input".format(" + ".join(self._total)))

    def power_absent(self) -> str:
        if not self._rails:
            return "no INA3221 power monitor is readable (the Jetson Nano 2GB has none)"
        return "none of its rails is known to be the total: {}".format(", ".join(rail.name for rail in self._rails))

    def sensors(self) -> Tuple[str, ...]:
        mode = self.power_mode()
        return super().sensors() + (("power-mode:" + mode,) if mode else ())
