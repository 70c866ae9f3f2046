"""The model takes pixels as a camera gives them: normalisation moves into the first convolution.

Exact where that convolution has no padding. Where it pads, its border was padded after normalisation, with zeros: the mean is
then subtracted in the graph, before the padding, and only the division goes into the weights.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from edgevit.compress.equalise import run_hooked
from edgevit.rewrite import Applied, Subject

if TYPE_CHECKING:
    import torch

UNIT = (1 / 255, 1 / 255, 1 / 255)
"""The standard deviation under which a pixel's value is its own normalised value."""


def rewrite(subject: Subject) -> Applied | str:
    """Fold mean and standard deviation into the only convolution that reads the image."""
    import torch

    readers = _readers(subject.module, subject.x)
    if len(readers) != 1:
        return f"the image is read by {len(readers)} convolutions, expected one"
    module: Any = copy.deepcopy(subject.module)
    layer: Any = module.get_submodule(readers[0])
    if layer.groups != 1 or layer.padding_mode != "zeros":
        return f"{readers[0]} has {layer.groups} groups and pads with {layer.padding_mode}"
    padded = layer.padding not in (0, (0, 0), "valid")
    mean = torch.tensor(subject.preprocessing.mean, dtype=torch.float64) * 255
    factor = 1 / (torch.tensor(subject.preprocessing.std, dtype=torch.float64) * 255)
    weight = layer.weight.detach().double() * factor[None, :, None, None]
    if padded:
        parent, _, last = readers[0].rpartition(".")
        setattr(module.get_submodule(parent), last, torch.nn.Sequential(_subtract()(mean), layer))
    else:
        shift = (weight * mean[None, :, None, None]).sum((1, 2, 3))
        bias = -shift if layer.bias is None else layer.bias.detach().double() - shift
        layer.bias = torch.nn.Parameter(bias.float())
    layer.weight = torch.nn.Parameter(weight.float())
    return Applied(module.eval(), 1, replace(subject.preprocessing, mean=(0.0, 0.0, 0.0), std=UNIT))


def takes_pixels(preprocessing: Any) -> bool:
    """Whether a module of this preprocessing takes pixel values 0 … 255 as they are."""
    return tuple(preprocessing.mean) == (0.0, 0.0, 0.0) and tuple(preprocessing.std) == UNIT


def _readers(module: torch.nn.Module, x: torch.Tensor) -> list[str]:
    """Paths of the convolutions that read ``x`` itself; none where anything else does. What hands on its input is looked
    through."""
    import torch

    seen: list[str] = []

    def note(name: str) -> Any:
        def see(_: Any, args: tuple[Any, ...]) -> None:
            if args and args[0] is x:
                seen.append(name)

        return see

    through = (torch.nn.Identity, torch.nn.Dropout)
    named = [(n, m) for n, m in module.named_modules() if not list(m.children()) and not isinstance(m, through)]
    run_hooked(module, x, [layer.register_forward_pre_hook(note(name)) for name, layer in named])
    layers = dict(named)
    return seen if all(isinstance(layers[name], torch.nn.Conv2d) for name in seen) else []


@lru_cache(maxsize=1)
def _subtract() -> Any:
    import torch

    class SubtractMean(torch.nn.Module):  # type: ignore[misc]
        """(N, 3, H, W) pixels minus their channel's mean (3,)."""

        def __init__(self, mean: torch.Tensor) -> None:
            super().__init__()
            self.register_buffer("mean", mean.float().reshape(1, 3, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - self.mean

    return SubtractMean
