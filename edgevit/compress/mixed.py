"""Mixed precision: int4, int8 or float for each layer, by the damage that layer alone was measured to do.

Every layer is rounded to every width once. A width's damage is the Kullback–Leibler divergence of the model's outputs when
only that layer has it; damages are taken to add up (as Cai et al., ZeroQ, 2020, do), and bits are bought where each takes the
most damage away until the budget is spent. What the whole then does is measured again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from device_agents.wire import Preprocessing, StepReport
from edgevit.compress import Compressed, StepContext
from edgevit.compress.calibrate import normalise
from edgevit.compress.fold import fold_norms
from edgevit.compress.rounding import Grid, correct_bias, output_error, round_weight
from edgevit.compress.weight_only import (
    INT8,
    SENSITIVITY_IMAGES,
    Layer,
    RoundedLayer,
    divergence,
    effective_bits,
    int4_grid,
    layers_to_round,
    log_probabilities,
    observe_moments,
    quant_of,
    round_plainly,
    size_text,
    verify_weight,
    weight_bytes,
)
from edgevit.errors import BuildError
from edgevit.progress import Progress
from edgevit.quantspec import LayerQuant, QuantSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from edgevit.compress.quantize import Budget, QuantizeConfig

FLOAT = "float32"


@dataclass(frozen=True)
class Width:
    """One way to store and compute one layer. ``quant`` None: it stays float. ``weight`` and ``bias`` are what the module has
    then; ``damage`` is what it does alone, in nats of the outputs' divergence."""

    layer: Layer
    name: str
    quant: LayerQuant | None
    weight: torch.Tensor
    bias: torch.Tensor | None
    bits: int
    error: float
    damage: float = 0.0


@dataclass(frozen=True)
class _Images:
    """Normalised images (N, 3, H, W) and the float model's log probabilities of them (N, classes)."""

    x: torch.Tensor
    wanted: torch.Tensor


def mixed(state: Compressed, config: QuantizeConfig, context: StepContext) -> Compressed:
    """Choose a width for each layer within ``config.budget``.

    Raises :class:`BuildError` where the budget cannot be met, naming the nearest, or NaN is met, naming the layer;
    :class:`DataError` without real images.
    """
    budget = config.budget
    if budget is None:
        raise BuildError("mixed was given no budget", hint="set budget: {effective_bits: 5.0} in the recipe")
    pixels = context.real_images("mixed")[: config.images]
    layers, kept = layers_to_round("mixed", state)
    module, _ = fold_norms(state.module, normalise(pixels[:2], state.preprocessing))
    widths = _widths(module, layers, int4_grid(config.group), pixels, state.preprocessing, context.on_progress)
    x = normalise(pixels, state.preprocessing)
    images = _Images(x, log_probabilities(state.module, x))
    measured = _measure(
        module, widths, _Images(x[:SENSITIVITY_IMAGES], images.wanted[:SENSITIVITY_IMAGES]), context.on_progress
    )
    order = purchases(measured)
    if budget.loss is not None:
        chosen, loss = _within_loss(module, measured, order, budget.loss, images)
    else:
        chosen = _within_size(module, measured, order, budget)
        loss = _loss(_assembled(module, chosen), images)
    return _finished(state, _assembled(module, chosen), measured, loss, len(pixels), kept)


def purchases(measured: Sequence[Sequence[Width]]) -> list[tuple[int, int]]:
    """(layer, width) in the order they are worth buying: each layer starts at its narrowest and only ever widens, and of all
    next widths the one that takes the most damage away for each bit comes first (the greedy solution of the knapsack over each
    layer's convex hull)."""
    bought: list[tuple[int, int]] = []
    at = [0] * len(measured)
    while True:
        best, worth = None, 0.0
        for i, widths in enumerate(measured):
            here = widths[at[i]]
            for j in range(at[i] + 1, len(widths)):
                gain = max(here.damage - widths[j].damage, 1e-12) / (widths[j].bits - here.bits)
                if gain > worth:
                    best, worth = (i, j), gain
        if best is None:
            return bought
        at[best[0]] = best[1]
        bought.append(best)


def choose(measured: Sequence[Sequence[Width]], bought: Sequence[tuple[int, int]]) -> list[Width]:
    """Each layer's width after the purchases ``bought``."""
    at = [0] * len(measured)
    for i, j in bought:
        at[i] = j
    return [widths[j] for widths, j in zip(measured, at, strict=True)]


