"""Raspberry Pi: the firmware tells what limits the board, and on a Pi 5 what its power controller (PMIC) measures.

Sources: Raspberry Pi documentation, ``vcgencmd get_throttled`` and ``vcgencmd pmic_read_adc``. Bits 0 to 3 are the state now;
16 to 19 mean "has happened since boot" and stay. One of these that rises during a measurement happened in it, also between two
readings; one that was set before says nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from functools import cached_property
from pathlib import Path
from typing import FrozenSet, Optional, Sequence, Tuple

from device_agents.boards.files import read_text
from device_agents.boards.generic import GenericBoard, PowerScope

LIMITS = ("under-voltage", "frequency-capped", "throttled", "soft-temperature-limit")
"""By bit, from 0 on; sixteen bits further up: whether it has happened since boot."""

PROGRAMS = ("usr/bin/vcgencmd", "opt/vc/bin/vcgencmd")
PROGRAM_TIMEOUT_S = 5.0


def parse_throttled_bits(text: str) -> Optional[int]:
    """``throttled=0x50005`` (vcgencmd) or ``50005`` (sysfs) → its bits; None where it is neither."""
    found = re.fullmatch(r"(?:throttled=0x)?([0-9a-fA-F]{1,8})", text.strip())
    return int(found.group(1), 16) if found else None


def parse_throttled(text: str) -> Optional[Tuple[str, ...]]:
    """The same text → what holds now, by name."""
    bits = parse_throttled_bits(text)
    return None if bits is None else _name_limits(bits)


def _name_limits(bits: int) -> Tuple[str, ...]:
    return tuple(name for bit, name in enumerate(LIMITS) if bits >> bit & 1)


def parse_pmic(text: str) -> Tuple[Tuple[str, float], ...]:
    """``vcgencmd pmic_read_adc`` → (rail, mW) of each rail with a current, ``VDD_CORE_A current(7)=0.56A``, and a voltage."""
    found = re.findall(r"^\s*(\w+)_([AV]) (?:current|volt)\(\d+\)=(-?\d+(?:\.\d+)?)[AV]\s*$", text, re.MULTILINE)
    amperes = {name: float(value) for name, unit, value in found if unit == "A"}
    volts = {name: float(value) for name, unit, value in found if unit == "V"}
    return tuple((name[:60], amperes[name] * volts[name] * 1000.0) for name in amperes if name in volts)


class RaspberryPi(GenericBoard):
    """Reads the firmware's state from sysfs, and through ``vcgencmd`` what the kernel does not offer."""

    name = "raspberry-pi"

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._happened: Optional[int] = None

    @classmethod
    def recognises(cls, model: str) -> bool:
        return model.startswith("Raspberry Pi")

    @property
    def asks_programs(self) -> FrozenSet[str]:
        asked = ["power"] if self._has_pmic else []
        return frozenset(asked + ([] if self._throttled_path else ["throttle"]))

    # ---- limits ----------------------------------------------------------------------------------------------------

    @cached_property
    def _throttled_path(self) -> Optional[Path]:
        found = sorted((self.root / "sys/devices/platform").glob("soc*/soc*:firmware/get_throttled"))
        return next((path for path in found if read_text(path)), None)

    def begin(self) -> None:
        self._happened = None
        self.throttle()

    def throttle(self) -> Optional[Tuple[str, ...]]:
        text = read_text(self._throttled_path) if self._throttled_path else self._ask("get_throttled")
        bits = parse_throttled_bits(text) if text else None
        if bits is None:
            return None
        happened = bits >> 16
        risen = 0 if self._happened is None else happened & ~self._happened
        self._happened = happened
        return _name_limits(bits | risen)

    def throttle_absent(self) -> str:
        return self._why_not("get_throttled")

    # ---- power -----------------------------------------------------------------------------------------------------

    @cached_property
    def _has_pmic(self) -> bool:
        """Asked once: a firmware without a PMIC to read answers with an error, at the price of starting a program."""
        return bool(self.rails_mw())

    def rails_mw(self) -> Tuple[Tuple[str, float], ...]:
        if "_has_pmic" in self.__dict__ and not self._has_pmic:
            return ()
        return parse_pmic(self._ask("pmic_read_adc") or "")

    def total_mw(self, rails: Sequence[Tuple[str, float]]) -> Optional[float]:
        return sum(mw for _, mw in rails) if rails else None

    def power_scope(self) -> Optional[PowerScope]:
        if not self._has_pmic:
            return None
        return PowerScope("pmic-partial", "the sum of the PMIC's rails; misses 5 V loads (USB, HATs, fan) and losses")

    def power_absent(self) -> str:
        old = re.search(r"Raspberry Pi (?:Compute Module )?5", self.model() or "") is None
        if (self._program is None and old) or "error=" in (self._ask("pmic_read_adc", whatever=True) or ""):
            return "this model has no sensor of power (a Raspberry Pi 5 has); a meter at the supply would tell"
        return self._why_not("pmic_read_adc")

    # ---- the program -----------------------------------------------------------------------------------------------

    @cached_property
    def _program(self) -> Optional[Path]:
        return next((self.root / p for p in PROGRAMS if (self.root / p).is_file()), None)

    def _why_not(self, question: str) -> str:
        if self._program is None:
            return "vcgencmd is not installed; on the device: sudo apt install raspi-utils"
        return "vcgencmd {} gives no answer; a user outside the group video may not ask (sudo usermod -aG video USER)".format(
            question
        )

    def _ask(self, question: str, whatever: bool = False) -> Optional[str]:
        """What ``vcgencmd`` answers; None where it cannot be asked or, without ``whatever``, answers with an error."""
        if self._program is None:
            return None
        began = time.thread_time()
        try:
            process = subprocess.Popen([str(self._program), question], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        except OSError:
            return None
        timer = threading.Timer(PROGRAM_TIMEOUT_S, process.kill)
        timer.start()
        try:
            out = process.stdout.read(65_536) if process.stdout else b""
            # wait4 tells what this one program cost; the totals of all children would hold the workers' too.
            _, status, usage = os.wait4(process.pid, 0)
        finally:
            timer.cancel()
            if process.stdout:
                process.stdout.close()
        process.returncode = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
        self.programs_cpu_s += usage.ru_utime + usage.ru_stime
        self.asking_cpu_s += time.thread_time() - began
        return out.decode("utf-8", "replace") if process.returncode == 0 or whatever else None
