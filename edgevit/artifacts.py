"""One artifact: export or take the float file, carry out the QuantSpec, read it back, hold it against the module, record it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device_agents import wire
from edgevit.cache import Cache, digest_of, hash_file, tool_versions
from edgevit.compress import CalibrationData, Compressed, StepContext, apply_step
from edgevit.compress.merge_choices import keeping
from edgevit.errors import BuildError
from edgevit.export import ReadBack, cannot_carry_out
from edgevit.export.oldest import oldest_runtimes, run_in_oldest
from edgevit.export.parity import find_turned, reference_outputs, verify_parity
from edgevit.export.placement import measure_placement, verify_memory
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

    from edgevit.compress.quantize import QuantizeConfig
    from edgevit.profile import Profile

NEVER_RIGHT = {"tflite-runtime": ("int8-dynamic", "int4-weights", "mixed")}
"""Schemes a runtime runs without an error and gets wrong, whatever a profile says."""


@dataclass(frozen=True)
class MadeArtifact:
    """An artifact and the bytes its blobs hold."""

    artifact: wire.Artifact
    model: bytes
    golden_outputs: bytes


@dataclass(frozen=True)
class MadeVariants:
    """The artifacts of one bundle in the order asked for, what each step reported, and what could not be made."""

    artifacts: tuple[MadeArtifact, ...]
    reports: tuple[wire.StepReport, ...]
    not_made: tuple[wire.NotMade, ...]


@dataclass
class ArtifactMaker:
    """Everything the artifacts of one bundle share. Pixels are uint8 (N, height, width, 3). ``float_module`` is the module
    before the quantize step rounded its weights: what every artifact is held against."""

    float_module: torch.nn.Module
    preprocessing: wire.Preprocessing
    parity_pixels: NDArray[np.uint8]
    golden: GoldenImages
    calibration: CalibrationData
    batch: int
    cache: Cache
    on_progress: Progress

    @cached_property
    def reference(self) -> tuple[NDArray[np.float32], bool]:
        """The module's own outputs, and whether it merges tokens."""
        with keeping() as choices:
            outputs = reference_outputs(self.float_module, self.parity_pixels, self.preprocessing)
        return outputs, choices.left > 0

    def make(self, state: Compressed, format_: str, profiles: Sequence[Profile]) -> MadeArtifact | wire.NotMade:
        """The artifact of ``state`` after its quantize step, or why there is none for these profiles. Raises
        :class:`BuildError` kin where it fails."""
        scheme = state.spec.scheme
        name = artifact_name(format_, scheme)
        reason = cannot_carry_out(format_, scheme, None) or refused_layers(format_, state.carried(format_)[1])
        if reason:
            return wire.NotMade(name, reason[:2000])
        fits = fitting_profiles(format_, scheme, profiles)
        if not fits:
            return wire.NotMade(name, f"no runtime of {', '.join(p.name for p in profiles)} runs it"[:2000])
        self.on_progress.start(name, f"exporting {name}")
        model, read = self._export(state, format_, fits)
        spec = read.input
        self.on_progress.start(name, f"checking {name}")
        outputs = run_artifact(format_, model, self.parity_pixels, self.preprocessing, spec)
        reference, merges = self.reference
        parity = verify_parity(name, scheme, reference, outputs, merges)
        recorded = run_artifact(format_, model, self.golden.pixels, self.preprocessing, spec)
        prepared = prepare_input(self.golden.pixels, self.preprocessing, spec)
        batches = prepared.reshape(-1, *spec.shape)
        oldest = run_in_oldest(model, format_, oldest_runtimes(format_, scheme, fits), batches, recorded)
        tolerance, source = tolerance_for(scheme, recorded, oldest.checked)
        placement = measure_placement(format_, model)
        memory = verify_memory(name, len(model), placement, fits)
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
            notes=(source, *find_turned(scheme, parity), *read.notes, *oldest.notes, *refusals(format_, scheme), *memory),
            placement=placement,
        )
        ran = "".join(f", ran in {c.runtime} {c.version}" for c in oldest.checked) + "".join(f"; {n}" for n in oldest.notes)
        done = (
            f"{name}: {len(model) / 1e6:.2f} MB, cosine ≥ {parity.min_cosine:.4f}, top-1 agreement {parity.top1_agreement:.1%}"
        )
        self.on_progress.finish(name, done + ran)
        return MadeArtifact(artifact, model, golden)

    def _export(self, state: Compressed, format_: str, fits: Sequence[Profile]) -> tuple[bytes, ReadBack]:
        module, spec = state.carried(format_)
        if format_ in ("onnx", "ort"):
            from edgevit.export import onnx
            from edgevit.export.readback import read_onnx

            float_model = float_file(self.cache, "onnx", onnx, module, self.preprocessing, self.batch)
            model = onnx.apply_spec(float_model, spec, module, self.calibration.pixels, self.preprocessing)
            ceiling = onnx_ceiling(tuple(fits))
            allowed = (onnx.IR_VERSION, onnx.OPSET) if ceiling is None else (ceiling.ir_version, ceiling.opset)
            read = read_onnx(model, float_model, spec, allowed)
            return (model, read) if format_ == "onnx" else self._in_ort_format(model, read)
        from edgevit.export import tflite
        from edgevit.export.readback_tflite import read_tflite

        float_model = float_file(self.cache, "tflite", tflite, module, self.preprocessing, self.batch)
        model = tflite.apply_spec(float_model, spec, module, self.calibration.pixels, self.preprocessing, self.on_progress)
        return model, read_tflite(model, float_model, spec, module)

    def _in_ort_format(self, model: bytes, read: ReadBack) -> tuple[bytes, ReadBack]:
        from edgevit.export.ort import convert, read_ort

        made, operators = convert(self.cache, model)
        lines = tuple(f"required operators: {line}" for line in operators.splitlines())
        known = read_ort(made, model, read)
        return made, replace(known, notes=(*known.notes, *lines))


