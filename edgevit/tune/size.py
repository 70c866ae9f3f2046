"""The least that a candidate's file can have, from its recipe alone: what is too large then need not be built. Pure but for
:func:`weigh`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edgevit.tune.candidate import Candidate
from edgevit.tune.space import Drawn, Space, recipe_of, smallest

LEAST_BITS = {"fp32": 32, "fp16": 16, "int8-dynamic": 8, "int8-static": 8, "int8-weights": 8, "int4-weights": 4, "mixed": 4}
"""Of a linear layer's weight, by scheme; what a scheme leaves in more bits only adds to a file."""


@dataclass(frozen=True)
class Bulk:
    """``linear``: weights of the linear layers that an image passes; ``factorable``: of all linear layers and 1×1 convolutions,
    of which ``low_rank`` saves a share; ``macs`` of an image, of which ``uses`` are of each weight in a block (its tokens; 0
    where blocks differ)."""

    linear: int
    factorable: int
    macs: int
    uses: int


def weigh(module: Any, preprocessing: Any, tokens: int) -> Bulk:
    """Pass one image through ``module``, whose blocks see ``tokens`` tokens (0 where that is not known)."""
    import torch

    from edgevit.compress.factor import factorable
    from edgevit.macs import count_macs

    layers = [module.get_submodule(path) for path in factorable(module)]
    passed: dict[int, int] = {}

    def note(layer: Any, *_: Any) -> None:
        passed[id(layer.weight)] = layer.weight.numel()

    handles = [layer.register_forward_hook(note) for layer in layers if isinstance(layer, torch.nn.Linear)]
    try:
        macs = count_macs(module, preprocessing)
    finally:
        for handle in handles:
            handle.remove()
    return Bulk(sum(passed.values()), sum(layer.weight.numel() for layer in layers), macs, tokens)


def least_mb(drawn: Drawn, bulk: Bulk) -> float:
    """No file of this draw is smaller (10⁶ bytes). 0 where nothing can be told: where weights are used by differing numbers of
    tokens a pruned share of the MACs may be any share of them.

    Pruning ends on a whole head or group of units and so takes up to one more; patch and position embedding, which are not
    counted here, have more weights than that."""
    weights = float(bulk.linear)
    for step in drawn.recipe.steps:
        if step.kind == "low_rank":
            weights -= step.config.ratio * bulk.factorable
        elif step.kind == "prune":
            if not bulk.uses:
                return 0.0
            weights -= step.config.ratio * bulk.macs / bulk.uses
    return max(0.0, weights) * LEAST_BITS[drawn.scheme] / 8 / 1e6


def sift(
    batch: Sequence[tuple[int, Drawn]], space: Space, most: float | None, least_mb: Callable[[Drawn], float]
) -> tuple[list[tuple[int, Drawn]], list[Candidate]]:
    """Which draws to build, and those that are larger than ``most`` MB by their weights alone. Where no draw of the space can
    be small enough all are to be built, for then the nearest is what a person is told."""
    if most is None or all(least_mb(recipe_of(one, space)) > most for one in smallest(space)):
        return list(batch), []
    rest, large = [], []
    for number, drawn in batch:
        least = least_mb(drawn)
        if least <= most:
            rest.append((number, drawn))
            continue
        reason = f"size at least {least:.2f} MB by its weights alone, at most {most:g}; not built"
        one = Candidate(number, drawn.recipe, drawn.format, drawn.threads, drawn.label, "misses", reason, size_mb=least)
        large.append(one)
    return rest, large
