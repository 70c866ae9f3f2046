"""Merging tokens: sizes add up, nothing is lost that was alike, shapes are static, and both exporters write plain kernels."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from device_agents.wire import Preprocessing
from edgevit.compress import CalibrationData, Compressed, StepContext, TrainingData, apply_step, restructure
from edgevit.compress.attend import attend
from edgevit.compress.merge_tokens import (
    PATCH,
    MergeTokensConfig,
    applies_to,
    attention_paid,
    block_costs,
    block_macs,
    merge,
    token_counts,
    tokens_read,
)
from edgevit.digits import SIZE, digits_vit
from edgevit.errors import BuildError
from edgevit.macs import count_macs
from edgevit.progress import Quiet
from edgevit.recipe import Recipe
from edgevit.torchsetup import import_timm, import_torch
from tests.support.models import MEAN, STD, hybrid, tiny_vit

SHAPE = Preprocessing(SIZE, SIZE, SIZE, "bicubic", "center", MEAN, STD)
FORBIDDEN = ("SCATTER", "ARGSORT", "ARG_SORT", "NONZERO", "IF", "LOOP", "WHILE")


def stepped(module: Any, shape: Preprocessing = SHAPE, **config: Any) -> Compressed:
    pixels = np.zeros((4, SIZE, SIZE, 3), dtype=np.uint8)
    context = StepContext(
        CalibrationData(pixels, None, real=False), lambda: TrainingData(pixels, None), 8, Path("unused"), Quiet()
    )
    return apply_step(Compressed(module.eval(), shape, module), MergeTokensConfig(**config), context)


def random(*shape: int, seed: int = 0) -> Any:
    torch = import_torch()
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(4, 30), st.integers(0, 2), st.data())
def test_sizes_always_add_up_and_the_weighted_sum_stays(batch: int, tokens: int, prefix: int, data: Any) -> None:
    torch = import_torch()
    count = data.draw(st.integers(0, (tokens - prefix) // 2))
    x, metric = random(batch, tokens, 8, seed=tokens), random(batch, tokens, 4, seed=count)
    sizes = random(batch, tokens, 1, seed=7).abs() + 1
    # Looked at as much as its size says, a token counts in a merge by its size.
    merged, left = merge(x, metric, sizes, sizes, count, prefix)
    assert merged.shape == (batch, tokens - count, 8)
    assert left.shape == (batch, tokens - count, 1)
    assert torch.allclose(left.sum(1), sizes.sum(1), rtol=1e-5)
    assert torch.allclose((merged * left).sum(1), (x * sizes).sum(1), rtol=1e-3, atol=1e-3)
    assert torch.allclose(merged[:, :prefix], x[:, :prefix], atol=1e-5)
    assert torch.equal(left[:, :prefix], sizes[:, :prefix])


def test_merging_nothing_keeps_every_token() -> None:
    torch = import_torch()
    x = random(2, 9, 4)
    merged, sizes = merge(x, x, torch.ones(2, 9, 1), None, 0, 1)
    assert torch.equal(sizes, torch.ones(2, 9, 1))
    assert torch.allclose(merged.sort(1).values, x.sort(1).values)


def test_the_most_alike_pairs_are_the_ones_that_merge() -> None:
    torch = import_torch()
    x = torch.eye(8)[None, :, :]
    x[0, 5] = x[0, 2]
    merged, sizes = merge(x, x, torch.ones(1, 8, 1), None, 1, 0)
    assert sizes.flatten().tolist().count(2.0) == 1
    place = int(sizes[0, :, 0].argmax())
    assert torch.equal(merged[0, place], x[0, 2])


def test_of_two_pairs_as_alike_the_one_that_is_looked_at_less_merges() -> None:
    torch = import_torch()
    x = torch.eye(8)[None].clone()
    for first, second in ((0, 1), (4, 5)):
        x[0, first] = x[0, second] = torch.eye(8)[second]
        x[0, first, 7] = 0.1
    for spared, gone in ((0, 5), (4, 1)):
        attention = torch.ones(1, 8, 1)
        attention[0, spared] = 4.0
        _, sizes = merge(x, x, attention, None, 1, 0)
        merged, _ = merge(x, x, attention, None, 1, 0)
        place = int(sizes[0, :, 0].argmax())
        assert float(merged[0, place, gone]) == pytest.approx(1.0)


def test_what_is_looked_at_more_counts_more_in_a_merge() -> None:
    torch = import_torch()
    x = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])
    attention = torch.tensor([[[0.5], [1.5]]])
    merged, sizes = merge(x, x, attention, None, 1, 0)
    assert sizes.tolist() == [[[2.0]]]
    # Attention over its mean, and what one patch weighs.
    weights = (0.5 + PATCH, 1.5 + PATCH)
    assert torch.allclose(merged, torch.tensor([[[(weights[0] + 3 * weights[1]) / sum(weights), 0.0]]]))


def test_tokens_are_weighed_by_what_the_answer_is_read_from() -> None:
    torch = import_torch()
    shares = random(3, 5, 5, seed=1).softmax(-1)
    assert torch.allclose(attention_paid(shares, 1, 1)[0, :, 0], shares[:, 0].mean(0))
    assert torch.allclose(attention_paid(shares, 0, 1)[0, :, 0], shares.mean((0, 1)))
    batched = torch.stack([shares, shares.flip(-1)])
    assert torch.allclose(attention_paid(batched, 2, 2)[1, :, 0], shares.flip(-1)[:, :2].mean((0, 1)))
    assert [tokens_read(digits_vit(global_pool=pool)) for pool in ("token", "avg")] == [1, 0]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_keys_of_all_heads_and_shares_come_with_the_attention(batch: int, qk_norm: bool) -> None:
    torch = import_torch()
    import_timm()
    from timm.layers.attention import Attention

    layer = Attention(12, num_heads=3, qkv_bias=True, qk_norm=qk_norm, norm_layer=torch.nn.LayerNorm).eval()
    x = random(batch, 5, 12)
    with torch.no_grad():
        mixed, keys, shares = attend(layer, x)
        q, k, _ = layer.qkv(x).reshape(batch, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
        k = layer.k_norm(k)
        wanted = (layer.q_norm(q) * layer.scale @ k.transpose(-1, -2)).softmax(-1)
        assert torch.allclose(mixed, layer(x), atol=1e-6)
    assert torch.allclose(keys, k.transpose(1, 2).reshape(batch, 5, 12), atol=1e-6)
    assert torch.allclose(shares.reshape(wanted.shape), wanted, atol=1e-6)


class TwoAlike:
    """Images of 32 × 32 whose patches come in equal pairs, for a model without positions: merging the twins changes nothing."""

    @staticmethod
    def model(pool: str) -> Any:
        torch = import_torch()
        model = digits_vit(depth=3, embed_dim=48, global_pool=pool)
        with torch.no_grad():
            model.pos_embed.zero_()
            for name, parameter in model.named_parameters():
                if name.endswith("weight") and parameter.ndim == 2:
                    parameter.copy_(random(*parameter.shape, seed=parameter.shape[0]) / parameter.shape[1] ** 0.5)
        return model.eval()

    @staticmethod
    def images() -> Any:
        patches = random(2, 3, 4, 8, 2, 1, 8, seed=3).expand(-1, -1, -1, -1, -1, 2, -1)
        return patches.reshape(2, 3, 32, 32)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_twins_merge_without_a_trace_where_keys_count_in_full(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = import_torch()
    monkeypatch.setattr("edgevit.compress.attend.COUNTED", 1.0)
    model = TwoAlike.model(pool)
    merged = stepped(copy.deepcopy(model), merge={0: 8}).module
    x = TwoAlike.images()
    with torch.no_grad():
        assert torch.allclose(model(x), merged(x), atol=1e-5)
        assert float((model(x[:1]) - model(x[1:])).abs().max()) > 0.01


def test_the_report_counts_tokens_and_the_macs_fall_as_computed() -> None:
    model = digits_vit()
    after = stepped(model, merge={1: 6, 3: 4})
    report = after.reports[-1]
    assert report.layers == 2
    assert report.details == {"blocks.1": "17 → 11 tokens", "blocks.3": "11 → 7 tokens"}
    assert report.summary == "17 → 7 tokens, in 2 of 6 blocks"
    costs = block_costs(model)
    whole, less = (block_macs(costs, token_counts(s, 6, 17, 1), 1) for s in ({}, {1: 6, 3: 4}))
    assert count_macs(model, SHAPE) - count_macs(after.module, SHAPE) == whole - less


def test_r_merges_in_every_block_that_has_tokens_to_spare() -> None:
    assert stepped(digits_vit(), r=6).structure[-1].plan == {"merge": [(0, 6), (1, 5), (2, 2), (3, 1), (4, 1)]}


@pytest.mark.parametrize("ratio", [0.1, 0.33])
def test_a_ratio_is_reached_and_not_overshot(ratio: float) -> None:
    model = import_timm().create_model("vit_tiny_patch16_224", img_size=112, patch_size=8, num_classes=10)
    shape = Preprocessing(112, 112, 112, "bicubic", "center", MEAN, STD)
    whole = count_macs(model, shape)
    after = stepped(model, shape, ratio=ratio)
    saved = 1 - count_macs(after.module, shape) / whole
    assert ratio <= saved < ratio + 0.02
    assert [block for block, _ in after.structure[-1].plan["merge"]] == [3, 5, 7]


def test_the_plan_brings_the_shape_back_and_names_of_weights_stay() -> None:
    torch = import_torch()
    model = tiny_vit().eval()
    after = stepped(model, merge={0: 4})
    assert list(after.module.state_dict()) == list(model.state_dict())
    again = restructure(copy.deepcopy(model), after.structure).eval()
    again.load_state_dict(after.module.state_dict(), strict=True)
    x = random(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), after.module(x))
        assert not torch.equal(model(x), after.module(x))


def test_class_and_distillation_tokens_are_left_alone() -> None:
    timm = import_timm()
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=SIZE, patch_size=8, depth=2, num_classes=10)
    after = stepped(model, merge={0: 8})
    assert after.module.num_prefix_tokens == 2
    assert after.reports[-1].details == {"blocks.0": "18 → 10 tokens"}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"merge": {6: 2}}, r"block 6, expected 0 … 5"),
        ({"merge": {0: 9}}, r"9 tokens in block 0, expected at most 8"),
        ({"ratio": 0.95}, "as much as the ratio asks for"),
    ],
)
def test_merges_that_cannot_be_are_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(BuildError, match=said):
        stepped(digits_vit(), **config)


@pytest.mark.parametrize("config", [{}, {"r": 2, "ratio": 0.3}, {"merge": {}}, {"merge": {0: 0}}, {"merge": {-1: 3}}, {"r": 0}])
def test_senseless_settings_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        MergeTokensConfig(**config)


def test_other_families_are_refused_by_name() -> None:
    timm = import_timm()
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24, num_heads=(1, 1, 1, 1))
    assert "SwinTransformer" in applies_to(swin)
    assert "Sequential" in applies_to(hybrid())
    assert applies_to(digits_vit()) == ""
    assert "'max'" in applies_to(digits_vit(global_pool="max"))
    with pytest.raises(BuildError, match="cannot apply: tokens of Sequential"):
        stepped(hybrid(), r=2)


def test_two_merge_steps_are_refused() -> None:
    steps = [{"merge_tokens": {"r": 1}}, {"merge_tokens": {"r": 1}}, {"quantize": {"scheme": "fp32"}}]
    with pytest.raises(ValidationError, match="stands before it already"):
        Recipe.model_validate({"schema": "edgevit.recipe/1", "name": "m", "summary": "for a test", "steps": steps})


@pytest.mark.parametrize("format_", ["onnx", "tflite"])
def test_the_exported_file_agrees_and_holds_plain_kernels_alone(format_: str) -> None:
    from edgevit.compress.quantize import quantizable_layers
    from edgevit.export import onnx, tflite
    from edgevit.export.parity import reference_outputs
    from edgevit.export.readback import read_onnx
    from edgevit.export.readback_tflite import read_tflite
    from edgevit.export.runtime import run_artifact
    from edgevit.quantspec import LayerQuant, QuantSpec

    module = stepped(digits_vit(depth=3, embed_dim=48), merge={0: 4, 1: 3}).module
    pixels = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3), dtype=np.uint8)
    if format_ == "onnx":
        import onnx as onnx_package

        data = onnx.export_float(module, SHAPE, 1)
        read = read_onnx(data, data, QuantSpec("fp32"), (onnx.IR_VERSION, onnx.OPSET))
        values = onnx_package.load(io.BytesIO(data)).graph.value_info
        assert not any(d.dim_param for v in values for d in v.type.tensor_type.shape.dim)
    else:
        data = tflite.export_float(module, SHAPE, 1)
        read = read_tflite(data, data, QuantSpec("fp32"), module)
    assert not [o for o in read.operators if o.upper().startswith(FORBIDDEN)]
    assert any(o.upper().startswith("TOPK") for o in read.operators)
    outputs = run_artifact(format_, data, pixels, SHAPE, read.input)
    assert np.allclose(outputs, reference_outputs(module, pixels, SHAPE), atol=1e-4)
    if format_ == "tflite":
        linear = tuple(
            LayerQuant(n, "linear", False, 8, "dynamic") for n, _, _ in quantizable_layers(module, convolutions=False)
        )
        assert len(tflite.match_layers(data, QuantSpec("int8-dynamic", linear), module)) == 13
