"""Families beyond the plain transformer: what int8 makes of them, as a file that ran, agrees with the float module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from device_agents.wire import Preprocessing
from edgevit.compress import CalibrationData, Compressed, StepContext, TrainingData, apply_step
from edgevit.compress.quantize import QuantizeConfig
from edgevit.export.parity import GATES, cosines, reference_outputs
from edgevit.export.runtime import run_artifact
from edgevit.golden import synthetic_images
from edgevit.torchsetup import import_timm
from tests.build.conftest import Recorder

SMALL: dict[str, tuple[int, dict[str, Any]]] = {
    "efficientvit_b0": (64, {"depths": (1, 1, 1, 1)}),
    "mobilevit_xxs": (64, {}),
    "tiny_vit_5m_224": (64, {"depths": (1, 1, 1, 1), "window_sizes": (4, 4, 4, 2)}),
    "fastvit_t8": (64, {"layers": (1, 1, 1, 1)}),
    "swin_tiny_patch4_window7_224": (56, {"depths": (1, 1, 1, 1), "embed_dim": 48, "window_size": 7}),
}
CASES = [(name, "onnx", "int8-static") for name in SMALL] + [
    ("efficientvit_b0", "tflite", "int8-static"),
    ("swin_tiny_patch4_window7_224", "tflite", "int8-static"),
]


def made(name: str) -> tuple[torch.nn.Module, Preprocessing]:
    timm = import_timm()
    side, more = SMALL[name]
    if "swin" in name:
        more = {**more, "img_size": side}
    torch.manual_seed(0)
    timm.layers.set_fused_attn(False)
    model = timm.create_model(name, pretrained=False, num_classes=10, **more).eval()
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)):
        # As no trained one is left: scales of one and shifts of zero vanish from the graph, and with them what they do to it.
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.normal_(std=0.1)
    return model, Preprocessing(side, side, side, "bicubic", "center", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(("name", "format_", "scheme"), CASES)
def test_the_file_agrees_with_the_float_module(name: str, format_: str, scheme: str) -> None:
    module, shape = made(name)
    pixels = synthetic_images(16, shape)
    data_of = CalibrationData(pixels, None, True)
    context = StepContext(data_of, lambda: TrainingData(pixels, None), 8, Path("unused"), Recorder(), (format_,))
    state = apply_step(Compressed(module, shape, module), QuantizeConfig(scheme=scheme), context)  # type: ignore[arg-type]
    changed, spec = state.carried(format_)
    if format_ == "onnx":
        from edgevit.export import onnx
        from edgevit.export.readback import read_onnx

        float_model = onnx.export_float(changed, shape, 1)
        data = onnx.apply_spec(float_model, spec, changed, pixels, shape)
        read = read_onnx(data, float_model, spec, (onnx.IR_VERSION, onnx.OPSET))
    else:
        from edgevit.export import tflite
        from edgevit.export.readback_tflite import read_tflite

        float_model = tflite.export_float(changed, shape, 1)
        data = tflite.apply_spec(float_model, spec, changed, pixels, shape, Recorder())
        read = read_tflite(data, float_model, spec, changed)
    assert read.integer_layers == len(spec.layers) > 0
    outputs = run_artifact(format_, data, pixels, shape, read.input)
    found = cosines(reference_outputs(module, pixels, shape), outputs)
    assert np.isfinite(outputs).all()
    assert found.mean() >= GATES[scheme].mean_cosine and found.min() >= GATES[scheme].min_cosine
