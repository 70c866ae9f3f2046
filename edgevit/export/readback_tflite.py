"""What a written TFLite file says of itself, held against the float file it was made from and the QuantSpec."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from device_agents.wire import TensorSpec
from edgevit.errors import ExportError
from edgevit.export import ReadBack, tflite
from edgevit.export.runtime import image_spec
from edgevit.export.tflite_calibrate import unchanged_ranges
from edgevit.export.tflite_weights import difference, float_biases
from edgevit.quantspec import QuantSpec

if TYPE_CHECKING:
    import torch

_FLOAT32, _FLOAT16, _UINT8, _INT8, _INT4 = 0, 1, 3, 9, 17


def read_tflite(data: bytes, float_model: bytes, spec: QuantSpec, module: torch.nn.Module) -> ReadBack:
    """Parse a TFLite file again and verify it against ``spec``; integers are those of the weights in ``float_model``.

    Raises :class:`ExportError` for several subgraphs, custom operators, external buffers, another dtype than asked, and for
    every layer whose integers are not those of the QuantSpec.
    """
    model = tflite.read_flatbuffer(data)
    if len(model.subgraphs) != 1:
        raise ExportError(f"the TFLite file has {len(model.subgraphs)} subgraphs, expected one")
    graph = model.subgraphs[0]
    names = tflite.op_names(model)
    if "CUSTOM" in names:
        raise ExportError("the TFLite file uses custom operators, expected built-in ones alone")
    if any(getattr(buffer, "offset", 0) for buffer in model.buffers) and getattr(model, "externalBuffers", None):
        raise ExportError("the TFLite file keeps weights outside itself; external data is refused")
    if spec.float_bits == 16:
        _verify_fp16(model)
    count, notes = _verify_integers(data, float_model, spec, module)
    operators = dict(sorted(Counter(names).items()))
    return ReadBack(
        _io(graph, graph.inputs, is_input=True), _io(graph, graph.outputs, is_input=False), None, None, operators, count, notes
    )


def _io(graph: Any, indices: Any, is_input: bool) -> TensorSpec:
    if len(indices) != 1:
        raise ExportError(f"the TFLite file has {len(indices)} {'inputs' if is_input else 'outputs'}, expected one")
    tensor = graph.tensors[indices[0]]
    name, shape = tensor.name.decode(), tuple(int(d) for d in tensor.shape)
    if tensor.type not in ((_FLOAT32, _UINT8) if is_input else (_FLOAT32,)):
        expected = "float32 or uint8" if is_input else "float32"
        raise ExportError(f"{name} has TFLite type {tensor.type}, expected {expected}")
    dtype = "uint8" if tensor.type == _UINT8 else "float32"
    return image_spec(name, dtype, shape) if is_input else TensorSpec(name, dtype, shape)


def _verify_integers(data: bytes, float_model: bytes, spec: QuantSpec, module: Any) -> tuple[int, tuple[str, ...]]:
    import numpy as np

    held = [op for op in tflite.matrix_ops(data) if op.weight_type in (_INT8, _INT4)]
    weight_only = [one for one in spec.layers if one.activations == "float"]
    if len(held) != len(spec.layers) - len(weight_only):
        raise ExportError(
            f"{len(held)} operators of the TFLite file compute with integer weights, "
            f"the QuantSpec asks for {len(spec.layers) - len(weight_only)}"
        )
    if not spec.layers:
        return 0, ()
    asked = tflite.match_layers(float_model, spec, module)
    parsed = tflite.read_flatbuffer(data)
    biases = float_biases(float_model)
    ranges = unchanged_ranges(asked, [one for one in spec.layers if one.activations == "static"], module)
    differing, folded = [], 0
    for layer in spec.layers:
        op = asked[layer.name]
        folded += not np.array_equal(op.weight, tflite.weight_as_stored(module, layer))
        found = difference(parsed, layer, op, biases.get(op.output), ranges.get(layer.name))
        if found:
            differing.append(f"{layer.name} ({found})")
    if differing:
        raise ExportError(
            f"{len(differing)} of {len(spec.layers)} layers in the TFLite file are not what the QuantSpec says: "
            f"{', '.join(differing[:5])}"
        )
    notes = (f"litert-torch folded the normalisation before {folded} layers into their weights",) if folded else ()
    return len(spec.layers), notes


def _verify_fp16(model: Any) -> None:
    sizes: Counter[int] = Counter()
    for tensor in model.subgraphs[0].tensors:
        if len(tensor.shape) >= 2 and tflite.constant_of(model, tensor) is not None:
            sizes[int(tensor.type)] += math.prod(int(d) for d in tensor.shape)
    if sizes[_FLOAT16] < 0.8 * (sizes[_FLOAT32] + sizes[_FLOAT16]):
        raise ExportError(f"fp16 was asked for; {sizes[_FLOAT32]:,} weights are float32 and {sizes[_FLOAT16]:,} float16")
