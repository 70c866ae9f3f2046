"""The integers of TFLite files: written and read as the QuantSpec defines them, whatever the quantizer chose by itself.

A weight-only layer keeps its operator in float and reads its weight through a ``DEQUANTIZE`` of the stored integers, which
LiteRT carries out once, when it loads the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgevit.errors import ExportError
from edgevit.quantspec import LayerQuant, QuantSpec, WeightIntegers, layer_integers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgevit.export.tflite import MatrixOp

INT32, INT8, INT4 = 2, 9, 17
_BITS = {INT8: 8, INT4: 4}
_QUANTIZED = "_quantized"
"""What ai-edge-quantizer appends to the name of a tensor that it splits into a float and an integer one."""

OFF_GRID = 1e-3
"""Of a step of the grid: a weight further from it than this was changed after it was rounded."""


@dataclass(frozen=True)
class StoredWeight:
    """A layer's weight as a file stores it. ``tensor`` and ``bias`` (None where there is none) are the flatbuffer's own;
    ``input_scale`` is 0 where activations are float."""

    tensor: Any
    bits: int
    integers: NDArray[np.int32]
    scales: NDArray[np.float32]
    dequantized: bool
    input_scale: float
    input_zero: int
    input_type: int
    bias: Any


def refuses(layer: LayerQuant) -> str:
    """Why a TFLite file cannot carry out a weight-only layer, or nothing."""
    if layer.activations != "float" or layer.weight_bits == 32:
        return ""
    if layer.group is not None:
        return (
            f"LiteRT has no float kernel for weights in groups of {layer.group}; set group: null, as in the recipe int4-channel"
        )
    if not layer.symmetric:
        return "LiteRT has no float kernel for integer weights with zero points"
    return "" if layer.weight_bits in _BITS.values() else f"LiteRT has no kernel for int{layer.weight_bits} weights"


def store_integers(model: bytes, float_model: bytes, found: dict[str, MatrixOp], spec: QuantSpec) -> bytes:
    """The file with the integers and scales of every layer of ``spec`` put in place of the quantizer's own, and the biases of
    static layers on the grid that goes with them. Weights come as they are in ``float_model``."""
    import numpy as np
    from ai_edge_quantizer.utils import tfl_flatbuffer_utils

    from edgevit.export.tflite import read_flatbuffer

    if not spec.layers:
        return model
    parsed = read_flatbuffer(model)
    biases = float_biases(float_model)
    for layer in spec.layers:
        op = found[layer.name]
        stored = stored_weight(parsed, op)
        wanted = integers_in_file(layer, op)
        if stored is None or stored.bits != layer.weight_bits:
            raise ExportError(f"ai-edge-quantizer left {layer.name} without int{layer.weight_bits} weights")
        values = np.moveaxis(wanted.integers.reshape(_channels_first(op).shape), 0, _axis(op))
        _replace(parsed, stored.tensor, _pack(values.reshape(-1), layer.weight_bits))
        stored.tensor.quantization.scale = wanted.scales.reshape(-1).astype(np.float32)
        if layer.activations == "static" and stored.bias is not None:
            grid, scales = bias_grid(biases[op.output], stored.input_scale, wanted.scales)
            _replace(parsed, stored.bias, grid.view(np.uint8))
            stored.bias.quantization.scale = scales
    data = tfl_flatbuffer_utils.flatbuffer_utils.convert_object_to_bytearray(parsed)
    return bytes(data)


def bias_grid(
    bias: NDArray[np.float32], input_scale: float, weight_scales: NDArray[np.float32]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """A bias (out,) as int32 and its scales, each that of the input × that of the weight, as the integer sums have them."""
    import numpy as np

    scales = (np.float64(input_scale) * weight_scales.reshape(-1).astype(np.float64)).astype(np.float32)
    grid = np.clip(np.rint(bias.astype(np.float64) / scales), -(2**31), 2**31 - 1)
    return grid.astype(np.int32), scales


def float_biases(float_model: bytes) -> dict[str, NDArray[np.float32]]:
    """Name of a matrix operator's output → its bias, of those that have one."""
    from edgevit.export.tflite import MATRIX_OPS, constant_of, op_names, read_flatbuffer

    parsed = read_flatbuffer(float_model)
    tensors = parsed.subgraphs[0].tensors
    found = {}
    for one, kind in zip(parsed.subgraphs[0].operators, op_names(parsed), strict=True):
        if kind in MATRIX_OPS and len(one.inputs) > 2 and int(one.inputs[2]) >= 0:
            value = constant_of(parsed, tensors[int(one.inputs[2])])
            if value is not None:
                found[tensors[int(one.outputs[0])].name.decode()] = value
    return found


