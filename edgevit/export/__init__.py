"""Exporters: the module and its QuantSpec → one model file, read back and held against what was asked.

Each format has a module with ``export_float(module, preprocessing, batch) -> bytes`` (deterministic bytes) and
``apply_spec(float_model, module, spec) -> bytes``; the first is slow and shared by every scheme of a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from device_agents.wire import TensorSpec

EXTRA_OF_FORMAT = {"onnx": "build", "tflite": "tflite", "ort": "build"}
PAIRS = {
    "onnx": ("fp32", "fp16", "int8-dynamic", "int8-static", "int8-weights", "int4-weights", "mixed"),
    "tflite": ("fp32", "fp16", "int8-dynamic", "int8-static", "int8-weights", "int4-weights", "mixed"),
    "ort": ("fp32", "fp16", "int8-dynamic", "int8-static"),
}
"""The schemes each exporter carries out."""


def cannot_carry_out(format_: str, scheme: str, group: int | None) -> str:
    """Why no file of ``format_`` can carry out ``scheme`` with 4-bit weights in groups of ``group`` inputs, or nothing."""
    if format_ == "ort" and scheme == "int8-weights":
        return "ONNX Runtime turns int8-weights back into float as it writes the ORT format; onnx keeps them"
    if format_ == "ort" and scheme not in PAIRS[format_]:
        return f"an ORT file of {scheme} has operators that older versions of ONNX Runtime do not take; onnx has none"
    if scheme not in PAIRS[format_]:
        return f"the {format_} exporter does not carry out {scheme}"
    if format_ == "tflite" and scheme in ("int4-weights", "mixed") and group is not None:
        return f"LiteRT has no float kernel for weights in groups of {group}; with group: null it has, as in int4-channel"
    return ""


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
