"""ONNX Runtime's own format: what is in the file, that it runs wherever a file runs, and what it cannot carry."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_agents.errors import Refused
from device_agents.golden import compare
from device_agents.runtimes import refuse_load
from device_agents.runtimes.onnx import TOO_OLD, OnnxBackend
from edgevit.cache import Cache
from edgevit.cli.model_options import chosen_formats
from edgevit.errors import BuildError, ExportError
from edgevit.export import PAIRS, cannot_carry_out
from edgevit.export.ort import convert, read_ort
from edgevit.export.runtime import run_artifact
from tests.build.conftest import Build, blob


@pytest.mark.parametrize("scheme", ["fp32", "int8-dynamic"])
def test_the_file_is_smaller_work_for_the_device_and_gives_the_same_answers(build: Build, images: Path, scheme: str) -> None:
    bundle = build(scheme, ("onnx", "ort"), calib_data=images)
    onnx, ort = bundle.manifest.artifacts
    assert (onnx.name, ort.name) == (f"onnx-{scheme}", f"ort-{scheme}")
    model = bundle.blob_path(ort.blob.sha256).read_bytes()
    assert model[4:8] == b"ORTM"
    needed = [note for note in ort.notes if note.startswith("required operators: ")]
    assert any(note.startswith("required operators: ai.onnx;") for note in needed), ort.notes
    named = {op for note in needed for op in note.rpartition(";")[2].split(",")}
    assert set(ort.operators) == named, "the operators to build ONNX Runtime with are not those of the file"
    assert ("DynamicQuantizeMatMul" in named) == (scheme == "int8-dynamic")
    pixels, recorded = blob(bundle, bundle.manifest.golden.blob.sha256), blob(bundle, ort.golden.blob.sha256)
    again = run_artifact("ort", model, pixels, bundle.manifest.preprocessing, ort.input)
    assert compare(again, recorded, ort.golden.tolerance).passed
    assert ort.placement is not None and onnx.placement is not None
    assert ort.placement.int8_share == pytest.approx(onnx.placement.int8_share)
    backend = OnnxBackend()
    backend.check(model)
    assert backend.load(model, "CPUExecutionProvider", 1, ort, Path("unused")).provider == "CPUExecutionProvider"


@pytest.mark.parametrize("scheme", ["int8-weights", "int4-weights"])
def test_what_the_format_cannot_keep_is_refused_by_name(build: Build, images: Path, scheme: str) -> None:
    assert scheme not in PAIRS["ort"] and cannot_carry_out("ort", scheme, None)
    with pytest.raises(BuildError, match=r"ort-int.*(back into float|older versions)"):
        build(scheme, ("ort",), calib_data=images)


def test_weights_that_were_turned_back_into_float_are_noticed(build: Build, images: Path) -> None:
    """The reason for the refusal above, found by the read-back."""
    from edgevit.export import ReadBack

    bundle = build("int8-weights", ("onnx",), calib_data=images)
    (artifact,) = bundle.manifest.artifacts
    model = bundle.blob_path(artifact.blob.sha256).read_bytes()
    made, _ = convert(Cache(), model)
    assert len(made) > 2 * len(model)
    read = ReadBack(artifact.input, artifact.output, 18, 10, {}, 1)
    with pytest.raises(ExportError, match="integer tensors of the ONNX file are not in the ORT file"):
        read_ort(made, model, read)
    with pytest.raises(ExportError, match="expected the ORT format"):
        read_ort(model, model, read)


def test_a_file_of_a_newer_version_of_the_format_says_so() -> None:
    said = "[ONNXRuntimeError] : 1 : FAIL : The ORT format model version [7] is not supported in this build 1.19.2. "
    refused = refuse_load("onnxruntime", "1.19.2", said, TOO_OLD)
    assert isinstance(refused, Refused) and refused.code == "runtime-too-old"
    assert "version 7 of the ORT format, onnxruntime 1.19.2 does not read it" in str(refused)


def test_formats_are_named_once_each_in_the_order_given() -> None:
    assert chosen_formats(("all",)) == ("onnx", "tflite")
    assert chosen_formats(("ort", "all", "onnx")) == ("ort", "onnx", "tflite")
