"""Paired accuracy against scipy's exact tests and a simulation."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from edgevit.results.accuracy import compare_accuracy, difference_interval, mcnemar, wilson


@given(st.integers(0, 400), st.integers(0, 400))
@settings(deadline=None)
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int) -> None:
    exact = binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    assert mcnemar(only_a, only_b) == pytest.approx(exact, rel=1e-9)
    assert mcnemar(only_a, only_b) == mcnemar(only_b, only_a)


def test_mcnemar_of_millions_neither_overflows_nor_takes_long() -> None:
    assert mcnemar(1_000_000, 1_000_000) == 1.0
    assert mcnemar(1_000_000, 1_003_000) == pytest.approx(binomtest(1_000_000, 2_003_000, 0.5).pvalue, rel=1e-6)
    assert mcnemar(0, 5000) == 0.0


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(deadline=None)
def test_wilson_is_scipys(counted: tuple[int, int]) -> None:
    exact = binomtest(*counted).proportion_ci(0.95, method="wilson")
    assert wilson(*counted) == pytest.approx((exact.low, exact.high), abs=1e-9)


@pytest.mark.parametrize(("images", "p", "q"), [(100, 0.05, 0.05), (650, 0.01, 0.02), (650, 0.002, 0.03)])
def test_the_interval_of_a_difference_holds_as_often_as_it_says(images: int, p: float, q: float) -> None:
    rng = random.Random(3)
    held = 0
    for _ in range(600):
        drawn = [rng.random() for _ in range(images)]
        only_a, only_b = sum(x < p for x in drawn), sum(p <= x < p + q for x in drawn)
        low, high = difference_interval(only_a, only_b, images)
        held += low <= q - p <= high
    assert held >= 0.925 * 600, f"{held} of 600, three standard errors below 95 % are 554"


def test_two_variants_by_hand() -> None:
    labels = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    a = [0, 1, 2, 3, 4, 5, 6, 7, 0, 0]
    b = [0, 1, 2, 3, 4, 0, 0, 0, 8, 0]
    found = compare_accuracy(a, b, labels)
    assert (found.images, found.a_top1, found.b_top1) == (10, 0.8, 0.6)
    assert (found.only_a, found.only_b, found.difference) == (3, 1, pytest.approx(-0.2))
    assert found.agreement == 0.6, "the last image, wrong alike, counts as agreement"
    assert found.p_value == pytest.approx(0.625)
    assert found.difference_interval[0] < -0.2 < found.difference_interval[1]


def test_what_is_not_paired_is_refused() -> None:
    for a, b, labels in (([], [], []), ([1], [1, 2], [1, 2]), ([1, 2], [1], [1, 2])):
        with pytest.raises(ValueError, match="predictions for"):
            compare_accuracy(a, b, labels)


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=60))
def test_a_comparison_turned_round_is_its_mirror(rows: list[tuple[int, int, int]]) -> None:
    a, b, labels = (list(column) for column in zip(*rows, strict=True))
    one, other = compare_accuracy(a, b, labels), compare_accuracy(b, a, labels)
    assert one.difference == -other.difference and one.p_value == other.p_value and one.agreement == other.agreement
    assert one.difference_interval == pytest.approx(tuple(-x for x in reversed(other.difference_interval)))
    assert one.b_top1 - one.a_top1 == pytest.approx(one.difference)
