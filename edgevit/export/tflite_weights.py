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

INT8, INT4 = 9, 17
_BITS = {INT8: 8, INT4: 4}
OFF_GRID = 1e-3
"""Of a step of the grid: a weight further from it than this was changed after it was rounded."""


@dataclass(frozen=True)
class StoredWeight:
    """A layer's weight as a file stores it. ``tensor`` is the flatbuffer's own object."""

    tensor: Any
    bits: int
    integers: NDArray[np.int32]
    scales: NDArray[np.float32]
    dequantized: bool


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


def store_integers(model: bytes, found: dict[str, MatrixOp], spec: QuantSpec) -> bytes:
    """The file with the integers and scales of every weight-only layer of ``spec`` put in place of the quantizer's own."""
    import numpy as np
    from ai_edge_quantizer.utils import tfl_flatbuffer_utils

    from edgevit.export.tflite import read_flatbuffer

    layers = [one for one in spec.layers if one.activations == "float"]
    if not layers:
        return model
    parsed = read_flatbuffer(model)
    for layer in layers:
        op = found[layer.name]
        stored = stored_weight(parsed, op)
        wanted = integers_in_file(layer, op)
        if stored is None or stored.bits != layer.weight_bits:
            raise ExportError(f"ai-edge-quantizer left {layer.name} without int{layer.weight_bits} weights")
        values = np.moveaxis(wanted.integers.reshape(_channels_first(op).shape), 0, _axis(op))
        parsed.buffers[stored.tensor.buffer].data = _pack(values.reshape(-1), layer.weight_bits)
        stored.tensor.quantization.scale = wanted.scales.reshape(-1).astype(np.float32)
    data = tfl_flatbuffer_utils.flatbuffer_utils.convert_object_to_bytearray(parsed)
    return bytes(data)


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
        if kind not in MATRIX_OPS or graph.tensors[int(one.outputs[0])].name.decode() != op.output:
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
        return StoredWeight(tensor, bits, first.reshape(len(first), -1), scales, before_kind == "DEQUANTIZE")
    return None


def difference(parsed: Any, layer: LayerQuant, op: MatrixOp) -> str:
    """What a weight-only layer of a written file has other than the QuantSpec says, or nothing."""
    import numpy as np

    stored, wanted = stored_weight(parsed, op), integers_in_file(layer, op)
    if stored is None or stored.bits != layer.weight_bits:
        return f"not int{layer.weight_bits}"
    if not stored.dequantized:
        return "its activations are integers too"
    if not np.array_equal(stored.integers, wanted.integers):
        return "other integers"
    return "" if np.array_equal(stored.scales, wanted.scales.reshape(-1)) else "other scales"


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
