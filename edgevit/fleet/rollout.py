"""A roll-out's waves and what to do after each: pure.

Waves are cumulative shares of the devices in the fleet file's order, ``local`` first, so the same command always takes the same
devices into the same wave, whichever of them were done before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgevit.errors import UsageError

_SHARE = re.compile(r"(\d{1,6}(?:\.\d{1,3})?)(%?)")


@dataclass(frozen=True)
class Share:
    """A count of devices, or a percentage of them."""

    value: float
    percent: bool

    def at_least(self, total: int) -> int:
        """Of ``total``, rounded up: a wave of 1 % of ten devices is one device."""
        return min(total, math.ceil(self._exact(total)))

    def at_most(self, total: int) -> int:
        """Of ``total``, rounded down: with 10 % of five devices allowed to fail none is."""
        return min(total, math.floor(self._exact(total)))

    def _exact(self, total: int) -> float:
        # Ten digits keep what floats make of 29 % of 100 from being rounded up to 30.
        return round(self.value * total / 100.0, 10) if self.percent else self.value

    def text(self) -> str:
        """As it was typed: ``3`` or ``25%``."""
        return f"{self.value:g}{'%' if self.percent else ''}"


def parse_share(text: str, option: str) -> Share:
    """``3`` or ``25%``. UsageError for anything else, a part of a device, or more than 100 %."""
    found = _SHARE.fullmatch(text.strip())
    value = float(found[1]) if found else -1.0
    percent = bool(found and found[2])
    if value < 0 or (percent and value > 100) or (not percent and value != int(value)):
        raise UsageError(f"{option}: got {text!r}, expected a count such as 3 or a share such as 25%", hint=f"{option} 25%")
    return Share(value, percent)


def plan_waves(shares: Sequence[Share], names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The devices of each wave, in the order of ``names``; a wave that would add none is left out.

    Each share counts from the beginning: 1, 25 %, 100 % of eight devices are waves of 1, 1 and 6. What is beyond the last share
    stays as it is. UsageError where a share is smaller than the one before, or takes no device.
    """
    waves: list[tuple[str, ...]] = []
    done = before = 0
    for share in shares:
        size = share.at_least(len(names))
        if size < 1:
            raise UsageError(f"--wave {share.text()} of {len(names)} devices is none", hint="--wave 1")
        if size < before:
            raise UsageError(
                f"--wave {share.text()} is {size} of {len(names)} devices, fewer than the {before} of the wave before; "
                "waves count from the beginning",
                hint="--wave 1 --wave 25% --wave 100%",
            )
        before = size
        if size > done:
            waves.append(tuple(names[done:size]))
            done = size
    return tuple(waves)


WaveEnd = Literal["passed", "gate failed", "failed"]


@dataclass(frozen=True)
class Member:
    """One device after its part in a wave. ``failed``: it was unreachable or refused, and nothing there was judged."""

    name: str
    end: WaveEnd
    reason: str = ""


Next = Literal["go on", "finished", "stop", "roll back"]


@dataclass(frozen=True)
class Decision:
    """What comes after a wave, and why."""

    next: Next
    reasons: tuple[str, ...] = ()


def decide(earlier: Sequence[Member], wave: Sequence[Member], max_failed: Share, waves_left: int) -> Decision:
    """A gate that did not hold takes the whole wave back. Otherwise more failures than ``max_failed`` of all devices tried so
    far stop the roll-out, where devices are left that it would go on to."""
    not_held = tuple(f"{m.name}: {m.reason}" for m in wave if m.end == "gate failed")
    if not_held:
        return Decision("roll back", not_held)
    tried = [*earlier, *wave]
    failed = [m for m in tried if m.end == "failed"]
    allowed = max_failed.at_most(len(tried))
    if len(failed) > allowed:
        several = f"{len(failed)} of {len(tried)} devices failed, {max_failed.text()} allows {allowed}"
        return Decision("stop", (several, *(f"{m.name}: {m.reason}" for m in failed)))
    return Decision("go on" if waves_left else "finished")
