"""ONNX files: the dynamo exporter's float graph made canonical, and a QuantSpec written into it as integer operators.

The graph keeps torch's layer names on its nodes and weights, and nothing of the machine it was made on, so equal inputs give
equal bytes. Integers are written by this file, not by a quantization tool, so that what is in the file is what the QuantSpec
says: dynamic int8 as ``DynamicQuantizeLinear`` + ``MatMulInteger``, static int8 as Q/DQ pairs with float outputs behind linear
layers (the runtime fuses both; a float output costs nothing and rounds once less).
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from device_agents.wire import Preprocessing
from edgevit.errors import ExportError, MissingExtra
from edgevit.export.onnx_blocks import BLOCK_DOMAIN, uses_blocks, weight_only_nodes
from edgevit.export.trouble import explain_failure, quietly
from edgevit.quantspec import LayerQuant, QuantSpec, activation_grid, layer_integers
from edgevit.rewrite.pixels import takes_pixels
from edgevit.torchsetup import import_torch, silence_exporters

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

OPSET = 18
"""What the dynamo exporter writes whatever lower opset it is asked for; LayerNormalization needs 17."""
IR_VERSION = 10
"""The newest IR that onnxruntime 1.19, the last for Python 3.8, reads."""

INPUT, OUTPUT = "input", "logits"
_LAYER = re.compile(r"/([^/:]+): torch\.nn\.modules\.(?:linear\.Linear|conv\.Conv2d)/")
_MATRIX_OPS = ("MatMul", "Gemm", "Conv")


def _onnx() -> Any:
    try:
        import onnx
        import onnx.helper
        import onnx.numpy_helper
    except ModuleNotFoundError as e:
        raise MissingExtra("onnx", "build") from e
    return onnx


def export_float(module: torch.nn.Module, preprocessing: Preprocessing, batch: int) -> bytes:
    """The module as float32 ONNX: ``input`` → ``logits`` (batch, classes), weights inside. The input is float32 (batch, 3,
    height, width), or uint8 (batch, height, width, 3) where the module takes pixel values as they are.

    Raises :class:`ExportError` where torch cannot export the module, :class:`MissingExtra` without onnx or onnxscript.
    """
    torch = import_torch()
    _onnx()
    silence_exporters()
    example = torch.zeros(batch, 3, preprocessing.height, preprocessing.width)
    try:
        with quietly():
            program = torch.onnx.export(
                module, (example,), dynamo=True, opset_version=OPSET, input_names=[INPUT], output_names=[OUTPUT], verbose=False
            )
    except ModuleNotFoundError as e:
        raise MissingExtra(e.name or "onnxscript", "build") from e
    except Exception as e:
        raise ExportError(f"torch could not export the module to ONNX: {explain_failure(e, f'ONNX opset {OPSET}')}") from e
    if program is None:
        raise ExportError("torch.onnx.export returned nothing, expected an ONNX program")
    return _canonical(program.model_proto, takes_pixels(preprocessing), module)


def _canonical(model: Any, pixels: bool, module: torch.nn.Module) -> bytes:
    """Strip what differs between machines and runs; name matrix nodes and their weights after the layer they come from."""
    graph = model.graph
    weights = {i.name: i for i in graph.initializer}
    bypassed = _linear_weights(module)
    uses: Counter[str] = Counter()
    renamed: dict[str, str] = {}
    for node in graph.node:
        layer = layer_of(node)
        if layer is None and node.op_type in _MATRIX_OPS and node.input[1] in weights:
            # A convolution that took in its BatchNorm lost its own note and kept the name of its weight.
            layer = node.input[1].removesuffix(".weight") if node.input[1].endswith(".weight") else None
            if layer is None and node.op_type == "MatMul":
                layer = bypassed.get(_digest(_onnx().numpy_helper.to_array(weights[node.input[1]])))
        if layer and node.op_type in _MATRIX_OPS:
            uses[layer] += 1
            node.name = f"{layer}/{node.op_type}" if uses[layer] == 1 else f"{layer}/{node.op_type}/{uses[layer]}"
            if node.op_type == "MatMul" and node.input[1] in weights and f"{layer}.weight" not in weights:
                renamed.setdefault(node.input[1], f"{layer}.weight")
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        del node.metadata_props[:]
        node.doc_string = ""
    for initializer in graph.initializer:
        initializer.name = renamed.get(initializer.name, initializer.name)
        initializer.doc_string = ""
        del initializer.metadata_props[:]
    del graph.value_info[:]
    del graph.metadata_props[:], model.metadata_props[:]
    graph.doc_string = model.doc_string = ""
    graph.name = "model"
    for value in [*graph.input, *graph.output]:
        value.doc_string = ""
        del value.metadata_props[:]
    model.producer_name, model.producer_version, model.domain = "edgevit", "", ""
    _order_gelu(graph)
    if pixels:
        _take_pixels(graph)
    return _write(model)


def _order_gelu(graph: Any) -> None:
    """x · (½ · (1 + erf)) → (x · (1 + erf)) · ½ in every GELU: the order that ONNX Runtime's fusion knows, the same number,
    since halving is exact. Left as torch writes it, DeiT-Tiny's GELUs cost twice the time."""
    onnx = _onnx()
    made = {name: node for node in graph.node for name in node.output}
    constants = {i.name: i for i in graph.initializer}
    readers: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1

    def is_half(name: str) -> bool:
        return name in constants and bool((onnx.numpy_helper.to_array(constants[name]) == 0.5).all())

    for node in graph.node:
        if node.op_type != "Mul":
            continue
        for x, halved in (tuple(node.input), tuple(reversed(node.input))):
            inner = made.get(halved)
            if inner is None or inner.op_type != "Mul" or readers[halved] != 1:
                continue
            half = next((n for n in inner.input if is_half(n)), None)
            rest = next((n for n in inner.input if n != half), None)
            if half is None or rest not in made or made[rest].op_type != "Add":
                continue
            if any(made[n].op_type == "Erf" for n in made[rest].input if n in made):
                inner.input[:] = [x, rest]
                node.input[:] = [halved, half]
                break


