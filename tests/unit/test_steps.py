"""Steps of latency over versions: found where they are, rarely where there are none, and told with what else changed."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_agents.wire import InstalledBundle, Run
from edgevit.cli import run_cli
from edgevit.results.history import trace_history
from edgevit.results.steps import LEAST_RUNS, find_steps
from edgevit.results.store import open_store
from tests.support.runs import facts, failed, measurement, run, sha


def noisy(rng: random.Random, levels: list[tuple[float, int]], spread: float = 0.02) -> list[float]:
    return [level * math.exp(rng.gauss(0.0, spread)) for level, count in levels for _ in range(count)]


def test_one_step_is_found_at_its_version() -> None:
    values = noisy(random.Random(3), [(20.0, 8), (23.0, 8)])
    (step,) = find_steps(values, [i // 2 for i in range(16)])
    assert (step.index, step.before, step.after) == (8, 8, 8)
    assert step.p_value < 0.01 and step.interval is not None and step.interval[0] < 1.15 < step.interval[1] < 1.2


def test_two_steps_are_measured_each_from_the_one_before() -> None:
    values = noisy(random.Random(4), [(20.0, 10), (30.0, 10), (24.0, 10)])
    first, second = find_steps(values, list(range(30)))
    assert (first.index, second.index) == (10, 20)
    assert first.ratio == pytest.approx(1.5, rel=0.03) and second.ratio == pytest.approx(0.8, rel=0.03)


def test_a_step_within_a_version_is_not_a_version_s() -> None:
    values = noisy(random.Random(3), [(20.0, 7), (30.0, 9)])
    (step,) = find_steps(values, [0] * 8 + [1] * 8)
    assert step.index == 8, "the version changed there, not where the latency did"
    assert find_steps(values, [0] * 16) == []


def test_no_change_is_rarely_called_one_also_with_heavy_tails() -> None:
    rng = random.Random(5)
    said = 0
    for _ in range(200):
        values = [20.0 * (1 + 0.02 * rng.paretovariate(1.2)) for _ in range(12)]
        said += bool(find_steps(values, list(range(12))))
    assert said <= 19, f"{said} of 200: 10 are to be expected at 5 %, and three standard errors more"


def test_too_few_runs_tell_nothing() -> None:
    values = [1.0] * 4 + [2.0] * 4
    assert find_steps(values[1:], [0] * 3 + [1] * 4) == [], "by chance 2 times in 35"
    assert [s.index for s in find_steps(values, [0] * 4 + [1] * 4)] == [4], "2 times in 70"
    assert len(values) == LEAST_RUNS
    for bad in ([1.0, 0.0], [1.0, math.nan], [1.0]):
        with pytest.raises(ValueError, match="got"):
            find_steps(bad, [1, 2])


@given(st.lists(st.floats(0.1, 1e4), max_size=14), st.floats(0.01, 100.0))
@settings(max_examples=25, deadline=None)
def test_a_unit_changes_no_step(values: list[float], unit: float) -> None:
    versions = list(range(len(values)))
    one, other = (find_steps([scale * v for v in values], versions) for scale in (1.0, unit))
    assert [s.index for s in one] == [s.index for s in other] or len(set(values)) < len(values)
    assert all(0 < s.p_value <= 0.05 for s in one)


# ---- the history of a bundle ----------------------------------------------------------------------------------------


def measured(number: int, version: int, p50_ms: float, **changes: object) -> Run:
    """A run of the bundle's version ``version`` on the day ``number``."""
    m = measurement("fp32", "onnx", p50_ms, seed=number)
    bundle = sha(f"version {version}")
    m = dataclasses.replace(m, variant=dataclasses.replace(m.variant, bundle=bundle))
    there = facts(bundles=(InstalledBundle(bundle, m.bundle_name, 1_700_000_000 + version),))
    given = {"facts": there, "governor": "performance", "started_at": f"2025-02-{number + 1:02}T00:00:00Z", **changes}
    return run(batch=f"b{number}", measurements=(m,), **given)


def slower_from_version_2() -> list[Run]:
    # Measured the other way round: an old version may well be measured again later.
    return [measured(i, 2 - i // 4, 60.0 if i < 4 else 50.0) for i in range(8)]


def test_versions_stand_in_the_order_they_were_built_in_with_their_step() -> None:
    (history,) = trace_history(slower_from_version_2(), "deit-tiny-fp32", "pi4")
    assert [v.version for v in history.versions] == [1_700_000_001, 1_700_000_002]
    assert [len(v.p50_ms) for v in history.versions] == [4, 4] and history.versions[0].mean_ms == pytest.approx(50, rel=0.02)
    (found,) = history.steps
    assert found.bundle == sha("version 2") and found.step.ratio == pytest.approx(1.2, rel=0.03)
    assert found.also_changed == () and history.absent == ""


def test_what_else_changed_at_a_step_is_named() -> None:
    runs = [dataclasses.replace(r, governor="powersave") if i < 4 else r for i, r in enumerate(slower_from_version_2())]
    (history,) = trace_history(runs, "deit-tiny-fp32", "pi4")
    assert [d.key for d in history.steps[0].also_changed] == ["governor"]


def test_without_versions_the_order_is_that_of_measuring() -> None:
    runs = [dataclasses.replace(r, facts=facts()) for r in slower_from_version_2()]
    (history,) = trace_history(runs, "deit-tiny-fp32", "pi4")
    assert [v.version for v in history.versions] == [None, None] and history.ordered_by == "measured"
    assert history.versions[0].bundle == sha("version 2"), "measured first"


def test_invalid_and_failed_runs_are_left_out_with_their_reason() -> None:
    runs = slower_from_version_2()
    m = runs[0].measurements[0]
    swapped = dataclasses.replace(m, series=(dataclasses.replace(m.series[0], swapped_pages=3), *m.series[1:]))
    runs[0] = dataclasses.replace(runs[0], measurements=(swapped,))
    runs.append(run(batch="bad", measurements=(failed("fp32", "onnx"),)))
    (history,) = trace_history(runs, "deit-tiny-fp32", "pi4")
    assert len(history.left_out) == 2 and "3 pages were swapped" in history.left_out[0] and "golden" in history.left_out[1]
    assert history.steps == () and history.absent == "7 runs count: fewer than 8 cannot tell a step from chance"
    (counted,) = trace_history(runs, "deit-tiny-fp32", "pi4", anyway=True)
    assert len(counted.steps) == 1
    (nothing,) = trace_history(runs[-1:], "deit-tiny-fp32", "pi4")
    assert nothing.versions == () and nothing.absent == "0 versions measured: a step needs two"


def test_the_command_shows_the_step_and_knows_its_names(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_store() as store:
        for one in slower_from_version_2():
            store.add_run(one)
    assert run_cli(["results", "history", "deit-tiny-fp32", "pi4"]) == 0
    shown = capsys.readouterr().out
    assert f"from {sha('version 2')[:12]} on slower: 1.2" in shown and "2023-11-14 22:13:21" in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert run_cli(["results", "history", "deit-tiny-fp32", "pi4", "--json"]) == 0
    (variant,) = json.loads(capsys.readouterr().out)["variants"]
    assert variant["steps"][0]["bundle"] == sha("version 2")
    assert run_cli(["results", "history", "deit-tiny-fp33", "pi4"]) == 2
    assert "did you mean deit-tiny-fp32 pi4?" in capsys.readouterr().err
