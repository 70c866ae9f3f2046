"""Statistics against definitions, published values and a simulation."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_agents.wire import Measurement, Run, Verdict
from edgevit.results.percentiles import early_stopping_percentile, early_stopping_rank, percentile
from edgevit.results.reference import relate
from edgevit.results.stats import summarize, summarize_all
from tests.support.judged import mixed, summaries, valid
from tests.support.runs import accuracy, failed, measurement, run


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=200), st.floats(0.01, 1.0))
def test_nearest_rank_is_the_smallest_sample_that_enough_are_not_above(samples: list[int], q: float) -> None:
    ordered = sorted(samples)
    found = percentile(ordered, q)
    assert found in ordered
    assert sum(s <= found for s in ordered) >= q * len(ordered) - 1e-6
    below = [s for s in ordered if s < found]
    assert len(below) < q * len(ordered)


def test_nearest_rank_by_hand() -> None:
    assert [percentile(range(1, 11), q) for q in (0.1, 0.5, 0.9, 0.91, 1.0)] == [1, 5, 9, 10, 10]
    assert percentile([7], 0.99) == 7
    for bad in ([], [1]):
        with pytest.raises(ValueError):
            percentile(bad, 0.5 if not bad else 0.0)


def test_early_stopping_thresholds_are_mlperfs() -> None:
    # MLPerf: the fewest queries with which SingleStream can say anything at confidence 0.99 and tolerance 0.
    assert [early_stopping_rank(n, 0.9) for n in (63, 64)] == [0, 1]
    assert [early_stopping_rank(n, 0.99) for n in (661, 662)] == [0, 1]


def fewest_samples(t: int, q: float) -> int:
    """LoadGen's own way round: the fewest queries, ``t`` of them slower, that pass at confidence 0.99; exact."""
    q_exact = Fraction(q).limit_denominator(100)
    h = 1
    while sum(math.comb(h + t, x) * (1 - q_exact) ** x * q_exact ** (h + t - x) for x in range(t + 1)) > Fraction(1, 100):
        h += 1
    return h + t


@pytest.mark.parametrize(("q", "t"), [(0.9, 1), (0.9, 2), (0.9, 5), (0.9, 9), (0.5, 1), (0.5, 7), (0.99, 1)])
def test_the_rank_is_the_inverse_of_loadgens_search(q: float, t: int) -> None:
    """mlcommons/inference, loadgen/early_stopping.cc: odds(h, t, p, 0) ≤ 1 − c."""
    n = fewest_samples(t, q)
    assert (early_stopping_rank(n - 1, q), early_stopping_rank(n, q)) == (t - 1, t)


@settings(max_examples=50)
@given(st.integers(1, 20_000), st.sampled_from([0.5, 0.9, 0.99]))
def test_the_rank_grows_with_the_samples_by_one_at_most(n: int, q: float) -> None:
    assert early_stopping_rank(n + 1, q) - early_stopping_rank(n, q) in (0, 1)
    assert early_stopping_rank(n, q) <= (1 - q) * n, "an estimate below the percentile itself is no bound"


@pytest.mark.parametrize(("n", "q"), [(64, 0.9), (100, 0.9), (1000, 0.9), (10_000, 0.9), (5000, 0.99), (200_000, 0.9)])
def test_early_stopping_rank_is_the_exact_binomial_tail(n: int, q: float) -> None:
    def tail(t: int) -> float:
        logs = (
            math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log1p(-q) + (n - i) * math.log(q)
            for i in range(t + 1)
        )
        return math.fsum(math.exp(x) for x in logs)

    t = early_stopping_rank(n, q)
    assert tail(t) <= 0.01 < tail(t + 1)


def test_early_stopping_estimate_is_conservative_as_often_as_it_says() -> None:
    rng = random.Random(3)
    true_p90 = math.exp(statistics.NormalDist().inv_cdf(0.9)) * 1e6
    above = 0
    for _ in range(1000):
        estimate = early_stopping_percentile(sorted(int(rng.lognormvariate(0, 1) * 1e6) for _ in range(150)), 0.9)
        assert estimate is not None
        above += estimate >= true_p90
    assert above >= 980, f"the estimate lies above the true p90 in {above} of 1000 trials, 990 were promised"


