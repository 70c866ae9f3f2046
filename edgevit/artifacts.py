"""One artifact: export or take the float file, carry out the QuantSpec, read it back, hold it against the module, record it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from device_agents import wire
from edgevit.cache import Cache, digest_of, tool_versions
from edgevit.compress import CalibrationData, Compressed
from edgevit.export import PAIRS, ReadBack
from edgevit.export.oldest import oldest_runtimes, run_in_oldest
from edgevit.export.parity import reference_outputs, verify_parity
from edgevit.export.runtime import prepare_input, run_artifact, runtime_of
from edgevit.golden import GoldenImages, npy_bytes, tolerance_for
from edgevit.model import module_digest
from edgevit.profile import onnx_ceiling
from edgevit.progress import Progress
from edgevit.quantspec import QuantSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from edgevit.profile import Profile

NEVER_RIGHT = {"tflite-runtime": ("int8-dynamic", "int4-weights", "mixed")}
"""Schemes a runtime runs without an error and gets wrong, whatever a profile says."""


@dataclass(frozen=True)
class MadeArtifact:
    """An artifact and the bytes its blobs hold."""

    artifact: wire.Artifact
    model: bytes
    golden_outputs: bytes


@dataclass
class ArtifactMaker:
    """Everything the artifacts of one bundle share. Pixels are uint8 (N, height, width, 3). ``float_module`` is the module
    before the quantize step rounded its weights: what every artifact is held against."""

    state: Compressed
    float_module: torch.nn.Module
    parity_pixels: NDArray[np.uint8]
    golden: GoldenImages
    calibration: CalibrationData
    batch: int
    cache: Cache
    on_progress: Progress

    @cached_property
    def reference(self) -> NDArray[np.float32]:
        return reference_outputs(self.float_module, self.parity_pixels, self.state.preprocessing)

    def make(self, format_: str, profiles: Sequence[Profile]) -> MadeArtifact | str:
        """The artifact, or why there is none for these profiles. Raises :class:`BuildError` kin where it fails."""
        scheme = self.state.spec.scheme
        name = f"{format_}-{scheme}"
        if scheme not in PAIRS[format_]:
            return f"{name}: the {format_} exporter does not carry out {scheme}"
        reason = refused_layers(format_, self.state.carried(format_)[1])
        if reason:
            return f"{name}: {reason}"
        fits = fitting_profiles(format_, scheme, profiles)
        if not fits:
            return f"{name}: no runtime of {', '.join(p.name for p in profiles)} runs it"
        self.on_progress.start(name, f"exporting {name}")
        model, read = self._export(format_, fits)
        spec = read.input
        self.on_progress.start(name, f"checking {name}")
        outputs = run_artifact(format_, model, self.parity_pixels, self.state.preprocessing, spec)
        parity = verify_parity(name, scheme, self.reference, outputs)
        recorded = run_artifact(format_, model, self.golden.pixels, self.state.preprocessing, spec)
        prepared = prepare_input(self.golden.pixels, self.state.preprocessing, spec)
        batches = prepared.reshape(-1, *spec.shape)
        oldest = run_in_oldest(model, format_, oldest_runtimes(format_, scheme, fits), batches, recorded)
        tolerance, source = tolerance_for(scheme, recorded, oldest.checked)
        golden = npy_bytes(recorded)
        runtime, version = runtime_of(format_)
        artifact = wire.Artifact(
            name=name,
            format=format_,
            scheme=scheme,
            blob=_blob(model),
            input=spec,
            output=read.output,
            batch=self.batch,
            opset=read.opset,
            ir_version=read.ir_version,
            operators=dict(read.operators),
            fits=tuple(p.name for p in fits),
            golden=wire.GoldenOutputs(_blob(golden), runtime, version, tolerance),
            parity=parity,
            checked=oldest.checked,
            notes=(source, *read.notes, *oldest.notes, *refusals(format_, scheme)),
        )
        ran = "".join(f", ran in {c.runtime} {c.version}" for c in oldest.checked) + "".join(f"; {n}" for n in oldest.notes)
        done = (
            f"{name}: {len(model) / 1e6:.2f} MB, cosine ≥ {parity.min_cosine:.4f}, top-1 agreement {parity.top1_agreement:.1%}"
        )
        self.on_progress.finish(name, done + ran)
        return MadeArtifact(artifact, model, golden)

    def _export(self, format_: str, fits: Sequence[Profile]) -> tuple[bytes, ReadBack]:
        module, spec = self.state.carried(format_)
        if format_ == "onnx":
            from edgevit.export import onnx
            from edgevit.export.readback import read_onnx

            float_model = self._float_model("onnx", onnx, module)
            model = onnx.apply_spec(float_model, spec, module, self.calibration.pixels, self.state.preprocessing)
            ceiling = onnx_ceiling(tuple(fits))
            allowed = (onnx.IR_VERSION, onnx.OPSET) if ceiling is None else (ceiling.ir_version, ceiling.opset)
            return model, read_onnx(model, float_model, spec, allowed)
        from edgevit.export import tflite
        from edgevit.export.readback_tflite import read_tflite

        float_model = self._float_model("tflite", tflite, module)
        model = tflite.apply_spec(
            float_model, spec, module, self.calibration.pixels, self.state.preprocessing, self.on_progress
        )
        return model, read_tflite(model, float_model, spec, module)

    def _float_model(self, format_: str, exporter: Any, module: torch.nn.Module) -> bytes:
        """The float32 file every scheme of a model starts from; the slow half of an export, so it is kept."""
        shape = [self.state.preprocessing.height, self.state.preprocessing.width, self.batch]
        key = digest_of("float", format_, module_digest(module), shape, tool_versions(), _source_digest(exporter))
        known = self.cache.get(key)
        if known is not None:
            return known.files["model"].read_bytes()
        data: bytes = exporter.export_float(module, self.state.preprocessing, self.batch)
        self.cache.put(key, {"model": data}, {})
        return data


def fitting_profiles(format_: str, scheme: str, profiles: Sequence[Profile]) -> tuple[Profile, ...]:
    """The profiles with at least one runtime that reads ``format_`` and gets ``scheme`` right."""
    return tuple(
        p
        for p in profiles
        if any(
            o.runtime in wire.RUNTIMES_OF_FORMAT[format_]
            and scheme not in o.refuses
            and scheme not in NEVER_RIGHT.get(o.runtime, ())
            for o in p.runtimes
        )
    )


def refused_layers(format_: str, spec: QuantSpec) -> str:
    """Why the format cannot carry out some layer of ``spec``, or nothing."""
    if format_ != "tflite":
        return ""
    from edgevit.export.tflite_weights import refuses

    reasons = {one.name: reason for one in spec.layers if (reason := refuses(one))}
    return f"{len(reasons)} layers, the first {next(iter(reasons))}: {next(iter(reasons.values()))}" if reasons else ""


def refusals(format_: str, scheme: str) -> tuple[str, ...]:
    """Runtimes that read the format and are known to get the scheme wrong, as notes for people."""
    return tuple(
        f"not runnable in {runtime}: it runs {scheme} without an error and returns garbage"
        for runtime, schemes in NEVER_RIGHT.items()
        if runtime in wire.RUNTIMES_OF_FORMAT[format_] and scheme in schemes
    )


def _source_digest(exporter: Any) -> str:
    from pathlib import Path

    return hashlib.sha256(Path(exporter.__file__).read_bytes()).hexdigest()


def _blob(data: bytes) -> wire.Blob:
    return wire.Blob(hashlib.sha256(data).hexdigest(), len(data))