def _take_pixels(graph: Any) -> None:
    """Let the graph take uint8 (N, H, W, 3) in place of float32 (N, 3, H, W) of the same values."""
    onnx = _onnx()
    batch, channels, height, width = (d.dim_value for d in graph.input[0].type.tensor_type.shape.dim)
    same: dict[str, str] = {}
    for node in list(graph.node):
        perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        if node.op_type == "Transpose" and node.input[0] == INPUT and perm == [0, 2, 3, 1]:
            # Pixels lie in that order already.
            same[node.output[0]] = "pixels"
            graph.node.remove(node)
    same[INPUT] = "image"
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = same.get(name, name)
    nodes = [onnx.helper.make_node("Cast", [INPUT], ["pixels"], name="pixels/Cast", to=onnx.TensorProto.FLOAT)]
    if any("image" in node.input for node in graph.node):
        nodes.append(onnx.helper.make_node("Transpose", ["pixels"], ["image"], name="pixels/Transpose", perm=[0, 3, 1, 2]))
    old = list(graph.node)
    del graph.node[:], graph.input[:]
    graph.node.extend([*nodes, *old])
    shape = [batch, height, width, channels]
    graph.input.append(onnx.helper.make_tensor_value_info(INPUT, onnx.TensorProto.UINT8, shape))


def _linear_weights(module: torch.nn.Module) -> dict[str, str]:
    """Digest of a linear layer's transposed weight → its path, for modules that multiply by the weight of a layer without
    calling it (BEiT, EVA: ``F.linear(x, self.qkv.weight, …)``); weights that several layers have are left out."""
    torch = import_torch()
    found: dict[str, str] = {}
    several = set()
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear):
            digest = _digest(layer.weight.detach().numpy().T)
            several |= {digest} & set(found)
            found[digest] = name
    return {digest: name for digest, name in found.items() if digest not in several}


def _digest(array: NDArray[Any]) -> str:
    import numpy as np

    return hashlib.sha256(f"{array.shape} {array.dtype}".encode() + np.ascontiguousarray(array).tobytes()).hexdigest()


def layer_of(node: Any) -> str | None:
    """The path of the Linear or Conv2d a freshly exported node comes from, by the exporter's own ``namespace`` note."""
    text = next((p.value for p in node.metadata_props if p.key == "namespace"), "")
    found = _LAYER.findall(text)
    return found[-1] if found else None


def _write(model: Any) -> bytes:
    if model.ir_version > IR_VERSION:
        model.ir_version = IR_VERSION
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def apply_spec(
    float_model: bytes, spec: QuantSpec, module: torch.nn.Module, pixels: NDArray[np.uint8], preprocessing: Preprocessing
) -> bytes:
    """The float file with ``spec`` carried out; ``pixels`` (N, height, width, 3) are looked at only where a static convolution
    took in its BatchNorm, so that its output is no longer the module's.

    Raises :class:`ExportError` where a layer of the spec is not in the graph.
    """
    if spec.scheme == "fp32":
        return float_model
    onnx = _onnx()
    model = onnx.load_model_from_string(float_model)
    if spec.scheme == "fp16":
        return _to_fp16(model)
    writer = _IntegerWriter(model)
    folded = writer.folded_convolutions(spec, module)
    if folded:
        from edgevit.export.onnx_calibrate import observe_outputs

        writer.output_ranges = observe_outputs(
            float_model, writer.outputs_of(folded), pixels[: spec.calibration_images], preprocessing
        )
    for layer in spec.layers:
        writer.quantize(layer)
    finished = writer.finish()
    if uses_blocks(spec):
        finished.opset_import.append(onnx.helper.make_opsetid(BLOCK_DOMAIN, 1))
    return _write(finished)


