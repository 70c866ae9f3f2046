"""What the charts of time and spread need of a run: percentiles, latency in the order it was taken, the board's state. Pure.

Only what is drawn is thinned: percentiles are of every sample, and of each stretch of samples through time its fastest, its
median and its slowest are kept, so that no spike is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from itertools import accumulate
from typing import Any

from device_agents.wire import Measurement, Reading, Run, Series
from edgevit.report.page_rows import short
from edgevit.results.percentiles import percentile
from edgevit.results.sustained import median_latency_ms

STRETCHES = 80
"""Of one series, at most."""
WINDOWS = 600
READINGS = 400
"""Of one run; a reading that was limited is always kept."""


def distribution(m: Measurement) -> dict[str, Any]:
    """101 percentiles (nearest rank) of all samples in ms, and each process's own median."""
    ordered = sorted(ns for one in m.series for ns in one.samples_ns)
    quantiles = [ordered[0]] + [percentile(ordered, i / 100) for i in range(1, 101)] if ordered else []
    own = [percentile(sorted(s.samples_ns), 0.5) for s in m.series if s.samples_ns]
    return {"q": [short(v / 1e6) for v in quantiles], "own": [short(v / 1e6) for v in own]}


def stretches(samples: Sequence[int], most: int) -> list[tuple[int, int, int, int]]:
    """(first index, fastest, median, slowest) of at most ``most`` stretches of equal length, fewer where samples are."""
    count = min(most, len(samples))
    found = []
    for k in range(count):
        first, end = k * len(samples) // count, (k + 1) * len(samples) // count
        here = sorted(samples[first:end])
        found.append((first, here[0], percentile(here, 0.5), here[-1]))
    return found


def trace(run: Run, rows: Sequence[int]) -> dict[str, Any]:
    """One run through time, in seconds since it began: every series of every measurement, and the board's readings.

    ``rows`` are the places of its measurements in the page's table.
    """
    start = _moment(run.started_at)
    series = []
    readings = []
    for row, m in zip(rows, run.measurements, strict=True):
        for one in m.series:
            began = _moment(one.started_at)
            offset = began - start if began is not None and start is not None else 0.0
            series.append({"row": row, "process": one.process, "start": round(offset, 3), **_points(one, offset)})
            readings += [_reading(r, offset, f"{row}/{one.process}") for r in one.readings]
    return {"id": run.job.run_id, "rows": list(rows), "series": series, **_readings(readings)}


def _points(one: Series, offset: float) -> dict[str, Any]:
    """[s, fastest, median, slowest] in ms, of a stretch each; of a sustained series its windows, which know no fastest,
    neighbours together where there are many; of any other its samples, laid end to end after the warm-up."""
    if one.windows:
        step = -(-len(one.windows) // WINDOWS)
        groups = [one.windows[i : i + step] for i in range(0, len(one.windows), step)]
        points = [
            [
                round(offset + some[0].at_ms / 1000, 2),
                None,
                short(median_latency_ms(some)),
                short(max(w.max_ns for w in some) / 1e6),
            ]
            for some in groups
        ]
        return {"points": points, "windows": True}
    began = [offset + (one.init_time_ns + one.first_inference_ns + sum(one.warmup_ns)) / 1e9]
    began += (began[0] + one.stride * passed / 1e9 for passed in accumulate(one.samples_ns))
    points = [
        [round(began[first], 3), *(short(ns / 1e6) for ns in told)] for first, *told in stretches(one.samples_ns, STRETCHES)
    ]
    return {"points": points, "windows": False}


def _reading(r: Reading, offset: float, series: str) -> list[Any]:
    power = None if r.power_mw is None else short(r.power_mw / 1000)
    at = round(offset + r.at_ms / 1000, 2)
    return [
        at,
        short(r.temperature_c),
        short(r.frequency_mhz),
        short(r.gpu_frequency_mhz),
        power,
        int(bool(r.throttle)),
        series,
    ]


def _readings(found: list[list[Any]]) -> dict[str, Any]:
    step = -(-len(found) // READINGS) or 1
    kept = [r for i, r in enumerate(found) if i % step == 0 or r[5]]
    return {"readings": kept, "of": len(found)}


def _moment(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
