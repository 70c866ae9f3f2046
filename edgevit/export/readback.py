"""What a written file says of itself, held against what the QuantSpec asked: exporters fall back without a word."""

from __future__ import annotations

from collections import Counter
from typing import Any

from device_agents.wire import TensorSpec
from edgevit.errors import ExportError, MissingExtra
from edgevit.export import ReadBack
from edgevit.export.onnx_blocks import BLOCK_DOMAIN, difference, in_blocks, uses_blocks
from edgevit.export.runtime import image_spec
from edgevit.quantspec import LayerQuant, QuantSpec, activation_grid

_FLOAT, _UINT8, _INT8, _INT32, _FLOAT16, _DOUBLE = 1, 2, 3, 6, 10, 11
_DTYPES = {_FLOAT: "float32", _UINT8: "uint8", _INT8: "int8", _FLOAT16: "float16"}


def read_onnx(data: bytes, float_model: bytes, spec: QuantSpec, ceiling: tuple[int, int]) -> ReadBack:
    """Parse an ONNX file again and verify it against ``spec``; integers are those of the weights in ``float_model``;
    ``ceiling`` is the (IR, opset) its profiles allow.

    Raises :class:`ExportError` for external data, another IR, opset, domain or dtype than asked, and for every layer whose
    integers are not those of the QuantSpec.
    """
    try:
        import onnx
    except ModuleNotFoundError as e:
        raise MissingExtra("onnx", "build") from e
    model = onnx.load_model_from_string(data)
    graph = model.graph
    _refuse_external_data(model)
    domains = {o.domain or "ai.onnx": o.version for o in model.opset_import}
    strange = sorted({n.domain for n in graph.node} - {"", "ai.onnx"})
    blocks = uses_blocks(spec)
    expected = {"ai.onnx", BLOCK_DOMAIN} if blocks else {"ai.onnx"}
    if strange != ([BLOCK_DOMAIN] if blocks else []) or set(domains) != expected or model.functions:
        raise ExportError(
            f"the ONNX file uses the domains {', '.join([*domains, *strange])}, expected {' and '.join(sorted(expected))} alone"
        )
    opset = domains["ai.onnx"]
    if model.ir_version > ceiling[0] or opset > ceiling[1]:
        raise ExportError(
            f"the ONNX file has IR {model.ir_version} and opset {opset}, "
            f"its profiles allow IR ≤ {ceiling[0]} and opset ≤ {ceiling[1]}",
            hint="build for profiles with a newer onnxruntime, or --format tflite",
        )
    operators = dict(sorted(Counter(n.op_type for n in graph.node).items()))
    _verify_float_width(graph, spec)
    count = _verify_integers_onnx(graph, spec, float_model, operators)
    return ReadBack(
        _io(graph.input, is_input=True), _io(graph.output, is_input=False), opset, model.ir_version, operators, count
    )


def _refuse_external_data(model: Any) -> None:
    for initializer in model.graph.initializer:
        if initializer.data_location == 1 or initializer.external_data:
            raise ExportError(f"the weight {initializer.name} lies outside the ONNX file; external data is refused")


def _io(values: Any, is_input: bool) -> TensorSpec:
    if len(values) != 1:
        raise ExportError(f"the ONNX file has {len(values)} {'inputs' if is_input else 'outputs'}, expected one")
    tensor = values[0].type.tensor_type
    shape = tuple(d.dim_value for d in tensor.shape.dim)
    dtype = _DTYPES.get(tensor.elem_type, "")
    if any(d < 1 for d in shape) or (dtype not in ("float32", "uint8") if is_input else dtype != "float32"):
        raise ExportError(
            f"{values[0].name} has shape {list(shape)} and ONNX type {tensor.elem_type}, expected fixed sizes and "
            f"{'float32 or uint8' if is_input else 'float32'}"
        )
    return image_spec(values[0].name, dtype, shape) if is_input else TensorSpec(values[0].name, dtype, shape)


def _verify_float_width(graph: Any, spec: QuantSpec) -> None:
    counts: Counter[int] = Counter()
    half_scales = {f"{one.name}.weight_scale" for one in spec.layers if in_blocks(one)}
    for initializer in graph.initializer:
        if initializer.name not in half_scales:
            counts[initializer.data_type] += max(1, _size(initializer.dims))
    if counts[_DOUBLE]:
        raise ExportError(f"the ONNX file holds {counts[_DOUBLE]} float64 numbers, expected none")
    if spec.float_bits == 16:
        if counts[_FLOAT] > 0.01 * counts[_FLOAT16]:
            raise ExportError(f"fp16 was asked for; {counts[_FLOAT]:,} numbers are float32 and {counts[_FLOAT16]:,} float16")
    elif counts[_FLOAT16]:
        raise ExportError(f"{spec.scheme} was asked for, but {counts[_FLOAT16]:,} numbers are float16")
    if not spec.layers and (counts[_INT8] or counts[_UINT8]):
        raise ExportError(f"{spec.scheme} was asked for, but the file holds int8 weights")


