"""Pruning: shapes and budgets add up, what is left takes over, kept results come back bit for bit, nonsense is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from device_agents.wire import Preprocessing
from edgevit.compress import CalibrationData, Compressed, StepContext, TrainingData, apply_step, restructure
from edgevit.compress.blocks import find_blocks
from edgevit.compress.budget import Cut, Judge, allocate, batches_of, interpolate, split_judged
from edgevit.compress.calibrate import normalise
from edgevit.compress.narrowing import narrowed, refitted, survey_blocks
from edgevit.compress.prune import PruneConfig, applies_to
from edgevit.compress.ridge import Moments, correct, eliminate, truncate_bilinear
from edgevit.errors import BuildError, DataError
from edgevit.macs import count_macs
from edgevit.progress import Quiet
from edgevit.recipe import Recipe
from edgevit.torchsetup import import_timm, import_torch
from tests.support.models import MEAN, STD, no_linear, tiny_vit

SHAPE = Preprocessing(32, 32, 36, "bicubic", "center", MEAN, STD)


def photographs(count: int = 32) -> Any:
    """Seeded blobs of colour, uint8 (count, 32, 32, 3): correlated as photographs are."""
    coarse = np.random.default_rng(0).integers(0, 255, (count, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def context_of(real: bool = True, multiple: int = 8) -> StepContext:
    pixels = photographs()
    return StepContext(
        CalibrationData(pixels, None, real=real), lambda: TrainingData(pixels, None), multiple, Path("unused"), Quiet()
    )


def pruned(module: Any, real: bool = True, multiple: int = 8, **config: Any) -> Compressed:
    return apply_step(Compressed(module.eval(), SHAPE, module), PruneConfig(**config), context_of(real, multiple))


def batches() -> list[Any]:
    return batches_of(normalise(photographs(), SHAPE))


@pytest.mark.parametrize("importance", ["reconstruction", "activation", "taylor", "magnitude"])
def test_the_budget_is_met_within_one_step_of_rounding(importance: str) -> None:
    module = tiny_vit()
    before = copy.deepcopy(module.state_dict())
    state = pruned(module, ratio=0.25, targets=("heads", "head_width", "mlp"), importance=importance, refit=False)
    whole, left = count_macs(module, SHAPE), count_macs(state.module, SHAPE)
    coarsest = max(2 * 17 * 48 * 8, 16 * (17 * 4 * 48 + 2 * 17 * 17))
    assert 0.75 * whole - coarsest <= left <= 0.75 * whole
    assert state.reports[-1].layers > 0
    assert all(torch_equal(before[k], v) for k, v in module.state_dict().items())


def torch_equal(a: Any, b: Any) -> bool:
    return bool(import_torch().equal(a, b))


@pytest.mark.parametrize("targets", [("heads",), ("head_width",), ("mlp",), ("blocks",)])
def test_every_target_alone_comes_back_bit_for_bit(targets: tuple[str, ...]) -> None:
    torch = import_torch()
    module = tiny_vit(width=96)
    state = pruned(module, ratio=0.05, targets=targets)
    again = restructure(copy.deepcopy(module), state.structure)
    again.load_state_dict(state.module.state_dict(), strict=True)
    images = batches()[0]
    with torch.no_grad():
        assert torch.equal(again.eval()(images), state.module(images))
    assert count_macs(state.module, SHAPE) < count_macs(module, SHAPE)
    sizes = list(state.structure[-1].plan["sizes"].values())
    widths = [s[1] for s in sizes if len(s) == 2] + [s[0] for s in sizes if len(s) == 1]
    assert all(w % 8 == 0 for w in widths)


def test_attention_of_the_full_width_is_exact_and_thinner_ones_keep_the_scale() -> None:
    torch = import_torch()
    module = tiny_vit().eval().requires_grad_(False)
    survey = survey_blocks(module, batches(), [], Quiet())
    whole, _ = narrowed(module, {"blocks.0.attn": (3, 16)}, survey, "reconstruction")
    thin, _ = narrowed(module, {"blocks.0.attn": (2, 8)}, survey, "reconstruction")
    images = batches()[0]
    with torch.no_grad():
        assert torch.allclose(whole(images), module(images), atol=1e-3)
    attention = thin.get_submodule("blocks.0.attn")
    assert (attention.num_heads, attention.head_dim, attention.attn_dim) == (2, 8, 16)
    assert attention.scale == module.get_submodule("blocks.0.attn").scale
    assert attention.qkv.weight.shape == (48, 48)
    assert not attention.fused_attn


def test_kept_units_take_over_what_copies_of_them_carried() -> None:
    torch = import_torch()
    module = tiny_vit().eval().requires_grad_(False)
    mlp = module.get_submodule("blocks.0.mlp")
    mlp.fc1.weight[96:] = mlp.fc1.weight[:96]
    mlp.fc1.bias[96:] = mlp.fc1.bias[:96]
    survey = survey_blocks(module, batches(), [], Quiet())
    half, _ = narrowed(module, {"blocks.0.mlp": (96,)}, survey, "reconstruction")
    images = batches()[1]
    with torch.no_grad():
        assert torch.allclose(half(images), module(images), atol=0.02 * float(module(images).abs().max()))


def test_a_refit_takes_back_what_an_earlier_block_lost() -> None:
    torch = import_torch()
    module = tiny_vit().eval().requires_grad_(False)
    survey = survey_blocks(module, batches(), [], Quiet())
    cut, goals = narrowed(module, {"blocks.1.attn": (3, 8), "blocks.1.mlp": (96,)}, survey, "magnitude")
    cut.get_submodule("blocks.0.mlp.fc2").bias.add_(1.0)
    again = refitted(module, cut, goals, survey, batches(), Quiet())
    images = torch.cat(batches())

    def off(other: Any) -> float:
        with torch.no_grad():
            return float((other.forward_features(images) - module.forward_features(images)).square().mean())

    assert off(again) < 0.9 * off(cut)


def test_the_refit_is_kept_only_where_it_helps() -> None:
    module = tiny_vit()
    with_refit, without = (pruned(module, ratio=0.3, refit=r).module for r in (True, False))
    frozen = copy.deepcopy(module).eval().requires_grad_(False)
    judge = Judge(frozen, find_blocks(frozen), split_judged(normalise(photographs(), SHAPE))[1])
    assert judge.of(with_refit) <= judge.of(without)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12))
def test_elimination_never_costs_less_for_more_and_spares_what_nothing_replaces(seed: int, inputs: int) -> None:
    torch = import_torch()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, inputs, generator=generator, dtype=torch.float64)
    x[:, 0] = x[:, 1]
    weight = torch.randn(5, inputs, generator=generator, dtype=torch.float64)
    went = eliminate(torch.cov(x.T), weight, 1e-6, inputs - 1)
    assert sorted(set(went.order)) == sorted(went.order)
    assert list(went.loss) == sorted(went.loss)
    assert went.order[0] in (0, 1)
    assert went.loss[1] < 1e-3 * float(weight.square().sum())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_a_bilinear_form_of_full_rank_is_exact_and_a_thinner_one_the_nearest(seed: int) -> None:
    torch = import_torch()
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(300, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    a, b = truncate_bilinear(q.T @ q, k.T @ k, 6)
    assert torch.allclose((q @ a.T) @ (k @ b.T).T, q @ k.T, atol=1e-6)
    a, b = truncate_bilinear(q.T @ q, k.T @ k, 3)
    singular = torch.linalg.svdvals(q @ k.T)
    lost = (q @ a.T) @ (k @ b.T).T - q @ k.T
    assert float(lost.square().sum()) == pytest.approx(float(singular[3:6].square().sum()), rel=1e-6)


def test_a_correction_finds_an_affine_map_and_leaves_noise_alone() -> None:
    torch = import_torch()
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(3, 5, generator=generator), torch.randn(3, generator=generator)
    signal, noise = (Moments(5, 3), Moments(5, 3)), (Moments(5, 3), Moments(5, 3))
    for half in range(2):
        x = torch.randn(400, 5, generator=generator)
        signal[half].add(x, torch.ones(400), x @ weight.T + bias)
        noise[half].add(x[:6], torch.ones(6), torch.randn(6, 3, generator=generator))
    found = correct(signal)
    assert found is not None
    assert torch.allclose(found[0].float(), weight, atol=0.01)
    assert torch.allclose(found[1].float(), bias, atol=0.01)
    left = correct(noise)
    assert left is None or float(left[0].abs().max()) < 0.7
    assert correct((signal[0], Moments(5, 3))) is None


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 400), st.integers(0, 1000))
def test_an_allocation_saves_what_was_wanted_where_it_can(parts: int, wanted: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cuts = {
        f"p{i}": [Cut((8 - j,), 10 * j, float(loss)) for j, loss in enumerate(np.sort(rng.random(7)), 1)] for i in range(parts)
    }
    chosen = allocate(cuts, wanted)
    saved = sum(c.saved for c in chosen.values())
    assert saved >= min(wanted, 70 * parts)


def test_an_allocation_takes_the_cheap_part_and_a_block_takes_its_parts_along() -> None:
    cheap = allocate({"a": [Cut((1,), 10, 5.0)], "b": [Cut((1,), 10, 0.1)]}, 10)
    assert list(cheap) == ["b"]
    both = allocate({"a.x": [Cut((1,), 10, 0.1)], "a": [Cut((), 100, 0.2)], "b": [Cut((1,), 50, 9.0)]}, 100)
    assert list(both) == ["a"]


def test_losses_between_measured_shares_follow_a_power() -> None:
    assert interpolate({0.25: 0.01, 0.5: 0.04}, 0.375) == pytest.approx(0.0225)
    assert interpolate({0.25: 0.01, 0.5: 0.04}, 0.125) == pytest.approx(0.0025)
    assert interpolate({0.25: 0.04, 0.5: 0.04}, 1.0) == pytest.approx(0.64)


def test_more_than_there_is_is_refused_with_the_most_there_is() -> None:
    with pytest.raises(BuildError, match=r"ratio 0\.9 asks for .* mlp can give .* at most"):
        pruned(tiny_vit(), ratio=0.9, targets=("mlp",))


def test_synthetic_images_and_foreign_models_are_refused() -> None:
    with pytest.raises(DataError, match="prune learns from real images"):
        pruned(tiny_vit(), real=False, ratio=0.2)
    with pytest.raises(BuildError, match="Sequential has neither"):
        pruned(no_linear(), ratio=0.2)
    assert applies_to(tiny_vit()) == ""


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("xcit.Xcit", {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}),
        ("cait.Cait", {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}),
    ],
)
def test_blocks_that_are_given_more_than_their_input_are_pruned_too(kind: str, sizes: dict[str, int]) -> None:
    import_torch().manual_seed(0)
    place, name = kind.split(".")
    module = getattr(getattr(import_timm().models, place), name)(**sizes).requires_grad_(False)
    state = pruned(module, ratio=0.1)
    assert count_macs(state.module, SHAPE) <= 0.91 * count_macs(module, SHAPE)


def test_an_mlp_with_more_inside_than_two_layers_is_left_alone() -> None:
    timm = import_timm()
    widths = {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 16, 16), "num_heads": (1, 1, 1, 1), "num_classes": 5}
    module = timm.models.pvt_v2.PyramidVisionTransformerV2(**widths)
    assert find_blocks(module) == []
    with pytest.raises(BuildError, match="has neither"):
        pruned(module, ratio=0.1)


def test_nan_is_named_by_its_layer() -> None:
    module = tiny_vit()
    with import_torch().no_grad():
        module.get_submodule("blocks.1.mlp.fc1").weight[0, 0] = float("nan")
    with pytest.raises(BuildError, match=r"NaN or infinity at the layer blocks\.1\.mlp\.fc1"):
        pruned(module, ratio=0.2)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1])
def test_a_ratio_that_leaves_nothing_or_everything_is_refused(ratio: float) -> None:
    with pytest.raises(ValidationError, match="ratio"):
        PruneConfig(ratio=ratio)


@pytest.mark.parametrize("before", ["prune", "low_rank"])
def test_an_order_that_makes_no_sense_is_refused(before: str) -> None:
    steps = [{before: {"ratio": 0.1}}, {"prune": {"ratio": 0.1}}, {"quantize": {"scheme": "fp32"}}]
    with pytest.raises(ValidationError, match=f"after {before}"):
        Recipe.model_validate({"schema": "edgevit.recipe/1", "name": "x", "summary": "order", "steps": steps})


def test_windows_and_downsampling_between_blocks_are_followed() -> None:
    torch = import_torch()
    import_timm()
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    module = SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=24, depths=(2, 1), num_heads=(2, 2), num_classes=10
    )
    state = pruned(module, ratio=0.15)
    assert set(state.structure[-1].plan["sizes"]) <= {b.mlp for b in find_blocks(module)}
    assert count_macs(state.module, SHAPE) <= 0.85 * count_macs(module, SHAPE)


def test_a_pruned_model_is_the_same_in_onnx(tmp_path: Path) -> None:
    import onnxruntime

    torch = import_torch()
    state = pruned(tiny_vit(), ratio=0.3, targets=("heads", "head_width", "mlp"))
    images = batches()[0][:1]
    torch.onnx.export(state.module, (images,), str(tmp_path / "pruned.onnx"), dynamo=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "pruned.onnx"), providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        assert np.allclose(outputs, state.module(images).numpy(), atol=1e-4)
