"""The patch embedding as a linear layer: a convolution whose kernel is its stride reads every pixel once.

A linear layer is what int8 kernels are written for; a convolution of 256 taps with three channels each is what they are not.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from edgevit.rewrite import Applied, Subject
from edgevit.torchsetup import import_timm

if TYPE_CHECKING:
    import torch


def rewrite(subject: Subject) -> Applied | str:
    """Replace timm's ``PatchEmbed``."""
    import_timm()
    import torch
    from timm.layers import PatchEmbed

    embed: Any = getattr(subject.module, "patch_embed", None)
    if type(embed) is not PatchEmbed:
        return f"the model has no patch embedding of timm's plain kind ({type(embed).__name__})"
    conv: Any = embed.proj
    height, width = subject.x.shape[2:]
    plain = (
        isinstance(conv, torch.nn.Conv2d)
        and conv.kernel_size == conv.stride
        and conv.padding == (0, 0)
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and height % conv.kernel_size[0] == 0
        and width % conv.kernel_size[1] == 0
    )
    if not plain or not embed.flatten or not isinstance(embed.norm, torch.nn.Identity):
        return "its patches overlap, are padded, or are normed before they are tokens"
    module: Any = copy.deepcopy(subject.module)
    module.patch_embed = _linear_embed()(embed, conv)
    return Applied(module.eval(), 1)


@lru_cache(maxsize=1)
def _linear_embed() -> Any:
    import torch

    class LinearPatchEmbed(torch.nn.Module):  # type: ignore[misc]
        """(B, 3, H, W) → (B, patches, C), each patch flattened as rows of pixels with their channels together."""

        def __init__(self, embed: Any, conv: Any) -> None:
            super().__init__()
            self.size = conv.kernel_size
            self.proj = torch.nn.Linear(conv.weight[0].numel(), conv.out_channels, bias=conv.bias is not None)
            self.proj.weight = torch.nn.Parameter(conv.weight.detach().permute(0, 2, 3, 1).flatten(1).contiguous())
            if conv.bias is not None:
                self.proj.bias = torch.nn.Parameter(conv.bias.detach().clone())
            # What timm's models ask their patch embedding for.
            self.grid_size, self.num_patches, self.patch_size = embed.grid_size, embed.num_patches, embed.patch_size

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, channels, height, width = x.shape
            rows, columns = height // self.size[0], width // self.size[1]
            x = x.permute(0, 2, 3, 1).reshape(batch * rows, self.size[0], columns, self.size[1] * channels)
            return self.proj(x.transpose(1, 2).reshape(batch, rows * columns, -1))

    return LinearPatchEmbed
