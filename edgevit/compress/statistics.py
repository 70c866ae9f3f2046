"""What calibration images say of each layer: second moments of its inputs, and how much its outputs matter to the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgevit.compress.ridge import Moments
from edgevit.errors import BuildError

if TYPE_CHECKING:
    import torch

FLOOR = 0.02
"""Share of the mean weight that every token keeps: a token the answer ignores (patches in the last block) must not vanish from
the statistics altogether."""


OnImage = Callable[[int], None]
"""Told how many more images are done."""


@dataclass(frozen=True)
class Sensitivity:
    """Of one layer's output: ``gram`` (outputs, outputs), the second moment of the gradient of the log-likelihood there,
    summed over tokens; ``tokens`` (positions,), how much of it falls on each token, mean 1. ``taylor_in`` and ``taylor_out``
    (channels,) are the mean squared first-order effect of removing one input or output channel (Molchanov et al., 2019)."""

    gram: torch.Tensor
    tokens: torch.Tensor
    taylor_in: torch.Tensor
    taylor_out: torch.Tensor


def rows_of(x: torch.Tensor, images: int, convolution: bool = False) -> torch.Tensor:
    """(images, positions, channels) of an activation that is channels last, or channels second behind a convolution."""
    if convolution:
        x = x.permute(0, 2, 3, 1)
    return x.reshape(images, -1, x.shape[-1])


def measure_sensitivity(
    module: torch.nn.Module, images: Sequence[torch.Tensor], paths: Iterable[str], on_image: OnImage
) -> dict[str, Sensitivity]:
    """The Fisher information of the model's own answers at each layer's output; labels are drawn from them.

    ``images`` are batches (N, 3, H, W); layers that read nothing of them are absent. Raises :class:`BuildError`
    naming the first layer with NaN or infinity.
    """
    import torch

    paths = list(paths)
    layers = {p: module.get_submodule(p) for p in paths}
    sums: dict[str, list[Any]] = {p: [0.0, 0.0, 0.0, 0.0] for p in paths}
    generator = torch.Generator().manual_seed(0)

    def apart(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The input under a name of its own, so that its gradient is what this layer alone does to the answer."""
        return (args[0].view_as(args[0]), *args[1:])

    def watch(path: str) -> Any:
        convolution = isinstance(layers[path], torch.nn.Conv2d)

        def forward(_: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
            if not bool(torch.isfinite(output).all()):
                raise BuildError(f"NaN or infinity at the layer {path} on calibration images", hint="check the weights")
            if not output.requires_grad:
                return  # it reads nothing of the image, as what makes position biases does
            x, y = rows_of(args[0].detach(), count, convolution), rows_of(output.detach(), count, convolution)

            def backward(gradient: torch.Tensor) -> None:
                g = rows_of(gradient, count, convolution)
                flat = g.reshape(-1, g.shape[-1])
                seen = (
                    (flat.T @ flat).double(),
                    (g * g).sum(2).sum(0).double(),
                    0.0,
                    (y * g).sum(1).square().sum(0).double(),
                )
                sums[path] = [a + b for a, b in zip(sums[path], seen, strict=True)]

            def behind(gradient: torch.Tensor) -> None:
                sums[path][2] += (x * rows_of(gradient, count, convolution)).sum(1).square().sum(0).double()

            output.register_hook(backward)
            args[0].register_hook(behind)

        return forward

    hooks = [layers[p].register_forward_pre_hook(apart) for p in paths]
    hooks += [layers[p].register_forward_hook(watch(p)) for p in paths]
    total = sum(len(b) for b in images)
    try:
        for batch in images:
            count = len(batch)
            with torch.enable_grad():
                log_p = module(batch.clone().requires_grad_(True)).log_softmax(1)
                drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
                log_p.gather(1, drawn).sum().backward()
            on_image(count)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        p: Sensitivity(gram / total, _spread(tokens), into / total, out / total)
        for p, (gram, tokens, into, out) in sums.items()
        if not isinstance(gram, float)
    }


def _spread(energy: torch.Tensor) -> torch.Tensor:
    share = energy / energy.mean().clamp_min(1e-30)
    return ((1 - FLOOR) * share + FLOOR).float()


@dataclass
class HeadMoments:
    """Of one attention: sums of q·qᵀ and of k·kᵀ about each image's mean key, (heads, dim, dim): what is the same for all keys
    of an image does not move the softmax."""

    q: Any = 0.0
    k: Any = 0.0


def collect_moments(
    module: torch.nn.Module,
    images: Sequence[torch.Tensor],
    tokens: dict[str, torch.Tensor],
    attentions: dict[str, torch.Tensor],
    on_image: OnImage,
) -> tuple[dict[str, Moments], dict[str, HeadMoments]]:
    """Second moments of the inputs of each layer of ``tokens``, each token weighted as it says (positions,), and of the heads
    of ``attentions`` (timm's ``Attention``), the queries weighted likewise."""
    import torch

    layers = {p: module.get_submodule(p) for p in tokens}
    moments: dict[str, Moments] = {}
    heads = {p: HeadMoments() for p in attentions}

    def watch_heads(path: str, weights: torch.Tensor) -> Any:
        attention: Any = module.get_submodule(path)

        def forward(_: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
            q, k, _v = output.reshape(len(output), -1, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
            k = k - k.mean(2, keepdim=True)
            share = weights if len(weights) == q.shape[2] else torch.ones(q.shape[2])
            heads[path].q = heads[path].q + torch.einsum("bhni,bhnj,n->hij", q, q, share).double()
            heads[path].k = heads[path].k + torch.einsum("bhni,bhnj->hij", k, k).double()

        return forward

    def watch(path: str) -> Any:
        convolution = isinstance(layers[path], torch.nn.Conv2d)

        def forward(_: Any, args: tuple[Any, ...]) -> None:
            rows = rows_of(args[0], count, convolution)
            if not bool(torch.isfinite(rows).all()):
                raise BuildError(f"NaN or infinity before the layer {path} on calibration images", hint="check the weights")
            known = moments.setdefault(path, Moments(rows.shape[-1]))
            known.add(rows.reshape(-1, rows.shape[-1]), weights_for(tokens[path], rows))

        return forward

    hooks = [layers[p].register_forward_pre_hook(watch(p)) for p in tokens]
    for path, weights in attentions.items():
        hooks.append(module.get_submodule(f"{path}.qkv").register_forward_hook(watch_heads(path, weights)))
    try:
        with torch.no_grad():
            for batch in images:
                count = len(batch)
                module(batch)
                on_image(count)
    finally:
        for hook in hooks:
            hook.remove()
    return moments, heads


def weights_for(tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Row weights of ``rows`` (images, positions, channels): those of ``tokens`` where the positions are the same (a stride or
    a window changes them), else one each."""
    import torch

    images, positions = rows.shape[:2]
    if len(tokens) != positions:
        return torch.ones(images * positions)
    return tokens.repeat(images)
