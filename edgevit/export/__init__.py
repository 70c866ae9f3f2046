"""Exporters: the module and its QuantSpec → one model file, read back and held against what was asked.

Each format has a module with ``export_float(module, preprocessing, batch) -> bytes`` (deterministic bytes) and
``apply_spec(float_model, module, spec) -> bytes``; the first is slow and shared by every scheme of a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from device_agents.wire import TensorSpec

EXTRA_OF_FORMAT = {"onnx": "build", "tflite": "tflite"}
PAIRS = {
    "onnx": ("fp32", "fp16", "int8-dynamic", "int8-static"),
    "tflite": ("fp32", "fp16", "int8-dynamic", "int8-static"),
}
"""The schemes each exporter carries out."""


@dataclass(frozen=True)
class ReadBack:
    """What a file itself says: input and output, versions (None for TFLite), operators counted, layers held as integers."""

    input: TensorSpec
    output: TensorSpec
    opset: int | None
    ir_version: int | None
    operators: Mapping[str, int]
    integer_layers: int
    notes: tuple[str, ...] = field(default=())
