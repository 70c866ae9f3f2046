"""Stored runs against each other: what goes with what, what does not compare and why, and what is said of the rest."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from device_agents.wire import Measurement, Reading, Run
from edgevit.cli import run_cli
from edgevit.errors import UsageError
from edgevit.results.sides import ROUNDS, TWO_RUNS, Pair, Side, pair_sides, pick_side
from edgevit.results.store import open_store
from tests.support.runs import accuracy, facts, failed, measurement, run


def sides(made: Run, wanted: str = "") -> list[Side]:
    return pick_side([made], wanted)


def one_pair(a: Run, b: Run) -> Pair:
    (pair,) = pair_sides(sides(a), sides(b)).pairs
    return pair


def with_plan(made: Run, **changes: Any) -> Run:
    return dataclasses.replace(made, job=dataclasses.replace(made.job, plan=dataclasses.replace(made.job.plan, **changes)))


def alone(p50_ms: float = 50.0, seed: int = 1, batch: str = "b1", **changes: Any) -> Run:
    return run(batch=batch, measurements=(measurement("fp32", "onnx", p50_ms, seed=seed),), **changes)


def change(made: Run, edit: Any) -> Run:
    return dataclasses.replace(made, measurements=tuple(edit(m) for m in made.measurements))


def threads(m: Measurement) -> Measurement:
    return dataclasses.replace(m, variant=dataclasses.replace(m.variant, threads=1))


def version(m: Measurement) -> Measurement:
    return dataclasses.replace(m, series=tuple(dataclasses.replace(s, runtime_version="1.19.2") for s in m.series))


def clock(m: Measurement) -> Measurement:
    slow = tuple(Reading(i * 1000, 50.0, 1500.0, ()) for i in range(4))
    return dataclasses.replace(m, series=tuple(dataclasses.replace(s, readings=slow) for s in m.series))


def no_clock(m: Measurement) -> Measurement:
    silent = tuple(Reading(i * 1000, 50.0, None, ()) for i in range(4))
    return dataclasses.replace(m, series=tuple(dataclasses.replace(s, readings=silent) for s in m.series))


def images(m: Measurement) -> Measurement:
    return dataclasses.replace(m, accuracy=accuracy(50, 100, random.Random(1)))


@pytest.mark.parametrize(
    ("other", "key", "a", "b"),
    [
        (
            alone(facts=facts(board_model="Raspberry Pi 5"), batch="b2"),
            "board",
            "Raspberry Pi 4 Model B Rev 1.4",
            "Raspberry Pi 5",
        ),
        (change(alone(batch="b2"), version), "runtime version", "1.31.1", "1.19.2"),
        (change(alone(batch="b2"), threads), "threads", "4", "1"),
        (with_plan(alone(batch="b2"), name="quick"), "plan", "standard", "quick"),
        (with_plan(alone(batch="b2"), max_seconds=5.0), "plan's max seconds", "60.0", "5.0"),
        (alone(batch="b2", governor="performance"), "governor", "ondemand", "performance"),
        (alone(batch="b2", governor=None), "governor", "ondemand", ""),
        (alone(batch="b2", facts=facts(sensors=("temperature", "power-mode:15W"))), "power mode", "", "15W"),
        (change(alone(batch="b2"), clock), "CPU clock", "1,800 MHz", "1,500 MHz"),
        (change(alone(batch="b2"), no_clock), "CPU clock", "1,800 MHz", ""),
    ],
)
def test_each_condition_that_differs_is_named_with_both_values(other: Run, key: str, a: str, b: str) -> None:
    pair = one_pair(alone(), other)
    assert [(d.key, d.a, d.b) for d in pair.differs] == [(key, a, b)]
    assert not pair.comparable and pair.latency is not None, "the figures are there for --anyway"


def test_other_images_differ_in_name_number_and_labels() -> None:
    pair = one_pair(alone(), change(alone(batch="b2"), images))
    (difference,) = pair.differs
    assert difference.key == "evaluation images" and "650 images" in difference.a and "100 images" in difference.b
    assert pair.accuracy is None and pair.accuracy_absent.startswith("scored on other images")


def test_more_processes_or_another_seed_are_no_condition() -> None:
    more = (measurement("fp32", "onnx", processes=7, seed=2),)
    longer = with_plan(run(batch="b2", measurements=more), processes=7)
    pair = one_pair(alone(), longer)
    assert pair.comparable and pair.latency is not None and pair.latency.how == TWO_RUNS
    assert pair.latency.interval is not None and pair.latency.interval[0] <= 1.0 <= pair.latency.interval[1]


def test_what_took_turns_in_one_run_is_paired_by_its_rounds() -> None:
    """Both drift by half from round to round: the ratio of each round is exact, that of the means would not be."""
    made = run(measurements=(measurement("fp32", "onnx"), measurement("int8-dynamic", "onnx")))

    def drifting(m: Measurement) -> Measurement:
        base = 10_000_000 if m.recipe == "fp32" else 5_000_000
        rounds = tuple(dataclasses.replace(s, samples_ns=(int(base * 1.5**s.process),) * 99) for s in m.series)
        return dataclasses.replace(m, series=rounds)

    made = change(made, drifting)
    (pair,) = pair_sides(sides(made, "fp32-onnx"), sides(made, "int8-dynamic-onnx:onnxruntime")).pairs
    assert pair.latency is not None and pair.latency.how.startswith(ROUNDS)
    assert pair.latency.value == pytest.approx(0.5) and pair.latency.interval == pytest.approx((0.5, 0.5))


def test_few_processes_have_a_ratio_without_an_interval() -> None:
    short = run(batch="b2", measurements=(measurement("fp32", "onnx", processes=1),))
    pair = one_pair(alone(), short)
    assert pair.latency is not None and pair.latency.interval is None
    assert pair.latency.how == "no interval from 1 process, 3 are needed: edgevit bench --plan standard"


def test_what_failed_or_has_no_sample_has_no_ratio_and_says_why() -> None:
    bad = run(batch="b2", measurements=(failed("fp32", "onnx"),))
    assert one_pair(alone(), bad).latency_absent.startswith("B failed: golden-mismatch")
    empty = change(
        alone(batch="b2"),
        lambda m: dataclasses.replace(m, series=tuple(dataclasses.replace(s, samples_ns=()) for s in m.series)),
    )
    pair = one_pair(empty, alone())
    assert pair.latency is None and "nothing was timed" in pair.a.summary.p50_absent
    assert pair.latency_absent == "A has no valid sample"


def test_an_invalid_figure_is_doubtful() -> None:
    swapped = change(
        alone(batch="b2"),
        lambda m: dataclasses.replace(m, series=(dataclasses.replace(m.series[0], swapped_pages=9), *m.series[1:])),
    )
    pair = one_pair(alone(), swapped)
    assert (
        pair.differs == ()
        and not pair.comparable
        and "B is INVALID" in pair.doubts[0]
        and "9 pages were swapped" in pair.doubts[0]
    )


def test_two_batches_pair_by_artifact_and_name_what_is_alone() -> None:
    a = run()
    b = run(
        batch="b2",
        measurements=(measurement("int8-dynamic", "tflite", 20.0), measurement("fp16", "onnx"), measurement("fp32", "onnx")),
    )
    paired = pair_sides(sides(a), sides(b))
    assert [(p.a.variant.artifact, p.b.variant.artifact) for p in paired.pairs] == [
        ("fp32-onnx", "fp32-onnx"),
        ("int8-dynamic-tflite", "int8-dynamic-tflite"),
    ]
    assert [text.split(":")[0] for text in paired.only_a] == ["fp32-tflite", "int8-dynamic-onnx"]
    assert [text.split(":")[0] for text in paired.only_b] == ["fp16-onnx"]


def test_two_boards_pair_only_where_each_side_has_one() -> None:
    pi4, pi5 = alone(batch="b1"), dataclasses.replace(run("pi5", batch="b2", measurements=(measurement("fp32", "onnx"),)))
    assert pair_sides(sides(pi4), sides(pi5)).pairs[0].b.run.job.target == "pi5"
    with pytest.raises(UsageError, match="nothing of A goes with anything of B"):
        pair_sides(sides(pi4), [*sides(pi5), *sides(run("pi6"))])
    with pytest.raises(UsageError, match="the same measurement"):
        pair_sides(sides(pi4), sides(pi4))


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(home: Path) -> None:
    with open_store() as store:
        store.add_run(run())
        store.add_run(run(batch="b2", governor="performance"))
        store.add_run(run(batch="b3", measurements=(failed("fp32", "onnx"),)))


def test_the_command_refuses_names_the_keys_and_shows_them_anyway(stored: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["results", "compare", "b1:fp32-onnx", "b2:fp32-onnx"]) == 2
    said = capsys.readouterr().err
    assert "governor: A ondemand, B performance" in said and "--anyway" in said and said.count("INCOMPARABLE") == 1
    assert run_cli(["results", "compare", "b1:fp32-onnx", "b2:fp32-onnx", "--anyway"]) == 0
    shown = capsys.readouterr().out
    assert "INCOMPARABLE: governor: A ondemand, B performance" in shown and "no difference can be told" in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert run_cli(["results", "compare", "b1:fp32-onnx", "b2:fp32-onnx", "--anyway", "--json"]) == 0
    (pair,) = json.loads(capsys.readouterr().out)["pairs"]
    assert (pair["comparable"], pair["labels"]) == (False, ["INCOMPARABLE: governor: A ondemand, B performance"])


def test_the_command_shows_ratio_accuracy_memory_and_size(stored: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["results", "compare", "b1-pi4:fp32-onnx", "b1:int8-dynamic-onnx"]) == 0
    shown = capsys.readouterr().out
    for said in ("B is 1.6", "taking turns in one run", "peak memory MB", "file MB", "McNemar's exact test", "same answer %"):
        assert said in shown, said
    assert "INCOMPARABLE" not in shown


def test_the_command_says_what_is_not_there(stored: None, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, told in (
        (["b1", "b9"], "no batch or run named 'b9'"),
        (["b1:fp33", "b2"], "b1 holds no measurement of fp33; it holds fp32-onnx on pi4"),
        (["b1", "b2", "--target", "pi5"], "b1 holds no measurement of anything on pi5"),
    ):
        assert run_cli(["results", "compare", *argv]) == 2
        assert told in capsys.readouterr().err
    assert run_cli(["results", "compare", "b1:fp32-onnx", "b3"]) == 1, "no ratio is a failure"
    assert "no ratio of latencies: B failed: golden-mismatch" in capsys.readouterr().out
