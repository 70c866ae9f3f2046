"""Which tokens merged, kept from one pass over images for another.

What merges is a choice, and of two pairs that are as good as alike either may be made: float noise decides. So one module in
two forms is held against itself with the choices of the first form, and what those were made from is compared as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Made = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]
"""Gains (B, N), their order (B, N) and each token's partner (B, N) of one merge."""


class Choices:
    """Those of every merge of a pass, in order. ``moved``: by how much any gain of the second pass lay from that of the first;
    gains are differences of cosines, so 1 is much."""

    def __init__(self) -> None:
        self._made: list[Made] = []
        self._next: int | None = None
        self.moved = 0.0

    @property
    def left(self) -> int:
        """Merges of the first pass that the second has not come to."""
        return len(self._made) - (self._next or 0)

    def settle(self, gain: torch.Tensor, order: torch.Tensor, partner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The order and partners to merge by: those given in the first pass, those kept in the second. IndexError for a merge
        that the first pass did not have."""
        if self._next is None:
            self._made.append((gain, order, partner))
            return order, partner
        before, order, partner = self._made[self._next]
        self._next += 1
        moved = float((gain - before).abs().max())
        self.moved = max(self.moved, moved if moved == moved else float("inf"))
        return order, partner

    def rewind(self) -> None:
        self._next, self.moved = 0, 0.0


_held: Choices | None = None


@contextmanager
def keeping() -> Iterator[Choices]:
    """The choices of every merge in the block."""
    with _holding(Choices()) as choices:
        yield choices


@contextmanager
def repeating(choices: Choices) -> Iterator[None]:
    """Merges in the block choose as they did when ``choices`` were kept, on the same images in the same batches."""
    choices.rewind()
    with _holding(choices):
        yield


@contextmanager
def _holding(choices: Choices) -> Iterator[Choices]:
    global _held
    before, _held = _held, choices
    try:
        yield choices
    finally:
        _held = before


def settle(gain: torch.Tensor, order: torch.Tensor, partner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a merge goes by; its own choice outside of :func:`keeping` and :func:`repeating`."""
    return (order, partner) if _held is None else _held.settle(gain, order, partner)
