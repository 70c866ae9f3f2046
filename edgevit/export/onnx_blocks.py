"""Weight-only layers in ONNX: integers and scales in the file, arithmetic in float32.

int8 is written as ``Cast`` + ``Mul`` in front of the layer, not as ``DequantizeLinear``: onnxruntime computes both once when it
loads the file, while a ``DequantizeLinear`` in front of a MatMul makes 1.31 round the *activations* to int8 too (measured: 5e-3
of the largest output instead of 6e-7) and 1.19 dequantize again at every inference. int4 is ``com.microsoft::MatMulNBits``,
which keeps the weight small in memory as well and runs alike in 1.19 and 1.31. Its ``accuracy_level`` 4 would round activations
to int8 for no speed at the block sizes that keep accuracy (measured at blocks of 16 to 64), so it stays 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgevit.errors import ExportError
from edgevit.quantspec import LayerQuant, QuantSpec, WeightIntegers, layer_integers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BLOCK_DOMAIN = "com.microsoft"
BLOCK_SIZES = (16, 32, 64, 128, 256)
ACCURACY_LEVEL = 0
_UINT8, _INT8, _FLOAT, _FLOAT16 = 2, 3, 1, 10


def uses_blocks(spec: QuantSpec) -> bool:
    """Whether a file of this spec needs operators of :data:`BLOCK_DOMAIN`."""
    return any(in_blocks(one) for one in spec.layers)


def in_blocks(layer: LayerQuant) -> bool:
    return layer.activations == "float" and layer.weight_bits == 4


def weight_only_nodes(writer: Any, layer: LayerQuant, node: Any) -> list[Any]:
    """The nodes that stand in for ``node``. Raises :class:`ExportError` for a width or grouping no operator has."""
    integers = layer_integers(layer, writer.weight_of(node))
    if in_blocks(layer):
        return _block_nodes(writer, layer, node, integers)
    if layer.weight_bits != 8 or layer.group is not None or not layer.symmetric:
        raise ExportError(
            f"the ONNX exporter has no operator for int{layer.weight_bits} weights in groups of {layer.group}, at {layer.name}"
        )
    return _cast_nodes(writer, layer, node, integers)


def _cast_nodes(writer: Any, layer: LayerQuant, node: Any, found: WeightIntegers) -> list[Any]:
    import numpy as np

    n = layer.name
    shape = writer.weight_of(node).shape
    grid, scale = found.integers.astype(np.int8).reshape(shape), found.scales.reshape(-1, *[1] * (len(shape) - 1))
    if _stored_transposed(node):
        grid, scale = np.ascontiguousarray(grid.T), np.ascontiguousarray(scale.T)
    w, s = writer._constant(f"{n}.weight_int", grid), writer._constant(f"{n}.weight_scale", scale)
    same = type(node)()
    same.CopyFrom(node)
    same.input[1] = f"{n}.weight_dequantized"
    return [
        writer._node("Cast", [w], [f"{n}.weight_float"], f"{n}/Cast", to=_FLOAT),
        writer._node("Mul", [f"{n}.weight_float", s], [f"{n}.weight_dequantized"], f"{n}/Dequantize"),
        same,
    ]


def _stored_transposed(node: Any) -> bool:
    """Whether the node holds its (out, in) weight as (in, out)."""
    if node.op_type == "Gemm":
        return not any(a.name == "transB" and a.i for a in node.attribute)
    return bool(node.op_type == "MatMul")


def _block_nodes(writer: Any, layer: LayerQuant, node: Any, found: WeightIntegers) -> list[Any]:
    import numpy as np

    n = layer.name
    if node.op_type == "Conv":
        raise ExportError(f"onnxruntime has no int4 convolution, asked for at {n}")
    out, inputs = found.integers.shape
    block = block_size(layer, inputs)
    packed, scales, zeros = pack_blocks(layer, found, block)
    names = [node.input[0], writer._constant(f"{n}.weight_int4", packed)]
    nodes = []
    if np.array_equal(scales.astype(np.float16).astype(np.float32), scales):
        half = writer._constant(f"{n}.weight_scale", scales.astype(np.float16))
        nodes.append(writer._node("Cast", [half], [f"{n}.weight_scale_float"], f"{n}/CastScale", to=_FLOAT))
        names.append(f"{n}.weight_scale_float")
    else:
        names.append(writer._constant(f"{n}.weight_scale", scales))
    if zeros is not None:
        names.append(writer._constant(f"{n}.weight_zero", zeros))
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2] else None
    result = node.output[0] if bias is None else f"{n}.product"
    attributes = {"K": inputs, "N": out, "bits": 4, "block_size": block, "accuracy_level": ACCURACY_LEVEL}
    nodes.append(writer._node("MatMulNBits", names, [result], f"{n}/MatMulNBits", domain=BLOCK_DOMAIN, **attributes))
    if bias is not None:
        nodes.append(writer._node("Add", [result, bias], [node.output[0]], f"{n}/Bias"))
    return nodes


def block_size(layer: LayerQuant, inputs: int) -> int:
    """The block that carries a group; a whole channel's scale is repeated over blocks of the least size that holds it."""
    if layer.group is None:
        return next((b for b in BLOCK_SIZES if b >= inputs), BLOCK_SIZES[-1])
    if layer.group not in BLOCK_SIZES:
        raise ExportError(
            f"MatMulNBits has blocks of {', '.join(map(str, BLOCK_SIZES))}, {layer.name} has groups of {layer.group}"
        )
    return layer.group


