"""Reading files back: what an exporter did otherwise than asked is an error that names it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from edgevit.compress.quantize import quantizable_layers
from edgevit.compress.row_ranges import round_rows
from edgevit.errors import ExportError
from edgevit.export.onnx import apply_spec, export_float
from edgevit.export.readback import read_onnx
from edgevit.model import LoadedModel, ModelSource, load_model
from edgevit.quantspec import LayerQuant, QuantSpec, activation_grid, quantize_weight

CEILING = (10, 21)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(ModelSource("tests.support.models:tiny_vit", random_weights=True))


@pytest.fixture(scope="module")
def float_model(model: LoadedModel) -> bytes:
    return export_float(model.module, model.preprocessing, 1)


def dynamic_spec(model: LoadedModel) -> QuantSpec:
    layers = tuple(LayerQuant(n, kind, dw, 8, "dynamic") for n, kind, dw in quantizable_layers(model.module, False))
    return QuantSpec("int8-dynamic", layers)


def static_spec(model: LoadedModel) -> QuantSpec:
    found = quantizable_layers(model.module, True)
    return QuantSpec("int8-static", tuple(LayerQuant(n, k, dw, 8, "static", (-4.0, 4.0), (-8.0, 8.0)) for n, k, dw in found))


def carried(model: LoadedModel, float_model: bytes, spec: QuantSpec) -> bytes:
    return apply_spec(float_model, spec, model.module, np.zeros((0, 32, 32, 3), np.uint8), model.preprocessing)


def edited(data: bytes, edit: Any) -> bytes:
    proto = onnx.load_model_from_string(data)
    edit(proto)
    out: bytes = proto.SerializeToString()
    return out


def test_a_float_file_reads_back(model: LoadedModel, float_model: bytes) -> None:
    read = read_onnx(float_model, float_model, QuantSpec("fp32"), CEILING)
    assert (read.opset, read.ir_version, read.integer_layers) == (18, 10, 0)
    assert (read.input.name, read.input.shape, read.input.layout) == ("input", (1, 3, 32, 32), "NCHW")
    assert (read.output.name, read.output.shape) == ("logits", (1, 10))
    assert read.operators["LayerNormalization"] == 5


def test_files_hold_nothing_of_the_machine(float_model: bytes) -> None:
    assert b"site-packages" not in float_model and b"/root" not in float_model and b"support/models" not in float_model


def test_every_linear_layer_is_integer_and_convolutions_stay_float(model: LoadedModel, float_model: bytes) -> None:
    spec = dynamic_spec(model)
    read = read_onnx(carried(model, float_model, spec), float_model, spec, CEILING)
    assert read.integer_layers == 9
    assert (read.operators["MatMulInteger"], read.operators["DynamicQuantizeLinear"], read.operators["Conv"]) == (9, 9, 1)
    assert "ConvInteger" not in read.operators


def test_static_files_hold_pairs_and_no_integer_softmax(model: LoadedModel, float_model: bytes) -> None:
    spec = static_spec(model)
    data = carried(model, float_model, spec)
    read = read_onnx(data, float_model, spec, CEILING)
    assert read.integer_layers == 10 and read.operators["QuantizeLinear"] == 11
    proto = onnx.load_model_from_string(data)
    made = {o: n for n in proto.graph.node for o in n.output}
    softmax = [n for n in proto.graph.node if n.op_type == "Softmax"]
    assert softmax and all(made[n.input[0]].op_type != "DequantizeLinear" for n in softmax)


def test_the_integers_in_the_file_are_those_of_the_spec(model: LoadedModel, float_model: bytes) -> None:
    spec = dynamic_spec(model)
    proto = onnx.load_model_from_string(carried(model, float_model, spec))
    held = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    for layer in spec.layers:
        wanted, scale = quantize_weight(model.module.get_submodule(layer.name).weight.detach().numpy())
        np.testing.assert_array_equal(held[f"{layer.name}.weight_int8"], wanted.T)
        np.testing.assert_array_equal(held[f"{layer.name}.weight_scale"], scale)


def test_one_changed_integer_is_found(model: LoadedModel, float_model: bytes) -> None:
    spec = dynamic_spec(model)

    def flip(proto: Any) -> None:
        weight = next(i for i in proto.graph.initializer if i.name == "blocks.1.mlp.fc1.weight_int8")
        array = numpy_helper.to_array(weight).copy()
        array[3, 5] ^= 1
        weight.CopyFrom(numpy_helper.from_array(array, weight.name))

    with pytest.raises(ExportError, match=r"1 of 9 layers .*blocks\.1\.mlp\.fc1 \(other integers\)"):
        read_onnx(edited(carried(model, float_model, spec), flip), float_model, spec, CEILING)


def test_a_layer_left_float_is_found(model: LoadedModel, float_model: bytes) -> None:
    spec = dynamic_spec(model)
    short = QuantSpec(spec.scheme, spec.layers[:-1])
    with pytest.raises(ExportError, match=r"head \(not int8\)"):
        read_onnx(carried(model, float_model, short), float_model, spec, CEILING)
    with pytest.raises(ExportError, match="9 layers"):
        read_onnx(float_model, float_model, spec, CEILING)


def test_another_precision_than_asked_is_found(model: LoadedModel, float_model: bytes) -> None:
    half = QuantSpec("fp16", float_bits=16)
    with pytest.raises(ExportError, match="fp16 was asked for"):
        read_onnx(float_model, float_model, half, CEILING)
    fp16 = carried(model, float_model, half)
    assert read_onnx(fp16, float_model, half, CEILING).input.dtype == "float32"
    with pytest.raises(ExportError, match="numbers are float16"):
        read_onnx(fp16, float_model, QuantSpec("fp32"), CEILING)
    with pytest.raises(ExportError, match="holds int8 weights"):
        read_onnx(carried(model, float_model, dynamic_spec(model)), float_model, QuantSpec("fp32"), CEILING)


def test_a_raised_ir_or_opset_is_found(model: LoadedModel, float_model: bytes) -> None:
    def raise_ir(proto: Any) -> None:
        proto.ir_version = 14

    def raise_opset(proto: Any) -> None:
        proto.opset_import[0].version = 23

    for edit, expected in ((raise_ir, "IR 14"), (raise_opset, "opset 23")):
        with pytest.raises(ExportError, match=expected):
            read_onnx(edited(float_model, edit), float_model, QuantSpec("fp32"), CEILING)


def test_external_data_and_foreign_domains_are_refused(model: LoadedModel, float_model: bytes) -> None:
    def external(proto: Any) -> None:
        proto.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
        entry = proto.graph.initializer[0].external_data.add()
        entry.key, entry.value = "location", "../../etc/passwd"

    def foreign(proto: Any) -> None:
        proto.graph.node[0].domain = "com.microsoft"

    with pytest.raises(ExportError, match="external data is refused"):
        read_onnx(edited(float_model, external), float_model, QuantSpec("fp32"), CEILING)
    with pytest.raises(ExportError, match=r"com\.microsoft"):
        read_onnx(edited(float_model, foreign), float_model, QuantSpec("fp32"), CEILING)


def test_a_layer_that_is_not_in_the_graph_is_named(model: LoadedModel, float_model: bytes) -> None:
    spec = QuantSpec("int8-dynamic", (LayerQuant("blocks.9.attn.qkv", "linear", False, 8, "dynamic"),))
    with pytest.raises(ExportError, match=r"blocks\.9\.attn\.qkv .* is 0 times"):
        carried(model, float_model, spec)


def test_grids_hold_zero_exactly() -> None:
    for low, high in ((-1.0, 3.0), (0.5, 2.0), (-3.0, -1.0), (0.0, 0.0)):
        scale, zero = activation_grid(low, high)
        assert scale > 0 and 0 <= zero <= 255


def test_a_dead_output_channel_quantizes_to_zero() -> None:
    weight = np.array([[0.0, 0.0], [0.5, -1.0]], np.float32)
    grid, scale = quantize_weight(weight)
    assert grid[0].tolist() == [0, 0] and scale[0] == 1 and grid[1].tolist() == [64, -127]


def rows_spec(model: LoadedModel, name: str) -> QuantSpec:
    spec = dynamic_spec(model)
    return QuantSpec(spec.scheme, tuple(replace(one, rows=one.name == name) for one in spec.layers))


def test_divided_rows_compute_what_they_stand_for(model: LoadedModel) -> None:
    """One token a thousand times smaller than the others comes through with the precision of its own range."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 8)
    holder = torch.nn.Sequential(torch.nn.Flatten(2), layer)
    example = replace(model.preprocessing, height=4, width=4)
    float_file = export_float(holder.eval(), example, 1)
    one = LayerQuant("1", "linear", False, 8, "dynamic", rows=True)
    data = apply_spec(float_file, QuantSpec("int8-dynamic", (one,)), holder, np.zeros((0, 4, 4, 3), np.uint8), example)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    x = torch.randn(1, 3, 4, 4) * torch.tensor([1.0, 1e-3, 0.0])[:, None, None]
    got = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
    integers, scale = quantize_weight(layer.weight.detach().numpy())
    weight = torch.from_numpy(integers * scale[:, None])
    with torch.no_grad():
        product = round_rows(x.flatten(2)) @ weight.T
        expected = product + layer.bias
    assert float((got - expected)[0, 1].abs().max()) < 1e-2 * float(product[0, 1].abs().max())
    assert torch.allclose(got, expected, atol=1e-4)


