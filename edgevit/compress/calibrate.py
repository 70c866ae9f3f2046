"""Activation ranges of layers, from real images, chosen for the smallest error behind the layer."""

from __future__ import annotations

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
"""Rows (tokens, pixels) kept of each layer for the search, spread evenly over the images."""

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)


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
    """What was seen of one layer: extremes over everything, the extremes of each image, and a sample of rows."""

    low: float = 0.0
    high: float = 0.0
    out_low: float = 0.0
    out_high: float = 0.0
    extremes: list[torch.Tensor] = field(default_factory=list)
    out_extremes: list[torch.Tensor] = field(default_factory=list)
    inputs: list[torch.Tensor] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)

    def look(self, name: str, x: torch.Tensor, y: torch.Tensor, images: int, keep: int, generator: torch.Generator) -> None:
        """Take in one call of ``images`` images, each tensor images first and channels last, keeping ``keep`` rows of it.

        The first row of each image is always among them: it is the class token where there is one, whose activations are unlike
        the others' and decide the answer. Raises :class:`BuildError` for NaN or infinity.
        """
        import torch

        for tensor, extremes, kept in ((x, self.extremes, self.inputs), (y, self.out_extremes, self.outputs)):
            flat = tensor.reshape(images, -1)
            ends = torch.stack([flat.amin(1), flat.amax(1)], 1)
            if not bool(torch.isfinite(ends).all()):
                raise BuildError(f"NaN or infinity at the layer {name} on calibration images", hint="check the weights")
            extremes.append(ends)
            rows = tensor.reshape(images, -1, tensor.shape[-1])
            drawn = torch.randint(rows.shape[1], (images, max(1, keep // images)), generator=generator)
            drawn[:, 0] = 0
            kept.append(rows[torch.arange(images)[:, None], drawn].reshape(-1, tensor.shape[-1]).clone())
        self.low, self.high = _widest(self.extremes[-1], self.low, self.high)
        self.out_low, self.out_high = _widest(self.out_extremes[-1], self.out_low, self.out_high)


def _widest(ends: torch.Tensor, low: float, high: float) -> tuple[float, float]:
    return min(low, float(ends[:, 0].min())), max(high, float(ends[:, 1].max()))


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

    ``minmax`` takes what was seen; ``mean`` the mean of each image's own extremes; ``error`` shrinks what was seen to the
    smallest relative error of each sampled row behind the layer. Raises :class:`BuildError` for NaN or infinity, naming it.
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
        rows = [t.detach().permute(0, 2, 3, 1) if isinstance(layer, torch.nn.Conv2d) else t.detach() for t in (args[0], output)]
        watch.look(name, rows[0], rows[1], len(output), keep, generator)

    return see


def choose_ranges(watch: Watch, weight: torch.Tensor | None, method: str) -> LayerRange:
    """Ranges of one layer by ``method``. ``weight`` (out, in) makes the error behind a linear layer count, else the input's.

    Clipping by quantiles of all rows was measured too and is far worse: the few large activations carry the answer.
    """
    import torch

    seen, seen_out = (watch.low, watch.high), (watch.out_low, watch.out_high)
    if method == "minmax":
        return LayerRange(seen, seen_out, seen)
    if method == "mean":
        return LayerRange(_mean_extremes(watch.extremes), _mean_extremes(watch.out_extremes), seen)
    return LayerRange(
        _least_error(torch.cat(watch.inputs), seen, weight), _least_error(torch.cat(watch.outputs), seen_out, None), seen
    )


def _mean_extremes(extremes: list[torch.Tensor]) -> tuple[float, float]:
    import torch

    low, high = torch.cat(extremes).mean(0).tolist()
    return min(low, 0.0), max(high, 0.0)


def _least_error(values: torch.Tensor, seen: tuple[float, float], weight: torch.Tensor | None) -> tuple[float, float]:
    """The seen range with each end shrunk, first the upper, to the smallest relative squared error of the rows."""
    low, high = min(seen[0], 0.0), max(seen[1], 0.0)
    if not high > low:
        return low, high
    exact = values if weight is None else values @ weight.T
    size = (exact * exact).sum(1).clamp_min(1e-12)

    def error(one_low: float, one_high: float) -> float:
        scale = (one_high - one_low) / 255
        zero = round(-one_low / scale)
        off = ((values / scale).round() + zero).clamp(0, 255).sub(zero).mul(scale) - values
        behind = off if weight is None else off @ weight.T
        return float(((behind * behind).sum(1) / size).sum())

    if high > 0:
        high *= min(SHRINKS, key=lambda shrink: error(low, high * shrink))
    if low < 0:
        low *= min(SHRINKS, key=lambda shrink: error(low * shrink, high))
    return low, high
