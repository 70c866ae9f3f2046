"""Attention laid out with the fewest transposes, in tensors of at most four dimensions, its scale folded into the query.

timm's ``Attention`` lays queries, keys and values of all heads out in five dimensions and takes them apart again. Here heads
become batch entries of one matrix product. One image at a time the batch axis goes too: ONNX Runtime's products then take in
the transposes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from edgevit.compress.blocks import is_attention
from edgevit.compress.merge_tokens import is_merging
from edgevit.rewrite import Applied, Subject
from edgevit.torchsetup import import_timm

if TYPE_CHECKING:
    import torch


def rewrite(subject: Subject) -> Applied | str:
    """Lay out every plain attention, merging ones too."""
    import torch

    made = copy.deepcopy(subject.module)
    count = 0
    lean, lean_merging = _classes()
    for block in list(made.modules()):
        attention: Any = getattr(block, "attn", None)
        if not isinstance(attention, torch.nn.Module):
            continue
        if is_attention(attention):
            attention.__class__ = lean
        elif is_merging(block):
            attention.__class__ = lean_merging
        else:
            continue
        _fold_scale(attention)
        count += 1
    return Applied(made.eval(), count) if count else "no block has timm's plain attention"


def _fold_scale(attention: Any) -> None:
    """Multiply the query by the scale once and for all, where no norm stands between."""
    import torch

    if not isinstance(attention.q_norm, torch.nn.Identity):
        return
    inner = attention.num_heads * attention.head_dim
    factors = torch.ones(3 * inner, 1)
    factors[:inner] = attention.scale
    attention.qkv.weight = torch.nn.Parameter(attention.qkv.weight.detach() * factors)
    if attention.qkv.bias is not None:
        attention.qkv.bias = torch.nn.Parameter(attention.qkv.bias.detach() * factors[:, 0])
    attention.scale = 1.0


@lru_cache(maxsize=1)
def _classes() -> tuple[Any, Any]:
    import_timm()
    from timm.layers.attention import Attention

    class LeanAttention(Attention):  # type: ignore[misc]
        """timm's Attention of (B, N, C), laid out leanly."""

        def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
            if attn_mask is not None or is_causal:
                raise NotImplementedError("the rewritten attention takes no mask")
            return attend(self, x, None)[0]

    class LeanMergingAttention(Attention):  # type: ignore[misc]
        """The same on tokens with sizes (B, N, 1); gives the mean key of the heads as well."""

        def forward(self, x: torch.Tensor, sizes: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            return attend(self, x, sizes)

    return LeanAttention, LeanMergingAttention


def attend(attention: Any, x: torch.Tensor, sizes: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, N, C) → (B, N, C), each key counted as often as ``sizes`` says, and the mean of the keys over heads (B, N, width)."""
    batch, count, _ = x.shape
    heads, width = attention.num_heads, attention.head_dim
    q, k, v = _parts(attention.qkv(x), batch, count, heads, width)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if attention.scale != 1.0:
        q = q * attention.scale
    logits = q @ k.transpose(-2, -1)
    if sizes is not None:
        weights = sizes.log().transpose(1, 2)
        logits = logits + (weights if batch == 1 else weights.unsqueeze(1))
    mixed = logits.softmax(-1) @ v
    mixed = mixed.transpose(-3, -2).reshape(batch, count, heads * width)
    out = attention.proj(attention.norm(mixed))
    return out, k.mean(-3).reshape(batch, count, width)


def _parts(qkv: torch.Tensor, batch: int, count: int, heads: int, width: int) -> Sequence[torch.Tensor]:
    """(B, N, 3·heads·width) → queries, keys and values, each (B, heads, N, width), or (heads, N, width) of a single image."""
    import torch

    shape = (count,) if batch == 1 else (batch, count)
    if torch.onnx.is_in_onnx_export():
        # Apart first: each transpose then stands before one product, which takes it in.
        q, k, v = qkv.reshape(*shape, 3 * heads * width).chunk(3, dim=-1)
        return [part.reshape(*shape, heads, width).transpose(-3, -2) for part in (q, k, v)]
    # One transpose, then parts that lie in one piece.
    together: Sequence[torch.Tensor] = qkv.reshape(*shape, 3 * heads, width).transpose(-3, -2).chunk(3, dim=-3)
    return together
