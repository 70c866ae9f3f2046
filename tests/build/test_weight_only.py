"""int8 and int4 weights and mixed precision: what is in the files, how they run, and where they are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from pydantic import ValidationError

from device_agents.wire import Preprocessing
from edgevit.artifacts import refused_layers
from edgevit.compress import CalibrationData, Compressed, StepContext, apply_step
from edgevit.compress.fold import fold_norms
from edgevit.compress.mixed import Width, choose, purchases
from edgevit.compress.quantize import Budget, QuantizeConfig
from edgevit.compress.weight_only import Layer, effective_bits, layers_in_order
from edgevit.errors import BuildError, DataError, ExportError
from edgevit.export import onnx as onnx_files
from edgevit.export import tflite
from edgevit.export.parity import cosines, reference_outputs
from edgevit.export.readback import read_onnx
from edgevit.export.readback_tflite import read_tflite
from edgevit.export.runtime import run_artifact
from edgevit.golden import synthetic_images
from edgevit.quantspec import layer_integers
from edgevit.torchsetup import import_timm
from tests.build.conftest import Recorder
from tests.support.models import hybrid, tiny_vit

SHAPE = Preprocessing(32, 32, 32, "bicubic", "center", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CEILING = (10, 21)
INT4 = QuantizeConfig(scheme="int4-weights", group=16)
PER_CHANNEL = QuantizeConfig(scheme="int4-weights", group=None)


@pytest.fixture(scope="module")
def pixels() -> Any:
    return synthetic_images(24, SHAPE)


def quantized(module: Any, config: QuantizeConfig, pixels: Any, real: bool = True) -> Compressed:
    module = module.eval().requires_grad_(False)

    def no_training() -> Any:
        raise AssertionError("weights are rounded without training images")

    context = StepContext(CalibrationData(pixels, None, real), no_training, 8, Path("unused"), Recorder())
    return apply_step(Compressed(module, SHAPE, module), config, context)


def onnx_of(state: Compressed, pixels: Any) -> tuple[bytes, bytes]:
    """(float file, file)."""
    float_model = onnx_files.export_float(state.module, SHAPE, 1)
    return float_model, onnx_files.apply_spec(float_model, state.spec, state.module, pixels, SHAPE)


def edited(data: bytes, name: str, edit: Callable[[Any], None]) -> bytes:
    """The file with the constant ``name`` changed."""
    proto = onnx.load_model_from_string(data)
    found = next(i for i in proto.graph.initializer if i.name == name)
    value = numpy_helper.to_array(found).copy()
    edit(value)
    found.CopyFrom(numpy_helper.from_array(value, name))
    out: bytes = proto.SerializeToString()
    return out


@pytest.fixture(scope="module")
def int4(pixels: Any) -> tuple[Compressed, bytes, bytes]:
    state = quantized(tiny_vit(), INT4, pixels)
    return (state, *onnx_of(state, pixels))


def test_int4_integers_in_the_file_are_those_of_the_spec(int4: tuple[Compressed, bytes, bytes]) -> None:
    state, float_model, data = int4
    read = read_onnx(data, float_model, state.spec, CEILING)
    assert (read.operators["MatMulNBits"], read.integer_layers) == (8, 10)
    held = {i.name: numpy_helper.to_array(i) for i in onnx.load_model_from_string(data).graph.initializer}
    for layer in (one for one in state.spec.layers if one.weight_bits == 4):
        wanted = layer_integers(layer, state.module.get_submodule(layer.name).weight.detach().numpy())
        bytes_there = held[f"{layer.name}.weight_int4"]
        there = np.stack([bytes_there & 15, bytes_there >> 4], -1).reshape(len(bytes_there), -1)
        np.testing.assert_array_equal(there[:, : wanted.integers.shape[1]], wanted.integers)
        assert held[f"{layer.name}.weight_scale"].dtype == np.float16
        np.testing.assert_array_equal(held[f"{layer.name}.weight_scale"].astype(np.float32), wanted.scales.reshape(-1))


def test_the_kernels_compute_what_the_module_of_rounded_weights_does(
    int4: tuple[Compressed, bytes, bytes], pixels: Any
) -> None:
    state, float_model, data = int4
    outputs = run_artifact("onnx", data, pixels, SHAPE, read_onnx(data, float_model, state.spec, CEILING).input)
    # Convolutions and the head take int8 only in the file.
    rounded = copy.deepcopy(state.module)
    for layer in (one for one in state.spec.layers if one.kind == "conv"):
        weight: Any = rounded.get_submodule(layer.name).weight
        found = layer_integers(layer, weight.detach().numpy())
        weight.data = torch.from_numpy(found.dequantized()).reshape(weight.shape)
    reference = reference_outputs(rounded, pixels, SHAPE)
    assert float(np.abs(outputs - reference).max()) < 1e-4 * float(np.abs(reference).max())
    assert float(cosines(reference_outputs(state.original, pixels, SHAPE), outputs).min()) > 0.98


@pytest.mark.parametrize(
    ("constant", "expected"),
    [("weight_int4", "other integers"), ("weight_scale", "other scales"), ("weight_zero", "other zero")],
)
def test_one_changed_number_is_found(int4: tuple[Compressed, bytes, bytes], constant: str, expected: str) -> None:
    state, float_model, data = int4

    def change(value: Any) -> None:
        value.reshape(-1)[5] = value.reshape(-1)[5] * 2 if value.dtype == np.float16 else value.reshape(-1)[5] ^ 1

    with pytest.raises(ExportError, match=rf"1 of 10 layers .*blocks\.1\.mlp\.fc1 \({expected}"):
        read_onnx(edited(data, f"blocks.1.mlp.fc1.{constant}", change), float_model, state.spec, CEILING)


def test_another_domain_only_where_the_spec_asks(int4: tuple[Compressed, bytes, bytes], pixels: Any) -> None:
    _, _, data = int4
    eight = quantized(tiny_vit(), QuantizeConfig(scheme="int8-weights"), pixels)
    with pytest.raises(ExportError, match=r"com\.microsoft"):
        read_onnx(data, onnx_of(eight, pixels)[0], eight.spec, CEILING)
    state, float_model, _ = int4
    with pytest.raises(ExportError, match=r"expected ai\.onnx and com\.microsoft"):
        read_onnx(float_model, float_model, state.spec, CEILING)


def test_int8_weights_need_no_images_and_leave_arithmetic_float(pixels: Any) -> None:
    state = quantized(hybrid(), QuantizeConfig(scheme="int8-weights"), pixels, real=False)
    float_model, data = onnx_of(state, pixels)
    read = read_onnx(data, float_model, state.spec, CEILING)
    assert read.integer_layers == 4 and not {"MatMulInteger", "QuantizeLinear", "DequantizeLinear"} & set(read.operators)
    outputs = run_artifact("onnx", data, pixels, SHAPE, read.input)
    assert float(cosines(reference_outputs(state.original, pixels, SHAPE), outputs).min()) > 0.999

    def flip(value: Any) -> None:
        value[0, 0] ^= 1

    with pytest.raises(ExportError, match=r"8 \(other integers\)"):
        read_onnx(edited(data, "8.weight_int", flip), float_model, state.spec, CEILING)


def test_tflite_carries_out_int4_per_channel_and_refuses_groups_by_name(
    int4: tuple[Compressed, bytes, bytes], pixels: Any
) -> None:
    assert "groups of 16; set group: null" in refused_layers("tflite", int4[0].spec)
    assert refused_layers("onnx", int4[0].spec) == ""
    model = tiny_vit(depth=1)
    model.fc_norm.weight.data.uniform_(0.5, 2)
    model.blocks[0].norm1.weight.data.uniform_(0.5, 2)
    state = quantized(model, PER_CHANNEL, pixels)
    assert refused_layers("tflite", state.spec) == ""
    float_model = tflite.export_float(state.module, SHAPE, 1)
    data = tflite.apply_spec(float_model, state.spec, state.module, pixels, SHAPE, Recorder())
    read = read_tflite(data, float_model, state.spec, state.module)
    assert read.integer_layers == 6 and read.operators["DEQUANTIZE"] == 6
    outputs = run_artifact("tflite", data, pixels, SHAPE, read.input)
    in_onnx, file = onnx_of(state, pixels)
    same = run_artifact("onnx", file, pixels, SHAPE, read_onnx(file, in_onnx, state.spec, CEILING).input)
    assert float(np.abs(outputs - same).max()) < 1e-4 * float(np.abs(same).max())
    wrong = copy.deepcopy(state.spec)
    next(one for one in wrong.layers if one.name == "blocks.0.mlp.fc2").scales[0] *= 2  # type: ignore[index]
    with pytest.raises(ExportError, match=r"1 of 6 layers .*blocks\.0\.mlp\.fc2"):
        read_tflite(data, float_model, wrong, state.module)


def test_layer_norms_are_folded_exactly_and_only_where_all_readers_are_linear() -> None:
    model = tiny_vit().eval().requires_grad_(False)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)):
        norm.weight.data.uniform_(0.5, 2)
        norm.bias.data.normal_()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    folded, count = fold_norms(model, x)
    assert count == 5  # Two blocks with two each, and the norm before the head.
    torch.testing.assert_close(folded(x), model(x), atol=1e-4, rtol=1e-4)
    assert bool((folded.get_submodule("blocks.0.norm1").weight == 1).all())

    plain = torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.Linear(32, 4, bias=False)).eval().requires_grad_(False)
    plain[0].weight.uniform_(0.5, 2)
    plain[0].bias.normal_()
    folded, count = fold_norms(plain, x)
    assert count == 1 and bool((folded.get_submodule("0").bias == 0).all()), "a layer without a bias gets one"
    torch.testing.assert_close(folded(x), plain(x), atol=1e-4, rtol=1e-4)

    class Forked(torch.nn.Module):
        """The norm's output is read by a linear layer and added to its output as it is."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = torch.nn.LayerNorm(3), torch.nn.Linear(3, 3)
            self.norm.weight.data.uniform_(2, 3)

        def forward(self, x: Any) -> Any:
            y = self.norm(x.mean((2, 3)))
            return self.linear(y) + y

    assert fold_norms(Forked().eval().requires_grad_(False), x)[1] == 0


