"""One family in one format: float and dynamic int8, through the exporters, the read-back and the parity gates of a build."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevit.cache import Cache
from edgevit.coverage.families import Family
from edgevit.errors import BuildError, EdgevitError
from edgevit.progress import Quiet

if TYPE_CHECKING:
    from edgevit.compress import Compressed

FORMATS = ("onnx", "tflite")
SCHEMES = ("fp32", "int8-dynamic")
IMAGES = 8
LEAST_SPREAD = 0.01
"""Of the logits' length: below it all images look alike to the model, and parity proves nothing."""


@dataclass(frozen=True)
class Row:
    """What became of one family in one format and scheme. ``reason`` is empty where it passed, else ``stage`` says where it
    failed. ``spread``: see :func:`edgevit.coverage.weights.spread`. ``peak_memory_mb`` is the process's until then."""

    family: str
    kind: str
    model: str
    format: str
    scheme: str
    parameters: int = 0
    macs: int = 0
    bytes: int = 0
    integer_layers: int = 0
    min_cosine: float | None = None
    max_relative_error: float | None = None
    top1_agreement: float | None = None
    spread: float | None = None
    seconds: float = 0.0
    peak_memory_mb: float | None = None
    stage: str = ""
    reason: str = ""

    @property
    def passed(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class _Prepared:
    """A model with drawn weights, the images it is checked on and its own outputs for them."""

    state: Compressed
    pixels: Any
    reference: Any
    row: Row


def cover(family: Family, format_: str, cache: Cache) -> Iterator[Row]:
    """A row for each of :data:`SCHEMES`, as soon as it is known. One float file serves them all: that of the module which the
    int8 step prepared exactly, or of the module itself where that step failed."""
    from edgevit.artifacts import float_file

    began = time.monotonic()
    row = Row(family.name, family.kind, family.member, format_, "fp32")
    try:
        prepared = _prepare(family, row)
    except EdgevitError as e:
        yield from (_failed(replace(row, scheme=scheme), began, "model", e) for scheme in SCHEMES)
        return
    state, refusal = prepared.state, None
    try:
        state = _int8(prepared)
    except EdgevitError as e:
        refusal = e
    module = state.carried(format_)[0]
    try:
        float_model = float_file(cache, format_, _exporter(format_), module, state.preprocessing, 1)
    except EdgevitError as e:
        yield from (_failed(replace(prepared.row, scheme=scheme), began, "export", e) for scheme in SCHEMES)
        return
    float_state = replace(prepared.state, module=module)
    yield _checked(prepared, float_state, "fp32", float_model, began)
    began = time.monotonic()
    if refusal is not None:
        yield _failed(replace(prepared.row, scheme="int8-dynamic"), began, "quantize", refusal)
    else:
        yield _checked(prepared, state, "int8-dynamic", float_model, began)


def _prepare(family: Family, row: Row) -> _Prepared:
    from edgevit.compress import Compressed
    from edgevit.compress.calibrate import normalise
    from edgevit.coverage.weights import draw_weights, spread
    from edgevit.export.parity import reference_outputs
    from edgevit.golden import synthetic_images
    from edgevit.model import ModelSource, load_model

    source = ModelSource(
        family.member, random_weights=True, num_classes=family.classes or None, img_size=family.img_size or None
    )
    model = load_model(source)
    pixels = synthetic_images(IMAGES, model.preprocessing)
    draw_weights(model.module, normalise(pixels, model.preprocessing))
    reference = reference_outputs(model.module, pixels, model.preprocessing)
    apart = spread(reference)
    if not apart >= LEAST_SPREAD:
        raise BuildError(
            f"with drawn weights the logits of all images are alike (spread {apart:.2g}): parity would prove nothing"
        )
    row = replace(row, parameters=model.info.parameters, macs=model.info.macs or 0, spread=apart)
    return _Prepared(Compressed(model.module, model.preprocessing, model.module), pixels, reference, row)


def _int8(prepared: _Prepared) -> Compressed:
    """The int8 step without real images: norms folded exactly, weights rounded to nearest by the exporter."""
    from edgevit.compress import CalibrationData, StepContext, TrainingData, apply_step
    from edgevit.compress.quantize import QuantizeConfig

    calibration = CalibrationData(prepared.pixels, None, real=False)
    training = TrainingData(prepared.pixels, None)
    context = StepContext(calibration, lambda: training, 1, Path("unused"), Quiet())
    return apply_step(prepared.state, QuantizeConfig(scheme="int8-dynamic"), context)


def _exporter(format_: str) -> Any:
    from edgevit.export import onnx, tflite

    return {"onnx": onnx, "tflite": tflite}[format_]


def _checked(prepared: _Prepared, state: Compressed, scheme: str, float_model: bytes, began: float) -> Row:
    """Write the scheme into the file, read it back, run it and hold it against the module before anything was done to it."""
    from edgevit.export.parity import measure_parity, verify_parity
    from edgevit.export.runtime import run_artifact

    row = replace(prepared.row, scheme=scheme, bytes=len(float_model))
    stage = "write"
    try:
        model, read = _written(prepared, state, row.format, float_model)
        row = replace(row, bytes=len(model), integer_layers=read.integer_layers)
        stage = "run"
        outputs = run_artifact(row.format, model, prepared.pixels, state.preprocessing, read.input)
        stage = "parity"
        found = measure_parity(prepared.reference, outputs)
        row = replace(
            row,
            min_cosine=found.min_cosine,
            max_relative_error=found.max_relative_error,
            top1_agreement=found.top1_agreement,
        )
        verify_parity(f"{row.format}-{scheme}", scheme, prepared.reference, outputs)
    except EdgevitError as e:
        return _failed(row, began, stage, e)
    return replace(row, seconds=time.monotonic() - began, peak_memory_mb=peak_memory_mb())


def _written(prepared: _Prepared, state: Compressed, format_: str, float_model: bytes) -> Any:
    module, spec = state.carried(format_)
    if format_ == "onnx":
        from edgevit.export import onnx
        from edgevit.export.readback import read_onnx

        model = onnx.apply_spec(float_model, spec, module, prepared.pixels, state.preprocessing)
        return model, read_onnx(model, float_model, spec, (onnx.IR_VERSION, onnx.OPSET))
    from edgevit.export import tflite
    from edgevit.export.readback_tflite import read_tflite

    model = tflite.apply_spec(float_model, spec, module, prepared.pixels, state.preprocessing, Quiet())
    return model, read_tflite(model, float_model, spec, module)


def _failed(row: Row, began: float, stage: str, error: EdgevitError) -> Row:
    reason = str(error).strip()[:600] or type(error).__name__
    return replace(row, seconds=time.monotonic() - began, peak_memory_mb=peak_memory_mb(), stage=stage, reason=reason)


def peak_memory_mb() -> float | None:
    """The most memory this process has held, in 10⁶ bytes; None where the system does not say."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) * (1 if sys.platform == "darwin" else 1024) / 1e6
