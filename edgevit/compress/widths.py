"""Narrower attention and MLPs: the same timm modules with fewer heads, thinner heads or fewer hidden units, in closed form."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgevit.compress.ridge import Moments, root_of, truncate_bilinear, truncate_product
from edgevit.compress.statistics import HeadMoments

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class NarrowAttention:
    """An attention with ``heads`` heads of ``dim``; ``project`` (3·heads·dim, 3·old) is what its qkv keeps of the old one's."""

    module: torch.nn.Module
    project: torch.Tensor


def attention_of_shape(attention: Any, heads: int, dim: int) -> Any:
    """A copy of timm's ``Attention`` with that many heads of that width, weights undefined; the scale stays as it was."""
    import torch

    new = copy.copy(attention)
    new._modules = dict(attention._modules)
    inputs, outputs = attention.qkv.in_features, attention.proj.out_features
    new.qkv = torch.nn.Linear(inputs, 3 * heads * dim, bias=attention.qkv.bias is not None)
    new.proj = torch.nn.Linear(heads * dim, outputs, bias=attention.proj.bias is not None)
    new.num_heads, new.head_dim, new.attn_dim, new.fused_attn = heads, dim, heads * dim, False
    return _frozen(new, attention.training)


def mlp_of_shape(mlp: Any, hidden: int) -> Any:
    """A copy of an MLP with that many hidden units, weights undefined."""
    import torch

    new = copy.copy(mlp)
    new._modules = dict(mlp._modules)
    new.fc1 = torch.nn.Linear(mlp.fc1.in_features, hidden, bias=mlp.fc1.bias is not None)
    new.fc2 = torch.nn.Linear(hidden, mlp.fc2.out_features, bias=mlp.fc2.bias is not None)
    return _frozen(new, mlp.training)


def _frozen(module: Any, training: bool) -> Any:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module.train(training)


def narrow_mlp(mlp: Any, keep: torch.Tensor, moments: Moments) -> Any:
    """The MLP with the hidden units ``keep`` alone, its second layer refitted to give what the whole gave.

    ``moments`` are those of the second layer's inputs.
    """
    import torch

    new = mlp_of_shape(mlp, len(keep))
    covariance, mean = moments.covariance, moments.mean
    energy = covariance.diagonal().mean().clamp_min(1e-12)
    inside = covariance[keep][:, keep] + moments.ridge * energy * torch.eye(len(keep), dtype=torch.float64)
    gone = torch.ones(len(mean), dtype=torch.bool)
    gone[keep] = False
    takes = torch.linalg.solve(inside, covariance[keep][:, gone]).T
    old = mlp.fc2.weight.double()
    new.fc1.weight.copy_(mlp.fc1.weight[keep])
    if mlp.fc1.bias is not None:
        new.fc1.bias.copy_(mlp.fc1.bias[keep])
    new.fc2.weight.copy_(old[:, keep] + old[:, gone] @ takes)
    if mlp.fc2.bias is not None:
        new.fc2.bias.copy_(mlp.fc2.bias + old[:, gone] @ (mean[gone] - takes @ mean[keep]))
    return new


def narrow_attention(
    attention: Any, heads: list[int], dim: int, seen: HeadMoments, moments: Moments, gram: torch.Tensor
) -> NarrowAttention:
    """The attention with ``heads`` alone, each of width ``dim``: queries and keys by the best approximation of their product,
    values by the best approximation of what the projection makes of them.

    ``seen`` are the moments of its queries and keys, ``moments`` those of the projection's inputs, ``gram`` (outputs, outputs)
    how much the projection's outputs matter. Joint truncation of query·key and value·projection: Lin et al., "MoDeGPT" (2024).
    """
    import torch

    old = attention.head_dim
    new = attention_of_shape(attention, len(heads), dim)
    size = 3 * attention.num_heads * old
    project = torch.zeros(3, len(heads), dim, size, dtype=torch.float64)
    covariance, mean = moments.covariance, moments.mean
    output_root = root_of(gram / gram.diagonal().mean().clamp_min(1e-30), 1e-4)[0]
    weight = attention.proj.weight.double()
    ups, bias = [], weight @ mean
    for i, h in enumerate(heads):
        at = slice(h * old, (h + 1) * old)
        a, b = truncate_bilinear(seen.q[h], seen.k[h], dim)
        up, down = truncate_product(weight[:, at], covariance[at, at], output_root, dim)
        for part, matrix in enumerate((a, b, down)):
            start = (part * attention.num_heads + h) * old
            project[part, i, :, start : start + old] = matrix
        ups.append(up)
        bias = bias - up @ (down @ mean[at])
    flat = project.reshape(-1, size)
    new.qkv.weight.copy_(flat @ attention.qkv.weight.double())
    if attention.qkv.bias is not None:
        new.qkv.bias.copy_(flat @ attention.qkv.bias.double())
    new.proj.weight.copy_(torch.cat(ups, 1))
    if attention.proj.bias is not None:
        new.proj.bias.copy_(attention.proj.bias + bias)
    return NarrowAttention(new, flat.float())