def test_layers_come_in_the_order_they_run() -> None:
    names = [one.name for one in layers_in_order(tiny_vit().eval(), SHAPE)]
    assert names[:3] == ["patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.attn.proj"] and names[-1] == "head"


def widths(*options: tuple[int, float]) -> list[Width]:
    layer = Layer("x", "linear", False, False)
    nothing = torch.zeros(1)
    return [Width(layer, str(bits), None, nothing, None, bits, 0.0, damage) for bits, damage in options]


def test_layers_that_a_file_does_not_hold_once_stay_float(pixels: Any) -> None:
    """Swin V2 makes its position biases by a small network, which exporters compute once."""
    timm = import_timm()
    torch.manual_seed(0)
    sizes = {"img_size": 32, "window_size": 2, "depths": (1, 1), "embed_dim": 16, "num_heads": (1, 2), "num_classes": 5}
    state = quantized(timm.models.SwinTransformerV2(**sizes), QuantizeConfig(scheme="int8-weights"), pixels)
    float_model, data = onnx_of(state, pixels)
    assert read_onnx(data, float_model, state.spec, CEILING).integer_layers == len(state.spec.layers) > 4
    details = state.reports[-1].details
    assert "computed once" in details["layers.0.blocks.0.attn.cpb_mlp.0"]
    assert not [one for one in state.spec.layers if "cpb_mlp" in one.name]


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-weights"])
def test_a_head_for_training_alone_stays_float(scheme: Any, pixels: Any) -> None:
    module = tiny_vit()
    module.aux = torch.nn.Linear(48, 10)
    state = quantized(module, QuantizeConfig(scheme=scheme), pixels, real=False)
    read_onnx(*reversed(onnx_of(state, pixels)), state.spec, CEILING)
    assert state.reports[-1].details["aux"] == "stays float: it has no part in the answer"