def float_weights(float_model: bytes, spec: QuantSpec) -> dict[str, NDArray[np.float32]]:
    """Layer of the spec → its (out, …) weight as the float file holds it, normalisation folded in where the exporter did so."""
    writer = _IntegerWriter(_onnx().load_model_from_string(float_model))
    return {layer.name: writer.weight_of(writer.find(layer)) for layer in spec.layers}


def _to_fp16(model: Any) -> bytes:
    try:
        from onnxruntime.transformers.float16 import convert_float_to_float16
    except ModuleNotFoundError as e:
        raise MissingExtra("onnxruntime", "build") from e
    try:
        converted = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=False)
    except (ValueError, RuntimeError, TypeError) as e:
        raise ExportError(f"the float16 converter failed: {_first_line(e)}") from e
    del converted.graph.value_info[:]
    return _write(converted)


class _IntegerWriter:
    """Rewrites matrix nodes of one graph into integer ones, in place."""

    def __init__(self, model: Any) -> None:
        self.onnx = _onnx()
        self.model = model
        self.weights = {i.name: i for i in model.graph.initializer}
        self.nodes = {n.name: n for n in model.graph.node}
        self.replaced: dict[str, list[Any]] = {}
        self.added: dict[str, Any] = {}
        self.output_ranges: dict[str, tuple[float, float]] = {}

    def find(self, layer: LayerQuant) -> Any:
        """The node that carries out ``layer``."""
        found = [n for op in _MATRIX_OPS if (n := self.nodes.get(f"{layer.name}/{op}")) is not None]
        if len(found) != 1:
            raise ExportError(f"the layer {layer.name} of the QuantSpec is {len(found)} times in the ONNX graph, expected once")
        return found[0]

    def folded_convolutions(self, spec: QuantSpec, module: Any) -> list[str]:
        """Convolutions of the spec whose weight in the graph is not the module's own."""
        import numpy as np

        found = [
            (one.name, self.weight_of(self.find(one)))
            for one in spec.layers
            if one.kind == "conv" and one.activations == "static"
        ]
        return [n for n, weight in found if not np.array_equal(weight, module.get_submodule(n).weight.detach().numpy())]

    def outputs_of(self, layers: list[str]) -> dict[str, str]:
        return {name: self.nodes[f"{name}/Conv"].output[0] for name in layers}

    def quantize(self, layer: LayerQuant) -> None:
        node = self.find(layer)
        if layer.activations == "float":
            self.replaced[node.name] = weight_only_nodes(self, layer, node)
            return
        if node.op_type == "Conv":
            self.replaced[node.name] = self._static_conv(layer, node)
            return
        weight, bias = self._matrix(node)
        quantized, scale = int8_weight(layer, weight)
        make = self._dynamic_linear if layer.activations == "dynamic" else self._static_linear
        # Stored (in, out) as MatMul wants it; scales stay per output channel, the last axis.
        out = node.output[0] if bias is None else f"{layer.name}.product"
        nodes = make(layer, node.input[0], quantized.T.copy(), scale, out)
        if bias is not None and layer.activations == "static":
            nodes += self._bias_apart(layer, out, bias, node.output[0])
        elif bias is not None:
            nodes.append(self._node("Add", [out, bias], [node.output[0]], f"{layer.name}/Bias"))
        elif layer.activations != "dynamic" or layer.rows:
            self._keep_bias_apart(layer, node)
        self.replaced[node.name] = nodes

    def _bias_apart(self, layer: LayerQuant, product: str, bias: str, result: str) -> list[Any]:
        """The bias added to a product (B, N) by way of (1, B, N), for the reason that :meth:`_keep_bias_apart` gives."""
        import numpy as np

        n, value = layer.name, self.onnx.numpy_helper.to_array(self.weights[bias])
        apart = self._constant(f"{n}.bias_3d", value.reshape(1, 1, -1))
        shape = self._constant(f"{n}.shape", np.array([-1, value.size], np.int64))
        return [
            self._node("Add", [product, apart], [f"{n}.sum_3d"], f"{n}/Bias"),
            self._node("Reshape", [f"{n}.sum_3d", shape], [result], f"{n}/Flatten"),
        ]

    def _keep_bias_apart(self, layer: LayerQuant, node: Any) -> None:
        """Give the bias added after a product of rank 3 or more that rank too: (N,) → (1, 1, N).

        onnxruntime 1.31 fuses MatMul and Add of a one-dimensional bias into a Gemm *before* it looks for quantized products,
        and then multiplies in float what it first dequantizes: DeiT-Tiny ran slower than in float32.
        """
        rank = self.ranks.get(node.output[0], 0)
        if rank < 3:
            return
        for add in self.model.graph.node:
            if add.op_type != "Add" or node.output[0] not in add.input:
                continue
            for i, name in enumerate(add.input):
                if name in self.weights and len(self.weights[name].dims) == 1:
                    bias = self.onnx.numpy_helper.to_array(self.weights[name])
                    add.input[i] = self._constant(f"{layer.name}.bias_{rank}d", bias.reshape((1,) * (rank - 1) + (-1,)))

    @functools.cached_property
    def ranks(self) -> dict[str, int]:
        """The number of dimensions of every tensor whose shape ONNX can infer."""
        inferred = self.onnx.shape_inference.infer_shapes(self.model)
        return {v.name: len(v.type.tensor_type.shape.dim) for v in inferred.graph.value_info}

    def finish(self) -> Any:
        graph = self.model.graph
        nodes = [new for old in graph.node for new in self.replaced.get(old.name, [old])]
        del graph.node[:]
        graph.node.extend(nodes)
        used = {name for n in nodes for name in n.input} | {o.name for o in graph.output}
        kept = [i for i in graph.initializer if i.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        graph.initializer.extend(v for k, v in self.added.items() if k in used)
        return self.model

    def _matrix(self, node: Any) -> tuple[NDArray[np.float32], str | None]:
        """(out, in) weight and the name of the bias of a MatMul or Gemm with a constant weight."""
        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2] else None
        return self.weight_of(node), bias

    def weight_of(self, node: Any) -> NDArray[np.float32]:
        """The constant (out, …) weight of a matrix node, whichever way the operator stores it."""
        if node.input[1] not in self.weights:
            raise ExportError(f"the weight of {node.name} is not a constant of the graph")
        weight: NDArray[np.float32] = self.onnx.numpy_helper.to_array(self.weights[node.input[1]])
        if node.op_type != "Gemm":
            return weight.T if node.op_type == "MatMul" else weight
        attributes = {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}
        if attributes.get("transA") or attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
            raise ExportError(f"{node.name} is a Gemm with {attributes}, expected a plain linear layer")
        return weight if attributes.get("transB") else weight.T

    def _dynamic_linear(
        self, layer: LayerQuant, x: str, weight: NDArray[np.int8], scale: NDArray[np.float32], out: str
    ) -> list[Any]:
        import numpy as np

        n = layer.name
        w = self._constant(f"{n}.weight_int8", weight)
        ws = self._constant(f"{n}.weight_scale", scale)
        wz = self._constant(f"{n}.weight_zero", np.zeros(len(scale), np.int8))
        before: list[Any] = []
        after: list[Any] = []
        if layer.rows:
            before, x, row = self._divided_rows(n, x)
            after = [self._node("Mul", [f"{n}.rows_product", row], [out], f"{n}/MultiplyRows")]
            out = f"{n}.rows_product"
        return [
            *before,
            self._node("DynamicQuantizeLinear", [x], [f"{n}.x_int8", f"{n}.x_scale", f"{n}.x_zero"], f"{n}/QuantizeInput"),
            self._node("MatMulInteger", [f"{n}.x_int8", w, f"{n}.x_zero", wz], [f"{n}.sum"], f"{n}/MatMulInteger"),
            self._node("Cast", [f"{n}.sum"], [f"{n}.sum_float"], f"{n}/Cast", to=self.onnx.TensorProto.FLOAT),
            self._node("Mul", [f"{n}.x_scale", ws], [f"{n}.scale"], f"{n}/Scale"),
            self._node("Mul", [f"{n}.sum_float", f"{n}.scale"], [out], f"{n}/Rescale"),
            *after,
        ]

    def _divided_rows(self, n: str, x: str) -> tuple[list[Any], str, str]:
        """Nodes that divide each row of ``x`` by its largest magnitude, and the names of the quotient and of the magnitudes."""
        import numpy as np

        last = self._constant(f"{n}.rows_axis", np.array([-1], np.int64))
        # A row of zeros stays one, and is not divided by zero.
        least = self._constant(f"{n}.rows_least", np.array(np.finfo(np.float32).tiny, np.float32))
        nodes = [
            self._node("Abs", [x], [f"{n}.rows_abs"], f"{n}/AbsRows"),
            self._node("ReduceMax", [f"{n}.rows_abs", last], [f"{n}.rows_max"], f"{n}/LargestOfRows", keepdims=1),
            self._node("Max", [f"{n}.rows_max", least], [f"{n}.rows"], f"{n}/Rows"),
            self._node("Div", [x, f"{n}.rows"], [f"{n}.rows_divided"], f"{n}/DivideRows"),
        ]
        return nodes, f"{n}.rows_divided", f"{n}.rows"

    def _static_linear(
        self, layer: LayerQuant, x: str, weight: NDArray[np.int8], scale: NDArray[np.float32], out: str
    ) -> list[Any]:
        n = layer.name
        nodes, x_dq, _ = self._q_dq(f"{n}.input", x, _range_of(layer, layer.input_range))
        w = self._dequantized_constant(f"{n}.weight", weight, scale, axis=1, nodes=nodes)
        return [*nodes, self._node("MatMul", [x_dq, w], [out], f"{n}/MatMul")]

    def _static_conv(self, layer: LayerQuant, node: Any) -> list[Any]:
        import numpy as np

        n = layer.name
        quantized, scale = int8_weight(layer, self.weight_of(node))
        nodes, x_dq, x_scale = self._q_dq(f"{n}.input", node.input[0], _range_of(layer, layer.input_range))
        inputs = [x_dq, self._dequantized_constant(f"{n}.weight", quantized, scale, axis=0, nodes=nodes)]
        if len(node.input) > 2 and node.input[2]:
            bias = self.onnx.numpy_helper.to_array(self.weights[node.input[2]]).astype(np.float64)
            bias_scale = (scale.astype(np.float64) * x_scale).astype(np.float32)
            grid = np.clip(np.rint(bias / bias_scale), -(2**31), 2**31 - 1).astype(np.int32)
            inputs.append(self._dequantized_constant(f"{n}.bias", grid, bias_scale, axis=0, nodes=nodes))
        conv = self.onnx.NodeProto()
        conv.CopyFrom(node)
        del conv.input[:], conv.output[:]
        conv.input.extend(inputs)
        conv.output.append(f"{n}.output_float")
        after, _out_dq, _ = self._q_dq(
            f"{n}.output", f"{n}.output_float", _range_of(layer, self.output_ranges.get(n, layer.output_range))
        )
        after[-1].output[0] = node.output[0]
        return [*nodes, conv, *after]

    def _q_dq(self, name: str, x: str, bounds: tuple[float, float]) -> tuple[list[Any], str, float]:
        import numpy as np

        scale, zero = activation_grid(*bounds)
        s = self._constant(f"{name}_scale", np.array(scale, np.float32))
        z = self._constant(f"{name}_zero", np.array(zero, np.uint8))
        q, dq = f"{name}_uint8", f"{name}_dequantized"
        nodes = [
            self._node("QuantizeLinear", [x, s, z], [q], f"{name}/Quantize"),
            self._node("DequantizeLinear", [q, s, z], [dq], f"{name}/Dequantize"),
        ]
        return nodes, dq, scale

    def _dequantized_constant(self, name: str, grid: Any, scale: NDArray[np.float32], axis: int, nodes: list[Any]) -> str:
        import numpy as np

        w = self._constant(f"{name}_int", grid)
        s = self._constant(f"{name}_scale", scale)
        z = self._constant(f"{name}_zero", np.zeros(len(scale), grid.dtype))
        out = f"{name}_dequantized"
        nodes.append(self._node("DequantizeLinear", [w, s, z], [out], f"{name}/Dequantize", axis=axis))
        return out

    def _constant(self, name: str, value: Any) -> str:
        self.added[name] = self.onnx.numpy_helper.from_array(value, name)
        return name

    def _node(self, op: str, inputs: list[str], outputs: list[str], name: str, **attributes: Any) -> Any:
        return self.onnx.helper.make_node(op, inputs, outputs, name=name, **attributes)


def int8_weight(layer: LayerQuant, weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A layer's integers in the shape of ``weight`` (out, …) and the scale of each output channel."""
    import numpy as np

    found = layer_integers(layer, weight)
    return found.integers.astype(np.int8).reshape(weight.shape), found.scales.reshape(-1)


def _range_of(layer: LayerQuant, bounds: tuple[float, float] | None) -> tuple[float, float]:
    if bounds is None:
        raise ExportError(f"the QuantSpec gives no activation range for the static layer {layer.name}")
    return bounds


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:400] if lines else ''}"
