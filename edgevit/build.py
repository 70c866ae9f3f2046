"""The only composer: model, recipe, profiles and data → one signed bundle.

compress → rewrite → quantize → export → read back → parity → golden → pack. Everything slow is kept by digest: a second build
of the same thing reads its manifest and blobs from the cache, imports neither torch nor timm, and keeps its version.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from device_agents import wire
from edgevit.artifacts import ArtifactMaker, MadeVariants, make_variants
from edgevit.bundle import Bundle, verify_place, write_bundle
from edgevit.cache import Cache, Entry, digest_of, hash_file, tool_versions
from edgevit.chunks import with_chunk_index
from edgevit.data import ImageSet
from edgevit.errors import DataError, MissingExtra, UsageError
from edgevit.images import BuildImages, DataSets, gather_images, keep_pixels, lacks_data, open_sets, width_multiple
from edgevit.model import LoadedModel, ModelSource, load_model
from edgevit.profile import Profile
from edgevit.progress import Progress
from edgevit.recipe import Recipe

Signer = Callable[[bytes], bytes]

_PACKAGES = {
    "onnx": ("build", ("torch", "timm", "onnx", "onnxscript", "onnxruntime")),
    "ort": ("build", ("torch", "timm", "onnx", "onnxscript", "onnxruntime")),
    "tflite": ("tflite", ("litert_torch", "ai_edge_quantizer", "ai_edge_litert")),
}


@dataclass(frozen=True)
class BuildRequest:
    """What to build. ``calib_data`` serves calibration, parity and golden images; without it ``eval_data`` serves the last
    two; without either they are seeded synthetic images. Steps that train learn from ``train_data``, else ``calib_data``.
    ``name`` replaces ``<model>.<recipe>`` as the bundle's name."""

    source: ModelSource
    recipe: Recipe
    profiles: tuple[Profile, ...]
    formats: tuple[str, ...] = ("onnx", "tflite")
    eval_data: Path | None = None
    calib_data: Path | None = None
    train_data: tuple[Path, ...] = ()
    batch: int = 1
    name: str | None = None

    @property
    def bundle_name(self) -> str:
        return self.name or bundle_name(self.source.name, self.recipe.name)


@dataclass(frozen=True)
class Built:
    """A bundle, the key that stands for everything it was made from, and whether the cache had it."""

    bundle: Bundle
    key: str
    reused: bool


def build_bundle(request: BuildRequest, out: Path, signer: Signer, on_progress: Progress) -> Bundle:
    """Build, check and sign one bundle into ``out``.

    Raises :class:`UsageError` and its kin for what a person asked wrongly, :class:`BuildError` for a step, exporter or gate
    that failed. Nothing is written to ``out`` unless all of it is right.
    """
    return make_bundle(request, out, signer, on_progress).bundle


def make_bundle(
    request: BuildRequest,
    out: Path,
    signer: Signer,
    on_progress: Progress,
    identity: str | None = None,
    version: int | None = None,
) -> Built:
    """:func:`build_bundle`, saying how it went. ``identity``: the model's digest where it was loaded already. ``version``: that
    of the bundle as it was made before; None for the next one of its name."""
    _check_request(request)
    verify_place(out, request.bundle_name)
    cache = Cache()
    sets = open_sets(request, cache)
    lacking = lacks_data(request.recipe, sets)
    if lacking:
        raise DataError(f"{request.recipe.name} {lacking[0]}", hint=lacking[1])
    identity = identity or request.source.fast_digest(cache)
    model = None
    if identity is None:
        model = _load(request, on_progress)
        identity = model.info.digest
    key = build_key(request, identity, sets)
    entry = cache.get(key)
    reused = entry is not None
    for complaint in cache.complaints:
        on_progress.start("cache", complaint)
        on_progress.finish("cache", complaint)
    if entry is not None:
        on_progress.start("cache", f"{request.recipe.name}: built before")
        on_progress.finish("cache", f"{request.recipe.name}: taken from the cache, nothing was built")
    else:
        entry = _build(request, model or _load(request, on_progress), cache, key, on_progress)
    manifest = wire.decode(wire.Manifest, entry.meta["manifest"], "cached manifest")
    manifest = replace(manifest, version=_version(cache, manifest.name, key) if version is None else version)
    on_progress.start("pack", f"packing {manifest.name}")
    manifest, by_sha = with_chunk_index(manifest, {path.name: path for path in entry.files.values()})
    bundle = write_bundle(out, manifest, by_sha, signer)
    on_progress.finish("pack", f"{bundle.path}: {len(manifest.artifacts)} artifacts, signed")
    return Built(bundle, key, reused)


