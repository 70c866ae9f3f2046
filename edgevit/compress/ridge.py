"""Closed forms: what a linear layer should be once its inputs have changed, and what of its inputs it can do without.

All are least squares on second moments of activations, so that any number of images costs the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


FEWEST = 1e-4
SHRINK = 0.02
"""Of ridges: the least, and how much is added where inputs are as many as rows."""


class Moments:
    """Weighted second moments of rows ``x`` (rows, inputs) with a one appended, and of targets ``y`` against them.

    ``xx`` is (inputs + 1, inputs + 1) and ``yx`` (outputs, inputs + 1), both float64 sums; ``weight`` the sum of row weights,
    ``squares`` that of their squares.
    """

    def __init__(self, inputs: int, outputs: int = 0) -> None:
        import torch

        self.xx = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64)
        self.yx = torch.zeros(outputs, inputs + 1, dtype=torch.float64)
        self.squares = 0.0

    def add(self, x: torch.Tensor, weights: torch.Tensor, y: torch.Tensor | None = None) -> None:
        """Take in rows: ``x`` (rows, inputs), ``weights`` (rows,), ``y`` (rows, outputs)."""
        import torch

        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        self.squares += float(weights.square().sum())
        weighted = x * weights[:, None]
        self.xx += (weighted.T @ x).double()
        if y is not None:
            self.yx += (y.T @ weighted).double()

    def __add__(self, other: Moments) -> Moments:
        both = Moments(0)
        both.xx, both.yx = self.xx + other.xx, self.yx + other.yx
        both.squares = self.squares + other.squares
        return both

    @property
    def weight(self) -> float:
        return float(self.xx[-1, -1])

    @property
    def ridge(self) -> float:
        """The strength that closed forms on these moments want, × the inputs' mean energy: the more inputs there are for the
        rows that count, the more."""
        return FEWEST + SHRINK * (len(self.xx) - 1) * self.squares / self.weight**2

    @property
    def mean(self) -> torch.Tensor:
        """(inputs,)"""
        return self.xx[:-1, -1] / self.xx[-1, -1]

    @property
    def covariance(self) -> torch.Tensor:
        """(inputs, inputs), about the mean"""
        import torch

        return self.xx[:-1, :-1] / self.xx[-1, -1] - torch.outer(self.mean, self.mean)


RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Candidates for the strength of a refit, × the inputs' mean energy."""


