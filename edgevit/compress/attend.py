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


COUNTED = 0.9
"""A key that stands for n patches is counted n ** COUNTED times. All n would be exact for patches that are equal; those that
merge are only alike, and DeiT-Tiny's answers on training images stay nearer (by KL) with a little less."""


def attend(
    attention: Any, x: torch.Tensor, sizes: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What timm's ``Attention`` gives for (B, N, C), each key counted by its ``sizes`` (B, N, 1) as :data:`COUNTED` says; also
    the keys of all heads side by side, (B, N, heads · head_dim), and the shares in which each query takes the values,
    (B, heads, N, N), without its first axis where B is 1."""
    import torch

    batch, count, _ = x.shape
    heads, width = attention.num_heads, attention.head_dim
    qkv = attention.qkv(x)
    q, k, v = _parts(qkv, batch, count, heads, width)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if isinstance(attention.k_norm, torch.nn.Identity):
        keys = qkv[:, :, heads * width : 2 * heads * width]
    else:
        keys = k.transpose(-3, -2).reshape(batch, count, heads * width)
    mixed, shares = mix(q, k, v, attention.scale, sizes, attention.attn_drop)
    mixed = attention.norm(mixed.transpose(-3, -2).reshape(batch, count, heads * width))
    return attention.proj_drop(attention.proj(mixed)), keys, shares


def mix(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, sizes: torch.Tensor | None, drop: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values ``v`` (…, heads, N, D) mixed for each query (…, heads, M, D), and the shares (…, heads, M, N) they are mixed in;
    ``sizes`` (B, N, 1) as in :func:`attend`, B being 1 where there is no batch axis."""
    logits = (q if scale == 1.0 else q * scale) @ k.transpose(-2, -1)
    if sizes is not None:
        weights = COUNTED * sizes.log().transpose(1, 2)
        logits = logits + (weights if logits.ndim == 3 else weights.unsqueeze(1))
    shares = logits.softmax(-1)
    return (shares if drop is None else drop(shares)) @ v, shares


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
