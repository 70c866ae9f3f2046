"""Exact rewrites of the module before it is quantized and exported; one file each, every one proven equal on real images.

:data:`REWRITES` is the list the build walks, in order: what folds into weights comes before what changes how they are called.
A recipe switches them off by name. One that breaks parity is refused, named in the report, and the build goes on without it.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from device_agents.wire import BeforeAfter, Preprocessing, StepReport
from edgevit.compress import CalibrationData, Compressed
from edgevit.compress.calibrate import normalise
from edgevit.compress.merge_choices import Choices, keeping, repeating
from edgevit.macs import count_macs
from edgevit.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

TOLERANCE = 1e-4
"""Of the largest logit: how far a rewrite may move any output, in float32."""
IMAGES = 32
FIRST_LOOK = 8
"""Images that each rewrite is proven on by itself: the four with extreme borders and as many others."""
BATCH = 12

FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError, NotImplementedError)
"""What a model's own code raises where it is run, or asked to join its branches, in a way that it was not written for."""

REWRITES: Mapping[str, str] = {
    "branches": "edgevit.rewrite.branches",
    "batch_norm": "edgevit.rewrite.batch_norm",
    "layer_scale": "edgevit.rewrite.layer_scale",
    "norm_affine": "edgevit.rewrite.norm_affine",
    "class_token": "edgevit.rewrite.class_token",
    "attention": "edgevit.rewrite.attention",
    "centre": "edgevit.rewrite.centre",
    "pixels": "edgevit.rewrite.pixels",
    "patches": "edgevit.rewrite.patches",
}
"""Rewrite → the module whose ``rewrite(subject) -> Applied | str`` carries it out, in the order they are tried."""


@dataclass(frozen=True)
class Subject:
    """What a rewrite starts from and must leave alone: a module, what its input means, and ``x`` (N, 3, H, W), two images of
    that meaning to trace it with."""

    module: torch.nn.Module
    preprocessing: Preprocessing
    x: torch.Tensor


@dataclass(frozen=True)
class Applied:
    """The rewritten module and how many of its layers are new or other. ``preprocessing``: where its input means another
    thing now."""

    module: torch.nn.Module
    layers: int
    preprocessing: Preprocessing | None = None


def apply_rewrites(state: Compressed, data: CalibrationData, on_progress: Progress, off: Collection[str] = ()) -> Compressed:
    """Apply every rewrite that fits, in order, and report which did and which were refused.

    All together are proven on up to :data:`IMAGES` calibration images and on images with extreme borders: no output moves by
    more than :data:`TOLERANCE` of the largest. Each by itself is proven on a few of them first, and on all where together they
    move more. Where tokens merge, the rewritten module merges those that the module did, and what it would have chosen by is
    held to the same tolerance. Those named ``off`` are left out.
    """
    began = time.monotonic()
    macs = count_macs(state.module, state.preprocessing)
    on_progress.start("rewrite", "rewriting exactly", len(REWRITES), "rewrites")
    pixels = _with_extremes(data.pixels[:IMAGES])
    every, few = _original(state, pixels), _original(state, pixels[-FIRST_LOOK:])
    walked = _walk(state, few, off, on_progress)
    moved = _moved(walked.state.module, walked.state.preprocessing, every)
    if isinstance(moved, str) or moved > TOLERANCE:
        walked = _walk(state, every, off, on_progress)
        moved = _moved(walked.state.module, walked.state.preprocessing, every)
    summary = "no rewrite was applied"
    if walked.layers:
        summary = (
            f"rewritten exactly: {', '.join(walked.layers)}; on {len(pixels)} images no output "
            f"moves by more than {moved:.1e} of the largest"
        )
    if walked.refused:
        summary += f"; refused, since it fails or would change the answers: {', '.join(walked.refused)}"
    on_progress.finish("rewrite", summary)
    after = count_macs(walked.state.module, state.preprocessing)
    report = StepReport(
        "rewrite",
        sum(walked.layers.values()),
        summary,
        walked.details,
        macs=BeforeAfter(macs, after),
        seconds=time.monotonic() - began,
    )
    return walked.state.reported(report)


