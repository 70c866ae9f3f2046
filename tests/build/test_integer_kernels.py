"""What onnxruntime makes of the integer files: products in integer kernels, not dequantized and multiplied in float."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest

from tests.build.conftest import Build

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
