"""A QuantSpec carried out in an ONNX graph: matrix nodes rewritten into integer ones.

Integers are written here, not by a quantization tool, so that what is in the file is what the QuantSpec says: dynamic int8 as
``DynamicQuantizeLinear`` + ``MatMulInteger``, static int8 as Q/DQ pairs with float outputs behind linear layers (the runtime
fuses both; a float output costs nothing and rounds once less).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from edgevit.errors import ExportError, MissingExtra
from edgevit.export.onnx_blocks import weight_only_nodes
from edgevit.quantspec import LayerQuant, QuantSpec, activation_grid, layer_integers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MATRIX_OPS = ("MatMul", "Gemm", "Conv")


def import_onnx() -> Any:
    try:
        import onnx
        import onnx.helper
        import onnx.numpy_helper
    except ModuleNotFoundError as e:
        raise MissingExtra("onnx", "build") from e
    return onnx


class IntegerWriter:
    """Rewrites matrix nodes of one graph into integer ones, in place."""

    def __init__(self, model: Any) -> None:
        self.onnx = import_onnx()
        self.model = model
        self.weights = {i.name: i for i in model.graph.initializer}
        self.nodes = {n.name: n for n in model.graph.node}
        self.replaced: dict[str, list[Any]] = {}
        self.added: dict[str, Any] = {}
        self.output_ranges: dict[str, tuple[float, float]] = {}

    def find(self, layer: LayerQuant) -> Any:
        """The node that carries out ``layer``."""
        found = [n for op in MATRIX_OPS if (n := self.nodes.get(f"{layer.name}/{op}")) is not None]
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