def test_every_head_of_several_counts_as_the_last() -> None:
    timm = import_timm()
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 7}
    module = timm.models.deit.VisionTransformerDistilled(**sizes).eval()
    assert [one.name for one in layers_in_order(module, SHAPE) if one.last] == ["head", "head_dist"]


def test_bits_are_bought_where_they_take_most_damage_away() -> None:
    measured = [widths((4, 1.0), (8, 0.1), (32, 0.0)), widths((4, 5.0), (8, 0.1), (32, 0.0))]
    order = purchases(measured)
    assert order[:2] == [(1, 1), (0, 1)] and len(order) == 4
    assert [one.bits for one in choose(measured, order[:1])] == [4, 8]
    assert [one.bits for one in choose(measured, order)] == [32, 32]


def test_mixed_keeps_to_its_budget(pixels: Any) -> None:
    state = quantized(tiny_vit(), QuantizeConfig(scheme="mixed", group=16, budget=Budget(effective_bits=8)), pixels)
    float_model, data = onnx_of(state, pixels)
    read = read_onnx(data, float_model, state.spec, CEILING)
    bits = {one.weight_bits for one in state.spec.layers}
    assert bits == {4, 8} and effective_bits(state.module, state.spec.layers) <= 8
    assert read.operators["MatMulNBits"] == sum(one.weight_bits == 4 for one in state.spec.layers)
    assert read.operators["MatMulInteger"] == sum(one.activations == "dynamic" for one in state.spec.layers)
    outputs = run_artifact("onnx", data, pixels, SHAPE, read.input)
    assert float(cosines(reference_outputs(state.original, pixels, SHAPE), outputs).min()) > 0.99
    details = state.reports[-1].details
    assert "damage alone: int4-weights" in details["blocks.0.attn.qkv"] and len(details) == 10


