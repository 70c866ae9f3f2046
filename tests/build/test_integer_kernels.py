"""Integer files: what onnxruntime makes of them, and that TFLite's hold every range and every rounded weight of the spec."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest

from edgevit.compress import CalibrationData, Compressed, StepContext, TrainingData, apply_step
from edgevit.compress.quantize import QuantizeConfig
from edgevit.errors import ExportError
from edgevit.export import tflite
from edgevit.export.readback_tflite import read_tflite
from edgevit.golden import synthetic_images
from edgevit.model import ModelSource, load_model
from tests.build.conftest import Build, Recorder

INTEGER_PRODUCTS = {"int8-static": "MatMulIntegerToFloat", "int8-dynamic": "DynamicQuantizeMatMul"}


@pytest.mark.parametrize("scheme", sorted(INTEGER_PRODUCTS))
def test_linear_layers_run_in_integer_kernels(build: Build, images: Path, tmp_path: Path, scheme: str) -> None:
    bundle = build(scheme, calib_data=images)
    (artifact,) = bundle.manifest.artifacts
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    data = bundle.blob_path(artifact.blob.sha256).read_bytes()
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    quantized = next(step for step in bundle.manifest.steps if step.step == "quantize").layers
    convolutions = operators["QLinearConv"]
    # The head stands behind a pooled token: its product has rank 2 and a bias of its own form.
    products = operators[INTEGER_PRODUCTS[scheme]]
    if scheme == "int8-static":
        dynamic = operators["DynamicQuantizeMatMul"]
        assert 1 <= dynamic <= quantized // 4, "layers with a range for each row compute it at run time"
        products += dynamic
    assert products >= quantized - convolutions - 1, operators


def test_tflite_keeps_smoothed_weights_and_the_ranges_of_the_spec() -> None:
    model = load_model(ModelSource("tests.support.models:tiny_vit", random_weights=True))
    pixels = synthetic_images(16, model.preprocessing)
    data_of = CalibrationData(pixels, None, True)
    context = StepContext(data_of, lambda: TrainingData(pixels, None), 8, Path("unused"), Recorder(), ("tflite",))
    start = Compressed(model.module, model.preprocessing, model.module)
    module, spec = apply_step(start, QuantizeConfig(scheme="int8-static"), context).carried("tflite")
    assert {one.activations for one in spec.layers} == {"static", "dynamic"}
    float_model = tflite.export_float(module, model.preprocessing, 1)
    data = tflite.apply_spec(float_model, spec, module, pixels, model.preprocessing, Recorder())
    read = read_tflite(data, float_model, spec, module)
    assert read.integer_layers == 9 and read.notes == (), "a scale was folded into a rounded weight"

    static = next(one for one in spec.layers if one.activations == "static" and one.kind == "linear")
    assert static.input_range is not None
    low, high = static.input_range
    for changed, expected in (
        (replace(static, input_range=(low, high * 1.01)), "other activation scales"),
        (replace(static, activations="dynamic", input_range=None, output_range=None), "static activations"),
    ):
        layers = tuple(changed if one is static else one for one in spec.layers)
        with pytest.raises(ExportError, match=rf"1 of 9 layers .*\({expected}\)"):
            read_tflite(data, float_model, replace(spec, layers=layers), module)
    with pytest.raises(ExportError, match="divides no rows"):
        rows = tuple(replace(one, rows=one.activations == "dynamic") for one in spec.layers)
        tflite.apply_spec(float_model, replace(spec, layers=rows), module, pixels, model.preprocessing, Recorder())