def _size(dims: Any) -> int:
    product = 1
    for d in dims:
        product *= int(d)
    return product


def _verify_integers_onnx(graph: Any, spec: QuantSpec, float_model: bytes, operators: dict[str, int]) -> int:
    import numpy as np
    from onnx import numpy_helper

    from edgevit.export.onnx import float_weights
    from edgevit.export.onnx_integers import int8_weight

    asked = float_weights(float_model, spec)
    held = {i.name: i for i in graph.initializer}
    nodes = {n.name: n for n in graph.node}
    differing = []
    for layer in spec.layers:
        if layer.activations == "float":
            found = difference(graph, layer, asked[layer.name])
            if found:
                differing.append(f"{layer.name} ({found})")
            continue
        name = f"{layer.name}.weight_int8" if layer.activations == "dynamic" else f"{layer.name}.weight_int"
        wanted, scale = int8_weight(layer, asked[layer.name])
        if layer.kind == "linear":
            wanted = wanted.T
        scales = held.get(f"{layer.name}.weight_scale")
        if name not in held or scales is None or held[name].data_type != _INT8:
            differing.append(f"{layer.name} (not int8)")
        elif not np.array_equal(numpy_helper.to_array(held[name]), wanted):
            differing.append(f"{layer.name} (other integers)")
        elif not np.array_equal(numpy_helper.to_array(scales), scale):
            differing.append(f"{layer.name} (other scales)")
        elif found := _activation_difference(nodes, held, layer):
            differing.append(f"{layer.name} ({found})")
    if differing:
        raise ExportError(
            f"{len(differing)} of {len(spec.layers)} layers in the ONNX file are not what the QuantSpec says: "
            f"{', '.join(differing[:5])}"
        )
    blocks = sum(in_blocks(one) for one in spec.layers)
    foreign = sum(n.domain == BLOCK_DOMAIN for n in graph.node)
    if foreign != blocks or operators.get("MatMulNBits", 0) != blocks:
        raise ExportError(f"{foreign} nodes of {BLOCK_DOMAIN} in the ONNX file, the QuantSpec asks for {blocks} MatMulNBits")
    dynamic = sum(one.activations == "dynamic" for one in spec.layers)
    if operators.get("MatMulInteger", 0) != dynamic or operators.get("DynamicQuantizeLinear", 0) != dynamic:
        raise ExportError(
            f"{operators.get('MatMulInteger', 0)} MatMulInteger nodes in the ONNX file, the QuantSpec asks for {dynamic}"
        )
    static = [one for one in spec.layers if one.activations == "static"]
    pairs = len(static) + sum(one.kind == "conv" for one in static)
    if operators.get("QuantizeLinear", 0) != pairs:
        raise ExportError(
            f"{operators.get('QuantizeLinear', 0)} QuantizeLinear nodes in the ONNX file, the QuantSpec asks for {pairs}"
        )
    return len(spec.layers)


def _activation_difference(nodes: dict[str, Any], held: dict[str, Any], layer: LayerQuant) -> str:
    """What the activations that a layer reads have other than the QuantSpec says, or nothing."""
    import numpy as np
    from onnx import numpy_helper

    n = layer.name
    if layer.activations == "static":
        quantize = nodes.get(f"{n}.input/Quantize")
        if quantize is None or layer.input_range is None or any(name not in held for name in quantize.input[1:]):
            return "no static activations"
        scale, zero = (numpy_helper.to_array(held[name]) for name in quantize.input[1:])
        wanted_scale, wanted_zero = activation_grid(*layer.input_range)
        same = np.float32(wanted_scale) == scale and wanted_zero == zero
        return "" if same else "other activation scales"
    quantize, divide, multiply = (nodes.get(f"{n}/{part}") for part in ("QuantizeInput", "DivideRows", "MultiplyRows"))
    if quantize is None:
        return "no dynamic activations"
    if not layer.rows:
        return "a range for each row" if divide is not None or multiply is not None else ""
    if divide is None or multiply is None or quantize.input[0] != divide.output[0] or multiply.input[1] != divide.input[1]:
        return "one range for all rows"
    return ""
