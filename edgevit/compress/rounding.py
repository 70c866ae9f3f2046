"""Rounding a linear layer's weight to few bits so that its *outputs* move least, not its entries.

The measure is the Hessian objective ``tr((W − Ŵ) H (W − Ŵ)ᵀ)``: the squared change of the outputs over the inputs that gave
``H = E[x xᵀ]``. Columns are rounded one after the other, each pushing its error onto those not yet rounded (GPTQ, Frantar et
al. 2023, columns in order of their diagonal), then every integer is moved while that lowers the objective (coordinate
descent), and scales are refitted in closed form to the integers found. Row by row the best of these and of rounding to nearest
is kept, so the result is never worse than that.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgevit.errors import BuildError

if TYPE_CHECKING:
    import torch

DAMPING = 0.01
"""Share of the Hessian's mean diagonal that is added to it: directions the images did not show must not be free."""

SHRINKS = tuple(1.0 - 0.025 * i for i in range(21))
"""Factors on the largest entry that are tried for a scale."""

_LEAST_SCALE = 1e-12


@dataclass(frozen=True)
class Grid:
    """The integers a weight may become. ``group`` inputs share one scale, None for all of an output channel's; a symmetric
    grid is ±(2^(bits−1) − 1) around zero, any other 0 … 2^bits − 1 around a zero point of each group's own. ``half_scales``:
    scales are numbers that float16 holds exactly, so that a file may store them in half the bytes."""

    bits: int
    group: int | None = None
    symmetric: bool = True
    half_scales: bool = False

    @property
    def limits(self) -> tuple[int, int]:
        if self.symmetric:
            return -(2 ** (self.bits - 1) - 1), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1

    def groups(self, inputs: int) -> int:
        return 1 if self.group is None else -(-inputs // self.group)


@dataclass(frozen=True)
class Rounded:
    """``integers`` int32 (out, in); ``scales`` float32 and ``zeros`` int32 (out, groups)."""

    integers: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    grid: Grid

    @property
    def weight(self) -> torch.Tensor:
        """The real weights these integers stand for, float32 (out, in): ``(integer − zero) · scale`` in float32."""
        scales, zeros = _spread(self.scales, self.zeros, self.integers.shape[1], self.grid)
        return (self.integers - zeros).float() * scales


class Moments:
    """Sums over the rows x of a layer's inputs: ``H = E[x xᵀ]`` and the mean, in float64."""

    def __init__(self, inputs: int) -> None:
        import torch

        self.weight = 0.0
        self._sum = torch.zeros(inputs, dtype=torch.float64)
        self._products = torch.zeros(inputs, inputs, dtype=torch.float64)

    def add(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Take in x (…, inputs), each row counted by ``weights`` (all axes of x but the last, or broadcast to them)."""
        import torch

        rows = x.detach().reshape(-1, x.shape[-1])
        if weights is None:
            self.weight += len(rows)
            counted = rows
        else:
            each = torch.broadcast_to(weights, x.shape[:-1]).reshape(-1, 1).to(rows.dtype)
            self.weight += float(each.sum())
            counted = rows * each
        self._sum += counted.sum(0).double()
        self._products += (counted.T @ rows).double()

    @property
    def mean(self) -> torch.Tensor:
        return self._sum / max(self.weight, 1e-12)

    def hessian(self, centred: bool = False) -> torch.Tensor:
        """(inputs, inputs) ``E[x xᵀ]``; ``centred`` about the mean, which is the measure where the bias is corrected after."""
        products = self._products / max(self.weight, 1e-12)
        return products - self.mean[:, None] * self.mean if centred else products


def output_error(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Mean squared change of each output, float64 (out,)."""
    off = weight.double() - rounded.double()
    return ((off @ hessian.double()) * off).sum(1)


def damped(hessian: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """``hessian`` in float64 with ``damping`` × its mean diagonal added; inputs that were always zero count as 1."""
    import torch

    made = hessian.double().clone()
    diagonal = made.diagonal()
    mean = float(diagonal.mean())
    diagonal += damping * mean if mean > 0 else 1.0
    if not bool(torch.isfinite(made).all()):
        raise BuildError("NaN or infinity in the inputs that a weight is rounded for", hint="check the calibration images")
    return made


def round_weight(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    scales: torch.Tensor | None = None,
    sweeps: int = 4,
    refits: int = 1,
    damping: float = DAMPING,
) -> Rounded:
    """Round ``weight`` (out, in) to ``grid`` against ``hessian`` (in, in).

    Given ``scales`` (out, groups) are kept as they are (symmetric grids only); else they are searched and refitted. Each of
    the ``refits`` is followed by up to ``sweeps`` of coordinate descent. Raises :class:`BuildError` for NaN or infinity.
    """
    import torch

    _verify(weight, hessian, grid, scales)
    w, h = weight.detach().double(), damped(hessian, damping)
    if scales is None:
        found, zeros = search_scales(w, h.diagonal(), grid)
    else:
        found = scales.detach().float().reshape(len(w), -1)
        zeros = torch.zeros_like(found, dtype=torch.int32)
    start = round_to_nearest(w, found, zeros, grid)
    best = _better(w, h, start, _descend(w, h, _gptq(w, h, start), sweeps))
    for _ in range(refits if scales is None else 0):
        best = _better(w, h, best, _descend(w, h, _refit_scales(w, h, best), sweeps))
    return best


def search_scales(weight: torch.Tensor, importance: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales float32 and zeros int32, both (out, groups): the range of each group shrunk to the smallest squared rounding
    error weighted by ``importance`` (in,), the Hessian's diagonal."""
    import torch

    low, high = grid.limits
    entries, counts = _grouped(weight.double(), grid)
    weights, _ = _grouped(importance.double().expand_as(weight), grid)
    weights = weights * counts
    top, bottom = entries.amax(2).clamp_min(0), entries.amin(2).clamp_max(0)
    least = torch.full(top.shape, float("inf"), dtype=torch.float64)
    scales = torch.ones_like(top)
    zeros = torch.zeros_like(top, dtype=torch.int32)
    for shrink in SHRINKS:
        if grid.symmetric:
            scale = (torch.maximum(top, -bottom) * shrink / high).float().double()
            scale = torch.where(scale > _LEAST_SCALE, scale, 1.0)
            zero = torch.zeros_like(scale)
        else:
            scale = ((top - bottom) * shrink / (high - low)).float().double()
            scale = torch.where(scale > _LEAST_SCALE, scale, 1.0)
            zero = (-bottom * shrink / scale).round().clamp(low, high)
        grid_entries = ((entries / scale[..., None]).round() + zero[..., None]).clamp(low, high)
        off = (grid_entries - zero[..., None]) * scale[..., None] - entries
        error = (off * off * weights).sum(2)
        closer = error < least
        least = torch.where(closer, error, least)
        scales = torch.where(closer, scale, scales)
        zeros = torch.where(closer, zero.int(), zeros)
    return storable(scales, grid), zeros


def storable(scales: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Scales in float32, rounded to what float16 holds where the grid asks for it and all of them are normal numbers there."""
    import torch

    full = scales.float()
    limits = torch.finfo(torch.float16)
    if not grid.half_scales or float(full.min()) < limits.tiny or float(full.max()) > limits.max:
        return full
    return full.half().float()


def round_to_nearest(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, grid: Grid) -> Rounded:
    """Each entry of (out, in) to the nearest integer of its group's grid."""
    scale, zero = _spread(scales, zeros, weight.shape[1], grid)
    integers = ((weight.double() / scale.double()).round() + zero).clamp(*grid.limits).int()
    return Rounded(integers, scales, zeros, grid)


def correct_bias(weight: torch.Tensor, rounded: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """What to add to the bias (out,) so that the outputs keep their mean over inputs of ``mean`` (in,) (Nagel et al. 2019)."""
    return ((weight.double() - rounded.double()) @ mean.double()).float()


def _verify(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, scales: torch.Tensor | None) -> None:
    import torch

    if weight.ndim != 2 or tuple(hessian.shape) != (weight.shape[1],) * 2:
        raise BuildError(
            f"got a weight {tuple(weight.shape)} and a Hessian {tuple(hessian.shape)}, expected (out, in), (in, in)"
        )
    if not bool(torch.isfinite(weight).all()):
        raise BuildError("NaN or infinity in a weight to be rounded", hint="check the weights")
    if scales is not None and (not grid.symmetric or scales.numel() != len(weight) * grid.groups(weight.shape[1])):
        raise BuildError(f"got {scales.numel()} scales for {grid} and a weight {tuple(weight.shape)}")


def _spread(scales: torch.Tensor, zeros: torch.Tensor, inputs: int, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, groups) → (out, in)."""
    size = inputs if grid.group is None else grid.group
    return scales.repeat_interleave(size, 1)[:, :inputs], zeros.repeat_interleave(size, 1)[:, :inputs]


def _grouped(values: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, in) → (out, groups, group), the last group filled up with zeros, and 1 where an entry is real."""
    import torch

    out, inputs = values.shape
    size, groups = inputs if grid.group is None else grid.group, grid.groups(inputs)
    pad = size * groups - inputs
    real = torch.nn.functional.pad(torch.ones_like(values), (0, pad))
    return torch.nn.functional.pad(values, (0, pad)).reshape(out, groups, size), real.reshape(out, groups, size)


def _gptq(w: torch.Tensor, h: torch.Tensor, start: Rounded) -> Rounded:
    """Columns by falling diagonal of ``h``; each one's error goes onto the rest by the Cholesky factor of the inverse."""
    import torch

    order = torch.argsort(h.diagonal(), descending=True, stable=True)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h[order][:, order])), upper=True)
    scales, zeros = _spread(start.scales, start.zeros, w.shape[1], start.grid)
    scales, zeros = scales.double()[:, order], zeros[:, order]
    left = w[:, order].clone()
    integers = torch.zeros_like(start.integers)
    low, high = start.grid.limits
    for j in range(left.shape[1]):
        q = ((left[:, j] / scales[:, j]).round() + zeros[:, j]).clamp(low, high)
        error = (left[:, j] - (q - zeros[:, j]) * scales[:, j]) / upper[j, j]
        left[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
        integers[:, order[j]] = q.int()
    return Rounded(integers, start.scales, start.zeros, start.grid)


def _descend(w: torch.Tensor, h: torch.Tensor, start: Rounded, sweeps: int) -> Rounded:
    """Move one column of integers at a time to its best place, all others fixed, until nothing moves or ``sweeps`` are over."""
    import torch

    scales, zeros = _spread(start.scales, start.zeros, w.shape[1], start.grid)
    scales = scales.double()
    low, high = start.grid.limits
    integers = start.integers.clone()
    slope = (w - (integers - zeros) * scales) @ h
    diagonal = h.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True).tolist()
    for _ in range(sweeps):
        moved = False
        for j in order:
            old = integers[:, j]
            step = (slope[:, j] / (diagonal[j] * scales[:, j])).round().int()
            new = (old + step).clamp(low, high).int()
            change = (new - old).double() * scales[:, j]
            rows = change.nonzero().squeeze(1)
            if len(rows):
                slope.index_add_(0, rows, change[rows, None] * h[j], alpha=-1)
                integers[:, j] = new
                moved = True
        if not moved:
            break
    return Rounded(integers, start.scales, start.zeros, start.grid)


def _refit_scales(w: torch.Tensor, h: torch.Tensor, rounded: Rounded) -> Rounded:
    """The scales that are best for these integers: least squares in each row, one unknown per group. A group whose best scale
    is not positive keeps its own."""
    import torch

    out, inputs = w.shape
    size, groups = inputs if rounded.grid.group is None else rounded.grid.group, rounded.grid.groups(inputs)
    _, zeros = _spread(rounded.scales, rounded.zeros, inputs, rounded.grid)
    member = torch.zeros(inputs, groups, dtype=torch.float64)
    member[torch.arange(inputs), torch.arange(inputs) // size] = 1
    levels = (rounded.integers - zeros).double()
    right = ((w @ h) * levels) @ member
    fitted = torch.empty(out, groups, dtype=torch.float64)
    for i in range(out):
        spread = levels[i][:, None] * member
        left = spread.T @ h @ spread
        left.diagonal().add_(1e-9 * float(left.diagonal().mean()) + _LEAST_SCALE)
        fitted[i] = torch.linalg.solve(left, right[i])
    scales = torch.where(fitted > _LEAST_SCALE, fitted, rounded.scales.double())
    return Rounded(rounded.integers, storable(scales, rounded.grid), rounded.zeros, rounded.grid)


def _better(w: torch.Tensor, h: torch.Tensor, *found: Rounded) -> Rounded:
    """Row by row the one with the smallest objective; the first where they are equal."""
    import torch

    def pick(a: Rounded, b: Rounded) -> Rounded:
        closer = (output_error(w, b.weight, h) < output_error(w, a.weight, h))[:, None]
        return Rounded(
            torch.where(closer, b.integers, a.integers),
            torch.where(closer, b.scales, a.scales),
            torch.where(closer, b.zeros, a.zeros),
            a.grid,
        )

    return functools.reduce(pick, found)
