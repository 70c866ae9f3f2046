"""Running an artifact on this machine, fed as a device feeds it: uint8 pixels → the artifact's own input."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from device_agents.wire import Preprocessing, TensorSpec
from edgevit.errors import ExportError, MissingExtra

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

THREADS = 2


def image_spec(name: str, dtype: str, shape: tuple[int, ...]) -> TensorSpec:
    """The spec of an image input: uint8 pixels lie as (N, H, W, 3), normalised float ones as (N, 3, H, W)."""
    return TensorSpec(name, dtype, shape, "NHWC" if dtype == "uint8" else "NCHW")


def prepare_input(pixels: NDArray[np.uint8], preprocessing: Preprocessing, spec: TensorSpec) -> NDArray[Any]:
    """uint8 (N, H, W, 3) → what ``spec`` wants: pixels as they are for uint8, else (x / 255 − mean) / std in float32; then the
    layout, then the dtype. The same rule, in the same order, as on the device."""
    import numpy as np

    x: NDArray[Any] = pixels
    if spec.dtype != "uint8":
        mean, std = np.asarray(preprocessing.mean, np.float32), np.asarray(preprocessing.std, np.float32)
        x = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    if spec.layout == "NCHW":
        x = x.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(x.astype(spec.dtype))


def run_artifact(
    format_: str, model: bytes, pixels: NDArray[np.uint8], preprocessing: Preprocessing, spec: TensorSpec
) -> NDArray[np.float32]:
    """Outputs, float32 (N, classes), of the newest runtime installed here. The last batch is filled up by repeating its images.

    Raises :class:`ExportError` where the runtime refuses the file, :class:`MissingExtra` where it is not installed.
    """
    import numpy as np

    call = _tflite_call(model) if format_ == "tflite" else _onnx_call(model)
    batch = spec.shape[0]
    rows = []
    for start in range(0, len(pixels), batch):
        chunk = pixels[start : start + batch]
        full = np.concatenate([chunk] * (-(-batch // len(chunk))))[:batch]
        rows.append(call(prepare_input(full, preprocessing, spec)).reshape(batch, -1)[: len(chunk)])
    return np.concatenate(rows).astype(np.float32)


def _onnx_call(model: bytes) -> Callable[[NDArray[Any]], NDArray[Any]]:
    try:
        import onnxruntime
    except ModuleNotFoundError as e:
        raise MissingExtra("onnxruntime", "build") from e
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise ExportError(f"onnxruntime {onnxruntime.__version__} refuses the file: {str(e)[:400]}") from e
    name = session.get_inputs()[0].name

    def call(x: NDArray[Any]) -> NDArray[Any]:
        out: NDArray[Any] = session.run(None, {name: x})[0]
        return out

    return call


def _tflite_call(model: bytes) -> Callable[[NDArray[Any]], NDArray[Any]]:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ModuleNotFoundError as e:
        raise MissingExtra("ai-edge-litert", "tflite") from e
    try:
        interpreter = Interpreter(model_content=model, num_threads=THREADS)
        interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as e:
        raise ExportError(f"LiteRT refuses the file: {str(e)[:400]}") from e
    source, sink = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def call(x: NDArray[Any]) -> NDArray[Any]:
        interpreter.set_tensor(source, x)
        interpreter.invoke()
        out: NDArray[Any] = interpreter.get_tensor(sink).copy()
        return out

    return call


def runtime_of(format_: str) -> tuple[str, str]:
    """(runtime, version) that :func:`run_artifact` uses here."""
    import importlib.metadata

    runtime, package = ("litert", "ai-edge-litert") if format_ == "tflite" else ("onnxruntime", "onnxruntime")
    return runtime, importlib.metadata.version(package)