def test_rows_that_are_not_divided_are_found(model: LoadedModel, float_model: bytes) -> None:
    name = "blocks.1.mlp.fc2"
    spec, plain = rows_spec(model, name), dynamic_spec(model)
    data = carried(model, float_model, spec)
    assert read_onnx(data, float_model, spec, CEILING).operators["ReduceMax"] == 1
    with pytest.raises(ExportError, match=r"1 of 9 layers .*fc2 \(one range for all rows\)"):
        read_onnx(carried(model, float_model, plain), float_model, spec, CEILING)
    with pytest.raises(ExportError, match=r"1 of 9 layers .*fc2 \(a range for each row\)"):
        read_onnx(data, float_model, plain, CEILING)

    def unplug(proto: Any) -> None:
        nodes = {n.name: n for n in proto.graph.node}
        nodes[f"{name}/QuantizeInput"].input[0] = nodes[f"{name}/DivideRows"].input[0]

    with pytest.raises(ExportError, match="one range for all rows"):
        read_onnx(edited(data, unplug), float_model, spec, CEILING)


def test_other_activation_scales_are_found(model: LoadedModel, float_model: bytes) -> None:
    spec = static_spec(model)
    data = carried(model, float_model, spec)
    first, *rest = (one for one in spec.layers if one.kind == "linear")
    others = tuple(one for one in spec.layers if one.name != first.name)
    wider = QuantSpec(spec.scheme, (*others, replace(first, input_range=(-4.0, 5.0))))
    assert rest
    with pytest.raises(ExportError, match=r"1 of 10 layers .*\(other activation scales\)"):
        read_onnx(data, float_model, wider, CEILING)
