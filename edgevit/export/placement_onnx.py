"""What ONNX Runtime made of a file: the graph it optimised, and the provider of each node, from its own profile of one run."""

from __future__ import annotations

import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from device_agents.wire import Placement
from edgevit.errors import ExportError, MissingExtra
from edgevit.export.placement import Product, Use, counted, peak_bytes, share_of

_INT8 = (
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "QLinearMatMul",
    "QGemm",
    "QLinearConv",
    "ConvInteger",
)
_PRODUCTS = (*_INT8, "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulNBits")
_CONVOLUTIONS = ("Conv", "FusedConv", "QLinearConv", "ConvInteger")
_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")
_BYTES = {"float": 4, "float16": 2, "double": 8, "int64": 8, "int32": 4, "uint8": 1, "int8": 1, "bool": 1}
_SUFFIX = "_kernel_time"


def onnx_placement(model: bytes) -> Placement:
    """See :func:`edgevit.export.placement.measure_placement`. Multiply-adds of attention operators are counted from the shapes
    of their inputs; those of recurrent ones are not counted."""
    try:
        import onnx
        import onnxruntime
    except ModuleNotFoundError as e:
        raise MissingExtra(e.name or "onnxruntime", "build") from e
    with tempfile.TemporaryDirectory(prefix="edgevit-placement-") as scratch:
        optimised = Path(scratch) / "optimised.onnx"
        events = _profiled_run(model, Path(scratch), optimised)
        graph = onnx.load(str(optimised), load_external_data=False).graph
    nodes = {node.name: node for node in graph.node}
    products = [product for event in events if (product := _product(event, nodes.get(event["node"]))) is not None]
    return Placement(
        runtime="onnxruntime",
        runtime_version=onnxruntime.__version__,
        macs=sum(p.macs for p in products),
        int8_share=share_of(products, 8),
        int4_share=share_of(products, 4),
        float_operators=counted(p.kind for p in products if p.bits == 32),
        nodes=counted(event["provider"] for event in events),
        outside={},
        partitions=1,
        leftover_pairs=leftover_pairs(graph),
        activation_bytes=_activation_bytes(graph, events),
    )


def _profiled_run(model: bytes, scratch: Path, optimised: Path) -> list[dict[str, Any]]:
    """One inference on zeros: an event for each node that ran, in order: its name, kind, provider, input and output shapes."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(scratch / "profile")
    options.optimized_model_filepath = str(optimised)
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        feed = session.get_inputs()[0]
        dtype = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(float16)": np.float16}[feed.type]
        session.run(None, {feed.name: np.zeros(feed.shape, dtype)})
        told = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    except Exception as e:
        raise ExportError(f"onnxruntime {onnxruntime.__version__} cannot run the file: {str(e)[:400]}") from e
    return [
        {
            "node": event["name"].removesuffix(_SUFFIX),
            "kind": event["args"]["op_name"],
            "provider": event["args"]["provider"],
            "inputs": [_shape(one) for one in event["args"].get("input_type_shape", ())],
            "outputs": [_shape(one) for one in event["args"].get("output_type_shape", ())],
        }
        for event in told
        if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX) and "op_name" in event.get("args", {})
    ]


def _shape(told: dict[str, list[int]]) -> tuple[str, tuple[int, ...]]:
    """``{"float": [1, 3]}`` → (dtype, shape)."""
    dtype, shape = next(iter(told.items()))
    return dtype, tuple(shape)


def _product(event: dict[str, Any], node: Any) -> Product | None:
    kind = event["kind"]
    shapes = [shape for _, shape in event["inputs"]]
    if not event["outputs"] or not shapes:
        return None
    out = math.prod(event["outputs"][0][1])
    attributes = {a.name: a.i for a in node.attribute} if node is not None else {}
    if kind in _CONVOLUTIONS:
        weight = shapes[3] if kind == "QLinearConv" else shapes[1]
        return Product(kind, out * math.prod(weight[1:]), 8 if kind in _INT8 else 32)
    if kind in _PRODUCTS:
        depth = shapes[0][-2] if attributes.get("transA") and len(shapes[0]) > 1 else shapes[0][-1]
        bits = attributes.get("bits", 4) if kind == "MatMulNBits" else 8 if kind in _INT8 else 32
        return Product(kind, out * depth, bits)
    if kind == "MultiHeadAttention" and len(shapes) > 1 and len(shapes[0]) == len(shapes[1]) == 3:
        batch, queries, width = shapes[0]
        return Product(kind, 2 * batch * queries * shapes[1][1] * width, 32)
    if kind == "Attention" and len(shapes[0]) == 3:
        batch, tokens, width = shapes[0]
        inner = shapes[1][-1]
        return Product(kind, batch * tokens * (width * inner + 2 * tokens * inner // 3), 32)
    return None


def leftover_pairs(graph: Any) -> int:
    """``DequantizeLinear`` nodes that read what a ``QuantizeLinear`` wrote: integers made and unmade with no integer operator
    between them."""
    made = {o for node in graph.node if node.op_type == "QuantizeLinear" for o in node.output}
    return sum(node.op_type == "DequantizeLinear" and node.input[0] in made for node in graph.node)


def _activation_bytes(graph: Any, events: Sequence[dict[str, Any]]) -> int:
    by_name: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        by_name[event["node"]].append(event)
    constants = {i.name for i in graph.initializer}
    uses = []
    for node in graph.node:
        told = by_name[node.name].pop(0)["outputs"] if by_name[node.name] else []
        names = [o for o in node.output if o]
        makes = {name: _bytes(*one) for name, one in zip(names, told, strict=False)}
        reads = tuple(name for name in node.input if name and name not in constants)
        uses.append(Use(reads, makes, node.op_type in _VIEWS))
    inputs = {v.name: _fed_bytes(v) for v in graph.input if v.name not in constants}
    return peak_bytes(uses, inputs, [o.name for o in graph.output])


def _fed_bytes(value: Any) -> int:
    tensor = value.type.tensor_type
    size = {2: 1, 3: 1, 10: 2}.get(tensor.elem_type, 4)
    return int(math.prod(d.dim_value for d in tensor.shape.dim)) * size


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _BYTES.get(dtype, 4)
