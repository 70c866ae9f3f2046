"""Activation ranges of layers, from real images, chosen for the smallest error behind the layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from device_agents.wire import Preprocessing
from edgevit.errors import BuildError
from edgevit.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

BATCH = 16
SAMPLE_ROWS = 2048
"""Rows (tokens, pixels) kept of each layer for the search, spread evenly over the calls."""

QUANTILES = (1.0, 0.99999, 0.9999, 0.9997, 0.9995, 0.999, 0.998, 0.996, 0.993)
SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6)


@dataclass(frozen=True)
class LayerRange:
    """Real ranges of one layer's input and output, beside the smallest and largest value seen."""

    input: tuple[float, float]
    output: tuple[float, float]
    seen_input: tuple[float, float]

    def describe(self) -> str:
        (low, high), (a, b) = self.input, self.seen_input
        return f"weights int8 per channel, input {low:.4g} … {high:.4g} (seen {a:.4g} … {b:.4g})"


@dataclass
class Watch:
    """What was seen of one layer."""

    low: float = 0.0
    high: float = 0.0
    out_low: float = 0.0
    out_high: float = 0.0
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)

    def look(self, name: str, x: torch.Tensor, y: torch.Tensor, keep: int, generator: torch.Generator) -> None:
        """Take in one call's input and output, channels last, keeping ``keep`` rows. Raises :class:`BuildError` for NaN or infinity."""
        import torch

        low, high = (float(v) for v in torch.aminmax(x))
        out_low, out_high = (float(v) for v in torch.aminmax(y))
        if not all(math.isfinite(v) for v in (low, high, out_low, out_high)):
            raise BuildError(f"NaN or infinity at the layer {name} on calibration images", hint="check the weights")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.out_low, self.out_high = min(self.out_low, out_low), max(self.out_high, out_high)
        for tensor, kept in ((x, self.inputs), (y, self.outputs)):
            rows = tensor.reshape(-1, tensor.shape[-1])
            chosen = torch.randint(len(rows), (keep,), generator=generator)
            kept.append(rows[chosen].clone())


def normalise(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> torch.Tensor:
    """uint8 (N, H, W, 3) → float32 (N, 3, H, W) exactly as the device makes it: (x / 255 − mean) / std in float32."""
    import numpy as np
    import torch

    mean, std = np.asarray(preprocessing.mean, np.float32), np.asarray(preprocessing.std, np.float32)
    x = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def observe_ranges(
    module: torch.nn.Module,
    preprocessing: Preprocessing,
    pixels: NDArray[np.uint8],
    layers: Sequence[str],
    method: str,
    on_progress: Progress,
) -> dict[str, LayerRange]:
    """Run ``pixels`` through the module and choose each layer's ranges; layers that never ran are absent.

    ``minmax`` takes what was seen. ``mse`` tries clipped ranges and keeps the one with the smallest squared error of the layer's
    *output* on a seeded sample of rows, weights rounded too. Raises :class:`BuildError` for NaN or infinity, naming the layer.
    """
    import torch

    watches = {name: Watch() for name in layers}
    generator = torch.Generator().manual_seed(0)
    modules = dict(module.named_modules())
    keep = rows_to_keep(-(-len(pixels) // BATCH))
    hooks = [modules[n].register_forward_hook(_hook(n, watches[n], keep, generator)) for n in layers]
    on_progress.start("calibrate", "calibrating", len(pixels), "images")
    try:
        with torch.no_grad():
            for start in range(0, len(pixels), BATCH):
                module(normalise(pixels[start : start + BATCH], preprocessing))
                on_progress.advance("calibrate", min(start + BATCH, len(pixels)))
    finally:
        for hook in hooks:
            hook.remove()
    ranges = {}
    for name, watch in watches.items():
        if watch.inputs:
            layer = modules[name]
            weight = layer.weight.detach() if isinstance(layer, torch.nn.Linear) else None
            ranges[name] = choose_ranges(watch, weight, method)
    on_progress.finish("calibrate", f"{len(ranges)} layers calibrated on {len(pixels)} images")
    return ranges


def rows_to_keep(calls: int) -> int:
    """Rows to keep of each of ``calls`` calls."""
    return max(1, -(-SAMPLE_ROWS // max(calls, 1)))


def _hook(name: str, watch: Watch, keep: int, generator: torch.Generator) -> Any:
    import torch

    def see(layer: Any, args: tuple[Any, ...], output: Any) -> None:
        rows = [
            t.detach().permute(0, 2, 3, 1) if isinstance(layer, torch.nn.Conv2d) else t.detach() for t in (args[0], output)
        ]
        watch.look(name, rows[0], rows[1], keep, generator)

    return see


def choose_ranges(watch: Watch, weight: torch.Tensor | None, method: str) -> LayerRange:
    """Ranges of one layer. ``weight`` (out, in) makes the error behind a linear layer count, else the error of the input."""
    import torch

    seen, seen_out = (watch.low, watch.high), (watch.out_low, watch.out_high)
    if method == "minmax":
        return LayerRange(seen, seen_out, seen)
    inputs, outputs = torch.cat(watch.inputs), torch.cat(watch.outputs)
    # The error behind the layer is e·Wᵀ: its squared size needs only the (in × in) Gram matrix.
    gram = None if weight is None else weight.T @ weight
    return LayerRange(_search(inputs, seen, gram), _search(outputs, seen_out, None), seen)


def _search(values: torch.Tensor, seen: tuple[float, float], gram: torch.Tensor | None) -> tuple[float, float]:
    import torch

    flat = values.flatten()
    order = torch.sort(flat).values
    best, best_error = seen, float("inf")
    tried = set()
    for q in QUANTILES:
        last = len(order) - 1
        low, high = (seen if q == 1.0 else (float(order[round((1 - q) * last)]), float(order[round(q * last)])))
        for shrink in SHRINKS if q == 1.0 else (1.0,):
            one = (min(low * shrink, 0.0), max(high * shrink, 0.0))
            if one in tried or one[1] <= one[0]:
                continue
            tried.add(one)
            scale = (one[1] - one[0]) / 255
            zero = round(-one[0] / scale)
            error = (torch.clamp(torch.round(values / scale) + zero, 0, 255) - zero) * scale - values
            size = float((error @ gram * error).sum()) if gram is not None else float((error * error).sum())
            if size < best_error:
                best, best_error = one, size
    return best
