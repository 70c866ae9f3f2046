"""Energy per inference from what a run recorded. Pure.

Gross is the mean power over the timed part × its length ÷ the inferences in it; net takes the power of the idle board off the
mean first, so it is what the work adds. An inference is one call, of as many images as the artifact's batch. Where the board
has a counter of energy the mean is the counter's; else it is that of the readings inside the timed part.

No two scopes compare: a board's input, the sum of some rails, a package. Every figure carries its own.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from device_agents.wire import Measurement, Series

FEWEST_READINGS = 3
"""Of a sampled power, over all series: two readings can both have caught the same moment of a rising clock."""


@dataclass(frozen=True)
class Energy:
    """Millijoules an inference and milliwatts; what is None has its reason in ``absent`` (net) and ``gross_absent``."""

    net_mj: float | None = None
    absent: str = ""
    gross_mj: float | None = None
    gross_absent: str = ""
    power_mw: float | None = None
    idle_mw: float | None = None
    scope: str = ""
    covers: str = ""


def measure_energy(m: Measurement) -> Energy:
    """The energy of one measurement, over all of its series that recorded power."""
    if not m.series:
        return _absent("nothing was timed")
    known = [s for s in m.series if s.power is not None and s.sampling is not None]
    if not known:
        reason = next((s.power_absent for s in m.series if s.power_absent), "")
        return _absent(reason or "this run was recorded before power was")
    power = known[0].power
    scope, covers = (power.scope, power.covers) if power else ("", "")
    means = [(s, _mean_mw(s)) for s in known]
    measured = [(s, mean) for s, mean in means if mean is not None]
    readings = sum(len(_inside(s)) for s in known)
    if not measured or (readings < FEWEST_READINGS and not all(s.power and s.power.counted_mw is not None for s in known)):
        why = f"{readings} readings of power while timed, {FEWEST_READINGS} are needed; bench with --plan standard"
        return _absent(why if measured else "the sensor of power gave no reading while timed", scope, covers)
    seconds = sum(_seconds(s) for s, _ in measured)
    count = sum(inferences(s) for s, _ in measured)
    if not seconds or not count:
        return _absent("nothing was timed", scope, covers)
    gross = sum(mean * _seconds(s) for s, mean in measured)
    idles = [s.power.idle_mw for s, _ in measured if s.power and s.power.idle_mw is not None]
    idle = statistics.fmean(idles) if len(idles) == len(measured) else None
    found = Energy(gross_mj=gross / count, power_mw=gross / seconds, idle_mw=idle, scope=scope, covers=covers, net_mj=None)
    return _with_net(found, seconds, count, next((s.power.idle_absent for s, _ in measured if s.power), ""))


def _with_net(found: Energy, seconds: float, count: int, idle_absent: str) -> Energy:
    from dataclasses import replace

    power = found.power_mw or 0.0
    if found.idle_mw is None:
        return replace(found, absent=idle_absent or "the power of the idle board was not read")
    if power <= found.idle_mw:
        told = f"timed it took {power:,.0f} mW on the mean, idle {found.idle_mw:,.0f} mW: the sensor cannot tell them apart"
        return replace(found, absent=told)
    return replace(found, net_mj=(power - found.idle_mw) * seconds / count)


def _absent(reason: str, scope: str = "", covers: str = "") -> Energy:
    return Energy(absent=reason, gross_absent=reason, scope=scope, covers=covers)


def inferences(s: Series) -> int:
    """How many calls the timed part held: not all of a long one's samples are kept."""
    return sum(w.count for w in s.windows) or len(s.samples_ns) * s.stride


def _seconds(s: Series) -> float:
    return s.sampling.wall_ms / 1000.0 if s.sampling else 0.0


def _inside(s: Series) -> list[float]:
    """The readings of power in the timed part: the last one is made after its end."""
    wall_ms = s.sampling.wall_ms if s.sampling else 0
    return [r.power_mw for r in s.readings if r.power_mw is not None and r.at_ms <= wall_ms]


def _mean_mw(s: Series) -> float | None:
    if s.power is not None and s.power.counted_mw is not None:
        return s.power.counted_mw
    inside = _inside(s)
    return statistics.fmean(inside) if inside else None