def test_a_summary_by_hand() -> None:
    m = measurement("int8-dynamic", "tflite", samples=0)
    base = measurement("int8-dynamic", "tflite").series[0]
    series = (
        dataclasses.replace(
            base, samples_ns=tuple(range(1_000_000, 51_000_000, 1_000_000)), init_time_ns=4_000_000, peak_memory_mb=80.0
        ),
        dataclasses.replace(base, samples_ns=tuple(range(51_000_000, 101_000_000, 1_000_000)), init_time_ns=6_000_000),
    )
    made = run(measurements=(dataclasses.replace(m, series=series),))
    (s,) = summarize(made, valid)
    assert (s.n, s.processes, s.p50_ms, s.p90_ms, s.mean_ms, s.min_ms, s.max_ms) == (100, 2, 50.0, 90.0, 50.5, 1.0, 100.0)
    assert s.process_p50_ms == (25.0, 75.0)
    assert s.p90_early_stopping_ms == 98.0, "the third largest of 100"
    assert s.std_ms == pytest.approx(statistics.stdev(range(1, 101)))
    assert (s.init_ms, s.peak_mb, s.file_mb) == (5.0, 92.5, 6.3)
    few = "100 samples, 662 are needed at 99 % confidence; bench with --plan"
    assert (s.p99_ms, s.p99_absent) == (None, f"{few} sustained"), "the same plan again would give no more"
    job = dataclasses.replace(made.job, plan=dataclasses.replace(made.job.plan, name="quick"))
    assert summarize(dataclasses.replace(made, job=job), valid)[0].p99_absent == f"{few} standard"
    assert s.top1 == pytest.approx(530 / 650)
    assert s.top1_error == pytest.approx(math.sqrt(530 * 120 / 650) / 650)


@pytest.mark.parametrize(
    ("n", "p90", "p99"), [(1, False, False), (63, False, False), (64, True, False), (661, True, False), (662, True, True)]
)
def test_percentiles_only_from_enough_samples(n: int, p90: bool, p99: bool) -> None:
    (s,) = summarize(run(measurements=(measurement(samples=n, processes=1),)), valid)
    assert (s.p90_ms is not None, s.p90_early_stopping_ms is not None, s.p99_ms is not None) == (p90, p90, p99)
    assert (s.p90_absent == "", s.p99_absent == "") == (p90, p99)
    assert s.p50_ms is not None


def test_what_failed_or_never_ran_has_a_row_with_its_reason() -> None:
    rows = summaries(*mixed())
    by_name = {(s.target, s.artifact): s for s in rows}
    gone = by_name["attic-pi5-with-a-long-name", "int8-static-onnx"]
    assert gone.failure.startswith("golden-mismatch")
    assert (gone.p50_ms, gone.p90_ms, gone.speedup, gone.agreement) == (None, None, None, None)
    assert gone.p50_absent == gone.failure
    never = by_name["attic-pi5-with-a-long-name", "fp16-onnx"]
    assert never.failure == "not measured: the run is interrupted, the power went away three times"
    assert never.model == "deit_tiny_patch16_224"
    assert not never.rankable


def test_speedup_is_against_the_onnx_fp32_of_the_same_target_and_threads() -> None:
    rows = summaries(
        run("pi4"), run("pi5", measurements=(measurement("fp32", "tflite", 30.0), measurement("int8-dynamic", "tflite", 15.0)))
    )
    by_name = {(s.target, s.artifact): s for s in rows}
    fp32 = by_name["pi4", "fp32-onnx"]
    assert fp32.speedup == 1.0
    fast = by_name["pi4", "int8-dynamic-tflite"]
    assert fast.reference == "fp32-onnx on onnxruntime 1.31.1"
    assert fp32.p50_ms is not None and fast.p50_ms is not None
    assert fast.speedup == fp32.p50_ms / fast.p50_ms
    other = by_name["pi5", "int8-dynamic-tflite"]
    assert other.reference == "fp32-tflite on litert 2.3.0", "no ONNX there: the fp32 that was measured"
    assert other.speedup == pytest.approx(2.0, rel=0.1)


