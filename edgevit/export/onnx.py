"""ONNX files: the dynamo exporter's float graph made canonical, and a QuantSpec carried out in it.

The graph keeps torch's layer names on its nodes and weights, and nothing of the machine it was made on, so equal inputs give
equal bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from device_agents.wire import Preprocessing
from edgevit.errors import ExportError, MissingExtra
from edgevit.export.onnx_blocks import BLOCK_DOMAIN, uses_blocks
from edgevit.export.onnx_integers import MATRIX_OPS, IntegerWriter, import_onnx
from edgevit.export.trouble import explain_failure, quietly
from edgevit.quantspec import QuantSpec
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


def export_float(module: torch.nn.Module, preprocessing: Preprocessing, batch: int) -> bytes:
    """The module as float32 ONNX: ``input`` → ``logits`` (batch, classes), weights inside. The input is float32 (batch, 3,
    height, width), or uint8 (batch, height, width, 3) where the module takes pixel values as they are.

    Raises :class:`ExportError` where torch cannot export the module, :class:`MissingExtra` without onnx or onnxscript.
    """
    torch = import_torch()
    import_onnx()
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
        if layer is None and node.op_type in MATRIX_OPS and node.input[1] in weights:
            # A convolution that took in its BatchNorm lost its own note and kept the name of its weight.
            layer = node.input[1].removesuffix(".weight") if node.input[1].endswith(".weight") else None
            if layer is None and node.op_type == "MatMul":
                layer = bypassed.get(_digest(import_onnx().numpy_helper.to_array(weights[node.input[1]])))
        if layer and node.op_type in MATRIX_OPS:
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
    onnx = import_onnx()
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
    onnx = import_onnx()
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
    onnx = import_onnx()
    model = onnx.load_model_from_string(float_model)
    if spec.scheme == "fp16":
        return _to_fp16(model)
    writer = IntegerWriter(model)
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
    writer = IntegerWriter(import_onnx().load_model_from_string(float_model))
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


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:400] if lines else ''}"
