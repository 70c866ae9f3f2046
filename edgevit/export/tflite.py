"""TFLite files: litert-torch's float32 conversion, and a QuantSpec carried out by ai-edge-quantizer on named operators only.

Operators are matched with the module's layers by the paths the converter keeps, so that a scheme reaches exactly the layers the
QuantSpec names and a layer the converter lost is an error. Where the converter changed a layer (folded a normalisation into it,
or an activation function) its activation ranges are observed again on the file's own tensors, by the QuantSpec's method.
"""

from __future__ import annotations

import functools
import hashlib
import re
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device_agents.wire import Preprocessing
from edgevit.errors import ExportError, MissingExtra
from edgevit.export.tflite_forms import convertible
from edgevit.export.tflite_weights import refuses, store_integers
from edgevit.export.trouble import explain_failure, quietly
from edgevit.quantspec import LayerQuant, QuantSpec
from edgevit.rewrite.pixels import takes_pixels
from edgevit.torchsetup import import_timm, import_torch, silence_exporters

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from edgevit.progress import Progress

MATRIX_OPS = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D")


_FIT_ROUNDS = 8
"""Of fitting factors of rows and columns in turn; one is exact where no entry is zero."""
_FIT_TOLERANCE = 1e-3
"""Of the logarithm of an entry: products of float32 lie far below, other weights far above."""


@dataclass(frozen=True)
class MatrixOp:
    """One operator with a constant weight: its kind, the quantizer's name for it, and the names of its tensors. ``fused``: an
    activation function is part of it, so that its output is not the layer's."""

    kind: str
    scope: str
    input: str
    output: str
    input_index: int
    output_index: int
    weight_name: str
    weight: Any
    weight_type: int
    fused: bool


def export_float(module: torch.nn.Module, preprocessing: Preprocessing, batch: int) -> bytes:
    """The module as float32 TFLite → (batch, classes), from float32 (batch, 3, height, width), or from uint8 (batch, height,
    width, 3) where the module takes pixel values as they are.

    Raises :class:`ExportError` where litert-torch cannot convert the module, :class:`MissingExtra` without it.
    """
    torch = import_torch()
    import_timm()
    silence_exporters()
    try:
        with quietly():
            import litert_torch
    except ModuleNotFoundError as e:
        raise MissingExtra(e.name or "litert-torch", "tflite") from e
    example = (torch.zeros(batch, 3, preprocessing.height, preprocessing.width),)
    if takes_pixels(preprocessing):
        module, example = _pixel_input()(module).eval(), (example[0].permute(0, 2, 3, 1).contiguous().to(torch.uint8),)
    with tempfile.TemporaryDirectory(prefix="edgevit-tflite-") as scratch:
        path = Path(scratch) / "model.tflite"
        try:
            with quietly(), convertible():
                litert_torch.convert(module, example).export(str(path))
        except Exception as e:
            raise ExportError(f"litert-torch could not convert the module: {explain_failure(e, 'TFLite')}") from e
        return path.read_bytes()


def apply_spec(
    float_model: bytes,
    spec: QuantSpec,
    module: torch.nn.Module,
    pixels: NDArray[np.uint8],
    preprocessing: Preprocessing,
    on_progress: Progress,
) -> bytes:
    """The float file with ``spec`` carried out; ``pixels`` (N, height, width, 3) are looked at for static layers only.

    Raises :class:`ExportError` where a layer of the spec is not in the file.
    """
    if spec.scheme == "fp32":
        return float_model
    try:
        from ai_edge_quantizer import qtyping, quantizer
    except ModuleNotFoundError as e:
        raise MissingExtra("ai-edge-quantizer", "tflite") from e
    tool = quantizer.Quantizer(bytearray(float_model))
    names = qtyping.TFLOperationName
    ranges: dict[str, Any] | None = None
    found: dict[str, MatrixOp] = {}
    if spec.scheme == "fp16":
        config = qtyping.OpQuantizationConfig(
            weight_tensor_config=qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT),
            compute_precision=qtyping.ComputePrecision.FLOAT,
            explicit_dequantize=True,
        )
        for kind in MATRIX_OPS:
            tool.update_quantization_recipe(".*", names[kind], config, quantizer.AlgorithmName.FLOAT_CASTING)
    else:
        found = match_layers(float_model, spec, module)
        _configure_integers(tool, names, spec, found)
        if any(layer.activations == "static" for layer in spec.layers):
            from edgevit.export.tflite_calibrate import ranges_of_tensors

            ranges = ranges_of_tensors(float_model, found, spec, module, pixels, preprocessing, on_progress)
    try:
        with quietly():
            result = tool.quantize(ranges, enable_progress_bar=False, enable_progress_report=False).quantized_model
    except (ValueError, RuntimeError, KeyError, NotImplementedError, TypeError) as e:
        raise ExportError(f"ai-edge-quantizer failed on {spec.scheme}: {str(e)[:400]}") from e
    if result is None:
        raise ExportError(f"ai-edge-quantizer returned no model for {spec.scheme}")
    return store_integers(bytes(result), float_model, found, spec)