def pack_blocks(
    layer: LayerQuant, found: WeightIntegers, block: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8] | None]:
    """MatMulNBits' own layout: (out, blocks, block / 2) with the first of two integers in the low half of a byte, scales
    (out · blocks,), and zero points two to a byte, (out · ⌈blocks / 2⌉,), or None where all of them are its default of 8."""
    import numpy as np

    out, inputs = found.integers.shape
    blocks = -(-inputs // block)
    zeros = found.zeros.repeat(blocks if found.group is None else 1, 1)
    scales = found.scales.repeat(blocks if found.group is None else 1, 1)
    shift = 8 if layer.symmetric else 0
    values = np.full((out, blocks * block), 8, np.uint8)
    values[:, :inputs] = found.integers + shift
    packed = pack_nibbles(values).reshape(out, blocks, block // 2)
    if layer.symmetric:
        return packed, scales.reshape(-1), None
    even = np.pad(zeros.astype(np.uint8), ((0, 0), (0, blocks % 2)))
    return packed, scales.reshape(-1), pack_nibbles(even).reshape(-1)


def pack_nibbles(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(…, 2n) numbers of 0 … 15 → (…, n) bytes, the first of each two in the low half."""
    return (values[..., 0::2] | (values[..., 1::2] << 4)).astype("uint8")


def difference(graph: Any, layer: LayerQuant, weight: NDArray[np.float32]) -> str:
    """What a weight-only layer of a written graph has other than the QuantSpec and its float (out, …) ``weight`` say, or
    nothing."""
    import numpy as np
    from onnx import helper, numpy_helper

    n = layer.name
    held = {i.name: i for i in graph.initializer}
    nodes = {one.name: one for one in graph.node}
    wanted = layer_integers(layer, weight)
    if not in_blocks(layer):
        grid, scale = held.get(f"{n}.weight_int"), held.get(f"{n}.weight_scale")
        if grid is None or scale is None or grid.data_type != _INT8 or f"{n}/Dequantize" not in nodes:
            return "not int8"
        carrier = next((one for one in graph.node if f"{n}.weight_dequantized" in one.input), None)
        if carrier is None:
            return "not int8"
        there = numpy_helper.to_array(grid)
        there = there.T if _stored_transposed(carrier) else there.reshape(len(there), -1)
        if not np.array_equal(there, wanted.integers):
            return "other integers"
        return "" if np.array_equal(numpy_helper.to_array(scale).reshape(-1), wanted.scales.reshape(-1)) else "other scales"
    node = nodes.get(f"{n}/MatMulNBits")
    if node is None or node.domain != BLOCK_DOMAIN or f"{n}.weight_int4" not in node.input:
        return "not int4"
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    out, inputs = wanted.integers.shape
    block = block_size(layer, inputs)
    asked = {"K": inputs, "N": out, "bits": 4, "block_size": block, "accuracy_level": ACCURACY_LEVEL}
    if attributes != asked:
        return f"MatMulNBits with {attributes}, expected {asked}"
    packed, scales, zeros = pack_blocks(layer, wanted, block)
    if not np.array_equal(numpy_helper.to_array(held[f"{n}.weight_int4"]), packed):
        return "other integers"
    if not np.array_equal(numpy_helper.to_array(held[f"{n}.weight_scale"]).astype(np.float32), scales):
        return "other scales"
    stored = f"{n}.weight_zero"
    if (zeros is None) != (stored not in node.input):
        return "other zero points"
    return "" if zeros is None or np.array_equal(numpy_helper.to_array(held[stored]), zeros) else "other zero points"
