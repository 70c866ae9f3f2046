"""A file against the torch module it was exported from, on the same images: a failed gate is an error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from device_agents.wire import Parity
from edgevit.errors import ParityError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from device_agents.wire import Preprocessing


@dataclass(frozen=True)
class Gate:
    """What a precision must reach. ``max_relative`` is the largest absolute difference ÷ the largest absolute reference output.

    ``min_agreement`` counts top-1 only on images whose reference margin is clear: above ``margin`` × the largest
    absolute output (random weights give near-ties that any rounding turns).
    """

    max_relative: float | None
    min_cosine: float
    mean_cosine: float
    min_agreement: float
    margin: float


GATES = {
    "fp32": Gate(max_relative=1e-3, min_cosine=0.99999, mean_cosine=0.99999, min_agreement=1.0, margin=0.005),
    "fp16": Gate(max_relative=2e-2, min_cosine=0.999, mean_cosine=0.9995, min_agreement=1.0, margin=0.05),
    "int8-dynamic": Gate(max_relative=None, min_cosine=0.9, mean_cosine=0.98, min_agreement=0.9, margin=0.1),
    "int8-weights": Gate(max_relative=None, min_cosine=0.98, mean_cosine=0.995, min_agreement=0.95, margin=0.1),
    "int4-weights": Gate(max_relative=None, min_cosine=0.8, mean_cosine=0.93, min_agreement=0.85, margin=0.15),
    "mixed": Gate(max_relative=None, min_cosine=0.8, mean_cosine=0.93, min_agreement=0.85, margin=0.15),
    "int8-static": Gate(max_relative=None, min_cosine=0.9, mean_cosine=0.97, min_agreement=0.9, margin=0.1),
}
"""Measured on DeiT-Tiny: fp32 relative 2e-6; int8 mean cosine ≥ 0.99 in both formats, one image of 650 down to 0.93."""


TURNED = Gate(max_relative=0.1, min_cosine=0.99, mean_cosine=0.99, min_agreement=1.0, margin=0.1)
"""What a float file of a model that merges tokens must reach on images where it merges others than the module did: of two pairs
as good as alike float noise decides. Measured on DeiT-Tiny in TFLite: 1 of 32 images, relative 8e-3, the others 3e-6."""

TURNED_SHARE = 1 / 8
"""Of the images at most so many; a file that is wrong is wrong on most."""


def reference_outputs(
    module: torch.nn.Module, pixels: NDArray[np.uint8], preprocessing: Preprocessing, batch: int = 16
) -> NDArray[np.float32]:
    """The module's own outputs on uint8 (N, H, W, 3), float32 (N, classes)."""
    import numpy as np
    import torch

    from edgevit.compress.calibrate import normalise

    rows = []
    with torch.no_grad():
        for start in range(0, len(pixels), batch):
            rows.append(module(normalise(pixels[start : start + batch], preprocessing)).float().numpy())
    return np.concatenate(rows)


def measure_parity(reference: NDArray[np.float32], outputs: NDArray[np.float32]) -> Parity:
    """Figures of ``outputs`` against ``reference``, both (N, classes). NaN or infinity is a :class:`ParityError`."""
    import numpy as np

    if outputs.shape != reference.shape:
        raise ParityError(f"the file gives outputs of shape {outputs.shape}, the module {reference.shape}")
    if not np.isfinite(outputs).all():
        raise ParityError(f"the file gives NaN or infinity on {int((~np.isfinite(outputs)).any(axis=1).sum())} images")
    difference = float(np.abs(outputs - reference).max())
    return Parity(
        images=len(reference),
        max_abs_error=difference,
        max_relative_error=difference / max(float(np.abs(reference).max()), 1e-12),
        min_cosine=float(cosines(reference, outputs).min()),
        top1_agreement=float((outputs.argmax(1) == reference.argmax(1)).mean()),
    )


def verify_parity(
    name: str, scheme: str, reference: NDArray[np.float32], outputs: NDArray[np.float32], merges: bool = False
) -> Parity:
    """The figures, or :class:`ParityError` naming every gate that failed with its number and limit.

    ``merges``: the module merges tokens, so a few images may be held to :data:`TURNED` where the scheme is a float one."""
    import numpy as np

    parity, gate = measure_parity(reference, outputs), GATES[scheme]
    turned = np.zeros(len(reference), bool)
    if merges and gate.max_relative is not None:
        turned = np.abs(outputs - reference).max(1) > gate.max_relative * float(np.abs(reference).max())
        if turned.sum() > TURNED_SHARE * len(turned):
            turned[:] = False
    failed = _find_misses(gate, reference, outputs, ~turned)
    if turned.any():
        failed += [
            f"{text}, where near ties may merge other tokens" for text in _find_misses(TURNED, reference, outputs, turned)
        ]
    if failed:
        raise ParityError(
            f"{name} disagrees with the module it was exported from on {parity.images} images: {'; '.join(failed)}",
            hint="try another recipe, or more calibration images with --calib",
        )
    return parity


def find_turned(scheme: str, parity: Parity) -> tuple[str, ...]:
    """What is to be said of a file that passed although some of its answers lie beyond the gate of its scheme."""
    limit = GATES[scheme].max_relative
    if limit is None or parity.max_relative_error <= limit:
        return ()
    return (
        f"on some of {parity.images} images it merges other tokens than the module (relative error up to "
        f"{parity.max_relative_error:.2g}): of pairs as good as alike float noise decides",
    )


def _find_misses(
    gate: Gate, reference: NDArray[np.float32], outputs: NDArray[np.float32], judged: NDArray[np.bool_]
) -> list[str]:
    """The gates that the ``judged`` images fail, each with its number and limit."""
    import numpy as np

    largest = max(float(np.abs(reference).max()), 1e-12)
    reference, outputs = reference[judged], outputs[judged]
    relative = float(np.abs(outputs - reference).max()) / largest
    found = cosines(reference, outputs)
    top = np.sort(reference, axis=1)
    clear = (top[:, -1] - top[:, -2]) > gate.margin * largest
    agreement = float((outputs.argmax(1) == reference.argmax(1))[clear].mean()) if clear.any() else 1.0
    failed = []
    if gate.max_relative is not None and relative > gate.max_relative:
        failed.append(f"relative error {relative:.3g}, at most {gate.max_relative:g}")
    if found.min() < gate.min_cosine:
        failed.append(f"smallest cosine {found.min():.4f}, at least {gate.min_cosine:g}")
    if found.mean() < gate.mean_cosine:
        failed.append(f"mean cosine {found.mean():.4f}, at least {gate.mean_cosine:g}")
    if agreement < gate.min_agreement:
        failed.append(f"top-1 agreement {agreement:.3f} over {int(clear.sum())} clear images, at least {gate.min_agreement:g}")
    return failed


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine of each row; 0 where one row is all zeros, so that a dead output never looks right."""
    import numpy as np

    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a64, axis=1) * np.linalg.norm(b64, axis=1)
    found: NDArray[np.float64] = np.clip(
        np.where(lengths > 0, (a64 * b64).sum(1) / np.maximum(lengths, 1e-300), 0.0), -1.0, 1.0
    )
    return found
