"""What the page draws: columns, stretches, accuracy by class, devices, what bundles add, and what is thinned."""

from __future__ import annotations

import dataclasses
import io
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from device_agents.wire import Accuracy, EvaluationSet, Measurement, OperatorProfile, OperatorTime, Placement, Window
from edgevit import bundle, signing
from edgevit.errors import BundleError, MissingExtra
from edgevit.report import page_data as page_data_module
from edgevit.report.page_bundles import read_bundles
from edgevit.report.page_data import Shown, page_data
from edgevit.report.page_rows import METRICS, NUMBERS, columns, short
from edgevit.report.page_traces import stretches, trace
from edgevit.results.percentiles import percentile
from edgevit.results.stats import summarize_all
from tests.support.bundles import make_manifest
from tests.support.judged import mixed, summaries, valid
from tests.support.runs import measurement, run


def shown(*runs: Any, **changes: Any) -> dict[str, Any]:
    return page_data(Shown(summarize_all(runs, valid), runs, len(runs), **changes))


def scored(predictions: tuple[int, ...], labels: tuple[int, ...], recipe: str = "fp32", format: str = "onnx") -> Measurement:
    correct = sum(p == y for p, y in zip(predictions, labels, strict=True))
    return measurement(recipe, format, accuracy=Accuracy(len(labels), correct, predictions, labels, "four", False))


@given(st.lists(st.integers(1, 10**9), max_size=300), st.integers(1, 40))
def test_a_stretch_keeps_its_fastest_its_median_and_its_slowest(samples: list[int], most: int) -> None:
    found = stretches(samples, most)
    assert len(found) == min(most, len(samples))
    bounds = [first for first, *_ in found] + [len(samples)]
    assert bounds[0] == 0 if samples else bounds == [0]
    for (first, low, middle, high), end in zip(found, bounds[1:], strict=True):
        here = sorted(samples[first:end])
        assert (low, middle, high) == (here[0], percentile(here, 0.5), here[-1])


@given(st.floats(allow_nan=True, allow_infinity=True))
@example(1.79765e308)
def test_a_short_figure_is_within_its_digits_or_absent(value: float) -> None:
    told = short(value)
    if value != value or abs(value) == float("inf"):
        assert told is None
    else:
        assert told == pytest.approx(value, rel=1e-4)


def test_columns_give_every_figure_back() -> None:
    rows = summaries(*mixed())
    told = columns(rows)
    assert told["count"] == len(rows)
    for i, s in enumerate(rows):
        assert told["texts"]["target"]["values"][told["texts"]["target"]["at"][i]] == s.target
        assert told["numbers"]["p50"][i] == short(s.p50_ms)
    assert "energy" not in told["numbers"], "a column of nothing"
    for metric in METRICS:
        for name in ("key", "low", "high"):
            assert metric.get(name, "p50") in NUMBERS


def test_a_run_through_time_lays_samples_after_the_warm_up_and_keeps_limited_readings() -> None:
    one = run(measurements=(measurement(samples=500, processes=2),))
    series = one.measurements[0].series[0]
    hot = tuple(
        dataclasses.replace(r, throttle=("throttled",) if i == 777 else ()) for i, r in enumerate(series.readings * 250)
    )
    m = dataclasses.replace(one.measurements[0], series=(dataclasses.replace(series, readings=hot),))
    told = trace(dataclasses.replace(one, measurements=(m,)), [7])
    (drawn,) = told["series"]
    start = (series.init_time_ns + series.first_inference_ns + sum(series.warmup_ns)) / 1e9
    assert drawn["row"] == 7 and len(drawn["points"]) == 80
    assert drawn["points"][0][0] == pytest.approx(drawn["start"] + start, abs=1e-3)
    assert max(p[3] for p in drawn["points"]) == short(max(series.samples_ns) / 1e6)
    assert told["of"] == 1000 and len(told["readings"]) <= 401
    assert sum(r[5] for r in told["readings"]) == 1