def _check_request(request: BuildRequest) -> None:
    from importlib.util import find_spec

    if not request.profiles:
        raise UsageError("a build is for at least one profile", hint="edgevit profiles")
    if request.batch < 1:
        raise UsageError(f"got batch {request.batch}, expected 1 or more")
    for format_ in request.formats:
        if format_ not in _PACKAGES:
            raise UsageError(f"got format {format_!r}, expected onnx, ort or tflite")
        extra, packages = _PACKAGES[format_]
        for package in packages:
            if find_spec(package) is None:
                raise MissingExtra(package.replace("_", "-"), extra)


def _load(request: BuildRequest, on_progress: Progress) -> LoadedModel:
    on_progress.start("model", f"loading {request.source.name}")
    model = load_model(request.source)
    told = ", ".join(f"{k}={v}" for k, v in model.info.overrides.items())
    on_progress.finish(
        "model", f"{request.source.name}: {model.info.classes} classes, {model.info.parameters:,} parameters {told}"
    )
    return model


def build_key(request: BuildRequest, identity: str, sets: DataSets) -> str:
    """What stands for everything a build depends on; ``identity`` is the model's digest."""
    from edgevit.export.oldest import find_interpreter, oldest_runtimes

    data = [None if one is None else [one.name, one.digest] for one in (sets.evaluation, sets.calibration, *sets.training)]
    pairs = [(format_, scheme) for format_ in request.formats for scheme in request.recipe.schemes]
    wanted = [oldest for pair in pairs for oldest in oldest_runtimes(*pair, request.profiles)]
    return digest_of(
        "bundle",
        identity,
        [request.recipe.name, request.recipe.digest],
        [p.model_dump(mode="json") for p in request.profiles],
        [request.formats, request.batch, request.name],
        [data, width_multiple(request.profiles)],
        [[*pair, str(find_interpreter(*pair))] for pair in wanted],
        code_digest(),
        tool_versions(),
    )


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Over edgevit's own code that a build runs through: an edited exporter never serves what the old one wrote."""
    import device_agents
    import edgevit

    here = Path(edgevit.__file__).parent
    names = [
        "build",
        "artifacts",
        "data",
        "golden",
        "images",
        "labels",
        "macs",
        "model",
        "quantspec",
        "recipe",
        "timmsource",
        "torchsetup",
        "weights",
    ]
    files = [here / f"{n}.py" for n in names] + [Path(device_agents.__file__).parent / "wire.py"]
    for folder in ("compress", "rewrite", "export"):
        files += sorted((here / folder).glob("*.py"))
    return digest_of([hash_file(f) for f in files])


def _version(cache: Cache, name: str, key: str) -> int:
    """UTC seconds, but never below the last one given to this name; the same build keeps the version it had."""
    memo = digest_of("latest version", name)
    last = cache.get(memo)
    previous = int(last.meta["version"]) if last else 0
    if last and last.meta["key"] == key:
        return previous
    version = max(int(time.time()), previous + 1)
    cache.put(memo, {}, {"version": version, "key": key})
    return version


