"""LayerNorm's scale and shift folded into the linear layers that read it."""

from __future__ import annotations

from edgevit.compress.fold import fold_norms
from edgevit.rewrite import Applied, Subject


def rewrite(subject: Subject) -> Applied | str:
    """Fold the affine part of every LayerNorm whose readers are linear layers; its scale is 1 and its shift 0 from then on."""
    module, norms = fold_norms(subject.module, subject.x)
    return Applied(module, norms) if norms else "no LayerNorm is read by linear layers alone"