def test_a_budget_that_cannot_be_met_names_the_nearest(pixels: Any) -> None:
    for budget, unit in ((Budget(effective_bits=3), "effective bits"), (Budget(megabytes=0.01), "MB")):
        with pytest.raises(BuildError, match=rf"cannot keep to .* {unit}: with every layer at its narrowest it is [\d.]+"):
            quantized(tiny_vit(), QuantizeConfig(scheme="mixed", budget=budget), pixels)


def test_a_loss_budget_takes_no_more_bits_than_needed(pixels: Any) -> None:
    def bits(loss: float) -> float:
        state = quantized(tiny_vit(), QuantizeConfig(scheme="mixed", budget=Budget(loss=loss)), pixels)
        assert "of 24 calibration images answered otherwise" in state.reports[-1].summary
        return effective_bits(state.module, state.spec.layers)

    assert bits(100) <= bits(0)


def test_bad_input_is_named(pixels: Any) -> None:
    for scheme in ("int4-weights", "mixed"):
        budget = Budget(effective_bits=6) if scheme == "mixed" else None
        config = QuantizeConfig(scheme=scheme, budget=budget)  # type: ignore[arg-type]
        with pytest.raises(DataError, match=f"{scheme} learns from real images"):
            quantized(tiny_vit(), config, pixels, real=False)
        broken = tiny_vit()
        broken.blocks[1].mlp.fc2.weight.data[3, 3] = float("nan")
        with pytest.raises(BuildError, match=r"NaN or infinity .*blocks\.1\.mlp\.fc2|NaN or infinity .*head"):
            quantized(broken, config, pixels)
    with pytest.raises(BuildError, match="int4-weights applies to no layer"):
        quantized(hybrid(), INT4, pixels)


@pytest.mark.parametrize(
    "settings",
    [
        {"scheme": "mixed"},
        {"scheme": "int4-weights", "budget": {"effective_bits": 5}},
        {"scheme": "mixed", "budget": {}},
        {"scheme": "mixed", "budget": {"effective_bits": 5, "megabytes": 3}},
        {"scheme": "int4-weights", "group": 48},
        {"scheme": "int8-static", "int8_share": 0.3},
        {"scheme": "int8-dynamic", "ranges": "minmax"},
        {"scheme": "fp32", "group": 16},
    ],
)
def test_senseless_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        QuantizeConfig.model_validate(settings)