def _configure_integers(tool: Any, names: Any, spec: QuantSpec, found: dict[str, MatrixOp]) -> None:
    """Name each operator of the spec to the tool, by itself; what is not named stays float."""
    for layer in spec.layers:
        op = found[layer.name]
        scope = f"^{re.escape(op.scope)}$"
        if layer.rows:
            raise ExportError(f"the TFLite exporter divides no rows of {layer.name}: LiteRT takes a range for each by itself")
        if layer.activations == "dynamic":
            tool.add_dynamic_config(scope, names[op.kind], layer.weight_bits)
        elif layer.activations == "static":
            tool.add_static_config(scope, names[op.kind], 8, layer.weight_bits)
        elif not refuses(layer):
            tool.add_weight_only_config(scope, names[op.kind], layer.weight_bits)
        else:
            raise ExportError(f"the TFLite exporter cannot carry out {layer.name}: {refuses(layer)}")


def match_layers(model: bytes, spec: QuantSpec, module: torch.nn.Module) -> dict[str, MatrixOp]:
    """Layer of the spec → the operator of the float file ``model`` that carries it out, by the path the converter left in the
    name of the weight, else by the weight's bytes, else by its values but for factors of its inputs and outputs, which the
    converter moves in. Raises :class:`ExportError` naming those not found."""
    by_path: dict[str, list[MatrixOp]] = defaultdict(list)
    by_weight: dict[str, list[MatrixOp]] = defaultdict(list)
    ops = matrix_ops(model)
    for op in ops:
        for path in {part for part in op.weight_name.split(";") if part}:
            by_path[path].append(op)
        by_weight[_digest(op.weight)].append(op)
    found: dict[str, MatrixOp] = {}
    lost: list[LayerQuant] = []
    for layer in spec.layers:
        here = by_path.get(_converter_path(module, layer.name), ())
        if len(here) != 1:
            here = by_path.get(_converter_path(_pixel_input()(module), f"model.{layer.name}"), ())
        if len(here) != 1:
            here = by_weight.get(_digest(weight_as_stored(module, layer)), ())
        if len(here) == 1:
            found[layer.name] = here[0]
        else:
            lost.append(layer)
    taken = {id(op) for op in found.values()}
    for layer in list(lost):
        stored = weight_as_stored(module, layer)
        matches = [op for op in ops if id(op) not in taken and is_rescaled(op.weight, stored, layer.depthwise)]
        if len(matches) == 1:
            found[layer.name] = matches[0]
            lost.remove(layer)
    if lost:
        raise ExportError(
            f"{len(lost)} of {len(spec.layers)} layers of the QuantSpec have no operator in the TFLite file: "
            f"{', '.join(layer.name for layer in lost[:5])}"
        )
    return found


def is_rescaled(changed: NDArray[np.float32], weight: NDArray[np.float32], depthwise: bool) -> bool:
    """Whether ``changed`` is ``weight`` (both as the file stores them) times a factor for each output and one for each input
    channel, zeros aside. Another layer's weight never is, unless it is too small to tell."""
    import numpy as np

    if changed.shape != weight.shape:
        return False
    # (outputs, places, inputs); the outputs of a depthwise convolution have no inputs of their own.
    first, second = (
        (a.reshape(-1, a.shape[-1]).T[:, :, None] if depthwise and a.shape[0] == 1 else a.reshape(len(a), -1, a.shape[-1]))
        for a in (changed.astype(np.float64), weight.astype(np.float64))
    )
    mask = second != 0
    if mask.sum() <= 2 * (first.shape[0] + first.shape[2]) or not np.array_equal(mask, first != 0):
        return False
    ratio = np.log(np.abs(np.where(mask, first, 1)) / np.abs(np.where(mask, second, 1)))
    for _ in range(_FIT_ROUNDS):
        for axes in ((1, 2), (0, 1)):
            ratio -= np.where(mask, ratio, 0).sum(axes, keepdims=True) / np.maximum(mask.sum(axes, keepdims=True), 1)
    return bool(np.abs(np.where(mask, ratio, 0)).max() < _FIT_TOLERANCE)


