"""``int8-static`` and ``int8-dynamic``: the module made ready exactly, ranges chosen, weights rounded, each layer reported.

First what the exporters would fold by themselves is folded (normalisations into linear layers and convolutions), so that the
weights rounded here are those that run. With images, outliers move from activations into weights where that is exact, and the
weights of linear layers are rounded against their inputs; the layers measured to gain most from it take a range for each row of
their input at run time, in a static scheme too. Softmax, normalisation, GELU and the products of two activations stay
float: the fused integer softmax of ONNX Runtime is wrong near uniform attention, and neither pays off.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from device_agents.wire import StepReport
from edgevit.compress import Compressed, StepContext
from edgevit.compress.calibrate import LayerRange, Watch, choose_ranges, normalise, observe
from edgevit.compress.equalise import equalise, fold_batch_norms, run_hooked, trace_readers
from edgevit.compress.fold import fold_norms
from edgevit.compress.replay import Replay
from edgevit.compress.rounding import Grid, output_error, round_weight
from edgevit.compress.row_ranges import IMAGES, layers_for_rows
from edgevit.compress.smooth import balance_attention, hold_scales, smooth_norms
from edgevit.errors import BuildError
from edgevit.quantspec import LayerQuant, QuantSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from edgevit.compress.quantize import QuantizeConfig

GRID = Grid(8)
SWEEPS = 1
"""Of coordinate descent after GPTQ; a second gains nothing measurable at 8 bits."""

ROW_SHARES = {"onnx": 0.1, "tflite": 0.25}
"""Linear layers with a range for each row. On DeiT-Tiny, on a loaded machine, files with such layers ran at 0.94 to 1.01 of the
speed of those without in ONNX Runtime, and at 0.95 to 0.97 in LiteRT."""


@dataclass(frozen=True)
class _Prepared:
    """A module equal to the one that came, what was done to which of its layers, and what these saw on calibration images."""

    module: torch.nn.Module
    notes: Mapping[str, str]
    smoothed: tuple[str, ...] = ()
    watches: Mapping[str, Watch] = field(default_factory=dict)


def int8(state: Compressed, config: QuantizeConfig, context: StepContext) -> Compressed:
    """Quantize linear layers, and convolutions for ``int8-static``.

    Raises :class:`BuildError` where there is no such layer or NaN in one, :class:`DataError` where real images are needed.
    """
    from edgevit.compress.quantize import quantizable_layers

    static = config.scheme == "int8-static"
    what = "linear and convolution layers" if static else "linear layers"
    if static:
        context.real_images("int8-static")
    found = quantizable_layers(state.module, convolutions=static)
    if not found:
        raise BuildError(f"{config.scheme} applies to no layer: the module has no {what}", hint="build it with --recipe fp32")
    _verify_finite(state.module, [n for n, _, _ in found])
    pixels = context.calibration.pixels[: config.images]
    x = normalise(pixels[:2], state.preprocessing)
    common = ("int8", state.module, config.images, config.smooth, config.rounding)
    prepared = context.once(common, lambda: _prepared(state, config, context, pixels))
    module, spec, details = _quantized(prepared, state, config, context, common)
    made = replace(state, module=module, spec=spec)
    if context.calibration.real:
        made = _with_rows(made, details, config.row_share, context, pixels)
    if "tflite" in context.formats and prepared.smoothed:
        held = hold_scales(module, x, list(prepared.smoothed))
        made = replace(made, per_format={**made.per_format, "tflite": (held, made.carried("tflite")[1])})
    return _reported(made, config, details, what)


def _with_rows(
    state: Compressed, details: dict[str, str], share: float | None, context: StepContext, pixels: NDArray[np.uint8]
) -> Compressed:
    """Ranges for each row, taken at run time, for the layers that gain most from them. LiteRT takes dynamic ranges of each row
    by itself, and rounds the outputs of static layers; ONNX Runtime takes a range of the whole tensor, whose rows are divided
    by their largest magnitude before, and gives outputs as float."""
    module, spec = state.module, state.spec
    static = spec.scheme == "int8-static"
    formats = [f for f in context.formats if static or f != "tflite"]
    if not formats or share == 0:
        return state
    replay = Replay(module, normalise(pixels[:IMAGES], state.preprocessing), [one.name for one in spec.layers])
    made = {}
    for format_ in formats:
        lite = format_ == "tflite"
        context.on_progress.start("rows", "measuring activations", len(spec.layers), "layers")
        wanted = ROW_SHARES[format_] if share is None else share
        chosen = layers_for_rows(replay, spec.layers, wanted, outputs=lite)
        context.on_progress.finish("rows", f"{len(chosen)} layers take a range for each row")
        for name, (now, rows) in chosen.items():
            changes = f"outputs change by {100 * now**0.5:.2g} % with one range, {100 * rows**0.5:.2g} % so"
            details[name] = f"{details[name]}, {format_}: a range for each row at run time ({changes})"
        layers = tuple(_run_time(one, rows=not lite) if one.name in chosen else one for one in spec.layers)
        made[format_] = (module, replace(spec, layers=layers))
    return replace(state, per_format=made)


def _run_time(layer: LayerQuant, rows: bool) -> LayerQuant:
    return replace(layer, activations="dynamic", input_range=None, output_range=None, rows=rows)


def _reported(state: Compressed, config: QuantizeConfig, details: Mapping[str, str], what: str) -> Compressed:
    layers, kept = len(state.spec.layers), sum(text.startswith("stays float") for text in details.values())
    images = state.spec.calibration_images
    told = f", over {images} images" if images else ", without images"
    left = f", {kept} more stay{'s' if kept == 1 else ''} float" if kept else ""
    rest = "" if config.scheme == "int8-static" else ", convolutions stay float"
    summary = f"{config.scheme}: {layers} {what}{left}{rest}{told}"
    return state.reported(StepReport("quantize", layers, summary, dict(details)))


def _verify_finite(module: torch.nn.Module, layers: list[str]) -> None:
    import torch

    for name in layers:
        for part, value in module.get_submodule(name).named_parameters():
            if not bool(torch.isfinite(value).all()):
                raise BuildError(f"NaN or infinity in {name}.{part}", hint="check the weights")


def _prepared(state: Compressed, config: QuantizeConfig, context: StepContext, pixels: NDArray[np.uint8]) -> _Prepared:
    """Everything that does not depend on the scheme."""
    x = normalise(pixels[:2], state.preprocessing)
    prepared = _folded(state.module, x)
    if not context.calibration.real:
        return prepared
    if config.smooth:
        prepared = _smoothed(_balanced(prepared, x, state, pixels, context), x, state, pixels, context)
    return replace(prepared, watches=_watch(prepared.module, state, pixels, context, moments=config.rounding == "hessian"))


def _folded(module: torch.nn.Module, x: torch.Tensor) -> _Prepared:
    made, norms = fold_batch_norms(module, x)
    made, _ = fold_norms(made, x)
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    return _Prepared(made.eval(), dict.fromkeys(norms, "folded into the convolution before it"))


def _balanced(
    prepared: _Prepared, x: torch.Tensor, state: Compressed, pixels: NDArray[np.uint8], context: StepContext
) -> _Prepared:
    """Attention balanced and chains of layers equalised: both hold in every format."""
    watches = _watch(prepared.module, state, pixels, context)
    inputs, outputs = _largest(watches)
    module, attentions = balance_attention(prepared.module, x, inputs, outputs)
    module, seconds = equalise(module, x, inputs)
    notes = {f"{n}.{part}": "balanced" for n in attentions for part in ("qkv", "proj")}
    return _Prepared(module, {**prepared.notes, **notes, **dict.fromkeys(seconds, "inputs equalised")})


def _smoothed(
    prepared: _Prepared, x: torch.Tensor, state: Compressed, pixels: NDArray[np.uint8], context: StepContext
) -> _Prepared:
    inputs, _ = _largest(_watch(prepared.module, state, pixels, context))
    module, norms = smooth_norms(prepared.module, x, inputs)
    readers = trace_readers(module, x)
    notes = {r: "inputs smoothed" for n in norms for r in readers[n]}
    return _Prepared(module, {**prepared.notes, **notes}, tuple(norms))


def _watch(
    module: torch.nn.Module, state: Compressed, pixels: NDArray[np.uint8], context: StepContext, moments: bool = False
) -> dict[str, Watch]:
    import torch

    names = [n for n, layer in module.named_modules() if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))]
    return observe(module, state.preprocessing, pixels, names, context.on_progress, moments)


def _largest(watches: Mapping[str, Watch]) -> tuple[dict[str, Any], dict[str, Any]]:
    return {n: w.largest_input for n, w in watches.items()}, {n: w.largest_output for n, w in watches.items()}


def _quantized(
    prepared: _Prepared, state: Compressed, config: QuantizeConfig, context: StepContext, common: Hashable
) -> tuple[torch.nn.Module, QuantSpec, dict[str, str]]:
    """The module with rounded weights, its QuantSpec, and a line on every layer."""
    import copy

    import torch

    from edgevit.compress.quantize import quantizable_layers, unfit_layers

    static, real = config.scheme == "int8-static", context.calibration.real
    module = copy.deepcopy(prepared.module)
    pixels, watches = context.calibration.pixels[: config.images], prepared.watches
    x = normalise(pixels[:1], state.preprocessing)
    first = _image_layer(module, x) if config.first == "float" else ""
    behind = _activations_behind(module, x) if static else {}
    unfit = unfit_layers(module, x)
    layers, details = [], {}
    context.on_progress.start("round", "rounding weights", len(prepared.module.state_dict()), "tensors")
    for name, kind, depthwise in quantizable_layers(module, convolutions=static):
        if name == first:
            details[name] = "stays float: it reads the image, and is a small part of the work"
            continue
        if name in unfit:
            details[name] = f"stays float: {unfit[name]}"
            continue
        if static and name not in watches:
            details[name] = "stays float: it never ran on the calibration images"
            continue
        layer: Any = module.get_submodule(name)
        chosen = None
        if static:
            weight = layer.weight.detach() if kind == "linear" else None
            chosen = choose_ranges(watches[name], weight, config.ranges, behind.get(name))
        rounded = context.once((common, name), functools.partial(_round, layer.weight.detach(), watches.get(name)))
        scales, error = None, None
        if rounded is not None:
            layer.weight = torch.nn.Parameter(rounded.weight.clone(), requires_grad=False)
            scales, error = rounded.scales.numpy(), rounded.error
        quant = LayerQuant(name, kind, depthwise, 8, "dynamic")
        if chosen is not None:
            quant = replace(quant, activations="static", input_range=chosen.input, output_range=chosen.output)
        if scales is not None:
            quant = replace(quant, scales=scales, zeros=scales.astype("int32") * 0)
        layers.append(quant)
        details[name] = _describe(chosen, error, prepared.notes.get(name, ""))
    context.on_progress.finish("round", f"weights of {len(layers)} layers rounded")
    if not layers:
        told = "; ".join(f"{name} {reason}" for name, reason in list(details.items())[:3])
        raise BuildError(f"{config.scheme} applies to no layer: {told}", hint="first: int8 quantizes what reads the image too")
    spec = QuantSpec(config.scheme, tuple(layers), calibration_images=len(pixels) if real else 0, ranges=config.ranges)
    return module, spec, details


@dataclass(frozen=True)
class _Rounded:
    """A weight on its grid, the scales (out, 1), and the share of the outputs' energy that is error now."""

    weight: torch.Tensor
    scales: torch.Tensor
    error: float


