"""Layers that bear one activation range for a whole tensor worst, and get one for each row (token) at run time instead.

A row of small activations, such as a class token beside patches, is left with few of the 256 steps of a range that others
fill. What that does to the *model's outputs* is measured one layer at a time: the error behind the layer itself misleads, since
the network wipes out some errors and carries others to the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from edgevit.compress.replay import Replay
from edgevit.quantspec import LayerQuant, activation_grid

if TYPE_CHECKING:
    import torch

    Rounding = Callable[[torch.Tensor], torch.Tensor]

IMAGES = 8
"""Measured on this many calibration images: one run over them for each layer, two for likely ones."""


def layers_for_rows(
    replay: Replay, layers: tuple[LayerQuant, ...], share: float, outputs: bool = False
) -> dict[str, tuple[float, float]]:
    """The ``share`` (at most half) of the linear layers that gain most from a range for each row: layer → relative squared
    change of the module's outputs that its activations cause alone, with the range they have and with one for each row.
    ``outputs``: the outputs of static layers are rounded too, those with ranges at run time are not."""
    linear = [one for one in layers if one.kind == "linear"]
    # At most half, so that a static file of one linear layer, a classifier behind convolutions, stays static.
    count = min(math.ceil(share * len(linear)), len(linear) // 2)
    if not count:
        return {}
    now = output_changes(replay, {one.name: _roundings(one, outputs) for one in linear})
    likely = sorted(now, key=lambda n: -now[n])[: 3 * count]
    rows = output_changes(replay, dict.fromkeys(likely, (round_rows, None)))
    gains = sorted((n for n in likely if rows[n] < now[n]), key=lambda n: rows[n] - now[n])
    return {n: (now[n], rows[n]) for n in gains[:count]}


def output_changes(replay: Replay, roundings: Mapping[str, tuple[Rounding, Rounding | None]]) -> dict[str, float]:
    """Layer → mean over images of the squared change of the module's outputs, relative to them, when that layer's input, and
    its output where there is a second rounding, alone are rounded."""
    size = replay.exact.square().sum(1).clamp_min(1e-12)
    changes = {}
    for name, (before, after) in roundings.items():
        layer = replay.module.get_submodule(name)
        hooks = [layer.register_forward_pre_hook(_change_input(before))]
        if after is not None:
            hooks.append(layer.register_forward_hook(_change_output(after)))
        try:
            changes[name] = float(((replay.run(name) - replay.exact).square().sum(1) / size).mean())
        finally:
            for hook in hooks:
                hook.remove()
    return changes


def _change_input(rounding: Rounding) -> Any:
    def change(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounding(args[0]), *args[1:])

    return change


def _change_output(rounding: Rounding) -> Any:
    def change(_: Any, args: tuple[Any, ...], output: Any) -> Any:
        return rounding(output)

    return change


def _roundings(layer: LayerQuant, outputs: bool) -> tuple[Rounding, Rounding | None]:
    if layer.activations == "dynamic":
        return round_images, None
    return _round_to(layer.input_range), _round_to(layer.output_range) if outputs else None


def _round_to(bounds: tuple[float, float] | None) -> Rounding:
    scale, zero = activation_grid(*(bounds or (0.0, 0.0)))
    return lambda x: ((x / scale).round() + zero).clamp(0, 255).sub(zero).mul(scale)


def round_images(x: torch.Tensor) -> torch.Tensor:
    """x (N, …) on a grid of 256 steps over the range of each image."""
    import torch

    flat = x.reshape(len(x), -1)
    shape = (len(x), *[1] * (x.ndim - 1))
    low, high = flat.amin(1).clamp_max(0).reshape(shape), flat.amax(1).clamp_min(0).reshape(shape)
    scale = torch.where(high > low, (high - low) / 255, torch.ones_like(high))
    zero = (-low / scale).round()
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero).mul(scale)


def round_rows(x: torch.Tensor) -> torch.Tensor:
    """x (N, …, channels) with each row divided by its largest magnitude, rounded by :func:`round_images`, and multiplied."""
    import torch

    row = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return round_images(x / row) * row