@functools.cache
def _pixel_input() -> Any:
    import torch

    class PixelInput(torch.nn.Module):  # type: ignore[misc]
        """uint8 (N, H, W, 3) → what ``model`` makes of the same values as float32 (N, 3, H, W)."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.model(x.to(torch.float32).permute(0, 3, 1, 2))
            return result

    return PixelInput


def _converter_path(module: torch.nn.Module, layer: str) -> str:
    """``blocks.0.attn`` as litert-torch writes it: the class of every module on the way, each with its attribute behind it."""
    kind = type(module)
    parts = [f"{kind.__module__}.{kind.__qualname__}"]
    here = module
    for name in layer.split("."):
        here = here.get_submodule(name)
        kind = type(here)
        parts.append(f"{kind.__module__}.{kind.__qualname__}_{name}")
    return "/".join(parts)


def weight_as_stored(module: torch.nn.Module, layer: LayerQuant) -> NDArray[np.float32]:
    """A layer's weight in TFLite's order: (out, in), or (out, h, w, in), or (1, h, w, out) for depthwise convolutions."""
    weight = module.get_submodule(layer.name).weight
    value: NDArray[np.float32] = reorder(weight.detach().numpy(), layer)
    return value


def reorder(value: Any, layer: LayerQuant) -> Any:
    """torch's axis order → TFLite's, for weights and for their integers alike."""
    import numpy as np

    if layer.kind == "conv":
        value = value.transpose((1, 2, 3, 0) if layer.depthwise and value.shape[1] == 1 else (0, 2, 3, 1))
    return np.ascontiguousarray(value)


def _digest(array: Any) -> str:
    return hashlib.sha256(f"{array.shape} {array.dtype}".encode() + array.tobytes()).hexdigest()


def read_flatbuffer(model: bytes) -> Any:
    """The parsed TFLite model object. Raises :class:`ExportError` where it does not parse."""
    try:
        from ai_edge_quantizer.utils import tfl_flatbuffer_utils
    except ModuleNotFoundError as e:
        raise MissingExtra("ai-edge-quantizer", "tflite") from e
    try:
        return tfl_flatbuffer_utils.read_model(memoryview(model))
    except (ValueError, IndexError, TypeError, AttributeError, RuntimeError) as e:
        raise ExportError(f"the TFLite file does not parse: {str(e)[:200]}") from e


def op_names(model: Any) -> list[str]:
    """Operator names of the only subgraph, in order."""
    from ai_edge_quantizer import qtyping

    by_code = {v: k for k, v in vars(qtyping.BuiltinOperator).items() if isinstance(v, int)}
    return [by_code[model.operatorCodes[op.opcodeIndex].builtinCode] for op in model.subgraphs[0].operators]


def matrix_ops(data: bytes) -> list[MatrixOp]:
    """Every FULLY_CONNECTED, CONV_2D and DEPTHWISE_CONV_2D with a constant weight, in order."""
    from ai_edge_quantizer.utils import tfl_flatbuffer_utils

    model = read_flatbuffer(data)
    graph = model.subgraphs[0]
    found = []
    for op, kind in zip(graph.operators, op_names(model), strict=True):
        if kind not in MATRIX_OPS:
            continue
        x, weight, _, out = tfl_flatbuffer_utils.parse_fc_bmm_conv_tensors(op, graph.tensors)
        value = constant_of(model, weight)
        if value is not None:
            scope = tfl_flatbuffer_utils.get_op_scope(op, graph.tensors)
            names = (x.name.decode(), out.name.decode())
            places = (int(op.inputs[0]), int(op.outputs[0]))
            fused = bool(getattr(op.builtinOptions, "fusedActivationFunction", 0))
            found.append(MatrixOp(kind, scope, *names, *places, weight.name.decode(), value, int(weight.type), fused))
    return found


def constant_of(model: Any, tensor: Any) -> Any:
    """A tensor's constant value in its own dtype and shape, or None where it is computed."""
    from ai_edge_quantizer.utils import tfl_flatbuffer_utils

    return tfl_flatbuffer_utils.get_tensor_data(tensor, model.buffers)
