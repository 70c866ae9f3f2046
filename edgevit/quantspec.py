"""What the quantize step decides for each layer of the module that is exported, and every exporter carries out.

Integers are defined here once: weights symmetric on −127…127 per output channel, activations asymmetric on 0…255 (an exporter
that stores them signed shifts both ends by 128, which changes nothing). Files are read back and compared with these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Kind = Literal["linear", "conv"]
Activations = Literal["float", "dynamic", "static"]


@dataclass(frozen=True)
class LayerQuant:
    """One layer's scheme. ``name`` is its path in the exported module. Ranges are real values and hold zero; they are set for
    static activations only."""

    name: str
    kind: Kind
    depthwise: bool
    weight_bits: int
    activations: Activations
    input_range: tuple[float, float] | None = None
    output_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class QuantSpec:
    """The scheme of the whole module: the layers named are quantized, every other one stays float.

    ``float_bits`` is the width of what stays float: 32, or 16 for ``fp16``. ``ranges`` is the method that chose static ranges.
    """

    scheme: str
    layers: tuple[LayerQuant, ...] = ()
    float_bits: int = 32
    calibration_images: int = 0
    ranges: str = ""

    def layer(self, name: str) -> LayerQuant | None:
        return next((one for one in self.layers if one.name == name), None)

    @property
    def integer_layers(self) -> int:
        return len(self.layers)


def quantize_weight(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(out, …) float weights → int8 of the same shape and the scale of each output channel, rounding to nearest even."""
    import numpy as np

    flat = np.abs(weight.reshape(weight.shape[0], -1)).max(axis=1)
    scale = np.where(flat > 0, flat / np.float32(127), np.float32(1)).astype(np.float32)
    grid = np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1)))
    return np.clip(grid, -127, 127).astype(np.int8), scale


def activation_grid(low: float, high: float) -> tuple[float, int]:
    """A real range that holds zero → (scale, zero point on 0…255), with zero exactly on the grid."""
    import numpy as np

    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(np.float32((high - low) / 255.0)) if high > low else 1.0
    return scale, int(min(255, max(0, round(-low / scale))))
