"""Weights in few bits, arithmetic in float: ``int8-weights`` and ``int4-weights``.

int8 needs no images. int4 rounds layer after layer in the order they run, each against the inputs it really gets from layers
already rounded (GPTQ's own order, Frantar et al. 2023), and corrects its bias. The layer that gives the answer and convolutions
take int8: they are few and the answer hangs on them; so does a chosen share of the weights, where int4 was measured to hurt.
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
from edgevit.compress.rounding import (
    Grid,
    Moments,
    Rounded,
    correct_bias,
    output_error,
    round_to_nearest,
    round_weight,
)
from edgevit.errors import BuildError
from edgevit.progress import Progress
from edgevit.quantspec import Kind, LayerQuant, QuantSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from edgevit.compress.quantize import QuantizeConfig

BATCH = 16
LAYERS_AT_ONCE = 2
"""Layers that are rounded between two passes over the images; one would take twice the time and gains nothing measurable."""

CLASS_TOKEN_SHARE = 0.05
"""Weight of a class token in the inputs a layer is rounded for, as a share of all other tokens' together: the answer is read
from it alone, and one token in 197 would hardly count. Measured on DeiT-Tiny: −13 % divergence of the outputs."""

SENSITIVITY_IMAGES = 16

INT8 = Grid(8)


@dataclass(frozen=True)
class Layer:
    """A linear layer or convolution that ran, in the order of running. ``last``: it gives the model's outputs, or is one of
    several heads that do."""

    name: str
    kind: Kind
    depthwise: bool
    last: bool


@dataclass(frozen=True)
class RoundedLayer:
    """A layer on its grid: the weight rounded, and the share of its outputs' variance that is error now."""

    layer: Layer
    rounded: Rounded
    error: float


def int8_weights(state: Compressed, config: QuantizeConfig, context: StepContext) -> Compressed:
    """Every linear layer and convolution in int8 per output channel, rounded to nearest. Raises :class:`BuildError` where there
    is none."""
    layers, kept = layers_to_round("int8-weights", state)
    quants = tuple(LayerQuant(one.name, one.kind, one.depthwise, 8, "float") for one in layers)
    details = {one.name: "weights int8 per channel, computed in float" for one in layers} | kept
    summary = f"int8-weights: {len(layers)} layers, {size_text(state.module, quants)}"
    spec = QuantSpec("int8-weights", quants)
    return replace(state, spec=spec).reported(StepReport("quantize", len(layers), summary, details))


def int4_weights(state: Compressed, config: QuantizeConfig, context: StepContext) -> Compressed:
    """Linear layers in int4, the first, the last and convolutions in int8. Raises :class:`BuildError` where no linear layer is
    left for int4, :class:`DataError` without real images."""
    pixels = context.real_images("int4-weights")[: config.images]
    layers, kept = layers_to_round("int4-weights", state)
    grid = int4_grid(config.group)
    grids = {one.name: INT8 if one.kind == "conv" or one.last else grid for one in layers}
    if grid not in grids.values():
        raise BuildError(
            f"int4-weights applies to no layer: of {len(layers)} layers none is linear and not the last",
            hint="build it with --recipe int8-weights",
        )
    module, _ = fold_norms(state.module, normalise(pixels[:2], state.preprocessing))
    if config.int8_share:
        lowered = [one for one in layers if grids[one.name] == grid]
        widened = most_sensitive(module, lowered, grid, pixels, state.preprocessing, config.int8_share, context.on_progress)
        grids.update(dict.fromkeys(widened, INT8))
    found = round_layers(module, layers, grids, pixels, state.preprocessing, context.on_progress)
    return finished(state, module, found, kept, len(pixels))


