"""What the worker processes of a search do: look at the model, count what a candidate's file gets right."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from device_agents import wire
from edgevit.cache import Cache, digest_of
from edgevit.errors import BuildError
from edgevit.model import ModelSource
from edgevit.progress import Progress
from edgevit.study.plan import KnownModel
from edgevit.tune.size import Bulk, weigh
from edgevit.tune.space import STEPS

STEP_IMAGES = 32
"""Images of one training step, as :class:`edgevit.compress.distil.DistilConfig` has it."""


@dataclass(frozen=True)
class Survey:
    """The model as the search sees it: why kinds of step cannot apply, how many blocks and tokens may merge (0 where none may),
    about how long one step of recovery takes here, and what its files weigh."""

    known: KnownModel
    depth: int
    tokens: int
    seconds_per_step: float
    bulk: Bulk


def survey(source: ModelSource, progress: Progress) -> Survey:
    """Load the model and look at it. Raises :class:`ModelError` where it cannot be loaded."""
    from edgevit.compress import Compressed, why_not
    from edgevit.compress.merge_tokens import count_tokens
    from edgevit.model import load_model

    progress.start("model", f"looking at {source.name}")
    model = load_model(source)
    reasons: Mapping[str, str] = {kind: why_not(model.module, [kind]) for kind in (*STEPS, "quantize")}
    depth = tokens = uses = 0
    if not reasons["merge_tokens"]:
        module: Any = model.module
        depth = len(module.blocks)
        state = Compressed(module, model.preprocessing, module)
        uses = count_tokens(module, state)
        tokens = uses - int(module.num_prefix_tokens)
    seconds = _time_a_step(model.module, model.preprocessing)
    bulk = weigh(model.module, model.preprocessing, uses)
    progress.finish("model", f"{model.info.parameters:,} parameters, {model.info.classes} classes")
    known = KnownModel(model.info.digest, {kind: reason for kind, reason in reasons.items() if reason})
    return Survey(known, depth, tokens, seconds, bulk)


def _time_a_step(module: Any, preprocessing: wire.Preprocessing) -> float:
    """A step of recovery is about four forward passes of its images: the teacher's one, the student's one and its way back."""
    import torch

    few = torch.zeros(4, 3, preprocessing.height, preprocessing.width)
    module.eval()
    with torch.inference_mode():
        module(few)
        began = time.monotonic()
        module(few)
    return (time.monotonic() - began) * 4 * STEP_IMAGES / len(few)


@dataclass(frozen=True)
class Score:
    """Run a candidate's file on its evaluation images; all of it lies in the cache. ``artifact`` and ``preprocessing`` as JSON
    values, ``images`` the SHA-256 of the pixels."""

    artifact: Any
    preprocessing: Any
    images: str


def score(task: Score, progress: Progress) -> tuple[int, ...]:
    """The class index that the exported file gives each image, in the newest runtime installed here; kept in the cache.

    Raises :class:`BuildError` where the cache lost the file or the images since they were made.
    """
    import numpy as np

    from edgevit.export.runtime import run_artifact, runtime_of

    artifact = wire.decode(wire.Artifact, task.artifact, "artifact")
    preprocessing = wire.decode(wire.Preprocessing, task.preprocessing, "preprocessing")
    cache = Cache()
    key = score_key(artifact, preprocessing, task.images)
    known = cache.get(key)
    if known is not None:
        return tuple(known.meta["predictions"])
    pixels = np.load(_blob(cache, task.images), allow_pickle=False)
    model = _blob(cache, artifact.blob.sha256).read_bytes()
    runtime, _ = runtime_of(artifact.format)
    progress.start("score", f"scoring {artifact.name}", len(pixels), "images")
    found: list[int] = []
    for start in range(0, len(pixels), 50):
        outputs = run_artifact(artifact.format, model, pixels[start : start + 50], preprocessing, artifact.input)
        found += [int(i) for i in outputs.argmax(1)]
        progress.advance("score", len(found))
    progress.finish("score", f"{artifact.name}: {len(found):,} images in {runtime}")
    cache.put(key, {}, {"predictions": found})
    return tuple(found)


def score_key(artifact: wire.Artifact, preprocessing: wire.Preprocessing, images: str) -> str:
    """What stands for the predictions of a file here; one that takes floats is fed by the mean and deviation of its model."""
    from edgevit.export.runtime import runtime_of

    fed = [preprocessing.mean, preprocessing.std]
    return digest_of("host predictions", artifact.blob.sha256, fed, images, runtime_of(artifact.format))


def _blob(cache: Cache, sha256: str) -> Path:
    path = cache.blob_path(sha256)
    if not path.is_file():
        raise BuildError(f"the cache at {cache.root} lost {sha256[:12]} since it was made", hint="edgevit tune …, again")
    return path
