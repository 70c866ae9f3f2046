"""Outputs of this device against those recorded when the artifact was built. Needs numpy."""

from __future__ import annotations

from typing import Any

from device_agents import wire


def compare(got: Any, recorded: Any, tolerance: wire.Tolerance) -> wire.GoldenResult:
    """float32 (images, classes) twice → the worst case over all images, and whether it lies within ``tolerance``."""
    import numpy as np

    images = int(recorded.shape[0])
    if got.shape != recorded.shape:
        return wire.GoldenResult(False, images, 1e30, -1.0, images, "shape {}, recorded {}".format(got.shape, recorded.shape))
    if not np.isfinite(recorded).all():  # every comparison with a NaN is false, so each limit would be kept
        return wire.GoldenResult(False, images, 1e30, -1.0, images, "the recorded outputs are not all finite numbers")
    if not np.isfinite(got).all():
        bad = int((~np.isfinite(got)).any(axis=1).sum())
        return wire.GoldenResult(
            False, images, 1e30, -1.0, images, "not a number or infinite in {} of {} images".format(bad, images)
        )
    a, b = got.astype(np.float64), recorded.astype(np.float64)
    largest = float(np.abs(b).max())
    relative = min(float(np.abs(a - b).max()) / largest, 1e30) if largest > 0 else (0.0 if (a == b).all() else 1e30)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    dots = (a * b).sum(axis=1)
    # Two all-zero rows agree; one all-zero row beside another agrees with nothing.
    both_zero = (np.abs(a).max(axis=1) == 0) & (np.abs(b).max(axis=1) == 0)
    cosines = np.where(norms > 0, dots / np.where(norms > 0, norms, 1.0), np.where(both_zero, 1.0, 0.0))
    cosine = float(np.clip(cosines.min(), -1.0, 1.0))
    wrong = int(((a.argmax(axis=1) != b.argmax(axis=1)) & (_margins(b) > tolerance.top1_margin)).sum())
    reasons = []
    if tolerance.max_relative is not None and relative > tolerance.max_relative:
        reasons.append("relative difference {:.3g}, at most {:.3g}".format(relative, tolerance.max_relative))
    if cosine < tolerance.min_cosine:
        reasons.append("cosine {:.5f}, at least {:.5f}".format(cosine, tolerance.min_cosine))
    if wrong:
        reasons.append("another class on {} of {} images".format(wrong, images))
    return wire.GoldenResult(not reasons, images, relative, cosine, wrong, "; ".join(reasons))


def _margins(outputs: Any) -> Any:
    """Best minus second-best output of each image; infinite where there is one class only."""
    import numpy as np

    if outputs.shape[1] < 2:
        return np.full(outputs.shape[0], np.inf)
    top = np.sort(outputs, axis=1)
    return top[:, -1] - top[:, -2]
