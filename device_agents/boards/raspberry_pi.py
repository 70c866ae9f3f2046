"""Raspberry Pi: the firmware tells what limits the board.

Source: Raspberry Pi documentation, ``vcgencmd get_throttled``. Bits 0 to 3 are the state now; 16 to 19 mean "has happened
since boot" and stay, so they say nothing about a measurement and are not reported.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Optional, Tuple

from device_agents.boards.generic import GenericBoard, read_text

NOW_BITS = {0: "under-voltage", 1: "frequency-capped", 2: "throttled", 3: "soft-temperature-limit"}


def parse_throttled(text: str) -> Optional[Tuple[str, ...]]:
    """``throttled=0x50005`` (vcgencmd) or ``50005`` (sysfs) → what holds now; None where it is neither."""
    try:
        bits = int(text.strip().rpartition("=")[2], 16)
    except ValueError:
        return None
    return tuple(name for bit, name in sorted(NOW_BITS.items()) if bits >> bit & 1)


class RaspberryPi(GenericBoard):
    """Reads the firmware's state from sysfs, and through ``vcgencmd`` where the kernel does not offer it."""

    name = "raspberry-pi"

    @classmethod
    def recognises(cls, model: str) -> bool:
        return model.startswith("Raspberry Pi")

    def throttle(self) -> Optional[Tuple[str, ...]]:
        for path in sorted((self.root / "sys/devices/platform").glob("soc*/soc*:firmware/get_throttled")):
            text = read_text(path)
            if text:
                return parse_throttled(text)
        return self._ask_firmware()

    def _ask_firmware(self) -> Optional[Tuple[str, ...]]:
        program = next((p for p in ("usr/bin/vcgencmd", "opt/vc/bin/vcgencmd") if (self.root / p).is_file()), None)
        if program is None:
            return None
        try:
            done = subprocess.run(
                [str(Path(self.root, program)), "get_throttled"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=5
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return parse_throttled(done.stdout.decode("utf-8", "replace")) if done.returncode == 0 else None
