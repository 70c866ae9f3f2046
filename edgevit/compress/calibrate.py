"""Activation ranges of layers, from real images, chosen for the smallest error behind the layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from device_agents.wire import Preprocessing
from edgevit.compress.rounding import Moments
from edgevit.errors import BuildError
from edgevit.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

BATCH = 16
SAMPLE_ROWS = 2048
"""Rows (tokens, pixels) kept of each layer for the search, spread evenly over the images."""

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3)


@dataclass(frozen=True)
class LayerRange:
    """Real ranges of one layer's input and output, beside the smallest and largest value seen, and ``damage``: the mean over
    rows of the squared change of the layer's output, relative to the output, that these ranges cause on their own."""

    input: tuple[float, float]
    output: tuple[float, float]
    seen_input: tuple[float, float]
    damage: float = 0.0


@dataclass
class Watch:
    """What was seen of one layer: extremes over everything and of each channel, a sample of rows, and, where ``moments`` is
    given, sums over all its inputs."""

    low: float = 0.0
    high: float = 0.0
    out_low: float = 0.0
    out_high: float = 0.0
    largest_input: torch.Tensor | None = None
    largest_output: torch.Tensor | None = None
    inputs: list[torch.Tensor] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    moments: Moments | None = None

    def look(self, name: str, x: torch.Tensor, y: torch.Tensor, images: int, keep: int, generator: torch.Generator) -> None:
        """Take in one call of ``images`` images, each tensor images first and channels last, keeping ``keep`` rows of it.

        The first row of each image is always among them: it is the class token where there is one, whose activations are unlike
        the others' and decide the answer. Raises :class:`BuildError` for NaN or infinity.
        """
        import torch

        for tensor, kept in ((x, self.inputs), (y, self.outputs)):
            if not bool(torch.isfinite(tensor.sum())):
                raise BuildError(f"NaN or infinity at the layer {name} on calibration images", hint="check the weights")
            rows = tensor.reshape(images, -1, tensor.shape[-1])
            drawn = torch.randint(rows.shape[1], (images, max(1, keep // images)), generator=generator)
            drawn[:, 0] = 0
            kept.append(rows[torch.arange(images)[:, None], drawn].reshape(-1, tensor.shape[-1]).clone())
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        self.out_low, self.out_high = min(self.out_low, float(y.min())), max(self.out_high, float(y.max()))
        self.largest_input = _largest(x, self.largest_input)
        self.largest_output = _largest(y, self.largest_output)
        if self.moments is not None:
            self.moments.add(x)


def _largest(tensor: torch.Tensor, known: torch.Tensor | None) -> torch.Tensor:
    import torch

    here = tensor.abs().reshape(-1, tensor.shape[-1]).amax(0)
    return here if known is None else torch.maximum(here, known)


def normalise(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> torch.Tensor:
    """uint8 (N, H, W, 3) → float32 (N, 3, H, W) exactly as the device makes it: (x / 255 − mean) / std in float32."""
    import numpy as np
    import torch

    mean, std = np.asarray(preprocessing.mean, np.float32), np.asarray(preprocessing.std, np.float32)
    x = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def observe(
    module: torch.nn.Module,
    preprocessing: Preprocessing,
    pixels: NDArray[np.uint8],
    layers: Sequence[str],
    on_progress: Progress,
    moments: bool = False,
) -> dict[str, Watch]:
    """Run ``pixels`` (N, height, width, 3) through the module and watch ``layers``; those that never ran are absent.

    ``moments`` of inputs are taken of linear layers only. Raises :class:`BuildError` for NaN or infinity, naming the layer.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    modules: dict[str, Any] = dict(module.named_modules())
    watches = {}
    for name in layers:
        linear = isinstance(modules[name], torch.nn.Linear)
        watches[name] = Watch(moments=Moments(modules[name].in_features) if moments and linear else None)
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
    seen = {name: watch for name, watch in watches.items() if watch.inputs}
    on_progress.finish("calibrate", f"{len(seen)} layers calibrated on {len(pixels)} images")
    return seen


def rows_to_keep(calls: int) -> int:
    """Rows to keep of each of ``calls`` calls."""
    return max(1, -(-SAMPLE_ROWS // max(calls, 1)))


def _hook(name: str, watch: Watch, keep: int, generator: torch.Generator) -> Any:
    import torch

    def see(layer: Any, args: tuple[Any, ...], output: Any) -> None:
        rows = [t.detach().permute(0, 2, 3, 1) if isinstance(layer, torch.nn.Conv2d) else t.detach() for t in (args[0], output)]
        watch.look(name, rows[0], rows[1], len(output), keep, generator)

    return see


def choose_ranges(
    watch: Watch, weight: torch.Tensor | None, method: str, behind: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> LayerRange:
    """Ranges of one layer. ``minmax`` takes what was seen; ``error`` shrinks it to the smallest relative squared error of each
    sampled row: of the input behind ``weight`` (out, in) where there is one, of the output behind the activation ``behind``.

    The error is that of the layer's output, not of its input: the few large activations carry the answer, and ranges that clip
    them by how rare they are (quantiles) do not see that.
    """
    import torch

    seen, seen_out = (watch.low, watch.high), (watch.out_low, watch.out_high)
    if method == "minmax":
        return LayerRange(seen, seen_out, seen)
    product = None if weight is None else lambda x: x @ weight.T
    chosen, damage = _least_error(torch.cat(watch.inputs), seen, product)
    output, _ = _least_error(torch.cat(watch.outputs), seen_out, behind)
    return LayerRange(chosen, output, seen, damage)


def _least_error(
    values: torch.Tensor, seen: tuple[float, float], behind: Callable[[torch.Tensor], torch.Tensor] | None
) -> tuple[tuple[float, float], float]:
    """The seen range with each end shrunk, first the upper, to the smallest relative squared error of the rows, and that."""
    low, high = min(seen[0], 0.0), max(seen[1], 0.0)
    if not high > low:
        return (low, high), 0.0
    exact = values if behind is None else behind(values)
    size = (exact * exact).sum(1).clamp_min(1e-12)

    def error(one_low: float, one_high: float) -> float:
        scale = (one_high - one_low) / 255
        zero = round(-one_low / scale)
        there = ((values / scale).round() + zero).clamp(0, 255).sub(zero).mul(scale)
        off = (there if behind is None else behind(there)) - exact
        return float(((off * off).sum(1) / size).mean())

    if high > 0:
        high *= min(SHRINKS, key=lambda shrink: error(low, high * shrink))
    if low < 0:
        low *= min(SHRINKS, key=lambda shrink: error(low * shrink, high))
    return (low, high), error(low, high)
