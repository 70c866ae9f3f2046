"""Outliers of activations moved into weights at no cost in the graph: through LayerNorm's own scale, and within attention."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgevit.compress.equalise import Edit, apply_exact, balance, columns, norms_before_linears, scale_inputs

if TYPE_CHECKING:
    import torch

NORM_ALPHA = 0.75
"""Share of the difficulty that goes from activations into the weights behind a LayerNorm. Weights have a scale per output
channel and bear more than half; 0.5, 0.75 and 1 were tried on DeiT-Tiny, 0.75 was best by a little."""

ATTENTION_ALPHA = 0.5


def smooth_norms(
    module: torch.nn.Module, x: torch.Tensor, largest: Mapping[str, torch.Tensor]
) -> tuple[torch.nn.Module, list[str]]:
    """Divide each channel of an affine LayerNorm's output by a factor and multiply the columns of every linear layer that reads
    it (SmoothQuant, Xiao et al. 2023; RepQ-ViT, Li et al. 2023). ``largest``: layer → largest magnitude of each input channel.

    Returns the new module and the norms that were smoothed. A converter that folds the norm's scale into the next layer by
    itself (TFLite's) undoes it: see :func:`hold_scales`.
    """
    import torch

    edits: dict[str, Edit] = {}
    for name, readers in norms_before_linears(module, x).items():
        if all(r in largest for r in readers):
            weights = torch.stack([columns(module.get_submodule(r)) for r in readers]).amax(0)
            edits[name] = _smooth(name, readers, balance(largest[readers[0]], weights, NORM_ALPHA))
    return apply_exact(module, x, edits)


def _smooth(name: str, readers: list[str], factors: torch.Tensor) -> Edit:
    def edit(root: torch.nn.Module) -> None:
        norm: Any = root.get_submodule(name)
        norm.weight.div_(factors)
        if norm.bias is not None:
            norm.bias.div_(factors)
        for reader in readers:
            scale_inputs(root.get_submodule(reader), factors)

    return edit


def hold_scales(module: torch.nn.Module, x: torch.Tensor, norms: list[str]) -> torch.nn.Module:
    """A copy of ``module`` whose LayerNorms ``norms`` multiply their scale into the inverse deviation of each row, a product of
    two computed tensors that no converter can fold into the layer behind. A norm with a bias keeps its form."""
    edits = {n: _hold(n) for n in norms if not _has_bias(module.get_submodule(n))}
    return apply_exact(module, x, edits)[0]


def _has_bias(norm: Any) -> bool:
    return norm.bias is not None and bool(norm.bias.any())


def _hold(name: str) -> Edit:
    def edit(root: torch.nn.Module) -> None:
        parent, _, last = name.rpartition(".")
        setattr(root.get_submodule(parent), last, _held_norm()(root.get_submodule(name)))

    return edit


@functools.cache
def _held_norm() -> Any:
    import torch

    class HeldNorm(torch.nn.Module):  # type: ignore[misc]
        """LayerNorm over the last axis without a bias, its scale held where a converter leaves it."""

        def __init__(self, norm: Any) -> None:
            super().__init__()
            self.weight, self.eps = norm.weight, norm.eps

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            centred = x - x.mean(-1, keepdim=True)
            inverse = (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt()
            return centred * (inverse * self.weight)

    return HeldNorm


def balance_attention(
    module: torch.nn.Module, x: torch.Tensor, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
) -> tuple[torch.nn.Module, list[str]]:
    """Equalise within timm's plain attention: a channel of the query may be multiplied and the key's divided by one factor, a
    channel of the value divided and the projection's column multiplied. Exact, since attention is linear in each of them.

    ``inputs`` and ``outputs``: layer → largest magnitude of each channel. Returns the new module and the attentions changed.
    """
    from edgevit.compress.blocks import is_attention

    edits = {}
    for name, part in module.named_modules():
        qkv, proj = f"{name}.qkv", f"{name}.proj"
        if is_attention(part) and qkv in outputs and proj in inputs:
            edits[name] = _balance_attention(name, outputs[qkv], inputs[proj], columns(module.get_submodule(proj)))
    return apply_exact(module, x, edits)


def _balance_attention(name: str, seen: torch.Tensor, read: torch.Tensor, weights: torch.Tensor) -> Edit:
    import torch

    width = len(seen) // 3
    floor = 1e-5 * float(seen.max()) + 1e-12
    query, key, value = (part.clamp_min(floor) for part in seen.split(width))
    half = (key / query).sqrt().clamp(1 / 8, 8)
    factors = balance(read, weights, ATTENTION_ALPHA)
    # One factor for all values: their range becomes that of queries and keys, with which they share one scale.
    factors = factors * ((value / factors).max() / torch.maximum(query * half, key / half).max())

    def edit(root: torch.nn.Module) -> None:
        from edgevit.compress.equalise import scale_outputs

        scale_outputs(root.get_submodule(f"{name}.qkv"), torch.cat([half, 1 / half, 1 / factors]))
        scale_inputs(root.get_submodule(f"{name}.proj"), factors)

    return edit
