"""Manifests with random blobs in the place of models: enough for everything that ships, stores and verifies bundles."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from device_agents import wire
from edgevit import bundle, signing


def make_manifest(
    *,
    seed: int = 1,
    model_bytes: int = 100_000,
    name: str = "tiny-fp32",
    version: int = 1,
    fits: tuple[str, ...] = ("generic-x86-64",),
) -> tuple[wire.Manifest, dict[str, Path | bytes]]:
    """A valid manifest and its blobs; the same ``seed`` and size make the same bytes."""
    rng = random.Random(seed)
    blobs: dict[str, Path | bytes] = {}

    def blob(size: int) -> wire.Blob:
        data = rng.randbytes(size)
        sha256 = hashlib.sha256(data).hexdigest()
        blobs[sha256] = data
        return wire.Blob(sha256, size)

    tensor_in = wire.TensorSpec("x", "float32", (1, 3, 8, 8), "NCHW")
    tensor_out = wire.TensorSpec("y", "float32", (1, 10))
    artifacts = tuple(
        wire.Artifact(
            name=f"fp32-{form}",
            format=form,
            scheme="fp32",
            blob=blob(model_bytes if form == "onnx" else 1000),
            input=tensor_in,
            output=tensor_out,
            batch=1,
            opset=18 if form == "onnx" else None,
            ir_version=10 if form == "onnx" else None,
            operators={"MatMul": 1},
            fits=fits,
            golden=wire.GoldenOutputs(blob(800), "onnxruntime", "1.19.2", wire.Tolerance(1e-3, 0.99, 0.0)),
            parity=wire.Parity(16, 0.0, 0.0, 1.0, 1.0),
            checked=(),
        )
        for form in ("onnx", "tflite")
    )
    manifest = wire.Manifest(
        schema=wire.BUNDLE_SCHEMA,
        name=name,
        version=version,
        minimum_agent=1,
        made_by="tests",
        model=wire.ModelInfo("tiny", "0" * 64, "random", 10, 1000, None, {}),
        recipe=wire.RecipeInfo("fp32", "1" * 64),
        steps=(),
        preprocessing=wire.Preprocessing(8, 8, 8, "bilinear", "center", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        labels=None,
        golden=wire.GoldenInputs(blob(2000), 16, "synthetic"),
        evaluation=None,
        evaluation_absent="no evaluation data",
        artifacts=artifacts,
        tools={},
    )
    return manifest, blobs


def make_bundle(folder: Path, key: Path, *, seed: int = 1, model_bytes: int = 100_000, version: int = 1) -> bundle.Bundle:
    """A signed bundle in ``folder``."""
    manifest, blobs = make_manifest(seed=seed, model_bytes=model_bytes, version=version)
    return bundle.write_bundle(folder, manifest, blobs, lambda data: signing.sign(data, key))
