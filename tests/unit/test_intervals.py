"""Intervals hold the truth as often as they say, also with heavy tails and three processes."""

from __future__ import annotations

import dataclasses
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as reference

from benchmarks.interval_coverage import LATENCIES, coverage
from edgevit.results.intervals import T_975, log_percentile, percentile_interval, ratio_of_means, t_factor, t_interval
from edgevit.results.stats import summarize
from tests.support.judged import valid
from tests.support.runs import measurement, run


@pytest.mark.parametrize("kind", LATENCIES)
@pytest.mark.parametrize(("processes", "samples"), [(3, 221), (10, 221)])
def test_95_percent_intervals_hold_in_93_to_97_percent_of_all_cases(kind: str, processes: int, samples: int) -> None:
    # The standard error of a share of 95 % in 1500 trials is 0.6 points: the bounds lie more than three of them away.
    for q, held in coverage(kind, 0.01, processes, samples, trials=1500, seed=11).items():
        assert 0.93 <= held <= 0.97, f"{kind}, {processes} processes, p{100 * q:.0f}: {held:.1%} hold the truth"


def test_the_percentile_within_a_process_is_hazens() -> None:
    rng = np.random.default_rng(3)
    for n in (50, 100, 221):
        samples = np.sort(rng.lognormal(16.0, 0.3, n)).astype(int)
        for q in (0.5, 0.9, 0.99):
            wanted = np.quantile(np.log(samples), q, method="hazen")
            assert log_percentile(samples.tolist(), q) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("n", "q", "there"), [(49, 0.99, False), (50, 0.99, True), (4, 0.9, False), (5, 0.9, True), (1, 0.5, True)]
)
def test_no_percentile_beyond_the_samples(n: int, q: float, there: bool) -> None:
    assert (log_percentile(list(range(1, n + 1)), q) is not None) == there
    assert log_percentile([0, *range(1, n + 1)], q) is None, "a sample of 0 has no logarithm"
    assert log_percentile([], q) is None


def test_too_few_processes_have_no_interval() -> None:
    one = list(range(1, 101))
    assert percentile_interval([one, one], 0.5) is None
    assert percentile_interval([one, one, []], 0.5) is None
    assert percentile_interval([one, one, one, [5]], 0.9) is None, "a process too short to tell leaves no process out silently"
    assert percentile_interval([one, one, one], 0.5) == pytest.approx((50.5, 50.5), rel=1e-3)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12), st.lists(st.floats(-5, 5), min_size=2, max_size=12))
def test_a_ratio_of_means_is_welchs(a: list[float], b: list[float]) -> None:
    ratio, (low, high) = ratio_of_means(a, b)
    assert math.log(ratio) == pytest.approx(statistics.fmean(b) - statistics.fmean(a), abs=1e-9)
    assert low <= ratio <= high
    if statistics.pstdev(a) > 1e-3 and statistics.pstdev(b) > 1e-3:
        exact = reference.ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
        # Degrees of freedom are rounded down, so ours holds scipy's; the table's digits are 1e-3 of the width.
        spare = 1e-3 * (exact.high - exact.low)
        assert math.log(low) <= exact.low + spare and math.log(high) >= exact.high - spare


def test_students_t() -> None:
    for degrees in (1, 2, 7, 30, 31, 60, 1000):
        assert t_factor(degrees) == pytest.approx(reference.t.ppf(0.975, degrees), abs=6e-4)
    assert t_factor(2.9) == T_975[1], "between whole degrees the wider one"
    with pytest.raises(ValueError, match="quantile"):
        t_factor(0.5)
    with pytest.raises(ValueError, match="no interval"):
        t_interval([1.0])
    with pytest.raises(ValueError, match="no interval"):
        ratio_of_means([1.0], [1.0, 2.0])


def test_a_summary_says_what_its_intervals_repeat() -> None:
    (three,) = summarize(run(measurements=(measurement(samples=300),)), valid)
    assert three.interval_of == "processes"
    for shown, interval in (
        (three.p50_ms, three.p50_interval_ms),
        (three.p90_ms, three.p90_interval_ms),
        (three.p99_ms, three.p99_interval_ms),
    ):
        assert shown is not None and interval is not None and interval[0] <= shown <= interval[1]
    (one,) = summarize(run(measurements=(measurement(samples=300, processes=1),)), valid)
    assert (one.interval_of, one.p90_interval_ms) == ("samples", None) and one.p50_interval_ms is not None
    (few,) = summarize(run(measurements=(measurement(samples=10),)), valid)
    assert few.p50_interval_ms is not None and few.p90_interval_ms is None, "no interval of what is not shown"
    none = dataclasses.replace(measurement(), series=())
    (nothing,) = summarize(run(measurements=(none,)), valid)
    assert (nothing.p50_interval_ms, nothing.interval_of) == (None, "")
