"""Folding the affine part of LayerNorm into the linear layers that read it, an exact rewrite.

The TFLite converter does so by itself, after rounding, and would take integers off their grid; done before, it has nothing left
to move, and the weights that are rounded are those that really run.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-3
"""Of the largest output: float32 sums in another order stay far below it, a wrongly folded layer far above."""


def fold_norms(module: torch.nn.Module, x: torch.Tensor) -> tuple[torch.nn.Module, int]:
    """A copy of ``module`` with LayerNorms folded into the linear layers that read their very output, and how many were.

    ``x`` (N, 3, H, W) is run through both: a fold that another reader of the norm's output would feel is taken back.
    """
    import torch

    readers = _readers(module, x)
    if not readers:
        return copy.deepcopy(module), 0
    with torch.no_grad():
        expected = module(x)
        folded = _folded(module, readers, list(readers))
        if _same(folded(x), expected):
            return folded, len(readers)
        kept: list[str] = []
        for norm in readers:
            if _same(_folded(module, readers, [*kept, norm])(x), expected):
                kept.append(norm)
        return _folded(module, readers, kept), len(kept)


def _readers(module: torch.nn.Module, x: torch.Tensor) -> dict[str, list[str]]:
    """Affine LayerNorm → the linear layers whose input is the very tensor it gave."""
    import torch

    made: dict[int, tuple[str, Any]] = {}
    readers: dict[str, list[str]] = defaultdict(list)

    def after(name: str) -> Any:
        def keep(layer: Any, args: Any, output: Any) -> None:
            # The tensor is kept alive with its id, or another could take the same one.
            made[id(output)] = (name, output)

        return keep

    def before(name: str) -> Any:
        def see(layer: Any, args: Any) -> None:
            if args and id(args[0]) in made:
                readers[made[id(args[0])][0]].append(name)

        return see

    hooks = []
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.LayerNorm) and layer.elementwise_affine and len(layer.normalized_shape) == 1:
            hooks.append(layer.register_forward_hook(after(name)))
        elif isinstance(layer, torch.nn.Linear) and layer.bias is not None:
            hooks.append(layer.register_forward_pre_hook(before(name)))
    try:
        with torch.no_grad():
            module(x)
    finally:
        for hook in hooks:
            hook.remove()
    return {norm: sorted(set(linears)) for norm, linears in readers.items()}


def _folded(module: torch.nn.Module, readers: dict[str, list[str]], norms: list[str]) -> torch.nn.Module:
    import torch

    made = copy.deepcopy(module)
    with torch.no_grad():
        for name in norms:
            norm: Any = made.get_submodule(name)
            for linear in (made.get_submodule(reader) for reader in readers[name]):
                weight: Any = linear.weight
                bias: Any = linear.bias
                if norm.bias is not None:
                    bias.add_((weight.double() @ norm.bias.double()).float())
                weight.mul_(norm.weight)
            norm.weight.fill_(1.0)
            if norm.bias is not None:
                norm.bias.zero_()
    return made


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) <= TOLERANCE * max(float(b.abs().max()), 1e-12)