def float_file(
    cache: Cache, format_: str, exporter: Any, module: torch.nn.Module, preprocessing: wire.Preprocessing, batch: int
) -> bytes:
    """The float32 file that every scheme of a module starts from; the slow half of an export, so it is kept."""
    shape = [preprocessing.height, preprocessing.width, batch]
    key = digest_of("float", format_, module_digest(module), shape, tool_versions(), _source_digest(exporter))
    known = cache.get(key)
    if known is not None:
        return known.files["model"].read_bytes()
    data: bytes = exporter.export_float(module, preprocessing, batch)
    cache.put(key, {"model": data}, {})
    return data


def make_variants(
    maker: ArtifactMaker,
    state: Compressed,
    quantizations: Sequence[QuantizeConfig],
    formats: Sequence[str],
    profiles: Sequence[Profile],
    context: StepContext,
) -> MadeVariants:
    """Quantize ``state`` in each of the ways asked for, and export each to every format.

    A quantization or export that fails raises its :class:`BuildError` where it is the only one asked for. Of several it is left
    out and named, and an error only where nothing is left.
    """
    several = len(quantizations) > 1
    made: list[MadeArtifact] = []
    reports = list(state.reports)
    not_made: list[wire.NotMade] = []
    for config in quantizations:
        names: list[str] = []
        try:
            quantized = apply_step(state, config, context)
            if config is quantizations[-1]:
                context.found.clear()  # Before the exporters take their share of the memory.
        except BuildError as e:
            if not several:
                raise
            not_made += [wire.NotMade(artifact_name(f, config.scheme), str(e)[:2000]) for f in formats]
            continue
        for format_ in formats:
            try:
                result = maker.make(quantized, format_, profiles)
            except BuildError as e:
                if not several:
                    raise
                result = wire.NotMade(artifact_name(format_, config.scheme), str(e)[:2000])
            if isinstance(result, wire.NotMade):
                not_made.append(result)
            else:
                made.append(result)
                names.append(result.artifact.name)
        if names:
            own = quantized.reports[len(state.reports) :]
            reports += [replace(report, artifacts=tuple(names)) for report in own] if several else own
    for one in not_made:
        maker.on_progress.start(one.artifact, one.artifact)
        maker.on_progress.finish(one.artifact, f"{one.artifact} is not made: {one.reason}")
    if not made:
        reasons = "; ".join(f"{one.artifact}: {one.reason}" for one in not_made)
        raise BuildError(f"no artifact could be made: {reasons}", hint="edgevit profiles show NAME")
    return MadeVariants(tuple(made), tuple(reports), tuple(not_made))


def artifact_name(format_: str, scheme: str) -> str:
    """What an artifact is called in its bundle, and the variants of it on a device."""
    return f"{format_}-{scheme}"


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
    """Of the exporter and of every file that says how a module computes."""
    import edgevit

    here = Path(edgevit.__file__).parent
    files = [Path(exporter.__file__), *sorted(here.glob("rewrite/*.py")), *sorted(here.glob("compress/*.py"))]
    return digest_of([hash_file(file) for file in files])


def _blob(data: bytes) -> wire.Blob:
    return wire.Blob(hashlib.sha256(data).hexdigest(), len(data))
