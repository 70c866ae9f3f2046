"""int8: what is folded and scaled leaves the outputs as they were, and what the step decides is what the module holds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevit.compress import CalibrationData, Compressed, StepContext, TrainingData, apply_step
from edgevit.compress.calibrate import Watch, choose_ranges
from edgevit.compress.equalise import balance, chains, equalise, fold_batch_norms, trace_readers
from edgevit.compress.quantize import QuantizeConfig
from edgevit.compress.replay import Replay
from edgevit.compress.row_ranges import layers_for_rows, round_rows
from edgevit.compress.smooth import balance_attention, hold_scales, smooth_norms
from edgevit.errors import BuildError, DataError
from edgevit.golden import synthetic_images
from edgevit.model import LoadedModel, ModelSource, load_model
from edgevit.quantspec import LayerQuant, layer_integers, quantize_weight
from tests.build.conftest import Recorder


def load(factory: str) -> LoadedModel:
    return load_model(ModelSource(f"tests.support.models:{factory}", random_weights=True))


@pytest.fixture(scope="module")
def vit() -> LoadedModel:
    return load("tiny_vit")


def carry_out(
    model: LoadedModel, scheme: str, real: bool = True, formats: tuple[str, ...] = ("onnx",), **more: Any
) -> Compressed:
    return carry_out_all(model, [scheme], Recorder(), real, formats, **more)[0]


def carry_out_all(
    model: LoadedModel, schemes: list[str], told: Recorder, real: bool, formats: tuple[str, ...], **more: Any
) -> list[Compressed]:
    """Several schemes of one build."""
    pixels = synthetic_images(16, model.preprocessing)

    def no_training() -> TrainingData:
        raise AssertionError("int8 does not train")

    context = StepContext(CalibrationData(pixels, None, real), no_training, 8, Path("unused"), told, formats)
    start = Compressed(model.module, model.preprocessing, model.module)
    configs: list[Any] = [QuantizeConfig.model_validate({"scheme": scheme, **more}) for scheme in schemes]
    return [apply_step(start, config, context) for config in configs]


def run(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(x)


def chain(act: torch.nn.Module, depthwise: bool, seed: int, slope: float = 1.0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    second = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8) if depthwise else torch.nn.Conv2d(8, 6, 1)
    made = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), act, second)
    norm: Any = made[1]
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 4.0)
        norm.weight.copy_(torch.logspace(-1, slope, 8))
        norm.bias.normal_()
    return made.eval()


@given(seed=st.integers(0, 10_000), depthwise=st.booleans(), slope=st.floats(-1, 2))
@settings(max_examples=25, deadline=None)
def test_folding_and_equalising_leave_the_outputs_alone(seed: int, depthwise: bool, slope: float) -> None:
    module = chain(torch.nn.ReLU(), depthwise, seed, slope)
    x = torch.randn(2, 3, 8, 8)
    folded, norms = fold_batch_norms(module, x)
    assert norms == ["1"] and isinstance(folded[1], torch.nn.Identity)  # type: ignore[index]
    largest = run(torch.nn.Sequential(*list(module)[:3]), x).abs().amax((0, 2, 3))
    equal, seconds = equalise(folded, x, {"3": largest})
    assert seconds == ["3"]
    expected, got = run(module, x), run(equal, x)
    assert float((got - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    assert not torch.equal(equal[3].weight, module[3].weight)  # type: ignore[index, union-attr]


def test_equalised_channels_before_a_depthwise_layer_fill_one_range() -> None:
    module, x = chain(torch.nn.ReLU(), True, 3), torch.randn(4, 3, 8, 8)
    folded, _ = fold_batch_norms(module, x)
    before = run(torch.nn.Sequential(*list(module)[:3]), x).abs().amax((0, 2, 3))
    equal, _ = equalise(folded, x, {"3": before})
    after = run(torch.nn.Sequential(*list(equal.children())[:3]), x).abs().amax((0, 2, 3))
    alive = before > 0
    assert int(alive.sum()) >= 6 and float(before[alive].max() / before[alive].min()) > 3
    assert float(after[alive].max() / after[alive].min()) < 1.01


@pytest.mark.parametrize("act", [torch.nn.ReLU6(), torch.nn.Hardswish(), torch.nn.GELU(), torch.nn.SiLU()])
def test_a_bent_activation_breaks_the_chain(act: torch.nn.Module) -> None:
    module, x = chain(act, True, 0), torch.randn(2, 3, 8, 8)
    assert chains(fold_batch_norms(module, x)[0], x) == []
    assert chains(fold_batch_norms(chain(torch.nn.LeakyReLU(0.1), True, 0), x)[0], x) == [("0", "3")]


class Shared(torch.nn.Module):
    """A convolution whose output is also added back: scaling it for one reader would wrong the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return y + self.second(y)


