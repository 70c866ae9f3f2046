"""Random weights under which a model computes something: what an initialisation leaves out would otherwise go unchecked.

Initial weights make whole blocks vanish (LayerScale of 1e-5, position biases of zero) and the logits of all images alike, so
that a file that computes them wrongly would agree. Here every weight takes part, and activations keep their size by the depth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SMALL = 0.02
"""A parameter that is constant and no larger is a LayerScale."""

FACTORS = (0.3, 0.7)

KEPT = ("logit_scale", "temperature")
"""Names of factors that set how sharp attention is: as the model has them."""


LEAST_VARIANCE = 0.1
"""Of the mean square: where all images give a channel nearly the same, a BatchNorm would amplify rounding as much as images."""


def draw_weights(module: torch.nn.Module, x: torch.Tensor, seed: int = 0) -> None:
    """Draw every weight of ``module`` anew, in place; BatchNorms get the statistics of ``x`` (N, 3, height, width), N > 1.

    Matrices and kernels: normal of variance 1 ÷ inputs. Factors of normalisations: 0.3 … 0.7, so that a residual branch is
    smaller than what it is added to, as training leaves it (equal ones amplify rounding from block to block). LayerScale: 0.1 …
    0.3; what is all zeros: normal of deviation 0.05. Anything else keeps its initial value.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    own = set()
    with torch.no_grad():
        for layer in module.modules():
            weight: Any = getattr(layer, "weight", None)
            if not isinstance(weight, torch.nn.Parameter):
                continue
            if isinstance(layer, (torch.nn.Linear, torch.nn.modules.conv._ConvNd)):
                weight.normal_(0, (weight[0].numel()) ** -0.5, generator=generator)
                own.add(id(weight))
            elif weight.ndim == 1:
                weight.uniform_(*FACTORS, generator=generator)
                own.add(id(weight))
        for name, parameter in module.named_parameters():
            if id(parameter) in own or name.rpartition(".")[2] in KEPT or not parameter.is_floating_point():
                continue
            low, high = float(parameter.min()), float(parameter.max())
            if low == high == 0:
                parameter.normal_(0, 0.05, generator=generator)
            elif low == high and abs(low) <= SMALL:
                parameter.uniform_(0.1, 0.3, generator=generator)
        _set_statistics(module, x)
    # Position biases that a model gathers once in eval mode are thrown away by leaving it.
    module.train()
    module.eval()


def _set_statistics(module: torch.nn.Module, x: torch.Tensor) -> None:
    """Statistics of every BatchNorm from its own input in one pass, front to back."""
    import torch

    def set_own(norm: Any, args: tuple[torch.Tensor, ...]) -> None:
        value = args[0]
        others = [d for d in range(value.ndim) if d != 1]
        mean, square = value.mean(others), value.square().mean(others)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(torch.maximum(square - mean.square(), LEAST_VARIANCE * square).clamp_min(1e-6))

    norms = [m for m in module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    hooks = [norm.register_forward_pre_hook(set_own) for norm in norms]
    try:
        module(x)
    finally:
        for hook in hooks:
            hook.remove()


def spread(outputs: Any) -> float:
    """How far the outputs (N, classes) of different images lie from their mean, as a share of their length: 0 where a model
    says the same of every image, so that agreement would prove nothing."""
    import numpy as np

    centred = outputs - outputs.mean(axis=0)
    return float(np.linalg.norm(centred) / max(float(np.linalg.norm(outputs)), 1e-30))
