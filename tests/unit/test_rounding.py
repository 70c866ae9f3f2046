"""Rounding against a Hessian: never worse than to the nearest, on the grid it was asked for, and where it is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevit.compress.rounding import (
    Grid,
    Moments,
    correct_bias,
    damped,
    output_error,
    round_to_nearest,
    round_weight,
    search_scales,
)
from edgevit.errors import BuildError

GRIDS = [Grid(8), Grid(4), Grid(3), Grid(4, 16), Grid(4, 16, symmetric=False), Grid(3, 8, symmetric=False, half_scales=True)]


def problem(seed: int, out: int = 12, inputs: int = 40, rows: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Hessian of inputs that hang together and differ in size as activations do."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inputs, generator=generator) * 0.1
    mixing = torch.randn(inputs, inputs, generator=generator) * torch.rand(inputs, generator=generator).exp()
    moments = Moments(inputs)
    moments.add(torch.randn(rows, inputs, generator=generator) @ mixing)
    return weight, moments.hessian()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), grid=st.sampled_from(GRIDS), inputs=st.sampled_from([8, 16, 37, 40]))
def test_never_worse_than_to_the_nearest(seed: int, grid: Grid, inputs: int) -> None:
    weight, hessian = problem(seed, inputs=inputs)
    h = damped(hessian)
    scales, zeros = search_scales(weight, h.diagonal(), grid)
    nearest = round_to_nearest(weight, scales, zeros, grid)
    found = round_weight(weight, hessian, grid)
    assert (output_error(weight, found.weight, h) <= output_error(weight, nearest.weight, h) * (1 + 1e-9)).all()
    low, high = grid.limits
    assert int(found.integers.min()) >= low and int(found.integers.max()) <= high
    assert bool((found.scales > 0).all()) and found.scales.shape == (len(weight), grid.groups(inputs))


def test_it_is_far_better_where_inputs_hang_together() -> None:
    weight, hessian = problem(1, rows=60)
    grid = Grid(4, 16, symmetric=False)
    scales, zeros = search_scales(weight, hessian.diagonal(), grid)
    nearest = output_error(weight, round_to_nearest(weight, scales, zeros, grid).weight, hessian).sum()
    assert float(output_error(weight, round_weight(weight, hessian, grid).weight, hessian).sum()) < 0.6 * float(nearest)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_a_weight_on_the_grid_stays_as_it_is(seed: int) -> None:
    weight, hessian = problem(seed)
    grid = Grid(4, 16, symmetric=False)
    first = round_weight(weight, hessian, grid)
    again = round_to_nearest(first.weight, first.scales, first.zeros, grid)
    assert torch.equal(again.integers, first.integers) and torch.equal(again.weight, first.weight)


def test_given_scales_are_kept() -> None:
    weight, hessian = problem(3)
    scales = weight.abs().amax(1) / 127
    found = round_weight(weight, hessian, Grid(8), scales=scales)
    assert torch.equal(found.scales, scales[:, None]) and not bool(found.zeros.any())


def test_half_scales_are_float16_numbers() -> None:
    weight, hessian = problem(4)
    found = round_weight(weight, hessian, Grid(4, 16, symmetric=False, half_scales=True))
    assert torch.equal(found.scales.half().float(), found.scales)
    tiny = round_weight(weight * 1e-6, hessian, Grid(4, 16, symmetric=False, half_scales=True))
    error = output_error(weight * 1e-6, tiny.weight, hessian).sum() / output_error(weight * 1e-6, 0 * weight, hessian).sum()
    assert float(error) < 0.05  # Below float16's normal numbers the scales stay float32.


def test_dead_inputs_and_dead_outputs() -> None:
    weight, hessian = problem(5)
    weight[2] = 0
    hessian[:, 7] = hessian[7] = 0
    found = round_weight(weight, hessian, Grid(4, 16, symmetric=False))
    assert not bool(found.weight[2].any()) and bool(torch.isfinite(found.weight).all())
    assert bool(torch.isfinite(round_weight(weight, torch.zeros_like(hessian), Grid(4)).weight).all())


def test_the_corrected_bias_keeps_the_mean_output() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 40, generator=generator) + 3
    weight, _ = problem(6)
    moments = Moments(40)
    moments.add(x[:200])
    moments.add(x[200:].reshape(3, 100, 40))
    rounded = round_weight(weight, moments.hessian(centred=True), Grid(3)).weight
    bias = correct_bias(weight, rounded, moments.mean)
    torch.testing.assert_close((x @ rounded.T + bias).mean(0), (x @ weight.T).mean(0), atol=1e-5, rtol=1e-5)


def test_weighted_rows_count_as_often_as_their_weight() -> None:
    x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    weighted, repeated = Moments(8), Moments(8)
    weighted.add(x, torch.tensor([3.0, 1.0, 1.0]))
    repeated.add(torch.cat([x, x[:, :1], x[:, :1]], 1))
    torch.testing.assert_close(weighted.hessian(), repeated.hessian(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(weighted.mean, repeated.mean, atol=1e-6, rtol=1e-6)


def test_what_cannot_be_rounded_is_refused() -> None:
    weight, hessian = problem(7)
    with pytest.raises(BuildError, match="NaN or infinity in a weight"):
        round_weight(torch.full_like(weight, float("nan")), hessian, Grid(4))
    with pytest.raises(BuildError, match="NaN or infinity in the inputs"):
        round_weight(weight, hessian * float("inf"), Grid(4))
    with pytest.raises(BuildError, match=r"expected \(out, in\)"):
        round_weight(weight, hessian[:8, :8], Grid(4))
    with pytest.raises(BuildError, match="scales for"):
        round_weight(weight, hessian, Grid(4, 16), scales=torch.ones(len(weight)))
