"""Bundles of several artifacts of one model: all that can be made, the rest named with its reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from edgevit.cli import run_cli
from edgevit.errors import BuildError
from edgevit.model import ModelSource
from edgevit.report.bundle_view import render_explanation
from tests.build.conftest import Build, Recorder

NO_LINEAR = ModelSource("tests.support.models:no_linear", random_weights=True)


def recipe(folder: Path, *schemes: str) -> str:
    path = folder / "several.yaml"
    entries = "".join(f"      - {{scheme: {scheme}}}\n" for scheme in schemes)
    path.write_text(f"schema: edgevit.recipe/1\nname: several\nsummary: variants for a test\nsteps:\n  - quantize:\n{entries}")
    return str(path)


def shown(renderable: object) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


def test_every_scheme_and_format_is_one_artifact_with_its_own_report(
    build: Build, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, "fp32", "int8-dynamic", "int8-static")
    bundle = build(path, ("onnx", "tflite"), calib_data=images, eval_data=images)
    manifest = bundle.manifest
    assert [a.name for a in manifest.artifacts] == [
        "onnx-fp32", "tflite-fp32", "onnx-int8-dynamic", "tflite-int8-dynamic", "onnx-int8-static", "tflite-int8-static",
    ]  # fmt: skip
    assert manifest.not_made == ()
    assert len({a.blob.sha256 for a in manifest.artifacts}) == 6
    quantized = [s for s in manifest.steps if s.step == "quantize"]
    assert [s.artifacts for s in quantized] == [
        ("onnx-fp32", "tflite-fp32"), ("onnx-int8-dynamic", "tflite-int8-dynamic"), ("onnx-int8-static", "tflite-int8-static"),
    ]  # fmt: skip
    assert all(not s.artifacts for s in manifest.steps if s.step != "quantize"), "other steps are of all artifacts"
    for s, scheme in zip(quantized, ("fp32", "int8-dynamic", "int8-static"), strict=True):
        assert scheme in s.summary
    one = shown(render_explanation(bundle, "tflite-int8-static"))
    assert "int8-static: " in one and "step quantize (onnx-int8-dynamic" not in one, "one artifact is explained with its own"
    assert "step quantize (onnx-int8-dynamic, tflite-int8-dynamic)" in shown(render_explanation(bundle, None))
    assert run_cli(["explain", str(bundle.path), "tflite-int8-static", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["artifact"]["name"] == "tflite-int8-static", "the artifact that was asked for, as the tables have it"
    assert [s["artifacts"] for s in told["steps"]] == [[], ["onnx-int8-static", "tflite-int8-static"]]


def test_an_artifact_among_variants_is_the_one_its_own_recipe_makes(build: Build, images: Path, tmp_path: Path) -> None:
    """One variant's folds and rounded weights must not leak into the next: each starts from the same float module."""
    several = build(recipe(tmp_path, "int8-static", "fp32", "int8-dynamic"), calib_data=images).manifest
    for scheme in ("fp32", "int8-dynamic", "int8-static"):
        alone = build(scheme, calib_data=images).manifest.artifacts[0]
        among = several.artifact(f"onnx-{scheme}")
        assert among is not None and among.blob == alone.blob, scheme


def test_what_cannot_be_made_is_left_out_and_named(build: Build, tmp_path: Path) -> None:
    progress = Recorder()
    bundle = build(recipe(tmp_path, "fp32", "int8-dynamic"), source=NO_LINEAR, progress=progress)
    assert [a.name for a in bundle.manifest.artifacts] == ["onnx-fp32"]
    (one,) = bundle.manifest.not_made
    assert one.artifact == "onnx-int8-dynamic" and "applies to no layer" in one.reason
    assert any("onnx-int8-dynamic is not made: int8-dynamic applies to no layer" in said for said in progress.said)
    assert "onnx-int8-dynamic was not made" in shown(render_explanation(bundle, None))
    assert [s.artifacts for s in bundle.manifest.steps if s.step == "quantize"] == [("onnx-fp32",)]


def test_a_format_without_the_kernels_is_left_out_and_named(build: Build, images: Path, tmp_path: Path) -> None:
    bundle = build(recipe(tmp_path, "fp32", "int4-weights"), ("tflite", "onnx"), calib_data=images)
    assert [a.name for a in bundle.manifest.artifacts] == ["tflite-fp32", "onnx-fp32", "onnx-int4-weights"]
    assert [(o.artifact, "no float kernel" in o.reason) for o in bundle.manifest.not_made] == [("tflite-int4-weights", True)]


def test_one_that_cannot_be_made_is_an_error_where_it_is_the_only_one(build: Build, images: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="applies to no layer"):
        build("int8-dynamic", source=NO_LINEAR)
    with pytest.raises(BuildError, match=r"no artifact could be made: onnx-int8-dynamic: .*; onnx-int4-weights: ") as caught:
        build(recipe(tmp_path, "int8-dynamic", "int4-weights"), source=NO_LINEAR, calib_data=images)
    assert caught.value.hint
