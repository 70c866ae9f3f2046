"""LayerScale (Touvron et al., CaiT, 2021) folded into the linear layer or convolution whose output it scales."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgevit.compress.equalise import Edit, apply_exact, trace_readers
from edgevit.rewrite import Applied, Subject
from edgevit.torchsetup import import_timm

if TYPE_CHECKING:
    import torch


def rewrite(subject: Subject) -> Applied | str:
    """Fold every LayerScale that alone reads a linear layer or convolution, and take it out."""
    import_timm()
    import torch
    from timm.layers import LayerScale, LayerScale2d
    from timm.models.vision_transformer import LayerScale as BlockScale

    layers = dict(subject.module.named_modules())
    edits: dict[str, Edit] = {}
    for name, readers in trace_readers(subject.module, subject.x).items():
        scale = layers[readers[0]]
        alone = len(readers) == 1 and isinstance(scale, (LayerScale, LayerScale2d, BlockScale))
        if alone and isinstance(layers[name], (torch.nn.Linear, torch.nn.Conv2d)):
            edits[readers[0]] = _fold(name, readers[0])
    module, kept = apply_exact(subject.module, subject.x, edits)
    return Applied(module, len(kept)) if kept else "no LayerScale reads a linear layer or convolution alone"


def _fold(layer: str, scale: str) -> Edit:
    def edit(root: torch.nn.Module) -> None:
        import torch

        target: Any = root.get_submodule(layer)
        scaled: Any = root.get_submodule(scale)
        gamma = scaled.gamma.detach().reshape(-1)
        target.weight = torch.nn.Parameter(target.weight.detach() * gamma.reshape(-1, *[1] * (target.weight.ndim - 1)))
        if target.bias is not None:
            target.bias = torch.nn.Parameter(target.bias.detach() * gamma)
        parent, _, last = scale.rpartition(".")
        setattr(root.get_submodule(parent), last, torch.nn.Identity())

    return edit
