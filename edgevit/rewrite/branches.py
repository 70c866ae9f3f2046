"""Parallel branches that a model was trained with (RepVGG, MobileOne, RepMixer, RepViT, LeViT) joined into the one layer that
they come to, by the model's own arithmetic.

timm's ``reparameterize_model`` (``fuse``, ``reparameterize`` and ``switch_to_deploy`` of its modules).
"""

from __future__ import annotations

import copy

from edgevit.rewrite import Applied, Subject
from edgevit.torchsetup import import_timm

METHODS = ("fuse", "reparameterize", "switch_to_deploy")


def rewrite(subject: Subject) -> Applied | str:
    """Join the branches of every module that knows how."""
    import_timm()
    from timm.utils import reparameterize_model

    found = [m for m in subject.module.modules() if any(callable(getattr(m, name, None)) for name in METHODS)]
    if not found:
        return "no part of the model has branches to join"
    return Applied(reparameterize_model(copy.deepcopy(subject.module), inplace=True).eval(), len(found))