def most_sensitive(
    module: torch.nn.Module,
    layers: Sequence[Layer],
    grid: Grid,
    pixels: NDArray[np.uint8],
    preprocessing: Preprocessing,
    share: float,
    on_progress: Progress,
) -> list[str]:
    """The layers that hold at most ``share`` of the weights of ``layers`` and move the outputs most for each of their weights
    when they alone are rounded to ``grid``, against the inputs the float ``module`` gives them."""
    work = copy.deepcopy(module)
    moments = observe_moments(work, layers, pixels, preprocessing)
    x = normalise(pixels[:SENSITIVITY_IMAGES], preprocessing)
    wanted = log_probabilities(work, x)
    on_progress.start("sensitivity", "measuring each layer's damage", len(layers), "layers")
    worth, sizes = {}, {}
    for done, one in enumerate(layers):
        layer: Any = work.get_submodule(one.name)
        before = copy.deepcopy(layer.state_dict())
        sizes[one.name] = layer.weight.numel()
        verify_weight(one.name, layer.weight)
        round_in_place(one, layer, grid, moments[one.name], sweeps=1, refits=0)
        worth[one.name] = divergence(wanted, log_probabilities(work, x)) / sizes[one.name]
        layer.load_state_dict(before)
        on_progress.advance("sensitivity", done + 1)
    on_progress.finish("sensitivity", f"damage of {len(layers)} layers measured on {len(x)} images")
    left, kept = share * sum(sizes.values()), []
    for name in sorted(worth, key=lambda n: -worth[n]):
        if sizes[name] <= left:
            kept.append(name)
            left -= sizes[name]
    return kept


