"""Two variants measured in ABBA blocks → the ratio of their latencies and its interval. Pure.

A block is four series, each a process of its own: A B B A. What drifts evenly over a block meets both sides alike, and what
differs from process to process is averaged in it. Of each block the logarithm of the ratio of latencies is taken (a side's
latency being the geometric mean of its two medians); blocks are independent of each other, so their mean has a t interval of
n − 1 degrees of freedom (Box, Hunter and Hunter, Statistics for Experimenters, ch. 3: paired comparison; Kalibera and Jones,
Rigorous Benchmarking in Reasonable Time, ISMM 2013, on ratios over repeated processes). Exponentiated, it is the ratio's.

A block with a series that something falsified is left out, and named.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from device_agents.wire import Measurement, Run, Series, Variant
from edgevit.plans import pairs_of
from edgevit.results.intervals import t_interval
from edgevit.results.percentiles import percentile

LEAST_BLOCKS = 3
"""With two blocks the interval's factor is 12.7: it says nothing."""


@dataclass(frozen=True)
class Comparison:
    """B against A on one target: ``ratio`` is B's latency ÷ A's, below 1 where B is the faster.

    ``interval`` holds the ratio with 95 % confidence; both are None with their reason in ``absent``. ``a_p50_ms`` and
    ``b_p50_ms`` are medians over the series of the quantile that was compared, by default their medians. ``left_out`` names the
    blocks that were falsified, numbered from 1, each with the reason.
    """

    target: str
    a: Variant
    b: Variant
    a_name: str
    b_name: str
    a_p50_ms: float | None
    b_p50_ms: float | None
    ratio: float | None
    interval: tuple[float, float] | None
    absent: str
    blocks: int
    left_out: tuple[str, ...]

    @property
    def differs(self) -> bool | None:
        """Whether the interval leaves out "no difference"; None where there is none."""
        return None if self.interval is None else not self.interval[0] <= 1.0 <= self.interval[1]


def compare_pairs(run: Run, quantile: float = 0.5) -> list[Comparison]:
    """One comparison for each pair of a run whose plan is ``mirrored``; none for any other run. ``quantile``: of each series'
    latencies the one compared, the median by default; 0.9 compares the p90."""
    if run.job.plan.order != "mirrored":
        return []
    measured = {m.variant: m for m in run.measurements}
    return [_compare(run, a, b, measured, quantile) for a, b in pairs_of(run.job.variants)]


def _compare(run: Run, a: Variant, b: Variant, measured: dict[Variant, Measurement], quantile: float) -> Comparison:
    sides = (measured.get(a), measured.get(b))
    logs: list[float] = []
    left_out: list[str] = []
    kept: tuple[list[float], list[float]] = ([], [])
    for number in range(run.job.plan.processes // 2):
        medians, reason = _block(run, sides, number, quantile)
        if medians is None:
            left_out.append(f"block {number + 1}: {reason}")
            continue
        logs.append(statistics.fmean(map(math.log, medians[1])) - statistics.fmean(map(math.log, medians[0])))
        for side, values in zip(kept, medians, strict=True):
            side += values
    absent = "" if len(logs) >= LEAST_BLOCKS else f"{len(logs)} of the {LEAST_BLOCKS} blocks that it needs are left"
    mean = statistics.fmean(logs) if logs and not absent else None
    return Comparison(
        target=run.job.target,
        a=a,
        b=b,
        a_name=_name(a, sides[0]),
        b_name=_name(b, sides[1]),
        a_p50_ms=statistics.median(kept[0]) / 1e6 if kept[0] else None,
        b_p50_ms=statistics.median(kept[1]) / 1e6 if kept[1] else None,
        ratio=None if mean is None else math.exp(mean),
        interval=None if mean is None else t_interval(logs),
        absent=absent,
        blocks=len(logs),
        left_out=tuple(left_out),
    )


def _block(
    run: Run, sides: tuple[Measurement | None, Measurement | None], number: int, quantile: float
) -> tuple[tuple[list[float], list[float]] | None, str]:
    """The medians (ns), or another ``quantile``, of A's and B's two series of a block, or why it does not count."""
    from device_agents.verdict import judge_series

    found: tuple[list[float], list[float]] = ([], [])
    for side, measurement in enumerate(sides):
        name = "AB"[side]
        if measurement is None:
            return None, f"{name} was not reached"
        here = [s for s in measurement.series if s.process // 2 == number]
        if len(here) < 2:
            why = measurement.failure.message.split("\n")[0] if measurement.failure else "a series is missing"
            return None, f"{name}: {why}"
        for one in here:
            reasons = judge_series(run, measurement, one)
            if reasons:
                return None, f"{name}: {'; '.join(reasons)}"
            median = _quantile(one, quantile)
            if median <= 0:
                return None, f"{name}: nothing was timed"
            found[side].append(median)
    return found, ""


def _quantile(series: Series, quantile: float) -> int:
    return percentile(sorted(series.samples_ns), quantile) if series.samples_ns else 0


def _name(variant: Variant, measurement: Measurement | None) -> str:
    artifact = variant.artifact
    if measurement is None or not measurement.bundle_name:
        return f"{artifact} of {variant.bundle[:12]}"
    return artifact if measurement.bundle_name in artifact else f"{measurement.bundle_name}/{artifact}"