def _replace(parsed: Any, tensor: Any, data: NDArray[np.uint8]) -> None:
    """Give ``tensor`` the constant ``data``; a buffer that others share stays theirs."""
    import copy

    shared = sum(t.buffer == tensor.buffer for t in parsed.subgraphs[0].tensors) > 1
    if shared:
        parsed.buffers.append(copy.copy(parsed.buffers[tensor.buffer]))
        tensor.buffer = len(parsed.buffers) - 1
    parsed.buffers[tensor.buffer].data = data


def integers_in_file(layer: LayerQuant, op: MatrixOp) -> WeightIntegers:
    """The integers of a layer for the weight the float file holds, (out, …) with the axes after the first flattened.

    Where the converter moved a factor into the weight it no longer lies on the layer's own grid, and is rounded to nearest.
    """
    from dataclasses import replace

    import numpy as np

    weight = _channels_first(op)
    flat = weight.reshape(len(weight), -1)
    found = layer_integers(layer, flat)
    if layer.scales is None or float((np.abs(found.dequantized() - flat) / found.scales).max()) <= OFF_GRID:
        return found
    top = 2 ** (layer.weight_bits - 1) - 1
    largest = np.abs(flat).max(axis=1, keepdims=True)
    scales = np.where(largest > 0, largest / np.float32(top), np.float32(1)).astype(np.float32)
    return layer_integers(replace(layer, scales=scales, zeros=np.zeros(scales.shape, np.int32)), flat)


def stored_weight(parsed: Any, op: MatrixOp) -> StoredWeight | None:
    """The stored integers of the operator that gives ``op``'s output in another file made from the same one, or None where
    its weight is float."""
    import numpy as np

    from edgevit.export.tflite import MATRIX_OPS, op_names

    graph = parsed.subgraphs[0]
    names = op_names(parsed)
    made = {int(o): (one, kind) for one, kind in zip(graph.operators, names, strict=True) for o in one.outputs}
    for one, kind in zip(graph.operators, names, strict=True):
        out = graph.tensors[int(one.outputs[0])].name.decode()
        if kind not in MATRIX_OPS or out.removesuffix(_QUANTIZED) != op.output:
            continue
        index = int(one.inputs[1])
        before, before_kind = made.get(index, (None, ""))
        tensor = graph.tensors[int(before.inputs[0]) if before is not None and before_kind == "DEQUANTIZE" else index]
        bits = _BITS.get(int(tensor.type))
        data = parsed.buffers[tensor.buffer].data
        if bits is None or data is None or tensor.quantization is None or tensor.quantization.scale is None:
            return None
        integers = _unpack(np.asarray(data, np.uint8), bits, int(np.prod(tensor.shape)))
        first = np.moveaxis(integers.reshape([int(d) for d in tensor.shape]), _axis(op), 0)
        if np.any(np.asarray(tensor.quantization.zeroPoint)):
            raise ExportError(f"{op.weight_name} has zero points in the TFLite file, expected none")
        scales = np.asarray(tensor.quantization.scale, np.float32)
        x = graph.tensors[int(one.inputs[0])]
        known = x.quantization is not None and x.quantization.scale is not None
        input_scale = float(x.quantization.scale[0]) if known and int(x.type) == INT8 else 0.0
        input_zero = int(x.quantization.zeroPoint[0]) if input_scale else 0
        bias = graph.tensors[int(one.inputs[2])] if len(one.inputs) > 2 and int(one.inputs[2]) >= 0 else None
        dequantized = before_kind == "DEQUANTIZE"
        integers = first.reshape(len(first), -1)
        return StoredWeight(tensor, bits, integers, scales, dequantized, input_scale, input_zero, int(x.type), bias)
    return None