def log_probabilities(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(N, classes) of x (N, 3, H, W)."""
    import torch

    with torch.no_grad():
        return torch.cat([module(x[i : i + BATCH]).log_softmax(1) for i in range(0, len(x), BATCH)])


def divergence(wanted: torch.Tensor, given: torch.Tensor) -> float:
    """Mean Kullback–Leibler divergence, in nats, of two (N, classes) log probabilities."""
    import torch

    return float(torch.nn.functional.kl_div(given, wanted, log_target=True, reduction="batchmean"))


def int4_grid(group: int | None) -> Grid:
    """``group`` inputs to a scale and zero point, both small in a file; None: a symmetric grid per output channel."""
    return Grid(4) if group is None else Grid(4, group, symmetric=False, half_scales=True)


def finished(
    state: Compressed, module: torch.nn.Module, found: Sequence[RoundedLayer], kept: Mapping[str, str], images: int
) -> Compressed:
    """The state with the rounded module, its QuantSpec and the report of what became of each layer; ``kept``: a line on those
    that stay float."""
    quants = tuple(quant_of(one) for one in found)
    details = {one.layer.name: describe(one) for one in found} | dict(kept)
    summary = f"int4-weights: {len(found)} layers, {size_text(module, quants)}"
    spec = QuantSpec("int4-weights", quants, calibration_images=images)
    return replace(state, module=module, spec=spec).reported(StepReport("quantize", len(found), summary, details))


def quant_of(one: RoundedLayer) -> LayerQuant:
    """How an exporter carries out a rounded layer."""
    layer, rounded = one.layer, one.rounded
    if layer.kind == "conv":
        return LayerQuant(layer.name, "conv", layer.depthwise, rounded.grid.bits, "float")
    return LayerQuant(
        layer.name,
        layer.kind,
        layer.depthwise,
        rounded.grid.bits,
        "float",
        group=rounded.grid.group,
        symmetric=rounded.grid.symmetric,
        scales=rounded.scales.numpy(),
        zeros=rounded.zeros.numpy(),
    )


def describe(one: RoundedLayer) -> str:
    grid = one.rounded.grid
    shared = "per channel" if grid.group is None else f"in groups of {grid.group}"
    return f"weights int{grid.bits} {shared}, output error {100 * one.error:.2g} %"


def layers_to_round(scheme: str, state: Compressed) -> tuple[list[Layer], dict[str, str]]:
    """The layers that a file holds once each, in the order they run, and a line on every other. Raises :class:`BuildError`
    where there is nothing to quantize."""
    import torch

    from edgevit.compress.quantize import unfit_layers

    shape = state.preprocessing
    unfit = unfit_layers(state.module, torch.zeros(1, 3, shape.height, shape.width))
    layers = [one for one in layers_in_order(state.module, shape) if one.name not in unfit]
    if not layers:
        raise BuildError(
            f"{scheme} applies to no layer: the module has no linear or convolution layer that runs once for each image",
            hint="build it with --recipe fp32",
        )
    called = {one.name for one in layers}
    for name, part in state.module.named_modules():
        if isinstance(part, torch.nn.Linear) and name not in called:
            unfit.setdefault(name, "the model multiplies by its weight without calling it")
    return layers, {name: f"stays float: {reason}" for name, reason in unfit.items()}


def layers_in_order(module: torch.nn.Module, preprocessing: Preprocessing) -> list[Layer]:
    """Linear layers and convolutions in the order they run; those that never run are left out."""
    import torch

    ran: dict[str, Any] = {}

    def note(name: str) -> Any:
        def see(layer: Any, args: Any, output: Any) -> None:
            ran.setdefault(name, output.shape)

        return see

    kinds = {n: m for n, m in module.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    hooks = [m.register_forward_hook(note(n)) for n, m in kinds.items()]
    try:
        with torch.no_grad():
            answer = module(torch.zeros(1, 3, preprocessing.height, preprocessing.width)).shape
    finally:
        for hook in hooks:
            hook.remove()
    # Distilled models and CrossViT answer from the mean of several heads.
    return [
        Layer(
            n,
            "conv" if isinstance(kinds[n], torch.nn.Conv2d) else "linear",
            getattr(kinds[n], "groups", 1) > 1,
            shape == answer or n == next(reversed(ran)),
        )
        for n, shape in ran.items()
    ]


def round_layers(
    module: torch.nn.Module,
    layers: Sequence[Layer],
    grids: Mapping[str, Grid],
    pixels: NDArray[np.uint8],
    preprocessing: Preprocessing,
    on_progress: Progress,
) -> list[RoundedLayer]:
    """Round, in place and in order, the layers of ``module`` that ``grids`` names; biases keep each output's mean.

    Convolutions keep their weights: exporters fold BatchNorm into them first and round to nearest then. Raises
    :class:`BuildError` for NaN or infinity, naming the layer.
    """

    wanted = [one for one in layers if one.name in grids]
    on_progress.start("round", "rounding weights", len(wanted), "layers")
    found = []
    for start in range(0, len(wanted), LAYERS_AT_ONCE):
        chunk = wanted[start : start + LAYERS_AT_ONCE]
        moments = observe_moments(module, [one for one in chunk if one.kind == "linear"], pixels, preprocessing)
        for one in chunk:
            layer: Any = module.get_submodule(one.name)
            verify_weight(one.name, layer.weight)
            found.append(round_in_place(one, layer, grids[one.name], moments.get(one.name)))
            on_progress.advance("round", len(found))
    on_progress.finish("round", f"{len(found)} layers rounded against {len(pixels)} images")
    return found


def verify_weight(name: str, weight: torch.Tensor) -> None:
    """Raises :class:`BuildError` for NaN or infinity, naming the layer."""
    import torch

    if not bool(torch.isfinite(weight).all()):
        raise BuildError(f"NaN or infinity in the weight of {name}", hint="check the weights")


def round_in_place(
    one: Layer, layer: Any, grid: Grid, moments: Moments | None, sweeps: int = 4, refits: int = 1
) -> RoundedLayer:
    """Round ``layer`` to ``grid`` and correct its bias; a layer without moments, a convolution, is only measured."""
    import torch

    weight = layer.weight.detach().flatten(1)
    if moments is None:
        rounded = round_plainly(weight, grid)
        off = (weight - rounded.weight).square().sum() / weight.square().sum().clamp_min(1e-30)
        return RoundedLayer(one, rounded, float(off))
    # The bias takes up the mean afterwards, so only what varies about it counts.
    hessian = moments.hessian(centred=layer.bias is not None)
    rounded = round_weight(weight, hessian, grid, sweeps=sweeps, refits=refits)
    size = output_error(weight, torch.zeros_like(weight), hessian).sum()
    error = float(output_error(weight, rounded.weight, hessian).sum() / size.clamp_min(1e-30))
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.add_(correct_bias(weight, rounded.weight, moments.mean))
        layer.weight.copy_(rounded.weight)
    return RoundedLayer(one, rounded, error)


def round_plainly(weight: torch.Tensor, grid: Grid) -> Rounded:
    """(out, in) to the nearest of the largest entry of each channel ÷ the largest integer, as exporters do without scales."""
    import torch

    scales = weight.abs().amax(1, keepdim=True) / grid.limits[1]
    scales = torch.where(scales > 0, scales, 1.0)
    return round_to_nearest(weight, scales, torch.zeros_like(scales, dtype=torch.int32), grid)


class _Enough(Exception):
    """Ends a forward pass whose rest nobody looks at."""


def observe_moments(
    module: torch.nn.Module, layers: Sequence[Layer], pixels: NDArray[np.uint8], preprocessing: Preprocessing
) -> dict[str, Moments]:
    """Moments of the inputs of ``layers`` over ``pixels``; each pass ends behind the last of them."""
    import torch

    if not layers:
        return {}
    modules: dict[str, Any] = {one.name: module.get_submodule(one.name) for one in layers}
    moments = {name: Moments(layer.in_features) for name, layer in modules.items()}
    waiting: set[str] = set()

    def see(name: str) -> Any:
        def take(layer: Any, args: Any) -> None:
            if not bool(torch.isfinite(args[0]).all()):
                raise BuildError(f"NaN or infinity at the input of {name} on calibration images", hint="check the weights")
            moments[name].add(args[0], token_weights(module, args[0]))
            waiting.discard(name)
            if not waiting:
                raise _Enough

        return take

    hooks = [layer.register_forward_pre_hook(see(name)) for name, layer in modules.items()]
    try:
        with torch.no_grad():
            for start in range(0, len(pixels), BATCH):
                waiting.update(modules)
                try:
                    module(normalise(pixels[start : start + BATCH], preprocessing))
                except _Enough:
                    continue
    finally:
        for hook in hooks:
            hook.remove()
    return moments


def token_weights(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """What each token of ``x`` (N, tokens, channels) counts, where the module answers from class tokens in front of others."""
    import torch

    prefix = getattr(module, "num_prefix_tokens", 0)
    if not prefix or getattr(module, "global_pool", "") != "token" or x.ndim != 3 or x.shape[1] <= prefix:
        return None
    weights = torch.ones(x.shape[1])
    weights[:prefix] += CLASS_TOKEN_SHARE * (x.shape[1] - prefix)
    return weights


def size_text(module: torch.nn.Module, layers: Sequence[LayerQuant]) -> str:
    """``4.6 effective bits, 3.10 MB of numbers``."""
    bits, total = effective_bits(module, layers), weight_bytes(module, layers)
    return f"{bits:.2f} effective bits in them, {total / 1e6:.2f} MB of numbers in all"


def effective_bits(module: torch.nn.Module, layers: Sequence[LayerQuant]) -> float:
    """Bits stored for each weight of ``layers``, scales and zero points counted in."""
    entries = sum(_entries(module, one) for one in layers)
    return sum(layer_bits(one, *_shape(module, one)) for one in layers) / max(entries, 1)


def weight_bytes(module: torch.nn.Module, layers: Sequence[LayerQuant]) -> int:
    """Bytes of every number of the module, ``layers`` as they are stored and the rest in float32."""
    entries = sum(_entries(module, one) for one in layers)
    rest = sum(p.numel() for p in module.parameters()) - entries
    return int(rest * 4 + sum(layer_bits(one, *_shape(module, one)) for one in layers) / 8)


def layer_bits(layer: LayerQuant, out: int, inputs: int) -> int:
    """Bits of a layer's weight in a file: integers, scales, and zero points where the grid has them."""
    if layer.weight_bits == 32:
        return out * inputs * 32
    groups = 1 if layer.group is None else -(-inputs // layer.group)
    scale = 16 if layer.group is not None else 32
    return out * (inputs * layer.weight_bits + groups * (scale + (0 if layer.symmetric else layer.weight_bits)))


def _shape(module: torch.nn.Module, layer: LayerQuant) -> tuple[int, int]:
    weight: Any = module.get_submodule(layer.name).weight
    return len(weight), weight[0].numel()


def _entries(module: torch.nn.Module, layer: LayerQuant) -> int:
    out, inputs = _shape(module, layer)
    return out * inputs
