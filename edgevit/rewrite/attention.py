"""Attention laid out with the fewest transposes (:mod:`edgevit.compress.attend`), its scale folded into the query."""

from __future__ import annotations

import copy
from typing import Any

from edgevit.compress.attend import lean_attention
from edgevit.compress.blocks import is_attention
from edgevit.compress.merge_tokens import is_merging
from edgevit.rewrite import Applied, Subject


def rewrite(subject: Subject) -> Applied | str:
    """Lay out every plain attention. One that merges tokens is laid out so already, and gets the scale folded."""
    made = copy.deepcopy(subject.module)
    count = 0
    for block in list(made.modules()):
        attention: Any = getattr(block, "attn", None)
        if attention is not None and is_attention(attention):
            attention.__class__ = lean_attention()
        elif not is_merging(block):
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
