"""Activation ranges on the tensors a TFLite file really has, since its converter moves factors between layers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from device_agents.wire import Preprocessing
from edgevit.compress.calibrate import Watch, choose_ranges, rows_to_keep
from edgevit.errors import ExportError, MissingExtra
from edgevit.export.runtime import THREADS, image_spec, prepare_input
from edgevit.export.tflite import MatrixOp, weight_as_stored
from edgevit.progress import Progress
from edgevit.quantspec import LayerQuant, QuantSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


def ranges_of_tensors(
    model: bytes,
    found: Mapping[str, MatrixOp],
    spec: QuantSpec,
    module: torch.nn.Module,
    pixels: NDArray[np.uint8],
    preprocessing: Preprocessing,
    on_progress: Progress,
) -> dict[str, Any]:
    """Tensor name → {"min", "max"} of inputs and outputs of the static layers in ``found``: the QuantSpec's own, or observed
    on the file over ``pixels`` (N, height, width, 3) where the converter changed the layer. Tensors that several operators
    share take the widest of their ranges, which clips nothing."""
    import numpy as np

    static = [one for one in spec.layers if one.activations == "static"]
    changed = [found[n] for n in changed_layers(found, static, module)]
    observed = _observe(model, changed, spec, pixels, preprocessing, on_progress) if changed else {}
    ranges: dict[str, Any] = {}
    for one in static:
        op = found[one.name]
        pair = observed.get(op.scope, (one.input_range, one.output_range))
        for tensor, bounds in zip((op.input, op.output), pair, strict=True):
            if bounds is None:
                raise ExportError(f"the QuantSpec gives no activation range for the static layer {one.name}")
            low, high = min(bounds[0], 0.0), max(bounds[1], 0.0)
            if tensor in ranges:
                low, high = min(low, float(ranges[tensor]["min"].min())), max(high, float(ranges[tensor]["max"].max()))
            ranges[tensor] = {"min": np.array([[low]], np.float32), "max": np.array([[high]], np.float32)}
    return ranges


def changed_layers(found: Mapping[str, MatrixOp], layers: Sequence[LayerQuant], module: torch.nn.Module) -> list[str]:
    """Those of the static ``layers`` whose weight or output the converter changed, so that their ranges say nothing of it."""
    import numpy as np

    def changed(one: LayerQuant) -> bool:
        op = found[one.name]
        return op.fused or one.input_range is None or not np.array_equal(op.weight, weight_as_stored(module, one))

    return [one.name for one in layers if changed(one)]


def unchanged_ranges(
    found: Mapping[str, MatrixOp], layers: Sequence[LayerQuant], module: torch.nn.Module
) -> dict[str, tuple[float, float]]:
    """Static layer → the range that its input tensor must have in a file: the widest of all that share it. Layers that the
    converter changed are left out, and those that share a tensor with one."""
    changed = set(changed_layers(found, layers, module))
    ranges: dict[str, tuple[float, float]] = {}
    observed = {tensor for n in changed for tensor in (found[n].input, found[n].output)}
    for one in layers:
        for tensor, bounds in ((found[one.name].input, one.input_range), (found[one.name].output, one.output_range)):
            if bounds is not None:
                low, high = ranges.get(tensor, (0.0, 0.0))
                ranges[tensor] = (min(low, bounds[0]), max(high, bounds[1]))
    return {one.name: ranges[found[one.name].input] for one in layers if found[one.name].input not in observed}


def _observe(
    model: bytes,
    ops: Sequence[MatrixOp],
    spec: QuantSpec,
    pixels: NDArray[np.uint8],
    preprocessing: Preprocessing,
    on_progress: Progress,
) -> dict[str, tuple[tuple[float, float], tuple[float, float]]]:
    """Scope of an operator → ranges of its input and output, by the QuantSpec's method over its number of images."""
    import torch

    try:
        from ai_edge_litert.interpreter import Interpreter
    except ModuleNotFoundError as e:
        raise MissingExtra("ai-edge-litert", "tflite") from e
    with warnings.catch_warnings():
        # It warns of the memory that keeping every tensor takes; keeping them is the purpose.
        warnings.simplefilter("ignore", UserWarning)
        interpreter = Interpreter(model_content=model, num_threads=THREADS, experimental_preserve_all_tensors=True)
        interpreter.allocate_tensors()
    detail = interpreter.get_input_details()[0]
    shape = image_spec("input", str(detail["dtype"].__name__), tuple(int(d) for d in detail["shape"]))
    batch = shape.shape[0]
    images = pixels[: max(spec.calibration_images // batch * batch, batch)]
    if len(images) < batch or not len(images):
        raise ExportError(f"static int8 at batch {batch} needs at least {batch} calibration images, got {len(images)}")
    generator = torch.Generator().manual_seed(0)
    keep = rows_to_keep(len(images) // batch)
    watches = {op.scope: Watch() for op in ops}
    on_progress.start("calibrate-file", "calibrating the TFLite file", len(images), "images")
    for start in range(0, len(images) - batch + 1, batch):
        interpreter.set_tensor(detail["index"], prepare_input(images[start : start + batch], preprocessing, shape))
        interpreter.invoke()
        for op in ops:
            x, y = (torch.from_numpy(interpreter.get_tensor(i)) for i in (op.input_index, op.output_index))
            watches[op.scope].look(op.weight_name, x, y, batch, keep, generator)
        on_progress.advance("calibrate-file", start + batch)
    on_progress.finish("calibrate-file", f"{len(ops)} operators calibrated on {len(images)} images")
    chosen = {}
    for op in ops:
        weight = torch.from_numpy(op.weight.copy()) if op.kind == "FULLY_CONNECTED" else None
        here = choose_ranges(watches[op.scope], weight, spec.ranges)
        chosen[op.scope] = (here.input, here.output)
    return chosen