def _within_size(
    module: torch.nn.Module, measured: Sequence[Sequence[Width]], order: Sequence[tuple[int, int]], budget: Budget
) -> list[Width]:
    """Every purchase that still fits, in order; one that does not is passed over."""
    narrowest = choose(measured, [])
    figure, limit, unit = _figure(module, narrowest, budget)
    if figure > limit:
        raise BuildError(
            f"mixed cannot keep to {limit:g} {unit}: with every layer at its narrowest it is {figure:.2f}, "
            f"{figure - limit:.2f} too many",
            hint=f"set the budget to at least {figure:.2f}, or a larger group",
        )
    bought: list[tuple[int, int]] = []
    for one in order:
        if _figure(module, choose(measured, [*bought, one]), budget)[0] <= limit:
            bought.append(one)
    return choose(measured, bought)


def _figure(module: torch.nn.Module, chosen: Sequence[Width], budget: Budget) -> tuple[float, float, str]:
    """(what it comes to, the limit, its unit)."""
    quants = [one.quant or _float_quant(one.layer) for one in chosen]
    if budget.effective_bits is not None:
        return effective_bits(module, quants), budget.effective_bits, "effective bits"
    return weight_bytes(module, quants) / 1e6, budget.megabytes or 0.0, "MB"


def _within_loss(
    module: torch.nn.Module,
    measured: Sequence[Sequence[Width]],
    order: Sequence[tuple[int, int]],
    limit: float,
    images: _Images,
) -> tuple[list[Width], float]:
    """The fewest purchases whose measured loss of agreement is within ``limit`` %, by bisection over their number."""
    few, many = 0, len(order)
    best, loss = choose(measured, order), 0.0
    while few < many:
        middle = (few + many) // 2
        chosen = choose(measured, order[:middle])
        found = _loss(_assembled(module, chosen), images)
        if found <= limit:
            many, best, loss = middle, chosen, found
        else:
            few = middle + 1
    if all(one.quant is None for one in best):
        raise BuildError(
            f"mixed keeps every layer float to lose at most {limit:g} % agreement", hint="allow a larger loss, or more images"
        )
    return best, loss


def _widths(
    module: torch.nn.Module,
    layers: Sequence[Layer],
    grid: Grid,
    pixels: NDArray[np.uint8],
    preprocessing: Preprocessing,
    on_progress: Progress,
) -> list[list[Width]]:
    """Every width of every layer, narrowest first. Convolutions and the last layer have no int4: the answer hangs on them."""
    import torch

    linear = [one for one in layers if one.kind == "linear"]
    on_progress.start("round", "rounding weights", len(layers), "layers")
    moments = observe_moments(module, linear, pixels, preprocessing)
    found = []
    for done, one in enumerate(layers):
        layer: Any = module.get_submodule(one.name)
        weight = layer.weight.detach().flatten(1)
        verify_weight(one.name, weight)
        bias = None if layer.bias is None else layer.bias.detach()
        widths = []
        if one.kind == "linear" and not one.last:
            hessian = moments[one.name].hessian(centred=bias is not None)
            rounded = round_weight(weight, hessian, grid)
            shifted = None if bias is None else bias + correct_bias(weight, rounded.weight, moments[one.name].mean)
            off = output_error(weight, rounded.weight, hessian).sum()
            size = output_error(weight, torch.zeros_like(weight), hessian).sum().clamp_min(1e-30)
            lowered = RoundedLayer(one, rounded, float(off / size))
            widths.append(_width(module, "int4-weights", quant_of(lowered), lowered.rounded.weight, shifted, lowered))
        plain = RoundedLayer(one, round_plainly(weight, INT8), 0.0)
        off = (weight - plain.rounded.weight).square().sum() / weight.square().sum().clamp_min(1e-30)
        dynamic = one.kind == "linear"
        quant = LayerQuant(one.name, one.kind, one.depthwise, 8, "dynamic" if dynamic else "float")
        name = "int8-dynamic" if dynamic else "int8-weights"
        widths.append(_width(module, name, quant, plain.rounded.weight, bias, replace(plain, error=float(off))))
        widths.append(Width(one, FLOAT, None, weight, bias, 32 * weight.numel(), 0.0))
        found.append(widths)
        on_progress.advance("round", done + 1)
    on_progress.finish("round", f"{len(layers)} layers rounded to every width against {len(pixels)} images")
    return found


def _width(
    module: torch.nn.Module, name: str, quant: LayerQuant, weight: torch.Tensor, bias: torch.Tensor | None, one: RoundedLayer
) -> Width:
    bits = int(effective_bits(module, [quant]) * weight.numel())
    return Width(one.layer, name, quant, weight, bias, bits, one.error)


