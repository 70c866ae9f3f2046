"""Retention and the knee on made-up minutes: what is there is found, what is not is not."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from device_agents.wire import Reading, Window
from edgevit.report.plans_view import render_sustained
from edgevit.results.stats import summarize
from edgevit.results.sustained import FALL, SMOOTH, describe_sustained, find_knee, median_latency_ms
from tests.support.judged import valid
from tests.support.runs import measurement, plan, run, series


def windows(rates: list[float], ms: int = 1000) -> tuple[Window, ...]:
    """One window a second with about so many inferences."""
    return tuple(Window(i * ms, ms, max(round(r), 1), int(1e9 / max(r, 1)), int(2e9 / max(r, 1))) for i, r in enumerate(rates))


def noisy(rates: list[float], share: float, seed: int = 1) -> list[float]:
    rng = random.Random(seed)
    return [r * (1 + rng.uniform(-share, share)) for r in rates]


def readings(seconds: int) -> tuple[Reading, ...]:
    return tuple(Reading(i * 1000, 40.0 + i / 10, 1800.0, ()) for i in range(seconds))


@settings(max_examples=40)
@given(st.integers(30, 150), st.integers(20, 100), st.floats(0.10, 0.8), st.floats(50.0, 5000.0), st.floats(0.0, 0.02))
def test_a_step_down_is_found_where_it_is(before: int, after: int, loss: float, rate: float, noise: float) -> None:
    found = find_knee(windows(noisy([rate] * before + [rate * (1 - loss)] * after, noise)), readings(before + after))
    assert found is not None
    assert abs(found.at_s - before) <= SMOOTH, "further off than the smoothing can move it"
    assert found.temperature_c == pytest.approx(40.0 + found.at_s / 10, abs=0.11)
    assert found.after / found.plateau == pytest.approx(1 - loss, rel=0.05)


@settings(max_examples=40)
@given(st.integers(18, 200), st.floats(200.0, 5000.0), st.floats(0.0, 0.04), st.integers(0, 1000))
def test_noise_is_no_knee(seconds: int, rate: float, noise: float, seed: int) -> None:
    assert find_knee(windows(noisy([rate] * seconds, noise, seed))) is None


@given(st.integers(60, 200), st.integers(1, 60), st.integers(10, 100))
def test_a_fall_that_passes_is_no_knee(before: int, low: int, after: int) -> None:
    assert find_knee(windows([1000.0] * before + [500.0] * low + [1000.0] * after)) is None


@given(st.integers(60, 200), st.integers(0, 60), st.floats(0.5, 3.0))
def test_the_unit_does_not_matter(before: int, after: int, scale: float) -> None:
    rates = [1000.0] * before + [700.0] * (20 + after)
    plain, scaled = find_knee(windows(rates)), find_knee(windows([r * scale for r in rates]))
    assert plain and scaled and plain.at_s == scaled.at_s


def test_the_very_end_and_too_little_are_no_knee() -> None:
    assert find_knee(windows([1000.0] * 100 + [500.0] * 5)) is None, "five seconds are not for good"
    assert find_knee(windows([1000.0] * 9 + [500.0] * 8)) is None
    assert find_knee(()) is None
    assert find_knee((*windows([1000.0] * 60), Window(60_000, 1, 1, 1, 1))) is None, "the rest of a window has no rate"
    assert find_knee(windows([1000.0] * 60 + [1000.0 * (1 - 0.9 * FALL)] * 60)) is None
    knee = find_knee(windows([1000.0] * 60 + [900.0] * 60))
    assert knee and knee.temperature_c is None


def test_a_slow_decline_leaves_its_plateau_where_it_has_lost_a_twentieth() -> None:
    """An inference a minute slower each second."""
    rates = [1000.0] * 60 + [1000.0 - i for i in range(300)]
    knee = find_knee(windows(rates))
    assert knee and 60 + 48 <= knee.at_s <= 60 + 53


def test_retention_is_the_first_minute_by_the_last() -> None:
    rates = [100.0] * 60 + [90.0] * 120 + [80.0] * 60
    one = dataclasses.replace(series(0, 10.0, 3, random.Random(1)), windows=windows(rates), readings=readings(240))
    told = describe_sustained(one)
    assert told and told.retention == pytest.approx(0.8) and (told.first_ms, told.last_ms) == (10.0, 12.5)
    assert (told.seconds, told.inferences) == (240.0, int(sum(rates))) and told.temperature_c == (40.0, pytest.approx(63.9))
    assert told.knee and abs(told.knee.at_s - 60) <= SMOOTH
    assert describe_sustained(series(0, 10.0, 3, random.Random(1))) is None
    short = describe_sustained(dataclasses.replace(one, windows=windows(rates[:119])))
    assert short and short.retention is None and short.retention_absent == "119.0 s were timed, two minutes are needed"


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 1000)), min_size=1, max_size=40))
def test_the_median_of_windows_weighs_inferences(many: list[tuple[int, int]]) -> None:
    made = [Window(i, 1, count, p50, p50) for i, (count, p50) in enumerate(many)]
    every = sorted(p50 for count, p50 in many for _ in range(count))
    assert median_latency_ms(made) == every[(len(every) - 1) // 2] / 1e6
    assert median_latency_ms([]) is None


def test_a_slow_model_has_windows_of_its_own_length() -> None:
    """2.5 s an inference: a window holds one."""
    made = tuple(Window(i * 2500, 2500, 1, 2_500_000_000, 2_500_000_000) for i in range(60))
    one = dataclasses.replace(series(0, 2500.0, 3, random.Random(1)), windows=made, readings=())
    told = describe_sustained(one)
    assert told and told.retention == 1.0 and told.knee is None and told.temperature_c is None


def test_what_is_shown() -> None:
    one = dataclasses.replace(
        series(0, 10.0, 100, random.Random(1)), windows=windows([100.0] * 100 + [80.0] * 140), readings=readings(240)
    )
    brief = dataclasses.replace(one, windows=one.windows[:50])
    made = [dataclasses.replace(measurement(name), series=(s,)) for name, s in (("fp32", one), ("fp16", brief))]
    ran = run(measurements=tuple(made))
    ran = dataclasses.replace(ran, job=dataclasses.replace(ran.job, plan=plan(name="sustained", sustained=True, processes=1)))
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_sustained(summarize(ran, valid)))
    text = console.export_text()
    assert "80.0" in text and "4.0" in text and "50.0" in text, text
    assert "100.0 inferences/s at first, 80.0 after 100 s at 50.0 °C (20% less)" in text
    assert "no retention: 50.0 s were timed, two minutes are needed" in text
