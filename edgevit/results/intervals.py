"""Where a percentile lies, with 95 % confidence, when worker processes are what was repeated. Pure, standard library.

The samples of one process are not independent of each other: they share its memory layout, its clock and what else ran then
(Kalibera and Jones, *Rigorous Benchmarking in Reasonable Time*, ISMM 2013; Mytkowicz et al., *Producing Wrong Data Without
Doing Anything Obviously Wrong!*, ASPLOS 2009). So the unit is the process: each gives one figure, the logarithm of its own
percentile, and their mean has Student's t interval of n - 1 degrees of freedom. What it holds is the percentile of a typical
process: the exponential of the mean logarithm.

A bootstrap over processes, the first choice, holds the true value only three times in four with three of them: it resamples
three values, and knows no correction for so few (Cameron, Gelbach and Miller, *Bootstrap-based improvements for inference with
clustered errors*, Review of Economics and Statistics 90, 2008). The simulation of both is ``benchmarks/interval_coverage.py``.

A process's own percentile is here Hazen's (Hyndman and Fan, *Sample quantiles in statistical packages*, The American
Statistician 50, 1996, type 5), taken between the logarithms of two samples: of latencies whose tail falls exponentially in the
logarithm, as Pareto's does, its mean over processes has next to no bias. Nearest rank is off by up to a whole rank, and the
median-unbiased type 8 by a sixth of one upwards: with twenty processes of 221 samples that leaves p99 to 87 % instead of 95 %.
What tables show as p50, p90 and p99 stays nearest rank; an interval is widened to hold it where it does not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95
LEAST_PROCESSES = 3
"""With two, the interval's factor is 12.7: it says nothing."""

T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""The 97.5 % quantile of Student's t for 1 to 30 degrees of freedom (NIST/SEMATECH e-Handbook, table 1.3.6.7.2)."""


def t_factor(degrees: float) -> float:
    """The 97.5 % quantile of Student's t; between whole degrees of freedom that of the next lower one, so never too small.
    ValueError below 1."""
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom have no quantile")
    whole = math.floor(degrees)
    return T_975[whole - 1] if whole <= len(T_975) else t_of_many(whole)


def t_of_many(degrees: int) -> float:
    """Beyond the table: the first terms of the Cornish–Fisher expansion (Abramowitz and Stegun, 26.7.5)."""
    z = statistics.NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def t_interval(logs: Sequence[float]) -> tuple[float, float]:
    """The interval of exp(mean) at 95 % confidence; ValueError for fewer than two values."""
    if len(logs) < 2:
        raise ValueError(f"{len(logs)} values have no interval")
    mean, half = statistics.fmean(logs), t_factor(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean - half), math.exp(mean + half)


def ratio_of_means(a: Sequence[float], b: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """exp(mean of ``b`` - mean of ``a``) of two independent groups of logarithms, and its interval after Welch (*The
    generalization of Student's problem when several different population variances are involved*, Biometrika 34, 1947).

    ValueError where either has fewer than two values."""
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} and {len(b)} values have no interval")
    mean = statistics.fmean(b) - statistics.fmean(a)
    shares = [statistics.variance(group) / len(group) for group in (a, b)]
    total = sum(shares)
    if total == 0.0:
        return math.exp(mean), (math.exp(mean), math.exp(mean))
    degrees = 1.0 / sum((share / total) ** 2 / (len(group) - 1) for share, group in zip(shares, (a, b), strict=True))
    half = t_factor(max(degrees, 1.0)) * math.sqrt(total)
    return math.exp(mean), (math.exp(mean - half), math.exp(mean + half))


def log_percentile(ordered: Sequence[int], q: float) -> float | None:
    """The logarithm of Hazen's ``q``-percentile of samples in ascending order; None where it would lie beyond the
    smallest or the largest of them, or where a sample is 0."""
    n = len(ordered)
    position = n * q + 0.5
    if n == 0 or position < 1 or position > n or ordered[0] <= 0:
        return None
    below = math.floor(position)
    if below == n:
        return math.log(ordered[-1])
    low, high = math.log(ordered[below - 1]), math.log(ordered[below])
    return low + (position - below) * (high - low)


def percentile_interval(series: Sequence[Sequence[int]], q: float) -> tuple[float, float] | None:
    """Where a typical process's ``q``-percentile lies with 95 % confidence, in the unit of the samples.

    ``series``: the samples of each process in ascending order. None with fewer than three processes that have enough samples to
    tell (5 for p90, 50 for p99)."""
    found = [log_percentile(one, q) for one in series if len(one)]
    logs = [value for value in found if value is not None]
    if len(logs) < max(LEAST_PROCESSES, len(found)):
        return None
    return t_interval(logs)
