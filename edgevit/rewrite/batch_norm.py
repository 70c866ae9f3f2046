"""BatchNorm folded into the convolution before it."""

from __future__ import annotations

from edgevit.compress.equalise import fold_batch_norms
from edgevit.rewrite import Applied, Subject


def rewrite(subject: Subject) -> Applied | str:
    """Fold every BatchNorm that is the only reader of a convolution."""
    module, norms = fold_batch_norms(subject.module, subject.x)
    return Applied(module, len(norms)) if norms else "no BatchNorm reads a convolution alone"
