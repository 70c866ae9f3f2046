"""What LiteRT made of a file: the operators its XNNPACK delegate took, told by the node that stands in their place."""

from __future__ import annotations

import math
from typing import Any

from device_agents.wire import Placement
from edgevit.errors import ExportError, MissingExtra
from edgevit.export import tflite
from edgevit.export.placement import Product, Use, counted, peak_bytes, share_of

_BITS_OF_TYPE = {9: 8, 17: 4, 3: 8}
_BYTES_OF_TYPE = {0: 4, 1: 2, 2: 4, 3: 1, 4: 8, 6: 1, 7: 2, 9: 1}
_VIEWS = ("RESHAPE", "SQUEEZE", "EXPAND_DIMS")
DELEGATE = "XNNPACK"
OWN = "LiteRT"


def tflite_placement(model: bytes) -> Placement:
    """See :func:`edgevit.export.placement.measure_placement`."""
    import importlib.metadata

    parsed = tflite.read_flatbuffer(model)
    graph = parsed.subgraphs[0]
    kinds = tflite.op_names(parsed)
    outside, pieces = _not_delegated(model, len(kinds), [int(o) for o in graph.outputs])
    products = [p for op, kind in zip(graph.operators, kinds, strict=True) if (p := _product(graph, op, kind)) is not None]
    taken = len(kinds) - len(outside)
    return Placement(
        runtime="litert",
        runtime_version=importlib.metadata.version("ai-edge-litert"),
        macs=sum(p.macs for p in products),
        int8_share=share_of(products, 8),
        int4_share=share_of(products, 4),
        float_operators=counted(p.kind for p in products if p.bits == 32),
        nodes={name: n for name, n in ((DELEGATE, taken), (OWN, len(outside))) if n},
        outside=counted(kinds[i] for i in sorted(outside)),
        partitions=pieces,
        leftover_pairs=None,
        activation_bytes=_activation_bytes(parsed, graph, kinds),
    )


def _not_delegated(model: bytes, operators: int, outputs: list[int]) -> tuple[set[int], int]:
    """(indices of the operators that LiteRT runs itself, number of pieces the delegate took).

    The interpreter keeps the file's operators in its list and appends a ``DELEGATE`` for each piece; which of them still run is
    told by walking back from the outputs, taking a delegate where one makes the tensor.
    """
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ModuleNotFoundError as e:
        raise MissingExtra("ai-edge-litert", "tflite") from e
    try:
        interpreter = Interpreter(model_content=model, num_threads=1)
        interpreter.allocate_tensors()
        details = list(interpreter._get_ops_details())
    except (RuntimeError, ValueError) as e:
        raise ExportError(f"LiteRT refuses the file: {str(e)[:400]}") from e
    makers: dict[int, int] = {}
    for i, one in enumerate(details):
        makers.update({int(o): i for o in one["outputs"]})  # A delegate comes last and replaces whom it stands for.
    own: set[int] = set()
    seen: set[int] = set()
    waiting = list(outputs)
    while waiting:
        maker = makers.get(waiting.pop())
        if maker is None or maker in seen:
            continue
        seen.add(maker)
        if maker < operators:
            own.add(maker)
        waiting += [int(i) for i in details[maker]["inputs"] if int(i) >= 0]
    return own, len(details) - operators


def _product(graph: Any, op: Any, kind: str) -> Product | None:
    if kind not in (*tflite.MATRIX_OPS, "BATCH_MATMUL", "TRANSPOSE_CONV"):
        return None
    out = math.prod(_dims(graph.tensors[int(op.outputs[0])]))
    first, second = (graph.tensors[int(i)] for i in op.inputs[:2])
    weight = _dims(second)
    if kind == "BATCH_MATMUL":
        depth = _dims(first)[-2 if getattr(op.builtinOptions, "adjX", False) else -1]
    elif kind == "DEPTHWISE_CONV_2D":
        depth = weight[1] * weight[2]
    else:
        depth = math.prod(weight[1:])
    return Product(kind, out * depth, _BITS_OF_TYPE.get(int(second.type), 32))


def _dims(tensor: Any) -> list[int]:
    return [int(d) for d in tensor.shape] if tensor.shape is not None else []


def _activation_bytes(parsed: Any, graph: Any, kinds: list[str]) -> int:
    def size(index: int) -> int:
        tensor = graph.tensors[index]
        return math.prod(_dims(tensor)) * _BYTES_OF_TYPE.get(int(tensor.type), 4)

    made = {int(o) for op in graph.operators for o in op.outputs}
    fed = {int(i) for i in graph.inputs}
    uses = []
    for op, kind in zip(graph.operators, kinds, strict=True):
        reads = tuple(str(int(i)) for i in op.inputs if int(i) in made or int(i) in fed)
        uses.append(Use(reads, {str(int(o)): size(int(o)) for o in op.outputs}, kind in _VIEWS))
    return peak_bytes(uses, {str(i): size(i) for i in fed}, [str(int(o)) for o in graph.outputs])