def _build(request: BuildRequest, model: LoadedModel, cache: Cache, key: str, on_progress: Progress) -> Entry:
    from edgevit.compress import Compressed, StepContext
    from edgevit.compress.walk import run_steps
    from edgevit.rewrite import apply_rewrites

    images = gather_images(request, model, cache, on_progress)
    calibration = images.steps.calibration
    state = Compressed(model.module, model.preprocessing, model.module)
    state = run_steps(state, model.info.digest, request.recipe.steps[:-1], images.steps, cache, on_progress)
    state = apply_rewrites(state, calibration, on_progress, request.recipe.rewrite.off)
    scratch = cache.root / "unfinished" / key
    exported = tuple(dict.fromkeys("onnx" if f == "ort" else f for f in request.formats))
    context = StepContext(calibration, images.steps.training, images.steps.multiple, scratch, on_progress, exported)
    maker = ArtifactMaker(
        state.module, state.preprocessing, images.parity, images.golden, calibration, request.batch, cache, on_progress
    )
    made = make_variants(maker, state, request.recipe.quantizations, request.formats, request.profiles, context)
    return _pack(request, model, made, images, cache, key, on_progress)


def _pack(
    request: BuildRequest,
    model: LoadedModel,
    made: MadeVariants,
    images: BuildImages,
    cache: Cache,
    key: str,
    on_progress: Progress,
) -> Entry:
    from edgevit.golden import npy_bytes

    files: dict[str, Path | bytes] = {"golden": npy_bytes(images.golden.pixels)}
    for one in made.artifacts:
        files[f"model {one.artifact.name}"] = one.model
        files[f"golden {one.artifact.name}"] = one.golden_outputs
    names = model.labels
    if names is None and images.evaluation is not None:
        names = images.evaluation.class_names
    labels = None
    if names is not None:
        files["labels"] = (json.dumps(list(names), ensure_ascii=False, indent=0) + "\n").encode("utf-8")
        labels = _blob(files["labels"])
    evaluation = None
    if images.evaluation is not None:
        evaluation = _evaluation(images.evaluation, model, cache, files, on_progress)
    manifest = wire.Manifest(
        schema=wire.BUNDLE_SCHEMA,
        name=request.bundle_name,
        version=1,
        minimum_agent=wire.AGENT_VERSION,
        made_by=f"edgevit {tool_versions().get('edgevit', 'from source')}",
        model=model.info,
        recipe=wire.RecipeInfo(request.recipe.name, request.recipe.digest),
        steps=made.reports,
        preprocessing=model.preprocessing,
        labels=labels,
        golden=wire.GoldenInputs(_blob(files["golden"]), len(images.golden.pixels), images.golden.source),
        evaluation=evaluation,
        evaluation_absent="" if evaluation else "built without --eval: there are no labelled images to count on",
        artifacts=tuple(one.artifact for one in made.artifacts),
        tools=dict(tool_versions()),
        not_made=made.not_made,
    )
    encoded = wire.encode(manifest)
    wire.decode(wire.Manifest, encoded, "manifest")  # What a device would refuse is refused here first.
    return cache.put(key, files, {"manifest": encoded})


def _evaluation(
    images: ImageSet, model: LoadedModel, cache: Cache, files: dict[str, Path | bytes], on_progress: Progress
) -> wire.EvaluationSet:
    import numpy as np

    from edgevit.golden import npy_bytes

    entry = keep_pixels(cache, images, model.preprocessing, list(range(len(images))), "evaluation images", on_progress)
    path = entry.files["images"]
    files["evaluation images"] = path
    files["evaluation labels"] = npy_bytes(np.asarray(images.labels, np.int64))
    return wire.EvaluationSet(
        wire.Blob(path.name, path.stat().st_size), _blob(files["evaluation labels"]), len(images), images.name[:200]
    )


def _blob(content: Path | bytes) -> wire.Blob:
    import hashlib

    data = content if isinstance(content, bytes) else content.read_bytes()
    return wire.Blob(hashlib.sha256(data).hexdigest(), len(data))


def bundle_name(model: str, recipe: str) -> str:
    """``<model>.<recipe>`` with whatever a bundle name may not hold turned into ``-``."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", f"{model}.{recipe}").lstrip("._+-")[:200]
