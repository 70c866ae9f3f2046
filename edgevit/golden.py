"""Golden images and outputs: what every device is checked with before anything is timed on it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from device_agents.wire import CheckedRuntime, Preprocessing, Tolerance

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GOLDEN_IMAGES = 16
SEED = 20_240_229

_FIXED = {"fp32": 1e-3, "fp16": 1e-2, "int8-weights": 1e-2, "int4-weights": 1e-2}
_INT_COSINE = 0.98
LEAST_SPREAD = 0.1
"""Share of the largest absolute output that the top-1 margin has at least: two runtime versions on one machine can agree to the
last bit where another instruction set rounds a few activations the other way."""


@dataclass(frozen=True)
class GoldenImages:
    """uint8 (count, height, width, 3); ``source`` is ``images`` or ``synthetic``."""

    pixels: NDArray[np.uint8]
    source: str


def choose_golden(available: int, batch: int) -> list[int]:
    """Seeded indices of at least :data:`GOLDEN_IMAGES` images, a multiple of ``batch``, without repeats while they last."""
    import numpy as np

    count = -(-max(GOLDEN_IMAGES, batch) // batch) * batch
    order = np.random.default_rng(SEED).permutation(available)
    return [int(order[i % available]) for i in range(count)]


def synthetic_images(count: int, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Seeded images with structure at several scales, colour fields plus noise: no channel and no corner is alike."""
    import numpy as np

    rng = np.random.default_rng(SEED)
    height, width = preprocessing.height, preprocessing.width
    images = np.zeros((count, height, width, 3), np.float64)
    for cells in (2, 5, 11, 29):
        rows = np.linspace(0, cells - 1e-6, height).astype(int)
        columns = np.linspace(0, cells - 1e-6, width).astype(int)
        images += rng.uniform(0, 255, (count, cells, cells, 3))[:, rows][:, :, columns] / 4
    images += rng.normal(0, 12, images.shape)
    gain, offset = rng.uniform(0.6, 1.4, (count, 1, 1, 3)), rng.uniform(-40, 40, (count, 1, 1, 3))
    return np.clip(images * gain + offset, 0, 255).astype(np.uint8)


def tolerance_for(scheme: str, outputs: NDArray[np.float32], checked: Sequence[CheckedRuntime]) -> tuple[Tolerance, str]:
    """How far a right device may be off, and where the figure comes from.

    Files that compute in float: 1e-3 (fp32) or 1e-2 (fp16 and weight-only) of the largest output. Integer files: cosine ≥ 0.98
    on every image, and the same top-1 wherever the recorded margin exceeds the spread between two runtime versions: twice the
    largest difference measured in the oldest runtime, and at least :data:`LEAST_SPREAD` of the largest output.
    """
    import numpy as np

    largest = float(np.abs(outputs).max())
    if scheme in _FIXED:
        relative = _FIXED[scheme]
        return Tolerance(relative, 0.999, 2 * relative * largest), f"golden: relative difference at most {relative:g}"
    least = LEAST_SPREAD * largest
    measured = 2 * max((one.max_abs_error for one in checked), default=0.0)
    if measured > least:
        versions = ", ".join(f"{one.runtime} {one.version}" for one in checked)
        note = f"golden: top-1 margin {measured:.3g} is twice the largest difference measured in {versions}"
    else:
        note = f"golden: top-1 margin {least:.3g} is {LEAST_SPREAD:g} of the largest output"
    return Tolerance(None, _INT_COSINE, max(measured, least)), note


def npy_bytes(array: NDArray[Any]) -> bytes:
    """An ``.npy`` file (version 1.0, C order, no pickle): equal arrays give equal bytes."""
    import numpy as np

    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return stream.getvalue()
