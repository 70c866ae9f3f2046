"""Folding the affine part of LayerNorm into the linear layers that read it, an exact rewrite.

The TFLite converter does so by itself, after rounding, and would take integers off their grid; done before, it has nothing left
to move, and the weights that are rounded are those that really run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgevit.compress.equalise import Edit, apply_exact, norms_before_linears

if TYPE_CHECKING:
    import torch


def fold_norms(module: torch.nn.Module, x: torch.Tensor) -> tuple[torch.nn.Module, int]:
    """A copy of ``module`` with LayerNorms folded into the linear layers that read them, and how many were. A layer without a
    bias gets one.

    ``x`` (N, 3, H, W) is run through both: a fold that another reader of the norm's output would feel is left out.
    """
    edits = {name: _fold(name, readers) for name, readers in norms_before_linears(module, x).items()}
    folded, kept = apply_exact(module, x, edits)
    return folded, len(kept)


def _fold(name: str, readers: list[str]) -> Edit:
    def edit(root: torch.nn.Module) -> None:
        import torch

        norm: Any = root.get_submodule(name)
        with torch.no_grad():
            for linear in (root.get_submodule(reader) for reader in readers):
                weight: Any = linear.weight
                if norm.bias is not None:
                    shift = (weight.double() @ norm.bias.double()).float()
                    linear.bias = torch.nn.Parameter(shift if linear.bias is None else linear.bias + shift)
                weight.mul_(norm.weight)
            norm.weight.fill_(1.0)
            if norm.bias is not None:
                norm.bias.zero_()

    return edit
