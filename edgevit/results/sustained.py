"""What minutes of load did to a variant: retention, and where the board left its first plateau. Pure.

*Retention* is the median latency of the first minute ÷ that of the last: 1.0 where nothing changed, 0.8 where an inference of
the last minute took a quarter longer than one of the first, which is a speed of 80 %.

The *knee* is the moment from which on throughput stays more than 5 % below its first plateau. The plateau is the median
throughput of the first 20 seconds: boards with a boost lose it within the first minute. Throughput is smoothed by a running
median over 9 seconds, which a dip of up to 4 s does not move (Tukey, Exploratory Data Analysis, 1977); what lasts less than
10 s at the very end is not called "for good".
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from device_agents.wire import Reading, Series, Window

MINUTE_MS = 60_000
PLATEAU_MS = 20_000
FALL = 0.05
SMOOTH = 9
FOR_GOOD_MS = 10_000


@dataclass(frozen=True)
class Knee:
    """Throughput (inferences a second) stays below the plateau from ``at_s`` on, when the board had ``temperature_c``.

    ``after`` is its median from there to the end.
    """

    at_s: float
    temperature_c: float | None
    plateau: float
    after: float


@dataclass(frozen=True)
class Sustained:
    """One sustained series. ``retention`` is None with its reason in ``retention_absent``; ``knee`` None where throughput held.

    ``first_ms`` and ``last_ms``: median latency of the first and of the last minute.
    """

    seconds: float
    inferences: int
    first_ms: float | None
    last_ms: float | None
    retention: float | None
    retention_absent: str
    knee: Knee | None
    temperature_c: tuple[float, float] | None


def describe_sustained(series: Series) -> Sustained | None:
    """None where the series has no windows: it was of another plan."""
    windows = series.windows
    if not windows:
        return None
    end_ms = windows[-1].at_ms + windows[-1].duration_ms
    first = median_latency_ms([w for w in windows if w.at_ms + w.duration_ms / 2 <= MINUTE_MS])
    last = median_latency_ms([w for w in windows if w.at_ms + w.duration_ms / 2 >= end_ms - MINUTE_MS])
    absent = "" if end_ms >= 2 * MINUTE_MS else f"{end_ms / 1000:.1f} s were timed, two minutes are needed"
    if not absent and (first is None or last is None or last <= 0):
        absent = "no inference fell into the first or the last minute"
    known = [r.temperature_c for r in series.readings if r.temperature_c is not None]
    return Sustained(
        seconds=end_ms / 1000,
        inferences=sum(w.count for w in windows),
        first_ms=None if absent else first,
        last_ms=None if absent else last,
        retention=None if absent or first is None or last is None else first / last,
        retention_absent=absent,
        knee=find_knee(windows, series.readings),
        temperature_c=(min(known), max(known)) if known else None,
    )


def median_latency_ms(windows: Sequence[Window]) -> float | None:
    """The median of the windows' medians, each weighed by its inferences; None where there are none."""
    total = sum(w.count for w in windows)
    passed = 0
    for window in sorted(windows, key=lambda w: w.p50_ns):
        passed += window.count
        if 2 * passed >= total:
            return window.p50_ns / 1e6
    return None


def throughput(windows: Sequence[Window]) -> list[float]:
    """Inferences a second of each window."""
    return [1000.0 * w.count / max(w.duration_ms, 1) for w in windows]


def find_knee(windows: Sequence[Window], readings: Sequence[Reading] = (), fall: float = FALL) -> Knee | None:
    """The knee, or None where throughput never falls below its first plateau by more than ``fall`` for good."""
    whole = [w for w in windows if w.duration_ms > 0]
    if len(whole) >= 2 and 2 * whole[-1].duration_ms < whole[-2].duration_ms:
        whole = whole[:-1]  # the rest of a window: too short for a rate
    if len(whole) < 2 * SMOOTH:
        return None
    rates = _running_median(throughput(whole), SMOOTH)
    plateau = statistics.median(rates[: max(sum(w.at_ms < PLATEAU_MS for w in whole), SMOOTH)])
    start = len(rates)
    while start > 0 and rates[start - 1] < (1.0 - fall) * plateau:
        start -= 1
    if start in (0, len(rates)):
        return None
    end_ms = whole[-1].at_ms + whole[-1].duration_ms
    if end_ms - whole[start].at_ms < FOR_GOOD_MS:
        return None
    at_ms = whole[start].at_ms
    return Knee(at_ms / 1000, _temperature_at(readings, at_ms), plateau, statistics.median(rates[start:]))


def _running_median(values: Sequence[float], width: int) -> list[float]:
    """Over ``width`` values around each one; fewer at both ends."""
    half = width // 2
    return [statistics.median(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))]


def _temperature_at(readings: Sequence[Reading], at_ms: int) -> float | None:
    """Of the last reading before that moment, else the first after it."""
    known = [r for r in readings if r.temperature_c is not None]
    before = [r for r in known if r.at_ms <= at_ms]
    return (before[-1] if before else known[0]).temperature_c if known else None