def _measure(
    module: torch.nn.Module, widths: Sequence[Sequence[Width]], images: _Images, on_progress: Progress
) -> list[list[Width]]:
    """The widths with their damage: each layer lowered alone, in a copy of the module."""
    work = copy.deepcopy(module)
    on_progress.start("sensitivity", "measuring each layer's damage", len(widths), "layers")
    measured = []
    for done, options in enumerate(widths):
        floating = options[-1]
        told = []
        for one in options[:-1]:
            _put(work, one)
            with _activations_lowered(work, [one]):
                told.append(replace(one, damage=divergence(images.wanted, log_probabilities(work, images.x))))
        _put(work, floating)
        measured.append([*told, floating])
        on_progress.advance("sensitivity", done + 1)
    on_progress.finish("sensitivity", f"damage of {len(widths)} layers measured on {len(images.x)} images")
    return measured


def _put(module: torch.nn.Module, one: Width) -> None:
    import torch

    layer: Any = module.get_submodule(one.layer.name)
    with torch.no_grad():
        layer.weight.copy_(one.weight.reshape(layer.weight.shape))
        if one.bias is not None:
            layer.bias.copy_(one.bias)


class _activations_lowered:
    """While inside, dynamic layers of ``chosen`` see their inputs rounded as the runtimes round them: 256 steps from the
    smallest to the largest value of the call."""

    def __init__(self, module: torch.nn.Module, chosen: Sequence[Width]) -> None:
        self.layers = [module.get_submodule(w.layer.name) for w in chosen if w.quant and w.quant.activations == "dynamic"]
        self.hooks: list[Any] = []

    def __enter__(self) -> None:
        self.hooks = [layer.register_forward_pre_hook(_round_input) for layer in self.layers]

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def _round_input(layer: Any, args: Any) -> Any:
    import torch

    x = args[0]
    # Each image by itself: the files run one at a time.
    flat = x.reshape(len(x), -1)
    low, high = flat.amin(1).clamp_max(0), flat.amax(1).clamp_min(0)
    scale = ((high - low) / 255).clamp_min(1e-12).reshape(-1, *[1] * (x.ndim - 1))
    zero = (-low.reshape(scale.shape) / scale).round()
    return (((x / scale).round() + zero).clamp(0, 255).sub(zero).mul(scale).to(torch.float32), *args[1:])


def _assembled(module: torch.nn.Module, chosen: Sequence[Width]) -> _Assembled:
    made = copy.deepcopy(module)
    for one in chosen:
        _put(made, one)
    return _Assembled(made, tuple(chosen))


@dataclass(frozen=True)
class _Assembled:
    module: torch.nn.Module
    chosen: tuple[Width, ...]


def _loss(made: _Assembled, images: _Images) -> float:
    """Share of the images, in %, on which the top-1 answer is no longer the float model's."""
    with _activations_lowered(made.module, made.chosen):
        given = log_probabilities(made.module, images.x)
    return 100 * float((images.wanted.argmax(1) != given.argmax(1)).float().mean())


def _float_quant(layer: Layer) -> LayerQuant:
    """How a layer that stays float counts in bits; never part of a QuantSpec."""
    return LayerQuant(layer.name, layer.kind, layer.depthwise, 32, "float", scales=None)


def _finished(
    state: Compressed,
    made: _Assembled,
    measured: Sequence[Sequence[Width]],
    loss: float,
    images: int,
    kept: Mapping[str, str],
) -> Compressed:
    import torch

    chosen = made.chosen
    quants = tuple(one.quant for one in chosen if one.quant is not None)
    # What stays int8 by its largest entry is rounded by the exporters, like every layer of int8-dynamic.
    with torch.no_grad():
        for one, widths in zip(chosen, measured, strict=True):
            if one.quant is not None and one.quant.scales is None:
                _put(made.module, replace(widths[-1], layer=one.layer))
    names = [one.name for one in chosen]
    counts = ", ".join(f"{names.count(n)} {n}" for n in dict.fromkeys(sorted(names)))
    details = {one.layer.name: _describe(one, widths) for one, widths in zip(chosen, measured, strict=True)} | dict(kept)
    text = size_text(made.module, [one.quant or _float_quant(one.layer) for one in chosen])
    summary = f"mixed: {counts}; {text}; {loss:.1f} % of {images} calibration images answered otherwise"
    spec = QuantSpec("mixed", quants, calibration_images=images)
    done = replace(state, module=made.module, spec=spec)
    return done.reported(StepReport("quantize", len(quants), summary, details))


def _describe(one: Width, widths: Sequence[Width]) -> str:
    others: Mapping[str, float] = {w.name: w.damage for w in widths[:-1]}
    told = ", ".join(f"{name} {damage:.2g}" for name, damage in others.items())
    return f"{one.name}, output error {100 * one.error:.2g} %; damage alone: {told}"
