"""What runs where: shares, providers and leftovers as the runtimes really have them, and the estimate of memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agents import wire
from device_agents.wire import Preprocessing
from edgevit.compress import CalibrationData, Compressed, StepContext, TrainingData, apply_step
from edgevit.compress.quantize import QuantizeConfig
from edgevit.errors import BuildError
from edgevit.export import onnx, tflite
from edgevit.export.placement import Use, measure_placement, peak_bytes, verify_memory
from edgevit.golden import synthetic_images
from edgevit.profile import load_profile
from edgevit.progress import Quiet
from tests.support.models import tiny_vit

SHAPE = Preprocessing(32, 32, 32, "bicubic", "center", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
TOKENS, WIDTH = 17, 48
LINEAR = TOKENS * WIDTH * (3 * WIDTH + WIDTH + 8 * WIDTH) * 2 + WIDTH * 10
"""Multiply-adds of the tiny ViT's linear layers: two blocks, and the head for one pooled token."""
ATTENTION = 2 * 2 * TOKENS * TOKENS * WIDTH
PATCHES = 16 * WIDTH * 3 * 8 * 8


@pytest.fixture(scope="module")
def files() -> dict[tuple[str, str], bytes]:
    """The tiny ViT in both formats, by scheme."""
    module = tiny_vit().eval()
    pixels = synthetic_images(16, SHAPE)
    made: dict[tuple[str, str], bytes] = {}
    for scheme in ("int8-dynamic", "int8-static"):
        context = StepContext(
            CalibrationData(pixels, None, True), lambda: TrainingData(pixels, None), 8, Path("unused"), Quiet()
        )
        config: Any = QuantizeConfig(scheme=scheme, row_share=0.0, smooth=False)  # type: ignore[arg-type]
        state = apply_step(Compressed(module, SHAPE, module), config, context)
        changed, spec = state.carried("onnx")
        float_model = onnx.export_float(changed, SHAPE, 1)
        made["onnx", "fp32"], made["onnx", scheme] = (
            float_model,
            onnx.apply_spec(float_model, spec, changed, pixels, SHAPE),
        )
        if scheme == "int8-dynamic":
            changed, spec = state.carried("tflite")
            float_model = made["tflite", "fp32"] = tflite.export_float(changed, SHAPE, 1)
            made["tflite", scheme] = tflite.apply_spec(float_model, spec, changed, pixels, SHAPE, Quiet())
    return made


@pytest.mark.parametrize("format_", ["onnx", "tflite"])
def test_multiply_adds_and_their_precision(files: dict[tuple[str, str], bytes], format_: str) -> None:
    plain = measure_placement(format_, files[format_, "fp32"])
    assert plain.macs == LINEAR + ATTENTION + PATCHES
    assert plain.int8_share == plain.int4_share == 0
    assert sum(plain.float_operators.values()) == 9 + 4 + 1
    dynamic = measure_placement(format_, files[format_, "int8-dynamic"])
    assert dynamic.macs == plain.macs
    assert dynamic.int8_share == pytest.approx(LINEAR / plain.macs)
    assert sum(dynamic.float_operators.values()) == 4 + 1
    assert wire.decode(wire.Placement, wire.encode(dynamic), "placement") == dynamic


def test_static_int8_fuses_every_pair(files: dict[tuple[str, str], bytes]) -> None:
    found = measure_placement("onnx", files["onnx", "int8-static"])
    assert found.leftover_pairs == 0
    assert found.int8_share == pytest.approx(LINEAR / found.macs)
    assert found.nodes == {"CPUExecutionProvider": sum(found.nodes.values())}


def test_a_pair_that_nothing_takes_in_is_counted() -> None:
    """Q → DQ before a Softmax: onnxruntime has no integer kernel to fuse it into that keeps the output float."""
    import onnx as library
    from onnx import TensorProto, helper, numpy_helper

    constants = [
        numpy_helper.from_array(np.array(0.1, np.float32), "scale"),
        numpy_helper.from_array(np.array(128, np.uint8), "zero"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="dequantize"),
        helper.make_node("Sin", ["d"], ["y"], name="sin"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 8]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "pair", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    library.checker.check_model(model)
    found = measure_placement("onnx", model.SerializeToString())
    assert found.leftover_pairs == 1 and found.macs == 0 and found.int8_share == 0


def test_the_delegate_takes_all_of_a_plain_transformer(files: dict[tuple[str, str], bytes]) -> None:
    found = measure_placement("tflite", files["tflite", "int8-dynamic"])
    parsed = tflite.read_flatbuffer(files["tflite", "int8-dynamic"])
    assert found.nodes == {"XNNPACK": len(parsed.subgraphs[0].operators)}
    assert found.outside == {} and found.partitions == 1


def test_operators_the_delegate_leaves_are_named() -> None:
    import torch

    class Sums(torch.nn.Module):
        """CUMSUM has no XNNPACK kernel: it splits the graph in two."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(3 * 8 * 8, 16), torch.nn.Linear(16, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.second(torch.cumsum(self.first(x.flatten(1)), 1))
            return y

    shape = replace(SHAPE, height=8, width=8)
    found = measure_placement("tflite", tflite.export_float(Sums().eval(), shape, 1))
    assert found.outside == {"CUMSUM": 1}
    assert found.nodes["LiteRT"] == 1 and found.nodes["XNNPACK"] > 0
    assert found.partitions == 2


@given(st.data())
def test_the_peak_is_what_a_run_that_frees_at_the_last_reader_holds(data: st.DataObject) -> None:
    """Against a plain simulation on random graphs without views."""
    sizes = {"x": data.draw(st.integers(1, 50))}
    uses: list[Use] = []
    for i in range(data.draw(st.integers(1, 8))):
        reads = tuple(data.draw(st.lists(st.sampled_from(sorted(sizes)), min_size=1, max_size=3, unique=True)))
        uses.append(Use(reads, {f"t{i}": data.draw(st.integers(1, 50))}))
        sizes.update(uses[-1].makes)
    outputs = [f"t{len(uses) - 1}"]
    held, peak = {"x"}, sizes["x"]
    for i, use in enumerate(uses):
        held |= set(use.makes)
        peak = max(peak, sum(sizes[n] for n in held))
        later = {n for u in uses[i + 1 :] for n in u.reads} | set(outputs)
        held &= later
    assert peak_bytes(uses, {"x": sizes["x"]}, outputs) == peak


def test_a_view_takes_no_memory_and_keeps_its_source_alive() -> None:
    uses = [Use(("x",), {"a": 100}), Use(("a",), {"v": 100}, view=True), Use(("x",), {"b": 10}), Use(("v", "b"), {"y": 1})]
    assert peak_bytes(uses, {"x": 5}, ["y"]) == 115


def test_more_than_any_board_has_is_an_error(files: dict[tuple[str, str], bytes]) -> None:
    profile = load_profile("raspberry-pi-zero-2w")
    placement = measure_placement("onnx", files["onnx", "fp32"])
    assert verify_memory("onnx-fp32", 1_000_000, placement, [profile]) == ()
    with pytest.raises(BuildError, match=r"onnx-fp32 needs about 9,000 MB \(a file of 9,000 MB.*has 512 MB"):
        verify_memory("onnx-fp32", 9_000_000_000, placement, [profile])
    several = load_profile("raspberry-pi-4b")
    (note,) = verify_memory("onnx-fp32", 1_500_000_000, placement, [several])
    assert note.startswith("not for every Raspberry Pi 4") and "some have 1,024 MB" in note