def test_a_reader_that_no_hook_sees_is_not_wronged() -> None:
    module, x = Shared().eval(), torch.randn(2, 3, 4, 4)
    assert chains(module, x) == [("first", "second")]
    made, changed = equalise(module, x, {"second": torch.tensor([1.0, 10.0, 0.1, 3.0])})
    assert changed == [] and torch.equal(run(made, x), run(module, x))


@given(seed=st.integers(0, 10_000), spread=st.floats(0.1, 3))
@settings(max_examples=10, deadline=None)
def test_smoothing_leaves_a_transformer_as_it_was(vit: LoadedModel, seed: int, spread: float) -> None:
    torch.manual_seed(seed)
    x = torch.randn(2, 3, 32, 32)
    inputs = {n: torch.exp(spread * torch.randn(m.in_features)) for n, m in linears(vit)}
    outputs = {n: torch.exp(spread * torch.randn(m.out_features)) for n, m in linears(vit)}
    module, norms = smooth_norms(vit.module, x, inputs)
    assert len(norms) == 5  # two of each block, and the one before the head
    module, attentions = balance_attention(module, x, inputs, outputs)
    assert attentions == ["blocks.0.attn", "blocks.1.attn"]
    expected = run(vit.module, x)
    assert float((run(module, x) - expected).abs().max()) <= 2e-4 * float(expected.abs().max())


def linears(model: LoadedModel) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in model.module.named_modules() if isinstance(m, torch.nn.Linear)]


def test_readers_are_found_through_identities(vit: LoadedModel) -> None:
    readers = trace_readers(vit.module, torch.randn(1, 3, 32, 32))
    assert readers["blocks.0.norm1"] == ["blocks.0.attn.qkv"]
    assert readers["blocks.0.mlp.act"] == ["blocks.0.mlp.fc2"]


