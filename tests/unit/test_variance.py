"""The spread of devices apart from the noise of runs and processes: by hand, by simulation, and where it cannot be told."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevit.results.variance import variance_components

Fleet = dict[str, list[list[float]]]


def fleet(rng: random.Random, sizes: list[list[int]], device: float, run: float, process: float) -> Fleet:
    """``sizes``: of each device the number of processes of each run; the rest are relative spreads around 20 ms."""
    made: Fleet = {}
    for i, runs in enumerate(sizes):
        of_device = rng.gauss(math.log(20.0), device)
        made[f"pi{i}"] = [
            [math.exp(of_run + rng.gauss(0.0, process)) for _ in range(n)]
            for n in runs
            for of_run in [rng.gauss(of_device, run)]
        ]
    return made


def test_a_balanced_fleet_by_hand() -> None:
    """The textbook's nested analysis of variance, done with its own sums of squares."""
    logs = {"a": [[0.0, 0.2], [0.4, 0.2]], "b": [[1.0, 1.2], [0.8, 0.8]], "c": [[2.0, 2.4], [2.2, 2.2]]}
    found = variance_components({d: [[math.exp(x) for x in run] for run in runs] for d, runs in logs.items()})
    run_means = [[statistics.fmean(r) for r in runs] for runs in logs.values()]
    within = sum((x - statistics.fmean(r)) ** 2 for runs in logs.values() for r in runs for x in r) / 6
    runs = 2 * sum((m - statistics.fmean(ms)) ** 2 for ms in run_means for m in ms) / 3
    devices = 4 * statistics.variance([statistics.fmean(ms) for ms in run_means])
    assert found.component("process").spread == pytest.approx(math.sqrt(within))
    assert found.component("run").spread == pytest.approx(math.sqrt(max(runs - within, 0) / 2))
    assert found.component("device").spread == pytest.approx(math.sqrt((devices - runs) / 4))
    assert (found.devices, found.runs, found.processes) == (3, 6, 12)
    assert found.device_means["a"] == pytest.approx(math.exp(0.2))
    assert found.devices_differ is True


@pytest.mark.parametrize("sizes", [[[3] * 3] * 6, [[3, 3], [2, 3, 1], [3], [3, 3], [1, 2, 3], [3, 3], [3, 3]]])
def test_the_interval_of_the_devices_spread_holds_it_as_often_as_it_says(sizes: list[list[int]]) -> None:
    rng = random.Random(7)
    trials = 120
    held = 0
    middle = []
    for _ in range(trials):
        found = variance_components(fleet(rng, sizes, 0.03, 0.02, 0.01)).component("device")
        assert found.interval is not None and found.spread is not None
        held += found.interval[0] <= 0.03 <= found.interval[1]
        middle.append(found.spread**2)
    # Three standard errors of a share of 95 % in 120 trials are 6 points.
    assert held / trials >= 0.95 - 0.06, f"{held} of {trials} intervals hold the true spread"
    assert statistics.fmean(middle) == pytest.approx(0.03**2, rel=0.3), "the method of moments has no bias"


def test_noise_of_runs_is_not_called_a_difference_of_devices() -> None:
    rng = random.Random(3)
    said = [variance_components(fleet(rng, [[3] * 3] * 5, 0.0, 0.03, 0.01)).devices_differ for _ in range(50)]
    assert sum(map(bool, said)) <= 6, "1.3 of 50 are to be expected by the interval's own confidence"
    assert None not in said


def test_what_was_not_repeated_is_named_and_not_guessed() -> None:
    rng = random.Random(1)
    one_run = variance_components(fleet(rng, [[3]] * 5, 0.02, 0.02, 0.01))
    assert [c.name for c in one_run.components] == ["device and run", "process"]
    assert one_run.component("device").interval is not None
    assert one_run.devices_differ is None, "nothing tells a device from its run"
    one_process = variance_components(fleet(rng, [[1, 1]] * 5, 0.02, 0.02, 0.01))
    assert [c.name for c in one_process.components] == ["device", "run and process"]
    bare = variance_components(fleet(rng, [[1]] * 4, 0.02, 0.02, 0.01))
    assert [c.name for c in bare.components] == ["device and run and process"]
    with pytest.raises(KeyError):
        bare.component("board")


def test_too_few_devices_have_no_interval() -> None:
    rng = random.Random(1)
    alone = variance_components(fleet(rng, [[3, 3]], 0.02, 0.02, 0.01))
    assert (alone.component("device").spread, alone.devices_differ) == (None, None)
    assert "1 device" in alone.component("device").absent and alone.component("run").interval is not None
    two = variance_components(fleet(rng, [[3, 3]] * 2, 0.02, 0.02, 0.01)).component("device")
    assert two.spread is not None and two.interval is None
    assert two.absent == "too few devices for an interval: 2, at least 3 are needed"


def test_what_was_not_measured_is_left_out_and_nonsense_refused() -> None:
    found = variance_components({"a": [[1.0, 1.1], []], "gone": [[]], "b": [[1.2, 1.3]]})
    assert (found.devices, found.runs, found.processes) == (2, 2, 4)
    for nothing in ({}, {"a": []}, {"a": [[]]}):
        with pytest.raises(ValueError, match="no device"):
            variance_components(nothing)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="pi4: got a latency"):
            variance_components({"pi4": [[1.0, bad]]})


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=3),
        st.lists(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=4), min_size=1, max_size=3),
        min_size=1,
        max_size=5,
    ),
    st.floats(0.01, 100.0),
)
def test_any_fleet_has_components_that_know_no_unit(measured: Fleet, unit: float) -> None:
    one = variance_components(measured)
    other = variance_components({d: [[unit * x for x in run] for run in runs] for d, runs in measured.items()})
    assert sorted(level for c in one.components for level in c.levels) == ["device", "process", "run"]
    for a, b in zip(one.components, other.components, strict=True):
        assert (a.spread is None) == (b.spread is None) and (a.interval is None) == (b.interval is None)
        if a.spread is not None and b.spread is not None:
            assert a.spread == pytest.approx(b.spread, rel=1e-3, abs=1e-5)
        if a.interval is not None:
            assert 0.0 <= a.interval[0] <= a.interval[1]
