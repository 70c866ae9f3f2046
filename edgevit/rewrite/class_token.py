"""The last block of a class-token model computes only what the answer is read from.

Behind the last block nothing but the class token (and the distillation token) is looked at: its attention needs the keys and
values of every token, and the query, projection and MLP of those few alone.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from edgevit.compress.attend import mix
from edgevit.compress.blocks import is_attention
from edgevit.compress.merge_tokens import is_merging, tokens_read
from edgevit.rewrite import Applied, Subject
from edgevit.torchsetup import import_timm

if TYPE_CHECKING:
    import torch


def rewrite(subject: Subject) -> Applied | str:
    """Replace the last block of timm's plain Vision Transformer where its answer is read from its first tokens."""
    import_timm()
    import torch
    from timm.models.vision_transformer import Block, VisionTransformer

    module = subject.module
    if not isinstance(module, VisionTransformer) or not isinstance(module.blocks, torch.nn.Sequential):
        return f"{type(module).__name__} is not timm's plain Vision Transformer"
    if module.global_pool != "token" or getattr(module, "attn_pool", None) is not None:
        return f"the answer is read from all tokens (pooling {module.global_pool or 'none'!r})"
    last: Any = module.blocks[-1]
    merging = is_merging(last)
    if not merging and not (isinstance(last, Block) and is_attention(last.attn)):
        return f"the last block is a {type(last).__name__} with a {type(last.attn).__name__}"
    if merging and getattr(module.blocks, "schedule", {}).get(len(module.blocks) - 1):
        return "the last block merges tokens"
    made: Any = copy.deepcopy(module)
    made.blocks[-1] = _last_block()(made.blocks[-1], tokens_read(module), merging)
    return Applied(made.eval(), 1)


@lru_cache(maxsize=1)
def _last_block() -> Any:
    import torch

    class LastBlock(torch.nn.Module):  # type: ignore[misc]
        """timm's Block of (B, N, C) tokens that returns (B, kept, C); between blocks that merge it takes the tokens' sizes
        (B, N, 1), which count each key as often as it stands for a token, and returns them too."""

        def __init__(self, block: Any, kept: int, merging: bool) -> None:
            super().__init__()
            self.kept, self.merging = kept, merging
            self.norm1, self.norm2, self.mlp, self.ls1, self.ls2 = block.norm1, block.norm2, block.mlp, block.ls1, block.ls2
            attention = block.attn
            self.heads, self.width, self.scale = attention.num_heads, attention.head_dim, attention.scale
            self.q_norm, self.k_norm, self.norm, self.proj = (
                attention.q_norm,
                attention.k_norm,
                attention.norm,
                attention.proj,
            )
            inner = self.heads * self.width
            self.q = _rows(attention.qkv, 0, inner)
            self.kv = _rows(attention.qkv, inner, 3 * inner)
            if isinstance(self.q_norm, torch.nn.Identity):
                # Once and for all; TFLite's converter would do it too, and the layer would no longer be known by its weight.
                self.q.weight.detach().mul_(self.scale)
                if self.q.bias is not None:
                    self.q.bias.detach().mul_(self.scale)
                self.scale = 1.0

        def forward(self, x: torch.Tensor, sizes: torch.Tensor | None = None, count: int = 0, layout: Any = None) -> Any:
            batch, tokens, _ = x.shape
            normed = self.norm1(x)
            q = self.q(normed[:, : self.kept]).reshape(batch, self.kept, self.heads, self.width).transpose(1, 2)
            kv = self.kv(normed).reshape(batch, tokens, 2 * self.heads, self.width).transpose(1, 2)
            k, v = kv[:, : self.heads], kv[:, self.heads :]
            mixed, _ = mix(self.q_norm(q), self.k_norm(k), v, self.scale, sizes)
            mixed = mixed.transpose(1, 2).reshape(batch, self.kept, self.heads * self.width)
            x = x[:, : self.kept] + self.ls1(self.proj(self.norm(mixed)))
            x = x + self.ls2(self.mlp(self.norm2(x)))
            return (x, None if sizes is None else sizes[:, : self.kept]) if self.merging else x

    return LastBlock


def _rows(linear: Any, start: int, stop: int) -> torch.nn.Linear:
    """Outputs ``start`` … ``stop`` of a linear layer as a layer of their own."""
    import torch

    made = torch.nn.Linear(linear.in_features, stop - start, bias=linear.bias is not None)
    made.weight = torch.nn.Parameter(linear.weight.detach()[start:stop].clone())
    if linear.bias is not None:
        made.bias = torch.nn.Parameter(linear.bias.detach()[start:stop].clone())
    return made
