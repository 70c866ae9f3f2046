"""Lower ranks: exact where nothing is cut, the nearest where something is, within the budget, the same again from its plan."""

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
from edgevit.compress.budget import Judge, split_judged
from edgevit.compress.calibrate import normalise
from edgevit.compress.factor import break_even, factorable, factored
from edgevit.compress.low_rank import LowRankConfig, applies_to
from edgevit.compress.ridge import Moments, truncate_product
from edgevit.errors import BuildError, DataError
from edgevit.progress import Quiet
from edgevit.recipe import Recipe
from edgevit.torchsetup import import_timm, import_torch
from tests.support.models import MEAN, STD, hybrid, no_linear, tiny_vit

SHAPE = Preprocessing(32, 32, 36, "bicubic", "center", MEAN, STD)


def photographs(count: int = 32) -> Any:
    """Seeded blobs of colour, uint8 (count, 32, 32, 3): correlated as photographs are."""
    coarse = np.random.default_rng(0).integers(0, 255, (count, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def lowered(module: Any, real: bool = True, **config: Any) -> Compressed:
    pixels = photographs()
    context = StepContext(
        CalibrationData(pixels, None, real=real), lambda: TrainingData(pixels, None), 8, Path("unused"), Quiet()
    )
    return apply_step(Compressed(module.eval(), SHAPE, module), LowRankConfig(**config), context)


def linear_parameters(module: Any) -> int:
    return sum(module.get_submodule(p).weight.numel() for p in factorable(module))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(2, 9), st.booleans())
def test_a_layer_of_full_rank_is_exact(seed: int, inputs: int, outputs: int, bias: bool) -> None:
    torch = import_torch()
    generator = torch.Generator().manual_seed(seed)
    layer = torch.nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    x = torch.randn(100, inputs, generator=generator)
    moments = Moments(inputs)
    moments.add(x, torch.ones(100))
    pair = factored(layer, min(inputs, outputs), moments, torch.eye(outputs, dtype=torch.float64))
    assert torch.allclose(pair(x), layer(x), atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_a_truncation_is_nearer_on_its_inputs_than_that_of_the_weights(seed: int, rank: int) -> None:
    torch = import_torch()
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    x = torch.randn(200, 6, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    root = torch.diag(torch.rand(5, generator=generator, dtype=torch.float64) + 0.1)
    up, down = truncate_product(weight, x.T @ x, root, rank)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    plain = (u[:, :rank] * s[:rank]) @ vt[:rank]

    def off(other: Any) -> float:
        return float((x @ (weight - other).T @ root).square().sum())

    assert off(up @ down) <= off(plain) * (1 + 1e-6) + 1e-9


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 500), st.integers(1, 500))
def test_the_break_even_rank_is_the_first_that_saves_nothing(outputs: int, inputs: int) -> None:
    rank = break_even(outputs, inputs)
    assert rank * (outputs + inputs) >= outputs * inputs
    assert (rank - 1) * (outputs + inputs) < outputs * inputs


def test_a_strided_convolution_of_full_rank_is_exact() -> None:
    torch = import_torch()
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(6, 4, 1, stride=2).requires_grad_(False)
    x = torch.randn(3, 6, 8, 8)
    moments = Moments(6)
    moments.add(x.permute(0, 2, 3, 1).reshape(-1, 6), torch.ones(192))
    pair = factored(layer, 4, moments, torch.eye(4, dtype=torch.float64))
    assert torch.allclose(pair(x), layer(x), atol=1e-4)


@pytest.mark.parametrize("forms", [("attention",), ("mlp",), ("layers",), ("attention", "mlp", "layers")])
def test_every_form_meets_the_budget_and_comes_back_bit_for_bit(forms: tuple[str, ...]) -> None:
    torch = import_torch()
    module = tiny_vit()
    whole = linear_parameters(module)
    state = lowered(module, ratio=0.1, forms=forms)
    left = linear_parameters(state.module)
    assert left <= 0.9 * whole
    assert left >= 0.9 * whole - 8 * 4 * 48 * 3
    again = restructure(copy.deepcopy(module), state.structure)
    again.load_state_dict(state.module.state_dict(), strict=True)
    images = normalise(photographs(3), SHAPE)
    with torch.no_grad():
        assert torch.equal(again.eval()(images), state.module(images))
    plan = state.structure[-1].plan
    assert all(r % 8 == 0 for r in plan["ranks"].values())
    for path, rank in plan["ranks"].items():
        weight = module.get_submodule(path).weight
        assert rank < break_even(*weight.flatten(1).shape)
        assert isinstance(state.module.get_submodule(f"{path}.1"), torch.nn.Linear)


def test_a_refit_never_leaves_the_answers_further_away() -> None:
    module = tiny_vit()
    forms = ("layers",)
    with_refit, without = (lowered(module, ratio=0.25, forms=forms, refit=r).module for r in (True, False))
    frozen = copy.deepcopy(module).eval().requires_grad_(False)
    judge = Judge(frozen, [], split_judged(normalise(photographs(), SHAPE))[1])
    assert judge.of(with_refit) <= judge.of(without)


def test_pointwise_convolutions_of_a_network_without_blocks_are_split() -> None:
    torch = import_torch()
    module = hybrid()
    module[5] = torch.nn.Conv2d(16, 64, 1)
    module[8] = torch.nn.Linear(64, 10)
    state = lowered(module, ratio=0.05, forms=("layers",))
    assert isinstance(state.module.get_submodule("5.0"), torch.nn.Conv2d)
    assert "by way of 8" in state.reports[-1].details["5"]


def test_more_than_there_is_is_refused_with_the_most_there_is() -> None:
    with pytest.raises(BuildError, match=r"ratio 0\.95 asks for .* attention can give .* at most"):
        lowered(tiny_vit(), ratio=0.95, forms=("attention",))


def test_synthetic_images_and_models_without_layers_are_refused() -> None:
    with pytest.raises(DataError, match="low_rank learns from real images"):
        lowered(tiny_vit(), real=False, ratio=0.2)
    with pytest.raises(BuildError, match="Sequential has none"):
        lowered(no_linear(), ratio=0.2)
    assert applies_to(tiny_vit()) == ""


def test_layers_that_read_nothing_of_the_image_stay_whole() -> None:
    """Swin V2 makes its position biases by a small network of constants."""
    timm = import_timm()
    import_torch().manual_seed(0)
    sizes = {"img_size": 32, "window_size": 2, "depths": (1, 1), "embed_dim": 32, "num_heads": (2, 4), "num_classes": 5}
    module = timm.models.SwinTransformerV2(**sizes).requires_grad_(False)
    state = lowered(module, ratio=0.05, refit=False)
    assert state.reports[-1].details and not [p for p in state.reports[-1].details if "cpb_mlp" in p]


def test_nan_is_named_by_its_layer() -> None:
    module = tiny_vit()
    with import_torch().no_grad():
        module.get_submodule("blocks.0.attn.qkv").bias[0] = float("nan")
    with pytest.raises(BuildError, match=r"NaN or infinity at the layer blocks\.0\.attn\.qkv"):
        lowered(module, ratio=0.2)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_a_ratio_that_leaves_nothing_or_everything_is_refused(ratio: float) -> None:
    with pytest.raises(ValidationError, match="ratio"):
        LowRankConfig(ratio=ratio)


def test_lowering_twice_is_refused() -> None:
    steps = [{"low_rank": {"ratio": 0.1}}, {"low_rank": {"ratio": 0.1}}, {"quantize": {"scheme": "fp32"}}]
    with pytest.raises(ValidationError, match="after low_rank"):
        Recipe.model_validate({"schema": "edgevit.recipe/1", "name": "x", "summary": "order", "steps": steps})


def test_a_lowered_model_is_the_same_in_onnx(tmp_path: Path) -> None:
    import onnxruntime

    torch = import_torch()
    state = lowered(tiny_vit(), ratio=0.2, forms=("attention", "layers"))
    images = normalise(photographs(1), SHAPE)
    torch.onnx.export(state.module, (images,), str(tmp_path / "low.onnx"), dynamo=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "low.onnx"), providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        assert np.allclose(outputs, state.module(images).numpy(), atol=1e-4)
