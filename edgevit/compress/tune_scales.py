"""Tuning the scales and biases of a rounded network against the outputs of the one it was, the integers left as they are.

Rounding layer by layer leaves errors that add up on their way through the network; scales and biases are few numbers, reach
every one of them, and cost nothing in the file (the second half of EfficientQAT, Chen et al. 2024, with the labels replaced by
the float model's own answers and its residual stream).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from device_agents.wire import Preprocessing
from edgevit.compress.calibrate import normalise
from edgevit.compress.rounding import Rounded, storable
from edgevit.errors import BuildError
from edgevit.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from edgevit.compress.weight_only import RoundedLayer

BATCH = 16
SCALE_RATE, BIAS_RATE = 1e-3, 1e-4
STREAM_WEIGHT = 1.0
"""Of the residual stream's relative error, beside the Kullback–Leibler divergence of the outputs."""


def tune_scales(
    module: torch.nn.Module,
    original: torch.nn.Module,
    found: Sequence[RoundedLayer],
    pixels: NDArray[np.uint8],
    preprocessing: Preprocessing,
    steps: int,
    on_progress: Progress,
) -> list[RoundedLayer]:
    """Take ``steps`` of Adam, :data:`BATCH` images each (mirrored at random), on the relative change of each scale of a linear
    layer and on its bias; ``module`` and the layers returned carry the result. Raises :class:`BuildError` where it diverges.
    """
    import torch

    tuned = [one for one in found if one.layer.kind == "linear"]
    changes = [torch.zeros_like(one.rounded.scales, requires_grad=True) for one in tuned]
    layers: list[Any] = [module.get_submodule(one.layer.name) for one in tuned]
    biases = [torch.nn.Parameter(layer.bias.detach().clone()) if layer.bias is not None else None for layer in layers]
    optimizer = torch.optim.Adam(
        [{"params": changes, "lr": SCALE_RATE}, {"params": [b for b in biases if b is not None], "lr": BIAS_RATE}]
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [SCALE_RATE, BIAS_RATE], total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    levels = [_levels(one.rounded) for one in tuned]
    streams = _Streams(original, module)
    on_progress.start("tune", "tuning scales", steps, "steps")
    order = torch.empty(0, dtype=torch.long)
    for done in range(steps):
        if len(order) < min(BATCH, len(pixels)):
            order = torch.randperm(len(pixels), generator=generator)
        drawn, order = order[:BATCH], order[BATCH:]
        x = normalise(pixels[drawn.numpy()], preprocessing)
        mirrored = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        parameters = {}
        for one, level, change, bias in zip(tuned, levels, changes, biases, strict=True):
            scales = _spread(one.rounded, one.rounded.scales * (1 + change))
            parameters[f"{one.layer.name}.weight"] = level * scales
            if bias is not None:
                parameters[f"{one.layer.name}.bias"] = bias
        loss = streams.loss(module, parameters, x)
        if not bool(torch.isfinite(loss)):
            raise BuildError(f"tuning the scales diverged at step {done + 1}", hint="set tune: 0 in the recipe")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        on_progress.advance("tune", done + 1)
    on_progress.finish("tune", f"scales of {len(tuned)} layers tuned in {steps} steps")
    made = {one.layer.name: one for one in found}
    with torch.no_grad():
        for one, layer, change, bias in zip(tuned, layers, changes, biases, strict=True):
            scales = storable(one.rounded.scales * (1 + change), one.rounded.grid)
            rounded = replace(one.rounded, scales=scales)
            layer.weight.copy_(rounded.weight)
            if bias is not None:
                layer.bias.copy_(bias)
            made[one.layer.name] = replace(one, rounded=rounded)
    return list(made.values())


class _Streams:
    """The residual stream of both networks: what goes out of each block, where there are blocks to be found."""

    def __init__(self, original: torch.nn.Module, module: torch.nn.Module) -> None:
        from edgevit.compress.blocks import find_blocks

        self.original = original
        self.paths = [block.path for block in find_blocks(module)]
        self.theirs: dict[str, torch.Tensor] = {}
        self.ours: dict[str, torch.Tensor] = {}

    def loss(self, module: torch.nn.Module, parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        import torch

        hooks = [self.original.get_submodule(p).register_forward_hook(self._keep(self.theirs, p)) for p in self.paths]
        hooks += [module.get_submodule(p).register_forward_hook(self._keep(self.ours, p)) for p in self.paths]
        try:
            with torch.no_grad():
                wanted = self.original(x)
            given = torch.func.functional_call(module, parameters, (x,))
        finally:
            for hook in hooks:
                hook.remove()
        loss = torch.nn.functional.kl_div(given.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean")
        off = [
            (self.ours[p] - self.theirs[p]).square().mean() / self.theirs[p].square().mean().clamp_min(1e-12)
            for p in self.paths
        ]
        return loss + STREAM_WEIGHT * torch.stack(off).mean() if off else loss

    @staticmethod
    def _keep(place: dict[str, torch.Tensor], path: str) -> Any:
        def see(layer: Any, args: Any, output: Any) -> None:
            place[path] = output

        return see


def _levels(rounded: Rounded) -> torch.Tensor:
    return (rounded.integers - _spread(rounded, rounded.zeros)).float()


def _spread(rounded: Rounded, values: torch.Tensor) -> torch.Tensor:
    """(out, groups) → (out, in)."""
    inputs = rounded.integers.shape[1]
    return values.repeat_interleave(rounded.grid.group or inputs, 1)[:, :inputs]