def test_no_speedup_across_threads_batches_or_without_fp32() -> None:
    alone = summaries(run(measurements=(measurement("int8-dynamic", "onnx"),)))
    assert (alone[0].speedup, alone[0].speedup_absent) == (None, "no fp32 was measured beside it")
    two = summaries(
        run(measurements=(measurement("fp32", "onnx"),)), run(batch="b2", measurements=(measurement("int8-dynamic", "onnx"),))
    )
    assert two[1].speedup is None
    fewer = measurement("int8-dynamic", "onnx")
    fewer = dataclasses.replace(fewer, variant=dataclasses.replace(fewer.variant, threads=1))
    assert summaries(run(measurements=(measurement("fp32", "onnx"), fewer)))[1].speedup is None


def test_an_invalid_reference_gives_no_speedup() -> None:
    def judge(_run: Run, m: Measurement) -> Verdict:
        return Verdict(1, m.recipe != "fp32", ("throttled",) if m.recipe == "fp32" else (), ())

    rows = summarize_all([run(measurements=(measurement("fp32", "onnx"), measurement("int8-dynamic", "onnx")))], judge)
    assert (rows[1].speedup, rows[1].speedup_absent) == (None, "its reference, fp32-onnx on onnxruntime 1.31.1, is INVALID")


def test_agreement_counts_equal_predictions_on_the_same_images() -> None:
    rng = random.Random(5)
    base = accuracy(90, 100, rng)
    near = measurement("int8-dynamic", "onnx", accuracy=accuracy(0, 100, rng, base, 4))
    other = measurement("int8-static", "onnx", accuracy=dataclasses.replace(base, evaluation="other images"))
    silent = measurement("fp16", "onnx", accuracy=None, accuracy_absent="no labels")
    rows = summaries(run(measurements=(measurement("fp32", "onnx", accuracy=base), near, other, silent)))
    assert [s.agreement for s in rows] == [1.0, 0.96, None, None]
    assert rows[2].agreement_absent == "the fp32 beside it was scored on other images"
    assert rows[3].agreement_absent == "no labels"


def test_the_verdict_is_the_agents_own_rules() -> None:
    m = measurement("fp32", "onnx")
    swapping = dataclasses.replace(m, series=(dataclasses.replace(m.series[0], swapped_pages=7), *m.series[1:]))
    good, bad = (summarize(run(measurements=(one,), governor="performance"))[0] for one in (m, swapping))
    assert (good.verdict.valid, good.rankable) == (True, True)
    assert (bad.verdict.valid, bad.rankable) == (False, False)
    assert any("swapped" in reason for reason in bad.verdict.reasons)


def test_relating_twice_changes_nothing() -> None:
    rows = summaries(*mixed())
    assert relate(rows) == rows


def test_a_failed_measurement_is_never_the_reference() -> None:
    rows = summaries(
        run(measurements=(failed("fp32", "onnx"), measurement("fp32", "tflite"), measurement("int8-dynamic", "tflite")))
    )
    assert rows[2].reference == "fp32-tflite on litert 2.3.0"


def test_what_a_variant_gave_before_it_failed_is_no_speedup() -> None:
    """Killed in its second process: one series is there, the measurement asked for is not."""
    died = dataclasses.replace(
        measurement("int8-dynamic", "onnx", 20.0, processes=1), failure=failed(code="worker-died").failure
    )
    _, cut = summarize_all([run(measurements=(measurement("fp32"), died))])
    assert cut.n and cut.speedup is None and cut.speedup_absent == cut.failure and not cut.rankable


def test_throughput_is_of_images_and_latency_of_calls() -> None:
    base = measurement("fp32", "onnx", batch=8)
    m = dataclasses.replace(base, series=(dataclasses.replace(base.series[0], samples_ns=(10_000_000,) * 9 + (110_000_000,)),))
    (s,) = summarize(run(measurements=(m,)), valid)
    assert s.p50_ms == 10.0 and s.image_p50_ms == 1.25, "the median of calls, and of it an image's share"
    assert s.images_per_s == pytest.approx(8 * 10 / 0.2), "over all the time there was, the slow one included"


def test_p99_early_stopping_from_662_samples_on() -> None:
    for n, there in ((661, False), (662, True)):
        (s,) = summarize(run(measurements=(measurement(samples=n, processes=1),)), valid)
        assert (s.p99_early_stopping_ms is not None) == there
        assert s.p99_early_stopping_ms is None or s.p99_early_stopping_ms == s.max_ms
