"""ABBA blocks against definitions, published quantiles and simulations."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from device_agents.wire import Measurement, Run, Variant
from edgevit.errors import UsageError
from edgevit.plans import PLANS, list_cpus, memory_limit_mb, pair_variants, parse_cpus, with_blocks, with_minutes
from edgevit.report.plans_view import json_comparisons, render_comparisons
from edgevit.results.compare import compare_pairs
from edgevit.results.intervals import T_975, t_interval, t_of_many
from tests.support.runs import facts, measurement, run, series


def compared(a_ms: list[float], b_ms: list[float], **changes: object) -> Run:
    """A run of the plan compare in which the series of A and B have these medians, two of each a block."""
    rng = random.Random(1)

    def side(recipe: str, medians: list[float]) -> Measurement:
        made = measurement(recipe, "onnx", samples=0)
        each = tuple(
            dataclasses.replace(series(i, 1.0, 1, rng), samples_ns=(int(ms * 1e6),) * 9) for i, ms in enumerate(medians)
        )
        return dataclasses.replace(made, series=each)

    made = run(measurements=(side("fp32", a_ms), side("int8-dynamic", b_ms)), governor="performance")
    plan = dataclasses.replace(PLANS["compare"], processes=len(a_ms), min_samples=9)
    return dataclasses.replace(made, job=dataclasses.replace(made.job, plan=plan), **changes)


def change_series(made: Run, side: int, number: int, **changes: object) -> Run:
    m = made.measurements[side]
    several = tuple(dataclasses.replace(s, **changes) if s.process == number else s for s in m.series)
    both = list(made.measurements)
    both[side] = dataclasses.replace(m, series=several)
    return dataclasses.replace(made, measurements=tuple(both))


def test_a_ratio_by_hand() -> None:
    (c,) = compare_pairs(compared([10.0, 10.0] * 3, [5.0, 5.0] * 3))
    assert c.ratio == pytest.approx(0.5) and c.interval == pytest.approx((0.5, 0.5)) and c.differs and c.blocks == 3
    assert (c.a_p50_ms, c.b_p50_ms, c.left_out, c.absent) == (10.0, 5.0, (), "")
    (c,) = compare_pairs(compared([10.0] * 6, [10.0, 10.0, 11.0, 11.0, 12.0, 12.0]))
    logs = [0.0, math.log(1.1), math.log(1.2)]
    half = 4.303 * statistics.stdev(logs) / math.sqrt(3)
    assert c.interval == pytest.approx((math.exp(statistics.fmean(logs) - half), math.exp(statistics.fmean(logs) + half)))
    assert not c.differs, "three blocks that scatter by 10 % cannot tell 10 % apart"


@given(st.floats(0.2, 5.0), st.floats(1e-4, 0.2), st.integers(3, 12))
def test_a_drift_that_is_even_over_a_block_cancels(ratio: float, drift: float, blocks: int) -> None:
    """A board that gets slower all the time, measured A B B A: the ratio is the true one nevertheless."""
    moment = 0
    a: list[float] = []
    b: list[float] = []
    for _ in range(blocks):
        for side in ("A", "B", "B", "A"):
            (a if side == "A" else b).append(10.0 * (ratio if side == "B" else 1.0) * math.exp(drift * moment))
            moment += 1
    (c,) = compare_pairs(compared(a, b))
    assert c.ratio == pytest.approx(ratio, rel=1e-6)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = random.Random(5)
    held = 0
    for _ in range(2000):
        held += (lambda i: i[0] <= 1.0 <= i[1])(t_interval([rng.gauss(0.0, 0.05) for _ in range(8)]))
    assert 1870 <= held <= 1930, f"{held} of 2000 intervals hold the truth, 1900 were promised"


def test_the_table_of_t_goes_over_into_its_expansion() -> None:
    assert list(T_975) == sorted(T_975, reverse=True) and len(T_975) == 30
    for degrees, value in ((20, T_975[19]), (30, T_975[29]), (60, 2.000), (120, 1.980)):
        assert t_of_many(degrees) == pytest.approx(value, abs=2e-3)
    assert t_interval([0.0] * 40) == (1.0, 1.0)
    with pytest.raises(ValueError):
        t_interval([0.0])


def test_a_falsified_series_takes_its_block_alone() -> None:
    made = change_series(compared([10.0] * 8, [5.0] * 8), 1, 3, swapped_pages=40, samples_ns=(90_000_000,) * 9)
    (c,) = compare_pairs(made)
    assert c.blocks == 3 and c.ratio == pytest.approx(0.5)
    assert len(c.left_out) == 1 and c.left_out[0].startswith("block 2: B: series 4: 40 pages")


def test_too_few_blocks_give_no_ratio_and_say_why() -> None:
    made = change_series(compared([10.0] * 6, [5.0] * 6), 0, 0, waiting=3.0)
    (c,) = compare_pairs(made)
    assert (c.ratio, c.interval, c.differs) == (None, None, None) and c.absent == "2 of the 3 blocks that it needs are left"
    gone = dataclasses.replace(made, measurements=made.measurements[:1])
    (c,) = compare_pairs(gone)
    assert c.ratio is None and "B was not reached" in c.left_out[-1]
    assert compare_pairs(run()) == [], "a run of another plan holds no pairs"


def test_what_is_shown() -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    found = compare_pairs(compared([10.0] * 6, [5.0] * 6)) + compare_pairs(
        compared([10.0] * 6, [9.0, 9.0, 11.0, 11.0, 10.0, 10.0])
    )
    found += compare_pairs(change_series(compared([10.0] * 6, [5.0] * 6), 0, 0, swapped_pages=1))
    console.print(render_comparisons(found))
    text = console.export_text()
    assert "B ÷ A  0.5000 (0.5000 to 0.5000, 95 %), 3 blocks" in text and "B is 2.000 times as fast" in text
    assert "no difference can be told" in text and "--blocks 16" in text
    assert "no ratio: 2 of the 3 blocks" in text and "left out: block 1: A: series 1: 1 pages were swapped" in text
    assert json_comparisons(found)[0]["a"]["artifact"] == "fp32-onnx"


# ---- plans ----------------------------------------------------------------------------------------------------------


def variant(bundle: str, runtime: str = "onnxruntime", threads: int = 1) -> Variant:
    provider = "CPUExecutionProvider" if runtime == "onnxruntime" else "XNNPACK"
    return Variant(bundle * 64, f"m-{runtime}", runtime, provider, threads)


def test_pairs_agree_in_runtime_provider_and_threads() -> None:
    a = [variant("a"), variant("a", "litert"), variant("a", "litert", 4)]
    b = [variant("b", "litert"), variant("b")]
    pairs, alone = pair_variants(a, b)
    assert pairs == [a[0], b[1], a[1], b[0]] and alone == [a[2]]
    assert pair_variants([variant("a")], [variant("b", "litert")]) == ([variant("a"), variant("b", "litert")], [])
    assert pair_variants([variant("a")], [variant("a")])[0] == [], "a variant is no partner of itself"


def test_lists_of_cpus() -> None:
    assert parse_cpus("0-3,5") == (0, 1, 2, 3, 5) and parse_cpus("2") == (2,)
    for bad in ("", "a", "3-1", "1,1", "0-", "-1", "1 2"):
        with pytest.raises(UsageError):
            parse_cpus(bad)


@given(st.sets(st.integers(0, 200), min_size=1))
def test_a_list_of_cpus_reads_back(cpus: set[int]) -> None:
    assert parse_cpus(list_cpus(cpus)) == tuple(sorted(cpus))
    assert list_cpus((5, 0, 1, 2, 3)) == "0-3,5" and list_cpus(()) == ""


def test_plans_hold_what_the_docs_say() -> None:
    quick, standard, sustained, compare = (PLANS[n] for n in ("quick", "standard", "sustained", "compare"))
    assert quick.min_samples >= 64 and 1.5 * quick.max_seconds <= 7.5
    assert standard.processes >= 3 and standard.processes * standard.min_samples >= 662
    assert sustained.processes == 1 and sustained.min_seconds == sustained.max_seconds == 600
    assert compare.order == "mirrored" and compare.processes == 16
    assert with_minutes(sustained, 2).max_seconds == 120 and with_blocks(compare, 3).processes == 6
    for wrong in (lambda: with_minutes(quick, 2), lambda: with_blocks(quick, 3)):
        with pytest.raises(UsageError):
            wrong()


@pytest.mark.parametrize(("board", "limit"), [(416, 288.0), (1000, 800.0), (8000, 7000.0), (100, 64.0)])
def test_a_worker_leaves_the_board_some_memory(board: int, limit: float) -> None:
    assert memory_limit_mb(facts(memory_mb=board)) == limit
    assert memory_limit_mb(facts(memory_mb=None)) is None
