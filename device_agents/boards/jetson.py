"""NVIDIA Jetson: over-current throttling from the hwmon ``soctherm_oc``, the release and the power mode from their files.

Source: NVIDIA Jetson Linux developer guide, "Platform power and performance". Power mode numbers differ by board, so the
name is looked up in ``/etc/nvpmodel.conf``; jetson-stats is not used.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Dict, Optional, Tuple

from device_agents.boards.generic import GenericBoard, read_number, read_text


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

    def begin(self) -> None:
        self.throttle()  # events up to now are seen

    def throttle(self) -> Optional[Tuple[str, ...]]:
        now: Dict[str, float] = {}
        for hwmon in sorted((self.root / "sys/class/hwmon").glob("hwmon*")):
            if read_text(hwmon / "name") == "soctherm_oc":
                for path in sorted(hwmon.glob("oc*_event_cnt")):
                    count = read_number(path)
                    if count is not None:
                        now[path.name.split("_")[0]] = count
        if not now:
            return None
        risen = tuple("over-current-" + name for name, count in now.items() if count > self._seen.get(name, count))
        self._seen = now
        return risen

    def sensors(self) -> Tuple[str, ...]:
        mode = self.power_mode()
        return super().sensors() + (("power-mode:" + mode,) if mode else ())
