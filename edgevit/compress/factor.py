"""One linear layer or 1×1 convolution as two thinner ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from edgevit.compress.ridge import Moments, truncate_product

if TYPE_CHECKING:
    import torch


def factorable(module: torch.nn.Module) -> Iterator[str]:
    """Paths of the linear layers and ungrouped 1×1 convolutions below ``module``."""
    import torch

    for path, layer in module.named_modules():
        if not path:
            continue
        if type(layer) is torch.nn.Linear or (
            type(layer) is torch.nn.Conv2d and layer.kernel_size == (1, 1) and layer.groups == 1 and layer.padding == (0, 0)
        ):
            yield path


def break_even(outputs: int, inputs: int) -> int:
    """The least rank at which two layers (inputs → rank → outputs) have no fewer weights than one."""
    return -(-outputs * inputs // (outputs + inputs))


def pair_of_shape(layer: Any, rank: int) -> Any:
    """``Sequential`` of two layers, inputs → rank without bias and rank → outputs, in place of ``layer``, weights undefined."""
    import torch

    bias = layer.bias is not None
    if isinstance(layer, torch.nn.Conv2d):
        down: Any = torch.nn.Conv2d(layer.in_channels, rank, 1, layer.stride, bias=False)
        pair = torch.nn.Sequential(down, torch.nn.Conv2d(rank, layer.out_channels, 1, bias=bias))
    else:
        down = torch.nn.Linear(layer.in_features, rank, bias=False)
        pair = torch.nn.Sequential(down, torch.nn.Linear(rank, layer.out_features, bias=bias))
    for parameter in pair.parameters():
        parameter.requires_grad_(False)
    return pair.train(layer.training)


def factored(layer: Any, rank: int, moments: Moments, output_root: torch.Tensor) -> Any:
    """``layer`` by way of ``rank``, nearest in what it makes of inputs with these ``moments``, where ``output_root`` (outputs,
    outputs) is the root of how much its outputs matter. The bias takes over the mean of what is lost."""
    pair = pair_of_shape(layer, rank)
    fill_pair(pair, layer.weight.flatten(1), layer.bias, moments, output_root)
    return pair


def fill_pair(pair: Any, weight: torch.Tensor, bias: torch.Tensor | None, moments: Moments, output_root: torch.Tensor) -> None:
    """Write the truncation of ``weight`` (outputs, inputs) and the corrected ``bias`` into ``pair``.

    Without a bias to correct, the truncation is about zero instead of about the mean.
    """
    down, up = pair[0], pair[1]
    covariance = moments.covariance if bias is not None else moments.xx[:-1, :-1] / moments.weight
    left, right = truncate_product(weight.double(), covariance, output_root, down.weight.shape[0])
    down.weight.copy_(right.reshape(down.weight.shape))
    up.weight.copy_(left.reshape(up.weight.shape))
    if bias is not None:
        up.bias.copy_(bias + (weight.double() - left @ right) @ moments.mean)
