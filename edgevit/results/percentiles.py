"""Percentiles of samples, and what can be said of them at a confidence; :mod:`edgevit.results.stats` defines each. Pure,
standard library."""

from __future__ import annotations

import math
from collections.abc import Sequence

P90_SAMPLES = 64
P99_SAMPLES = 662
CONFIDENCE = 0.99
CONFIDENCE_OF_MEDIAN = 0.95


def percentile(ordered: Sequence[int], q: float) -> int:
    """The nearest-rank percentile of samples in ascending order; ``q`` in (0, 1]. ValueError where there are none."""
    if not ordered:
        raise ValueError("no samples")
    if not 0.0 < q <= 1.0:
        raise ValueError(f"got q={q}, expected more than 0 and at most 1")
    # The tiny shift keeps 0.9 × 10 at rank 9: in binary the product may come out a hair above the whole number.
    return ordered[max(1, math.ceil(q * len(ordered) - 1e-9)) - 1]


def early_stopping_rank(n: int, q: float, confidence: float = CONFIDENCE) -> int:
    """LoadGen's t: the largest number of slower samples among n such that, were the true q-percentile any slower than the
    estimate, seeing t or fewer above it would have probability ≤ 1 − confidence. 0 where n is too small for t = 1.

    LoadGen searches h_min(t), the fewest samples below the bound for t above it; with tolerance 0 its condition is the
    binomial tail P[Bin(n, 1 − q) ≤ t] ≤ 1 − confidence, summed here directly.
    """
    if n < 1:
        return 0
    log_q, log_rest = math.log(q), math.log1p(-q)
    log_term = n * log_q  # P[Bin = 0], as a logarithm: it underflows from some thousand samples on
    tail = math.exp(log_term)
    limit = 1.0 - confidence
    t = 0
    while t < n:
        log_term += math.log((n - t) / (t + 1)) + log_rest - log_q
        tail += math.exp(log_term)
        if tail > limit + 1e-12:
            break
        t += 1
    return t


def early_stopping_percentile(ordered: Sequence[int], q: float, confidence: float = CONFIDENCE) -> int | None:
    """LoadGen's estimate of the ``q``-percentile from samples in ascending order; None where there are too few."""
    t = early_stopping_rank(len(ordered), q, confidence)
    return ordered[len(ordered) - t] if t >= 1 else None


def median_interval(series: Sequence[Sequence[int]], confidence: float = CONFIDENCE_OF_MEDIAN) -> tuple[int, int] | None:
    """Where the median of all ``series`` lies with ``confidence``, by order statistics; None of too few samples."""
    ordered = sorted(ns for one in series for ns in one)
    n = len(ordered)
    if n == 0 or 2.0 * 0.5**n > 1.0 - confidence:
        return None
    # LoadGen's rank is the same binomial tail: of q = 1/2 at each end.
    t = early_stopping_rank(n, 0.5, 1.0 - (1.0 - confidence) / 2)
    own = [percentile(sorted(one), 0.5) for one in series if one]
    return min(ordered[t], *own), max(ordered[n - 1 - t], *own)
