"""What the quantize step decides for each layer of the module that is exported, and every exporter carries out.

Integers are defined here once: weights symmetric on −127…127 per output channel, activations asymmetric on 0…255 (an exporter
that stores them signed shifts both ends by 128, which changes nothing). A layer rounded with care carries its own scales, and
its weight in the module lies on that grid already. Files are read back and compared with these.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Kind = Literal["linear", "conv"]
Activations = Literal["float", "dynamic", "static"]


@dataclass(frozen=True)
class LayerQuant:
    """One layer's scheme. ``name`` is its path in the exported module. Ranges are real values and hold zero; they are set for
    static activations only.

    ``group`` inputs share one scale, None for all of an output channel's. ``scales`` float32 and ``zeros`` int32, both (out,
    groups), are set where the grid is not the largest entry ÷ 127; zero points are 0 on a symmetric grid, ±(2^(bits−1) − 1),
    and lie on 0 … 2^bits − 1 on any other.

    ``rows``, for dynamic activations in a runtime that takes one range for a whole tensor: each row is divided by its largest
    magnitude before it is quantized, and the product multiplied by that again.
    """

    name: str
    kind: Kind
    depthwise: bool
    weight_bits: int
    activations: Activations
    input_range: tuple[float, float] | None = None
    output_range: tuple[float, float] | None = None
    rows: bool = False
    group: int | None = None
    symmetric: bool = True
    scales: NDArray[np.float32] | None = field(default=None, compare=False)
    zeros: NDArray[np.int32] | None = field(default=None, compare=False)


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


@dataclass(frozen=True)
class WeightIntegers:
    """A layer's weight as integers: int32 (out, inputs of one output), scales float32 and zeros int32 (out, groups) for every
    ``group`` inputs, None for all."""

    integers: NDArray[np.int32]
    scales: NDArray[np.float32]
    zeros: NDArray[np.int32]
    group: int | None = None

    def dequantized(self) -> NDArray[np.float32]:
        """float32 (out, inputs): ``(integer − zero) · scale`` in float32, as every runtime computes it."""
        scales, zeros = spread_groups(self.scales, self.zeros, self.integers.shape[1], self.group)
        values: NDArray[np.float32] = (self.integers - zeros).astype("float32") * scales
        return values


def layer_integers(layer: LayerQuant, weight: NDArray[np.float32]) -> WeightIntegers:
    """The integers of ``layer`` for its (out, …) float weight, axes after the first flattened: on its own scales where it has
    them (a weight that lies on the grid gives back exactly its integers), else the largest entry of each channel ÷ 127."""
    import numpy as np

    flat = weight.reshape(weight.shape[0], -1)
    if layer.scales is None or layer.zeros is None:
        grid, scale = quantize_weight(flat)
        return WeightIntegers(grid.astype(np.int32), scale[:, None], np.zeros((len(scale), 1), np.int32))
    scales, zeros = spread_groups(layer.scales, layer.zeros, flat.shape[1], layer.group)
    top = 2 ** (layer.weight_bits - 1) - 1
    low, high = (-top, top) if layer.symmetric else (0, 2**layer.weight_bits - 1)
    integers = np.clip(np.rint(flat / scales) + zeros, low, high).astype(np.int32)
    return WeightIntegers(integers, layer.scales, layer.zeros, layer.group)


def spread_groups(
    scales: NDArray[np.float32], zeros: NDArray[np.int32], inputs: int, group: int | None
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """(out, groups) → (out, inputs)."""
    size = group or inputs
    return scales.repeat(size, 1)[:, :inputs], zeros.repeat(size, 1)[:, :inputs]


def activation_grid(low: float, high: float) -> tuple[float, int]:
    """A real range that holds zero → (scale, zero point on 0…255), with zero exactly on the grid."""
    import numpy as np

    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(np.float32((high - low) / 255.0)) if high > low else 1.0
    return scale, int(min(255, max(0, round(-low / scale))))