@dataclass(frozen=True)
class _Walked:
    """What all rewrites came to: layers by the rewrite applied, names of those refused, a line on each."""

    state: Compressed
    layers: dict[str, int]
    refused: list[str]
    details: dict[str, str]


@dataclass(frozen=True)
class _Original:
    """What the module gives for ``pixels`` before it is rewritten, and which tokens merged on the way."""

    pixels: NDArray[np.uint8]
    outputs: torch.Tensor
    choices: Choices


def _original(state: Compressed, pixels: NDArray[np.uint8]) -> _Original:
    with keeping() as choices:
        return _Original(pixels, _outputs(state.module, pixels, state.preprocessing), choices)


def _walk(state: Compressed, original: _Original, off: Collection[str], on_progress: Progress) -> _Walked:
    layers: dict[str, int] = {}
    refused: list[str] = []
    details: dict[str, str] = {}
    for i, (name, place) in enumerate(REWRITES.items()):
        on_progress.advance("rewrite", i, name)
        if name in off:
            details[name] = "switched off by the recipe"
            continue
        subject = Subject(state.module, state.preprocessing, normalise(original.pixels[:2], state.preprocessing))
        try:
            applied = importlib.import_module(place).rewrite(subject)
        except FAILURES as e:
            details[name] = f"refused: it fails: {_said(e)}"
            refused.append(name)
            continue
        if isinstance(applied, str):
            details[name] = f"does not apply: {applied}"
            continue
        preprocessing = applied.preprocessing or state.preprocessing
        moved = _moved(applied.module, preprocessing, original)
        if isinstance(moved, str) or moved > TOLERANCE:
            why = moved if isinstance(moved, str) else f"outputs moved by {moved:.1e} of the largest, at most {TOLERANCE:g}"
            details[name] = f"refused: {why}"
            refused.append(name)
            continue
        state = replace(state, module=applied.module, preprocessing=preprocessing)
        layers[name] = applied.layers
        details[name] = f"{applied.layers} layers, outputs move by {moved:.1e} of the largest"
    return _Walked(state, layers, refused, details)


def _with_extremes(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``images`` and four of them with borders of black, white, and both in turn: what a padded layer must not confuse."""
    import numpy as np

    extreme = images[np.arange(4) % len(images)].copy()
    for i, (rows, columns) in enumerate(((0, 0), (255, 255), (0, 255), (255, 0))):
        extreme[i, :3], extreme[i, -3:] = rows, rows
        extreme[i, :, :3], extreme[i, :, -3:] = columns, columns
    return np.concatenate([images, extreme])


def _outputs(module: torch.nn.Module, pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> torch.Tensor:
    import torch

    module.eval()
    with torch.no_grad():
        parts = [module(normalise(pixels[i : i + BATCH], preprocessing)) for i in range(0, len(pixels), BATCH)]
    return torch.cat(parts)


def _moved(module: Any, preprocessing: Preprocessing, original: _Original) -> float | str:
    """The largest change of an output as a share of the largest output, or of a gain where tokens merge; or why there is none
    to tell."""
    try:
        with repeating(original.choices):
            outputs = _outputs(module, original.pixels, preprocessing)
    except FAILURES as e:
        return f"the rewritten module fails: {_said(e)}"
    expected = original.outputs
    if outputs.shape != expected.shape:
        return f"outputs of shape {tuple(outputs.shape)}, expected {tuple(expected.shape)}"
    if original.choices.left:
        return f"{original.choices.left} merges of tokens are left out"
    moved = float((outputs - expected).abs().max()) / max(float(expected.abs().max()), 1e-12)
    return max(moved, original.choices.moved) if moved == moved else "outputs are no longer numbers"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