def test_factors_stay_finite_for_dead_channels() -> None:
    factors = balance(torch.tensor([0.0, 1.0, 100.0]), torch.tensor([0.0, 1.0, 1.0]), 0.75)
    assert bool(torch.isfinite(factors).all()) and float(factors.min()) > 0


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static"])
def test_weights_lie_on_the_grid_the_spec_names(vit: LoadedModel, scheme: str) -> None:
    before = {n: m.weight.clone() for n, m in linears(vit)}
    state = carry_out(vit, scheme, formats=("onnx", "tflite"))
    assert all(torch.equal(m.weight, before[n]) for n, m in linears(vit)), "the model that came was changed"
    moved = 0
    for format_ in ("onnx", "tflite"):
        module, spec = state.carried(format_)
        for layer in spec.layers:
            weight = module.get_submodule(layer.name).weight.detach().numpy()
            found = layer_integers(layer, weight)
            np.testing.assert_array_equal(found.dequantized(), weight)
            nearest, _ = quantize_weight(before[layer.name].numpy())
            moved += not np.array_equal(nearest, found.integers)
    assert moved > 0
    smoothed = state.carried("onnx")[0].get_submodule("blocks.0.norm1").weight
    assert not torch.equal(smoothed, torch.ones_like(smoothed))
    # The TFLite converter folds a LayerNorm's scale away, and the rounding with it: it must stand elsewhere there.
    held = state.carried("tflite")[0]
    norm = held.get_submodule("blocks.0.norm1")
    assert not isinstance(norm, torch.nn.LayerNorm) and torch.equal(norm.weight, smoothed)
    x = torch.randn(2, 3, 32, 32)
    expected = run(state.carried("onnx")[0], x)
    assert float((run(held, x) - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_a_norm_with_a_bias_keeps_its_form(vit: LoadedModel) -> None:
    made = hold_scales(vit.module, torch.randn(1, 3, 32, 32), ["blocks.0.norm1", "blocks.0.norm2"])
    assert not isinstance(made.get_submodule("blocks.0.norm1"), torch.nn.LayerNorm)
    biased = copy.deepcopy(vit.module)
    with torch.no_grad():
        norm: Any = biased.get_submodule("blocks.0.norm1")
        norm.bias.fill_(0.5)
    made = hold_scales(biased, torch.randn(1, 3, 32, 32), ["blocks.0.norm1"])
    assert isinstance(made.get_submodule("blocks.0.norm1"), torch.nn.LayerNorm)


@given(seed=st.integers(0, 10_000), spread=st.floats(0, 4))
@settings(max_examples=25, deadline=None)
def test_a_range_for_each_row_keeps_small_rows(seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, 8, generator=generator) * torch.exp(-spread * torch.arange(5.0))[:, None]
    x[0, 2] = 0.0
    rows = round_rows(x)
    # Half a step of a range that is at most twice the largest magnitude of the row.
    assert bool(((rows - x).abs() <= x.abs().amax(-1, keepdim=True) / 255 * 1.001).all())
    assert torch.equal(rows[0, 2], torch.zeros(8))


def test_the_layers_that_suffer_most_get_a_range_for_each_row(vit: LoadedModel) -> None:
    """One token a thousand times smaller than the others, and alone in deciding the answer, needs a range of its own."""
    layers = tuple(LayerQuant(n, "linear", False, 8, "dynamic") for n in ("small", "plain"))

    class Uneven(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.small, self.plain = torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scaled = x * torch.cat([torch.full((1, 1), 1e-3), torch.ones(15, 1)])
            return self.plain(1e3 * (self.small(scaled) - self.small.bias)[:, :1])[:, 0]

    replay = Replay(Uneven(), torch.randn(4, 16, 8), ["small", "plain"])
    chosen = layers_for_rows(replay, layers, 0.5)
    assert list(chosen) == ["small"]
    now, rows = chosen["small"]
    assert rows < now / 100
    assert layers_for_rows(replay, layers, 0.0) == {}


def test_what_two_schemes_of_a_build_share_is_worked_out_once_and_is_what_each_would_work_out(vit: LoadedModel) -> None:
    schemes, formats = ["int8-dynamic", "int8-static"], ("onnx", "tflite")
    told = Recorder()
    together = carry_out_all(vit, schemes, told, True, formats)
    assert told.said.count("calibrating") == 3, told.said
    for scheme, state in zip(schemes, together, strict=True):
        alone = carry_out(vit, scheme, formats=formats)
        for format_ in formats:
            (one, spec), (other, expected) = state.carried(format_), alone.carried(format_)
            assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items()), (scheme, format_)
            for a, b in zip(spec.layers, expected.layers, strict=True):
                assert (a.name, a.activations, a.rows, a.input_range) == (b.name, b.activations, b.rows, b.input_range)
                assert (a.scales is None) == (b.scales is None) and (a.scales is None or np.array_equal(a.scales, b.scales))


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static"])
def test_each_format_says_how_it_takes_ranges_of_rows(vit: LoadedModel, scheme: str) -> None:
    state = carry_out(vit, scheme, formats=("onnx", "tflite"), row_share=0.25)
    onnx_spec, tflite_spec = state.carried("onnx")[1], state.carried("tflite")[1]
    chosen = [one for one in onnx_spec.layers if one.rows]
    assert 1 <= len(chosen) <= 3 and not any(one.rows for one in tflite_spec.layers)
    for one in chosen:
        assert one.activations == "dynamic" and one.input_range is None
        assert "onnx: a range for each row at run time" in state.reports[-1].details[one.name]
    if scheme == "int8-static":
        lite = [one for one in tflite_spec.layers if one.activations == "dynamic"]
        assert 1 <= len(lite) <= 3 and all(one.input_range is None for one in lite)
        assert all("tflite: a range for each row" in state.reports[-1].details[one.name] for one in lite)
    none = carry_out(vit, scheme, row_share=0).carried("onnx")[1]
    assert not any(one.rows for one in none.layers) and len({one.activations for one in none.layers}) == 1


def test_rounding_against_inputs_beats_rounding_to_nearest(vit: LoadedModel) -> None:
    x = torch.randn(1, 3, 32, 32)
    errors = {}
    for rounding in ("hessian", "nearest"):
        state = carry_out(vit, "int8-dynamic", formats=("tflite",), rounding=rounding)
        module, spec = state.carried("tflite")
        for layer in spec.layers:
            part: Any = module.get_submodule(layer.name)
            with torch.no_grad():
                shape = part.weight.shape
                part.weight.copy_(torch.from_numpy(layer_integers(layer, part.weight.numpy()).dequantized()).reshape(shape))
        from edgevit.compress.calibrate import normalise

        x = normalise(synthetic_images(16, vit.preprocessing), vit.preprocessing)
        errors[rounding] = float((run(module, x) - run(vit.module, x)).square().mean())
    assert errors["hessian"] < errors["nearest"]


def test_the_report_says_what_became_of_each_layer(vit: LoadedModel) -> None:
    report = carry_out(vit, "int8-static").reports[-1]
    assert report.layers == 9 and "9 linear and convolution layers, 1 more stays float, over 16 images" in report.summary
    assert report.details["patch_embed.proj"].startswith("stays float: it reads the image")
    assert "inputs smoothed" in report.details["blocks.0.mlp.fc1"] and "seen" in report.details["blocks.0.mlp.fc1"]
    assert carry_out(vit, "int8-static", first="int8").spec.layer("patch_embed.proj") is not None


def test_without_images_dynamic_rounds_to_nearest_and_static_refuses(vit: LoadedModel) -> None:
    state = carry_out(vit, "int8-dynamic", real=False)
    assert all(one.scales is None for one in state.spec.layers) and "without images" in state.reports[-1].summary
    with pytest.raises(DataError, match="real images"):
        carry_out(vit, "int8-static", real=False)


def test_nan_is_named_in_weights_and_activations() -> None:
    model = load("tiny_vit")
    layer: Any = model.module.get_submodule("blocks.1.mlp.fc2")
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    with pytest.raises(BuildError, match=r"NaN or infinity in blocks\.1\.mlp\.fc2\.weight"):
        carry_out(model, "int8-dynamic")
    with pytest.raises(BuildError, match="NaN or infinity at the layer fc1"):
        Watch().look("fc1", torch.full((1, 2, 3), float("inf")), torch.zeros(1, 2, 3), 1, 4, torch.Generator())


def test_a_scheme_that_matches_no_layer_is_refused() -> None:
    with pytest.raises(BuildError, match="int8-dynamic applies to no layer: the module has no linear layers"):
        carry_out(load("no_linear"), "int8-dynamic")
    with pytest.raises(BuildError, match="int8-static applies to no layer: 0 stays float: it reads the image"):
        carry_out(load("no_linear"), "int8-static")


def test_ranges_are_searched_behind_the_activation() -> None:
    """GELU flattens what is far below zero: clipping it costs nothing and makes the steps finer."""
    torch.manual_seed(0)
    watch = Watch()
    y = torch.cat([3 * torch.randn(16, 32, 8) - 2, torch.full((16, 1, 8), -20.0)], 1)
    watch.look("fc1", y, y, 16, 512, torch.Generator().manual_seed(0))
    plain, behind = choose_ranges(watch, None, "error"), choose_ranges(watch, None, "error", torch.nn.functional.gelu)
    assert behind.output[0] > plain.output[0] / 2
    assert choose_ranges(watch, None, "minmax").output == (watch.out_low, watch.out_high)