def test_minutes_of_load_come_as_windows_with_the_knee() -> None:
    windows = tuple(Window(i * 1000, 1000, 100 if i < 120 else 70, 10**7 if i < 120 else 14 * 10**6, 1) for i in range(1300))
    base = measurement(processes=1)
    data = shown(run(measurements=(dataclasses.replace(base, series=(dataclasses.replace(base.series[0], windows=windows),)),)))
    (traced,) = data["runs"]
    assert traced["series"][0]["windows"] is True and len(traced["series"][0]["points"]) == 434
    spiked = tuple(dataclasses.replace(w, max_ns=10**9) if i == 700 else w for i, w in enumerate(windows))
    data = shown(run(measurements=(dataclasses.replace(base, series=(dataclasses.replace(base.series[0], windows=spiked),)),)))
    assert max(slowest for *_, slowest in data["runs"][0]["series"][0]["points"]) == 1000, "a spike is lost"
    (load,) = data["plans"]["loads"]
    assert load["knee"] == 120.0 and "retention 71.4 %: 100.0 inferences/s at first, 70.0 after 120 s" in load["words"]


def test_pairs_and_operators_stand_in_the_data() -> None:
    told = OperatorProfile(
        "ORT", 10, (OperatorTime("a", "Gemm", "CPU", 10, 5 * 10**6), OperatorTime("b", "Add", "CPU", 10, 5 * 10**6))
    )
    made = run(
        measurements=(dataclasses.replace(measurement(), profile=told), measurement("int8-dynamic", profile_absent="none"))
    )
    plan = dataclasses.replace(made.job.plan, order="mirrored", processes=6)
    data = shown(dataclasses.replace(made, job=dataclasses.replace(made.job, plan=plan)))
    assert "no ratio: 1 of the 3 blocks that it needs are left" in data["plans"]["pairs"][0]["words"]
    (profile,) = data["operators"]
    assert profile["kinds"] == [["Gemm", 0.5, 50], ["Add", 0.5, 50]] and profile["total"] == 1
    assert data["operators_absent"] == ["none"]


def test_classes_and_disputed_images_are_counted_image_by_image() -> None:
    labels = (0,) * 5 + (1,) * 5 + (2,) * 4
    first, second = (0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 2, 2, 2, 2), (0, 1, 0, 0, 0, 1, 1, 1, 1, 0, 2, 2, 2, 2)
    data = shown(run(measurements=(scored(first, labels), scored(second, labels, "int8-dynamic"))))
    (group,) = data["accuracy"]
    assert group["classes"] == [[0, 5, [100, 80]], [1, 5, [80, 80]]]
    assert (group["classes_of"], group["classes_few"]) == (2, 1), "four images tell nothing of a class"
    assert group["disputed"] == [[1, 0, [0, 1]]] and group["disputed_of"] == 1
    assert group["devices_disagree"] == []


def test_of_a_variant_that_was_built_again_the_newest_counts() -> None:
    labels = (0, 1)
    old = run("a", batch="b1", measurements=(scored((1, 1), labels),), started_at="2025-01-14T10:00:00Z")
    again = dataclasses.replace(scored((0, 1), labels), artifact_sha256="f" * 64)
    data = shown(old, run("a", batch="b2", measurements=(again,)))
    (group,) = data["accuracy"]
    assert len(group["variants"]) == group["variants_of"] == 1 and group["disputed_of"] == 0
    digests = data["table"]["texts"]["artifact"]
    assert digests["values"][digests["at"][group["variants"][0]]] == "f" * 64


def test_predictions_of_other_images_are_a_group_of_their_own() -> None:
    data = shown(run("a", measurements=(scored((0, 1), (0, 1)),)), run("b", measurements=(scored((1, 1), (1, 1)),)))
    assert [g["images"] for g in data["accuracy"]] == [2, 2]


def test_the_same_file_with_other_answers_on_another_device_is_named() -> None:
    data = shown(run("a", measurements=(scored((0, 1), (0, 1)),)), run("b", measurements=(scored((0, 0), (0, 1)),)))
    (group,) = data["accuracy"]
    assert group["devices_disagree"] == ["fp32-onnx in onnxruntime: 2 devices differ on 1 images"]


def test_devices_of_one_kind_are_held_against_each_other() -> None:
    runs = [run(f"pi-{k}", measurements=(measurement(p50_ms=50.0 + 2 * k, seed=k),)) for k in range(4)]
    other = run("zero", measurements=(measurement(p50_ms=200.0),))
    other = dataclasses.replace(other, facts=dataclasses.replace(other.facts, board_model="Raspberry Pi Zero 2 W"))
    data = shown(*runs, other)
    (group,) = data["fleet"]
    assert len(group["rows"]) == 4 and 50 < group["middle"] < 57
    spread = {part["name"]: part["percent"] for part in group["spread"]}
    assert 3 < spread["device and run"] < 7, "2 ms of 53 from one to the next"


