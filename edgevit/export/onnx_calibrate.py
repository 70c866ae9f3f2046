"""Output ranges of nodes of a float ONNX graph, observed on calibration images in ONNX Runtime itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from device_agents.wire import Preprocessing
from edgevit.errors import ExportError, MissingExtra
from edgevit.export.runtime import THREADS, image_spec, prepare_input

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def observe_outputs(
    model: bytes, tensors: Mapping[str, str], pixels: NDArray[np.uint8], preprocessing: Preprocessing
) -> dict[str, tuple[float, float]]:
    """Layer → (smallest, largest) value of its tensor over ``pixels`` uint8 (N, height, width, 3).

    Raises :class:`ExportError` where there are fewer images than the file's batch.
    """
    try:
        import onnx
        import onnxruntime
    except ModuleNotFoundError as e:
        raise MissingExtra(e.name or "onnxruntime", "build") from e
    proto = onnx.load_model_from_string(model)
    for name in tensors.values():
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = THREADS, 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    source = session.get_inputs()[0]
    dtype = "uint8" if source.type == "tensor(uint8)" else "float32"
    spec = image_spec(source.name, dtype, tuple(int(d) for d in source.shape))
    batch = spec.shape[0]
    if len(pixels) < batch:
        raise ExportError(f"static int8 at batch {batch} needs at least {batch} calibration images, got {len(pixels)}")
    ranges = dict.fromkeys(tensors, (0.0, 0.0))
    for start in range(0, len(pixels) - batch + 1, batch):
        x = prepare_input(pixels[start : start + batch], preprocessing, spec)
        found = session.run(list(tensors.values()), {spec.name: x})
        for layer, value in zip(tensors, found, strict=True):
            low, high = ranges[layer]
            ranges[layer] = (min(low, float(value.min())), max(high, float(value.max())))
    return ranges
