"""Files in ONNX Runtime's own format (.ort), for builds of it that leave out the ONNX parser and unused operators.

Made by ONNX Runtime's converter from the verified ONNX file: its optimisations are carried out once, here, since a reduced
build has none of its own. The converter's order of a few tables follows addresses in memory, so two conversions of one file
differ in some bytes and in nothing else; within one cache it is converted once.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from edgevit.cache import Cache, digest_of, tool_versions
from edgevit.errors import ExportError, MissingExtra
from edgevit.export import ReadBack

IDENTIFIER = b"ORTM"
"""Bytes 4 to 8 of every file in the format."""

SMALLEST = 64
"""Fewest integers of a tensor that counts as a layer's weights when files are compared."""


def convert(cache: Cache, model: bytes) -> tuple[bytes, str]:
    """(``model`` in the ORT format, what it needs as ONNX Runtime's build takes it: a line ``domain;opset;operators`` each).

    Layouts of one instruction set alone (NCHWc) are left out, so that the file runs on any board. Raises :class:`ExportError`
    where ONNX Runtime cannot convert the file, :class:`MissingExtra` without it.
    """
    key = digest_of("ort", hashlib.sha256(model).hexdigest(), tool_versions())
    known = cache.get(key)
    if known is None:
        made, operators = _convert(model)
        known = cache.put(key, {"model": made}, {"operators": operators})
    return known.files["model"].read_bytes(), str(known.meta["operators"])


def _convert(model: bytes) -> tuple[bytes, str]:
    try:
        import onnxruntime
        from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort
    except ModuleNotFoundError as e:
        raise MissingExtra(e.name or "onnxruntime", "build") from e
    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="edgevit-ort-") as scratch:
        source = Path(scratch) / "model.onnx"
        source.write_bytes(model)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                convert_onnx_models_to_ort(source, optimization_styles=[OptimizationStyle.Fixed], target_platform="arm")
        except Exception as e:
            raise ExportError(
                f"onnxruntime {onnxruntime.__version__} cannot write the file in its own format: {str(e)[:400]}"
            ) from e
        config = source.with_suffix(".required_operators.config").read_text(encoding="utf-8")
        lines = [line for line in config.splitlines() if line and not line.startswith("#")]
        return source.with_suffix(".ort").read_bytes(), "\n".join(lines)


def read_ort(model: bytes, onnx_model: bytes, read: ReadBack) -> ReadBack:
    """What the ORT file says of itself, once ONNX Runtime has written it back as ONNX; ``read`` is what the file
    ``onnx_model``, which it was made from, said.

    Raises :class:`ExportError` where it is another format, has other inputs or outputs, or lacks any layer's integers.
    """
    if model[4:8] != IDENTIFIER:
        raise ExportError(f"the file begins with {model[:8]!r}, expected the ORT format")
    written = _written_back(model)
    for name, values, spec in (("input", written.graph.input, read.input), ("output", written.graph.output, read.output)):
        found = [(v.name, tuple(d.dim_value for d in v.type.tensor_type.shape.dim)) for v in values]
        if found != [(spec.name, tuple(spec.shape))]:
            raise ExportError(f"the ORT file has the {name} {found}, expected {spec.name} {list(spec.shape)}")
    import onnx

    asked, held = _integers(onnx.load_model_from_string(onnx_model).graph), _integers(written.graph)
    missing = asked - held
    if missing:
        raise ExportError(f"{missing.total()} of {asked.total()} integer tensors of the ONNX file are not in the ORT file")
    operators = dict(sorted(Counter(n.op_type for n in written.graph.node).items()))
    return ReadBack(read.input, read.output, read.opset, read.ir_version, operators, read.integer_layers, read.notes)


def _written_back(model: bytes) -> Any:
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="edgevit-ort-") as scratch:
        sink = Path(scratch) / "back.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(sink)
        try:
            onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as e:
            raise ExportError(f"onnxruntime {onnxruntime.__version__} refuses the ORT file: {str(e)[:400]}") from e
        return onnx.load(str(sink), load_external_data=False)


def _integers(graph: Any) -> Counter[str]:
    """Digests of the 8-bit tensors of a graph, sorted within each: an optimisation may turn a matrix around, no more."""
    import numpy as np
    from onnx import numpy_helper

    found: Counter[str] = Counter()
    for initializer in graph.initializer:
        if initializer.data_type in (2, 3):
            values = numpy_helper.to_array(initializer)
            if values.size >= SMALLEST:
                found[hashlib.sha256(np.sort(values, axis=None).tobytes()).hexdigest()] += 1
    return found