def test_of_many_runs_only_the_newest_are_drawn_and_the_page_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_data_module, "DETAIL_RUNS", 2)
    monkeypatch.setattr(page_data_module, "TRACED_RUNS", 1)
    runs = [dataclasses.replace(run(f"t{k}"), started_at=f"2025-01-1{k}T10:00:00Z") for k in range(4)]
    data = shown(*runs)
    assert data["table"]["count"] == 16, "the table holds every run"
    assert len(data["spread"]) == 8
    assert [r["id"] for r in data["runs"]] == ["b1-t3"]
    assert "newest 2 of 4 runs" in data["thinned"][0] and "newest 1 runs" in data["thinned"][1]


@pytest.fixture
def bundled(tmp_path: Path) -> bundle.Bundle:
    """A bundle with four labelled images, class names, and a placement of its ONNX file."""
    import numpy as np

    manifest, blobs = make_manifest()

    def keep(data: bytes) -> Any:
        import hashlib

        from device_agents.wire import Blob

        sha256 = hashlib.sha256(data).hexdigest()
        blobs[sha256] = data
        return Blob(sha256, len(data))

    def npy(array: Any) -> bytes:
        stream = io.BytesIO()
        np.save(stream, array)
        return stream.getvalue()

    pixels = np.random.default_rng(1).integers(0, 255, (4, 8, 8, 3), dtype=np.uint8)
    placed = Placement("onnxruntime", "1.31.1", 1000, 0.75, 0.0, {"MatMul": 2}, {"CPUExecutionProvider": 5}, {}, 1, 0, 4096)
    first = dataclasses.replace(manifest.artifacts[0], placement=placed)
    manifest = dataclasses.replace(
        manifest,
        artifacts=(first, *manifest.artifacts[1:]),
        labels=keep(b'["cat", "dog"]'),
        evaluation=EvaluationSet(keep(npy(pixels)), keep(npy(np.array([0, 0, 1, 1]))), 4, "four"),
    )
    key = tmp_path / "key"
    signing.make_key(key, "tests")
    return bundle.write_bundle(tmp_path / "bundle", manifest, blobs, lambda data: signing.sign(data, key))


def test_a_bundle_adds_the_share_of_int8_class_names_and_pictures(bundled: bundle.Bundle) -> None:
    labels = (0, 0, 1, 1)
    artifact = bundled.manifest.artifacts[0]
    plain = scored((0, 0, 1, 0), labels)
    plain = dataclasses.replace(
        plain, artifact_sha256=artifact.blob.sha256, variant=dataclasses.replace(plain.variant, bundle=bundled.digest)
    )
    data = shown(run(measurements=(plain, scored((0, 1, 1, 0), labels, "int8-dynamic"))), bundles=read_bundles([bundled]))
    (placed,) = data["coverage"]
    assert (placed["int8"], placed["macs"], placed["floats"]) == (75, 1000, [["MatMul", 2]])
    (group,) = data["accuracy"]
    assert group["names"] == ["cat", "dog"]
    assert list(group["pictures"]) == ["1"] and group["pictures"]["1"].startswith("data:image/jpeg;base64,")


def test_pictures_that_cannot_be_shown_are_an_error(bundled: bundle.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgevit.report.page_bundles import thumbnails

    for module, extra in (("PIL", "pillow"), ("numpy", "numpy")):
        with monkeypatch.context() as light, pytest.raises(MissingExtra, match=extra):
            light.setitem(sys.modules, module, None)
            thumbnails(bundled, [0])
    evaluation = bundled.manifest.evaluation
    assert evaluation is not None
    blob = bundled.blob_path(evaluation.images.sha256)
    blob.chmod(0o600)
    blob.write_bytes(blob.read_bytes()[:100])
    with pytest.raises(BundleError, match="evaluation images cannot be shown"):
        thumbnails(bundled, [0])


def test_class_names_that_cannot_be_read_are_an_error(bundled: bundle.Bundle) -> None:
    labels = bundled.manifest.labels
    assert labels is not None
    blob = bundled.blob_path(labels.sha256)
    blob.chmod(0o600)
    blob.write_bytes(b"no JSON")
    with pytest.raises(BundleError, match="class names cannot be read"):
        read_bundles([bundled])


def test_a_store_of_runs_without_a_sample_makes_a_page() -> None:
    empty = measurement(samples=0, accuracy=None, accuracy_absent="not scored")
    data = shown(run(measurements=(empty,)))
    assert data["spread"] == {} and data["runs"] == [] and data["answers"][0]["word"] == "none"
