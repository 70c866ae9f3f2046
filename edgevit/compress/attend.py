"""Plain multi-head attention laid out with the fewest transposes, in tensors of at most four dimensions.

timm's ``Attention`` lays queries, keys and values of all heads out in five dimensions and takes them apart again. Here heads
become batch entries of one matrix product. One image at a time the batch axis goes too: ONNX Runtime's products then take in
the transposes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from edgevit.torchsetup import import_timm

if TYPE_CHECKING:
    import torch


def attend(attention: Any, x: torch.Tensor, sizes: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """What timm's ``Attention`` gives for (B, N, C), each key counted as often as its ``sizes`` (B, N, 1) says; also the mean
    of the keys over the heads, (B, N, head_dim), which says how alike tokens are."""
    batch, count, _ = x.shape
    heads, width = attention.num_heads, attention.head_dim
    q, k, v = _parts(attention.qkv(x), batch, count, heads, width)
    q, k = attention.q_norm(q), attention.k_norm(k)
    mixed = mix(q, k, v, attention.scale, sizes, attention.attn_drop)
    mixed = attention.norm(mixed.transpose(-3, -2).reshape(batch, count, heads * width))
    return attention.proj_drop(attention.proj(mixed)), k.mean(-3).reshape(batch, count, width)


def mix(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, sizes: torch.Tensor | None, drop: Any = None
) -> torch.Tensor:
    """Values ``v`` (…, heads, N, D) mixed for each query (…, heads, M, D); ``sizes`` (B, N, 1) as in :func:`attend`, B being 1
    where there is no batch axis."""
    logits = (q if scale == 1.0 else q * scale) @ k.transpose(-2, -1)
    if sizes is not None:
        weights = sizes.log().transpose(1, 2)
        logits = logits + (weights if logits.ndim == 3 else weights.unsqueeze(1))
    shares = logits.softmax(-1)
    return (shares if drop is None else drop(shares)) @ v


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


@lru_cache(maxsize=1)
def lean_attention() -> Any:
    """timm's ``Attention`` that computes by :func:`attend`; a class of its own, with the same parts and weights."""
    import_timm()
    from timm.layers.attention import Attention

    class LeanAttention(Attention):  # type: ignore[misc]
        """timm's Attention of (B, N, C), laid out leanly."""

        def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
            if attn_mask is not None or is_causal:
                raise NotImplementedError("the rewritten attention takes no mask")
            return attend(self, x)[0]

    return LeanAttention
