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
from collections.abc import Sequence
from dataclasses import dataclass

from device_agents.wire import Measurement, Run, Series, Variant
from edgevit.plans import pairs_of
from edgevit.results.stats import percentile

CONFIDENCE = 0.95
LEAST_BLOCKS = 3
"""With two blocks the interval's factor is 12.7: it says nothing."""

T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""The 97.5 % quantile of Student's t for 1 to 30 degrees of freedom (NIST/SEMATECH e-Handbook, table 1.3.6.7.2)."""


@dataclass(frozen=True)
class Comparison:
    """B against A on one target: ``ratio`` is B's latency ÷ A's, below 1 where B is the faster.

    ``interval`` holds the ratio with 95 % confidence; both are None with their reason in ``absent``. ``left_out`` names the
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


def compare_pairs(run: Run) -> list[Comparison]:
    """One comparison for each pair of a run whose plan is ``mirrored``; none for any other run."""
    if run.job.plan.order != "mirrored":
        return []
    measured = {m.variant: m for m in run.measurements}
    return [_compare(run, a, b, measured) for a, b in pairs_of(run.job.variants)]


def _compare(run: Run, a: Variant, b: Variant, measured: dict[Variant, Measurement]) -> Comparison:
    sides = (measured.get(a), measured.get(b))
    logs: list[float] = []
    left_out: list[str] = []
    kept: tuple[list[float], list[float]] = ([], [])
    for number in range(run.job.plan.processes // 2):
        medians, reason = _block(run, sides, number)
        if medians is None:
            left_out.append(f"block {number + 1}: {reason}")
            continue
        logs.append(statistics.fmean(map(math.log, medians[1])) - statistics.fmean(map(math.log, medians[0])))
        for side, values in zip(kept, medians, strict=True):
            side += values
    absent = "" if len(logs) >= LEAST_BLOCKS else f"{len(logs)} blocks are left, {LEAST_BLOCKS} are needed"
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


def t_interval(logs: Sequence[float]) -> tuple[float, float]:
    """The interval of exp(mean) at 95 % confidence; ValueError for fewer than two values."""
    if len(logs) < 2:
        raise ValueError(f"{len(logs)} values have no interval")
    degrees = len(logs) - 1
    factor = T_975[degrees - 1] if degrees <= len(T_975) else _t_of_many(degrees)
    mean, half = statistics.fmean(logs), factor * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean - half), math.exp(mean + half)


def _t_of_many(degrees: int) -> float:
    """Beyond the table: the first terms of the Cornish–Fisher expansion (Abramowitz and Stegun, 26.7.5)."""
    z = statistics.NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def _block(
    run: Run, sides: tuple[Measurement | None, Measurement | None], number: int
) -> tuple[tuple[list[float], list[float]] | None, str]:
    """The medians (ns) of A's and B's two series of a block, or why it does not count."""
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
            median = _median(one)
            if median <= 0:
                return None, f"{name}: nothing was timed"
            found[side].append(median)
    return found, ""


def _median(series: Series) -> int:
    return percentile(sorted(series.samples_ns), 0.5) if series.samples_ns else 0


def _name(variant: Variant, measurement: Measurement | None) -> str:
    artifact = variant.artifact
    if measurement is None or not measurement.bundle_name:
        return f"{artifact} of {variant.bundle[:12]}"
    return artifact if measurement.bundle_name in artifact else f"{measurement.bundle_name}/{artifact}"