def difference(
    parsed: Any,
    layer: LayerQuant,
    op: MatrixOp,
    bias: NDArray[np.float32] | None = None,
    input_range: tuple[float, float] | None = None,
) -> str:
    """What a layer of a written file has other than the QuantSpec says, or nothing. ``bias`` is the float file's;
    ``input_range`` that of the tensor a static layer reads, None where it was observed on the file."""
    import numpy as np

    stored, wanted = stored_weight(parsed, op), integers_in_file(layer, op)
    if stored is None or stored.bits != layer.weight_bits:
        return f"not int{layer.weight_bits}"
    if stored.dequantized != (layer.activations == "float"):
        return "its activations are integers too" if layer.activations == "float" else "computed in float"
    if (stored.input_type == INT8) != (layer.activations == "static"):
        return "static activations" if stored.input_type == INT8 else "float activations"
    if not np.array_equal(stored.integers, wanted.integers):
        return "other integers"
    if not np.array_equal(stored.scales, wanted.scales.reshape(-1)):
        return "other scales"
    if input_range is not None and not _is_grid_of(stored, input_range):
        return "other activation scales"
    if layer.activations == "static" and bias is not None:
        return _bias_difference(parsed, stored, wanted, bias)
    return ""


def _is_grid_of(stored: StoredWeight, bounds: tuple[float, float]) -> bool:
    """Whether the input's grid is that of ``bounds``, shifted by 128; the quantizer computes it in float32, where a zero point
    half way between two integers may become either."""
    low, high = min(bounds[0], 0.0), max(bounds[1], 0.0)
    if not high > low:
        return True
    scale = (high - low) / 255
    return abs(stored.input_scale - scale) <= 1e-5 * scale and abs(-low / scale - (stored.input_zero + 128)) <= 0.501


def _bias_difference(parsed: Any, stored: StoredWeight, wanted: WeightIntegers, bias: NDArray[np.float32]) -> str:
    import numpy as np

    if stored.bias is None or int(stored.bias.type) != INT32:
        return "its bias is not int32"
    grid, scales = bias_grid(bias, stored.input_scale, wanted.scales)
    held = np.ascontiguousarray(np.asarray(parsed.buffers[stored.bias.buffer].data, np.uint8)).view(np.int32)
    if not np.array_equal(np.asarray(stored.bias.quantization.scale, np.float32), scales):
        return "other bias scales"
    return "" if np.array_equal(held, grid) else "other bias integers"


def _axis(op: MatrixOp) -> int:
    return op.weight.ndim - 1 if op.kind == "DEPTHWISE_CONV_2D" else 0


def _channels_first(op: MatrixOp) -> NDArray[np.float32]:
    import numpy as np

    moved: NDArray[np.float32] = np.moveaxis(op.weight, _axis(op), 0)
    return moved


def _pack(values: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """Signed integers → bytes; of two 4-bit ones the first lies in the low half."""
    import numpy as np

    if bits == 8:
        return values.astype(np.int8).view(np.uint8)
    low = np.pad(values & 15, (0, len(values) % 2)).astype(np.uint8)
    return (low[0::2] | (low[1::2] << 4)).astype(np.uint8)


def _unpack(data: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int32]:
    import numpy as np

    if bits == 8:
        return data.view(np.int8)[:count].astype(np.int32)
    halves = np.stack([data & 15, data >> 4], 1).reshape(-1)[:count].astype(np.int32)
    return np.where(halves > 7, halves - 16, halves)
