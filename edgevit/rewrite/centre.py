"""LayerNorm without its mean: the residual stream is kept at mean zero, so that only its mean square is left to divide by.

Whatever writes to the stream (patch embedding, positions, class token, projection, second MLP layer) gets its mean over
channels taken out of its weights; a LayerNorm subtracts that mean anyway, so no answer changes (Ashkboos et al., "SliceGPT",
ICLR 2024, section 3). TFLite's LayerNorm comes out as five whole-tensor operators and becomes three.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from edgevit.rewrite import Applied, Subject
from edgevit.torchsetup import import_timm

if TYPE_CHECKING:
    import torch

POSITIONS = ("pos_embed", "cls_token", "reg_token", "dist_token")


def rewrite(subject: Subject) -> Applied | str:
    """Centre the stream of timm's plain Vision Transformer; every LayerNorm that reads it divides alone from then on."""
    import torch

    module: Any = subject.module
    reason = _why_not(module)
    if reason:
        return reason
    made: Any = copy.deepcopy(module)
    writers: list[Any] = [made.patch_embed.proj]
    norms = [(made, "norm")] if isinstance(made.norm, torch.nn.LayerNorm) else [(made, "fc_norm")]
    for block in made.blocks:
        writers += [block.proj if hasattr(block, "kv") else block.attn.proj, block.mlp.fc2]
        norms += [(block, "norm1"), (block, "norm2")]
    for layer in writers:
        layer.weight = torch.nn.Parameter(_centred(layer.weight.detach(), 0))
        if layer.bias is not None:
            layer.bias = torch.nn.Parameter(_centred(layer.bias.detach(), 0))
    for name in POSITIONS:
        value = getattr(made, name, None)
        if isinstance(value, torch.nn.Parameter):
            setattr(made, name, torch.nn.Parameter(_centred(value.detach(), -1)))
    for parent, name in norms:
        setattr(parent, name, _mean_free_norm()(getattr(parent, name)))
    return Applied(made.eval(), len(writers) + len(norms))


def _why_not(module: Any) -> str:
    import_timm()
    import torch
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(module, VisionTransformer):
        return f"{type(module).__name__} is not timm's plain Vision Transformer"
    if not isinstance(module.norm_pre, torch.nn.Identity) or not isinstance(module.patch_embed.norm, torch.nn.Identity):
        return "a norm stands before the first block"
    if not isinstance(module.patch_embed.proj, (torch.nn.Conv2d, torch.nn.Linear)):
        return f"patches are embedded by a {type(module.patch_embed.proj).__name__}"
    readers = [module.norm if isinstance(module.norm, torch.nn.LayerNorm) else module.fc_norm]
    for i, block in enumerate(module.blocks):
        if not isinstance(getattr(block.mlp, "fc2", None), torch.nn.Linear):
            return f"the MLP of block {i} ends in no linear layer"
        if not all(isinstance(getattr(block, name, None), torch.nn.Identity) for name in ("ls1", "ls2")):
            return f"block {i} scales its branches after their last layer"
        readers += [block.norm1, block.norm2]
    if not all(isinstance(norm, torch.nn.LayerNorm) and len(norm.normalized_shape) == 1 for norm in readers):
        return "something other than LayerNorm reads the residual stream"
    return ""


def _centred(value: torch.Tensor, axis: int) -> torch.Tensor:
    """``value`` with its mean over ``axis`` taken out, in double precision."""
    double = value.double()
    centred: torch.Tensor = (double - double.mean(axis, keepdim=True)).to(value.dtype)
    return centred


@lru_cache(maxsize=1)
def _mean_free_norm() -> Any:
    import torch

    class MeanFreeNorm(torch.nn.LayerNorm):  # type: ignore[misc]
        """LayerNorm over the last axis of what has mean zero there."""

        def __init__(self, norm: Any) -> None:
            super().__init__(norm.normalized_shape, norm.eps, bias=False)
            self.weight = norm.weight
            self.shift = norm.bias if norm.bias is not None and bool(norm.bias.any()) else None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            square = x.pow(2).mean(-1, keepdim=True) if torch.onnx.is_in_onnx_export() else (x * x).mean(-1, keepdim=True)
            if torch.onnx.is_in_onnx_export():
                # The very form that ONNX Runtime joins into one kernel (SimplifiedLayerNormalization).
                scaled = x / torch.sqrt(square + self.eps) * self.weight
            else:
                scaled = x * torch.rsqrt(square + self.eps) * self.weight
            return scaled if self.shift is None else scaled + self.shift

    return MeanFreeNorm
