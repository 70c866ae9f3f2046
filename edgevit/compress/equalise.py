"""Exact changes of a module before it is quantized: equal outputs, friendlier ranges, nothing added to the graph.

An edit is proposed where one layer reads the very tensor another gave, and kept only where the outputs on real images stay the
same, so that a reader which cannot be seen (a residual sum, a product) is never wronged.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Edit = Callable[["torch.nn.Module"], None]

SAME = 1e-4
"""Of the largest output: how far float32 sums in another order may move it."""

LARGEST_FACTOR = 64.0
"""A channel is scaled by at most this and at least its inverse: a nearly dead one must not blow up a weight."""


def trace_readers(module: torch.nn.Module, x: torch.Tensor) -> dict[str, list[str]]:
    """Layer → the layers whose input is the very tensor it gave, for ``x`` (N, 3, H, W). Layers are modules without children
    and batch normalisations; identities and dropout are looked through."""
    import torch

    through = (torch.nn.Identity, torch.nn.Dropout)
    made: dict[int, tuple[str, Any]] = {}
    readers: dict[str, list[str]] = defaultdict(list)

    def before(name: str) -> Any:
        def see(_: Any, args: tuple[Any, ...]) -> None:
            if args and id(args[0]) in made and name not in readers[made[id(args[0])][0]]:
                readers[made[id(args[0])][0]].append(name)

        return see

    def after(name: str) -> Any:
        def keep(_: Any, args: tuple[Any, ...], output: Any) -> None:
            # The tensor is kept alive with its id, or another could take the same one.
            made[id(output)] = (name, output)

        return keep

    hooks = []
    for name, layer in module.named_modules():
        if isinstance(layer, through):
            continue
        if isinstance(layer, torch.nn.BatchNorm2d) or not list(layer.children()):
            hooks += [layer.register_forward_pre_hook(before(name)), layer.register_forward_hook(after(name))]
    run_hooked(module, x, hooks)
    return {name: found for name, found in readers.items() if found}


def norms_before_linears(module: torch.nn.Module, x: torch.Tensor) -> dict[str, list[str]]:
    """Affine LayerNorm over the last axis → the linear layers that read it, where nothing else does."""
    import torch

    layers = dict(module.named_modules())
    found = {}
    for name, readers in trace_readers(module, x).items():
        norm = layers[name]
        affine = isinstance(norm, torch.nn.LayerNorm) and norm.elementwise_affine and len(norm.normalized_shape) == 1
        if affine and all(isinstance(layers[r], torch.nn.Linear) for r in readers):
            found[name] = readers
    return found


def run_hooked(module: torch.nn.Module, x: torch.Tensor, hooks: Iterable[Any]) -> None:
    """Run ``module`` on ``x`` without gradients and take ``hooks`` away again, whatever happens."""
    import torch

    try:
        with torch.no_grad():
            module(x)
    finally:
        for hook in hooks:
            hook.remove()


def apply_exact(module: torch.nn.Module, x: torch.Tensor, edits: Mapping[str, Edit]) -> tuple[torch.nn.Module, list[str]]:
    """A copy of ``module`` with those of ``edits`` that leave its outputs on ``x`` as they were, and their names."""
    import torch

    made = copy.deepcopy(module)
    if not edits:
        return made, []
    with torch.no_grad():
        expected = module(x)
        for edit in edits.values():
            edit(made)
        if _same(made(x), expected):
            return made, list(edits)
        kept: list[str] = []
        made = copy.deepcopy(module)
        for name, edit in edits.items():
            tried = copy.deepcopy(made)
            edit(tried)
            if _same(tried(x), expected):
                made = tried
                kept.append(name)
    return made, kept


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) <= SAME * max(float(b.abs().max()), 1e-12)


def fold_batch_norms(module: torch.nn.Module, x: torch.Tensor) -> tuple[torch.nn.Module, list[str]]:
    """Batch normalisation folded into the convolution before it, where that convolution has no other reader."""
    import torch

    edits: dict[str, Edit] = {}
    layers = dict(module.named_modules())
    for name, readers in trace_readers(module, x).items():
        norm = layers[readers[0]]
        # One that keeps no statistics takes those of each batch, which no weight can hold.
        known = isinstance(norm, torch.nn.BatchNorm2d) and norm.running_mean is not None
        if len(readers) == 1 and isinstance(layers[name], torch.nn.Conv2d) and known:
            edits[readers[0]] = _fold_batch_norm(name, readers[0])
    return apply_exact(module, x, edits)


def _fold_batch_norm(conv: str, norm: str) -> Edit:
    def edit(root: torch.nn.Module) -> None:
        import torch

        layer: Any = root.get_submodule(conv)
        bn: Any = root.get_submodule(norm)
        factor = 1 / (bn.running_var.double() + bn.eps).sqrt()
        if bn.weight is not None:
            factor = factor * bn.weight.double()
        bias = -bn.running_mean.double() if layer.bias is None else layer.bias.double() - bn.running_mean.double()
        bias = bias * factor + (0 if bn.bias is None else bn.bias.double())
        weight = layer.weight.double() * factor.reshape(-1, 1, 1, 1)
        layer.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
        layer.bias = torch.nn.Parameter(bias.float(), requires_grad=False)
        parent, _, last = norm.rpartition(".")
        # timm's BatchNormAct2d carries its activation with it.
        setattr(root.get_submodule(parent), last, getattr(bn, "act", torch.nn.Identity()))

    return edit


def chains(module: torch.nn.Module, x: torch.Tensor) -> list[tuple[str, str]]:
    """(first, second) convolutions or linear layers with ReLU, LeakyReLU or nothing between them: ``f(a·x) = a·f(x)`` for a > 0
    holds for those alone; ReLU6, hard-swish, SiLU and GELU bend elsewhere and break the chain."""
    import torch

    straight = (torch.nn.ReLU, torch.nn.LeakyReLU)
    layers, readers = dict(module.named_modules()), trace_readers(module, x)
    found = []
    for name, layer in layers.items():
        if not isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            continue
        here = name
        while len(readers.get(here, ())) == 1:
            here = readers[here][0]
            if isinstance(layers[here], (torch.nn.Conv2d, torch.nn.Linear)):
                found.append((name, here))
            if not isinstance(layers[here], straight):
                break
    return found


def equalise(
    module: torch.nn.Module, x: torch.Tensor, largest: Mapping[str, torch.Tensor]
) -> tuple[torch.nn.Module, list[str]]:
    """Cross-layer equalisation (Nagel et al. 2019) of the :func:`chains` of ``module``: the channels between two layers are
    scaled so that their activations, whose largest magnitudes are ``largest`` (second layer → (channels,)), fill one range.
    The factors go into the first layer's rows and the second's columns. Weights have scales per output channel, so what is
    equalised is the activations; a depthwise second layer takes any factor at no cost, another shares it with its columns.
    """
    edits = {}
    for first, second in chains(module, x):
        if second in largest:
            layer: Any = module.get_submodule(second)
            alpha = 1.0 if getattr(layer, "groups", 1) > 1 and layer.weight.shape[1] == 1 else 0.5
            edits[second] = _rescale(first, second, balance(largest[second], columns(layer), alpha))
    return apply_exact(module, x, edits)


def balance(activations: torch.Tensor, weights: torch.Tensor, alpha: float) -> torch.Tensor:
    """Factors (channels,) to divide activations by: ``a^α / w^(1−α)`` (SmoothQuant, Xiao et al. 2023) with a mean of 1 in the
    logarithm, at most :data:`LARGEST_FACTOR`."""
    a = activations.clamp_min(1e-5 * float(activations.max()) + 1e-12)
    w = weights.clamp_min(1e-5 * float(weights.max()) + 1e-12)
    factors = a.pow(alpha) / w.pow(1 - alpha)
    return (factors / factors.log().mean().exp()).clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR)


def columns(layer: Any) -> torch.Tensor:
    """Largest magnitude of the weight (channels,) that reads each input channel of a linear layer or convolution."""
    import torch

    weight = layer.weight.detach().abs()
    if isinstance(layer, torch.nn.Linear):
        return weight.amax(0)
    groups = layer.groups
    return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1).amax((1, 3)).reshape(-1)


def scale_inputs(layer: Any, factors: torch.Tensor) -> None:
    """Multiply what the weight of ``layer`` has for each input channel by ``factors`` (channels,), in place."""
    import torch

    if isinstance(layer, torch.nn.Linear):
        layer.weight.mul_(factors)
        return
    spread = factors.reshape(layer.groups, -1).repeat_interleave(len(layer.weight) // layer.groups, 0)
    layer.weight.mul_(spread[:, :, None, None])


def scale_outputs(layer: Any, factors: torch.Tensor) -> None:
    """Multiply the outputs of ``layer`` by ``factors`` (channels,), in place."""
    layer.weight.mul_(factors.reshape(-1, *[1] * (layer.weight.ndim - 1)))
    if layer.bias is not None:
        layer.bias.mul_(factors)


def _rescale(first: str, second: str, factors: torch.Tensor) -> Edit:
    def edit(root: torch.nn.Module) -> None:
        scale_outputs(root.get_submodule(first), 1 / factors)
        scale_inputs(root.get_submodule(second), factors)

    return edit