def _round(weight: torch.Tensor, watch: Watch | None) -> _Rounded | None:
    """The weight of a linear layer on the grid of its largest entries ÷ 127, against the Hessian of its inputs. None without a
    Hessian: the exporter rounds to nearest."""
    import torch

    if watch is None or watch.moments is None:
        return None
    largest = weight.abs().amax(1, keepdim=True)
    scales = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    hessian = watch.moments.hessian()
    rounded = round_weight(weight, hessian, GRID, scales=scales, sweeps=SWEEPS)
    error = float(output_error(weight, rounded.weight, hessian).sum())
    energy = float(output_error(weight, torch.zeros_like(weight), hessian).sum())
    return _Rounded(rounded.weight, rounded.scales, error / max(energy, 1e-30))


def _describe(chosen: LayerRange | None, error: float | None, note: str) -> str:
    parts = ["weights int8 per channel"]
    if error is not None:
        parts.append(f"rounding changes the output by {100 * error**0.5:.2g} %")
    if chosen is None:
        parts.append("activations int8 at run time")
    else:
        (low, high), (a, b) = chosen.input, chosen.seen_input
        parts.append(f"input {low:.4g} … {high:.4g} (seen {a:.4g} … {b:.4g}) by {100 * chosen.damage**0.5:.2g} %")
    return ", ".join([*parts, note] if note else parts)


def _image_layer(module: torch.nn.Module, x: torch.Tensor) -> str:
    """The convolution or linear layer that runs first, on the image or patches of it; nothing where none runs."""
    import torch

    found: list[str] = []
    layers = [(n, m) for n, m in module.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    hooks = [layer.register_forward_pre_hook(lambda _, args, name=name: found.append(name)) for name, layer in layers]
    run_hooked(module, x, hooks)
    return found[0] if found else ""


def _activations_behind(module: torch.nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """Layer → the activation that is the only reader of its output: its error counts as that lets it through."""
    import torch

    kinds = (torch.nn.GELU, torch.nn.ReLU, torch.nn.ReLU6, torch.nn.SiLU, torch.nn.Hardswish)
    layers = dict(module.named_modules())
    readers = trace_readers(module, x)
    # Called as a plain function: rows may be changed in place by it.
    return {
        n: (lambda rows, act=layers[r[0]]: act(rows.clone()))
        for n, r in readers.items()
        if len(r) == 1 and isinstance(layers[r[0]], kinds)
    }