def correct(halves: tuple[Moments, Moments]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(weight, bias) of the affine map of ``x`` that explains ``y``, held towards zero as strongly as serves the images it was
    not fitted on; None where no strength explains anything on those, or one half is empty.

    ``halves`` are the moments of two halves of the images. Given the error of a layer as ``y`` the result is what to add to it.
    """
    import torch

    if not all(h.weight > 0 for h in halves):
        return None
    first, second = (_Solver(h) for h in halves)
    losses = [sum(b.loss(*a.solve(ridge)) for a, b in ((first, second), (second, first))) for ridge in RIDGES]
    best = min(range(len(RIDGES)), key=losses.__getitem__)
    zero = torch.zeros(halves[0].yx.shape[0], halves[0].xx.shape[0] - 1, dtype=torch.float64)
    unchanged = sum(b.loss(zero, a.mean_y) for a, b in ((first, second), (second, first)))
    nothing = sum(h.loss(zero, torch.zeros_like(h.mean_y)) for h in (first, second))
    both = _Solver(halves[0] + halves[1])
    if losses[best] < min(unchanged, nothing):
        return both.solve(RIDGES[best])
    return (zero, both.mean_y) if unchanged < nothing else None


class _Solver:
    """Ridge regressions of every strength on one set of moments, from one eigendecomposition."""

    def __init__(self, moments: Moments) -> None:
        import torch

        self.moments = moments
        self.mean_y = moments.yx[:, -1] / moments.weight
        cross = moments.yx[:, :-1] / moments.weight - torch.outer(self.mean_y, moments.mean)
        self.values, self.vectors = torch.linalg.eigh(moments.covariance)
        self.values = self.values.clamp_min(0)
        self.rotated = cross @ self.vectors
        self.energy = self.values.mean().clamp_min(1e-12)

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        weight = (self.rotated / (self.values + ridge * self.energy)) @ self.vectors.T
        return weight, self.mean_y - weight @ self.moments.mean

    def loss(self, weight: torch.Tensor, bias: torch.Tensor) -> float:
        """Mean squared error of the map on these moments, less the energy of ``y``."""
        import torch

        full = torch.cat([weight, bias[:, None]], 1)
        return float(((full @ self.moments.xx) * full).sum() - 2 * (full * self.moments.yx).sum()) / self.moments.weight


def root_of(matrix: torch.Tensor, floor: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """(S, S⁻¹) symmetric with S·S = ``matrix`` (n, n, positive semidefinite), eigenvalues raised to ``floor`` × the largest."""
    import torch

    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(max(float(values[-1]) * floor, 1e-20)).sqrt()
    return vectors * values @ vectors.T, vectors / values @ vectors.T


@dataclass(frozen=True)
class Elimination:
    """Inputs of a linear layer in the order they can go: ``order[:k]`` are the first k to remove, ``loss[k]`` is the squared
    error that removing k leaves once the others have taken over what they can."""

    order: tuple[int, ...]
    loss: tuple[float, ...]


def eliminate(covariance: torch.Tensor, weight: torch.Tensor, ridge: float, most: int) -> Elimination:
    """Optimal brain surgeon over the inputs (n) of ``weight`` (outputs, n): at each step the input whose removal, with the
    rest refitted, costs least goes; up to ``most``.

    Kurtić et al., "ZipLM: Inference-Aware Structured Pruning of Language Models" (2023), without its latency table.
    """
    return eliminate_together([(covariance, weight, ridge)], most)


def eliminate_together(readers: Sequence[tuple[torch.Tensor, torch.Tensor, float]], most: int) -> Elimination:
    """:func:`eliminate` over n inputs that several linear layers read, each with its covariance, weight and ridge: an input
    goes from all of them at once."""
    import torch

    n = readers[0][0].shape[0]
    inverses, lefts = [], []
    for covariance, weight, ridge in readers:
        energy = covariance.diagonal().mean().clamp_min(1e-12)
        inverses.append(torch.linalg.inv(covariance + ridge * energy * torch.eye(n, dtype=covariance.dtype)).float())
        lefts.append(weight.T.float().clone())
    alive = torch.ones(n, dtype=torch.bool)
    order, loss, total = [], [0.0], 0.0
    for _ in range(min(most, n - 1)):
        diagonals = [inverse.diagonal().clamp_min(1e-20) for inverse in inverses]
        cost = sum(((left * left).sum(1) / diagonal for left, diagonal in zip(lefts, diagonals, strict=True)), torch.zeros(n))
        cost[~alive] = torch.inf
        j = int(cost.argmin())
        total += float(cost[j])
        for inverse, left, diagonal in zip(inverses, lefts, diagonals, strict=True):
            row = inverse[j] / diagonal[j]
            left -= torch.outer(row, left[j].clone())
            inverse -= torch.outer(inverse[:, j].clone(), row)
            left[j] = 0
            inverse[j] = 0
            inverse[:, j] = 0
        alive[j] = False
        order.append(j)
        loss.append(total)
    return Elimination(tuple(order), tuple(loss))


def truncate_bilinear(left: torch.Tensor, right: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B), each (rank, n), with ``(A q)·(B k)`` nearest to ``q·k``, for second moments ``left`` of q, ``right`` of k.

    The optimum over all pairs of maps (Eckart–Young on the whitened form), scaled evenly between the two.
    """
    import torch

    left_root, left_inverse = root_of(left)
    right_root, right_inverse = root_of(right)
    u, s, vt = torch.linalg.svd(left_root @ right_root)
    share = s[:rank].sqrt()[:, None]
    return share * (u[:, :rank].T @ left_inverse), share * (vt[:rank] @ right_inverse)


def truncate_product(
    weight: torch.Tensor, covariance: torch.Tensor, output_root: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(up, down), (outputs, rank) and (rank, inputs), with the smallest ``‖G½ (W − up·down) C½‖`` for C = ``covariance`` of the
    inputs and G½ = ``output_root`` (outputs, outputs).

    Two-sided whitened truncation: Hsu et al., "Language model compression with weighted low-rank factorization" (2022), with
    full second moments in place of diagonal ones, as in Wang et al., "SVD-LLM" (2024).
    """
    import torch

    root, inverse = root_of(covariance)
    u, s, vt = torch.linalg.svd(output_root @ weight @ root, full_matrices=False)
    share = s[:rank].sqrt()
    up = torch.linalg.solve(output_root, u[:, :rank] * share)
    return up, share[:, None] * (vt[:rank] @ inverse)
