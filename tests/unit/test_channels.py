"""Pruning along Torch-Pruning's graph: only what is proven is cut, budgets hold, readers take over, files agree."""

from __future__ import annotations

import builtins
import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from device_agents.wire import Preprocessing
from edgevit.compress import CalibrationData, Compressed, StepContext, TrainingData, apply_step, restructure, why_not
from edgevit.compress.budget import Cut
from edgevit.compress.calibrate import normalise
from edgevit.compress.channel_cuts import narrow, survey_widths, unit_scores
from edgevit.compress.channels import find_widths, why_unproven
from edgevit.compress.prune import PruneConfig
from edgevit.compress.quantize import QuantizeConfig
from edgevit.errors import BuildError, MissingExtra
from edgevit.export.parity import reference_outputs, verify_parity
from edgevit.export.runtime import run_artifact
from edgevit.macs import count_macs
from edgevit.progress import Quiet
from edgevit.recipe import StepEntry
from edgevit.torchsetup import import_timm, import_torch
from tests.support.models import MEAN, STD, hybrid, no_linear

SHAPE = Preprocessing(32, 32, 36, "bicubic", "center", MEAN, STD)

torch = import_torch()
import_timm()


class Inverted(torch.nn.Module):  # type: ignore[misc]
    """An inverted bottleneck with squeeze and excitation, added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 2 * width
        self.expand = torch.nn.Conv2d(width, hidden, 1, bias=False)
        self.norm = torch.nn.BatchNorm2d(hidden)
        self.depthwise = torch.nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.squeeze = torch.nn.Conv2d(hidden, 16, 1)
        self.excite = torch.nn.Conv2d(16, hidden, 1)
        self.project = torch.nn.Conv2d(hidden, width, 3, padding=1)

    def forward(self, x: Any) -> Any:
        y = torch.nn.functional.gelu(self.depthwise(self.norm(self.expand(x))))
        y = y * torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return x + self.project(y)


class Hybrid(torch.nn.Module):  # type: ignore[misc]
    """Convolutions, then a block of attention over what they leave, as MobileViT and its kin have."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block

        self.stem = torch.nn.Conv2d(3, 24, 3, stride=4, padding=1)
        self.bottleneck = Inverted(24)
        self.embed = torch.nn.Conv2d(24, width, 2, stride=2)
        self.positions = torch.nn.Parameter(torch.randn(1, 16, width) * 0.1)
        self.blocks = torch.nn.Sequential(Block(width, 2, qkv_bias=True))
        self.norm = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, 10)

    def forward(self, x: Any) -> Any:
        x = self.embed(self.bottleneck(self.stem(x))).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


class Misread(torch.nn.Module):  # type: ignore[misc]
    """Channels of two halves change places by a view that the graph does not understand, and are then gathered in fours."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 32, 4, stride=4)
        self.second = torch.nn.Conv2d(32, 32, 1)
        self.head = torch.nn.Linear(32, 10)

    def forward(self, x: Any) -> Any:
        y = self.first(x)
        y = y.reshape(len(y), 4, -1, y.shape[2], y.shape[3]).transpose(1, 2).reshape(y.shape)
        return self.head(self.second(y).relu().mean((2, 3)))


def drawn(module: Any, seed: int = 0) -> Any:
    """``module`` with weights that make every part of it speak, and BatchNorms of the images' statistics."""
    from edgevit.coverage.weights import draw_weights

    torch.manual_seed(seed)
    draw_weights(module.eval().requires_grad_(False), images()[:8])
    return module


def pixels(count: int = 32) -> Any:
    coarse = np.random.default_rng(0).integers(0, 255, (count, 8, 8, 3), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


def images() -> Any:
    return normalise(pixels(), SHAPE)


def pruned(module: Any, multiple: int = 8, **config: Any) -> Compressed:
    return apply_step(Compressed(module, SHAPE, module), PruneConfig(targets=("channels",), **config), context_of(multiple))


def context_of(multiple: int) -> StepContext:
    data = CalibrationData(pixels(), None, real=True)
    return StepContext(data, lambda: TrainingData(pixels(), None), multiple, Path("unused"), Quiet())


@pytest.fixture(scope="module")
def cut_hybrid() -> tuple[Any, Compressed]:
    module = drawn(Hybrid())
    return module, pruned(module, ratio=0.4)


def test_every_width_of_a_hybrid_is_found_and_proven_but_the_inside_of_its_attention() -> None:
    module = drawn(Hybrid())
    widths = find_widths(module, images()[:1])
    reasons = {w.name: why_unproven(module, w, images()[:1]) for w in widths}
    whole = {n for n, r in reasons.items() if r}
    assert whole == {"blocks.0.attn.qkv"} and "unit by unit" in reasons["blocks.0.attn.qkv"], reasons
    reach = {w.size: {p.path for p in w.places} for w in widths}
    assert {"positions", "norm", "embed", "head", "blocks.0.norm1", "blocks.0.attn.proj"} <= reach[32], reach
    assert {"stem", "bottleneck.project", "embed"} <= reach[24]
    assert {"bottleneck.norm", "bottleneck.depthwise", "bottleneck.excite", "bottleneck.squeeze"} <= reach[48]


def test_a_width_that_the_graph_misreads_is_left_whole() -> None:
    """The narrowed module runs without an error: only the proof tells that it computes something else."""
    module = drawn(Misread())
    reasons = {w.name: why_unproven(module, w, images()[:1]) for w in find_widths(module, images()[:1])}
    assert "computes something else" in reasons["first"] and not reasons["second"], reasons
    state = pruned(module, ratio=0.05)
    assert state.module.first.out_channels == 32 and state.module.second.out_channels < 32
    assert "left whole" in state.reports[-1].details["first"]


@pytest.mark.parametrize("importance", ["reconstruction", "activation", "taylor", "magnitude"])
def test_the_budget_is_met_in_widths_the_kernels_like(importance: str) -> None:
    module = drawn(Hybrid())
    before = copy.deepcopy(module.state_dict())
    state = pruned(module, ratio=0.4, importance=importance)
    left, whole = count_macs(state.module, SHAPE), count_macs(module, SHAPE)
    assert 0.45 * whole <= left <= 0.6 * whole, left / whole
    widths = [m.weight.shape[1] for m in state.module.modules() if isinstance(m, torch.nn.Linear)]
    assert all(n % 8 == 0 for n in widths), widths
    assert state.module.blocks[0].attn.qkv.out_features == 96
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_what_was_cut_is_restored_bit_for_bit(cut_hybrid: tuple[Any, Compressed]) -> None:
    _, state = cut_hybrid
    again = restructure(Hybrid(), state.structure)
    again.load_state_dict(state.module.state_dict(), strict=True)
    assert torch.equal(again.eval()(images()), state.module(images()))


def test_units_that_others_can_stand_in_for_go_at_no_cost() -> None:
    """Every other channel says what its neighbour says; half of them may go, and the answer stays."""
    module = drawn(Hybrid())
    inverted = module.bottleneck
    for name in ("expand", "norm", "depthwise"):
        layer = getattr(inverted, name)
        for value in (layer.weight, layer.bias, getattr(layer, "running_mean", None), getattr(layer, "running_var", None)):
            if value is not None:
                value[1::2] = value[::2]
    excite = inverted.excite
    excite.weight[1::2], excite.bias[1::2] = excite.weight[::2], excite.bias[::2]
    graph = survey_widths(module, [images()], 8, Quiet())
    width = next(w for w in graph.widths if w.size == 48)
    scores = unit_scores(graph, width, "reconstruction")
    half = narrow(graph, {width.name: scores}, {width.name: Cut((24,), 0, 0.0)})
    apart = float((half(images()) - module(images())).abs().max() / module(images()).abs().max())
    assert half.bottleneck.depthwise.groups == 24 and apart < 2e-3, apart


@pytest.mark.parametrize(("format_", "scheme"), [("onnx", "fp32"), ("onnx", "int8-dynamic"), ("tflite", "fp32")])
def test_the_exported_file_agrees_with_the_pruned_module(format_: str, scheme: Any, cut_hybrid: tuple[Any, Compressed]) -> None:
    from edgevit.export import onnx, tflite
    from edgevit.export.readback import read_onnx
    from edgevit.export.readback_tflite import read_tflite

    state = apply_step(cut_hybrid[1], QuantizeConfig(scheme=scheme), context_of(8))
    module, spec = state.carried(format_)
    if format_ == "onnx":
        whole = onnx.export_float(module, SHAPE, 1)
        data = onnx.apply_spec(whole, spec, module, pixels(), SHAPE)
        read = read_onnx(data, whole, spec, (onnx.IR_VERSION, onnx.OPSET))
    else:
        whole = tflite.export_float(module, SHAPE, 1)
        data = tflite.apply_spec(whole, spec, module, pixels(), SHAPE, Quiet())
        read = read_tflite(data, whole, spec, module)
    outputs = run_artifact(format_, data, pixels(), SHAPE, read.input)
    verify_parity(f"{format_}-{scheme}", scheme, reference_outputs(cut_hybrid[1].module, pixels(), SHAPE), outputs)


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(ValidationError, match="expected channels alone"):
        PruneConfig(ratio=0.3, targets=("channels", "mlp"))
    with pytest.raises(BuildError, match=r"ratio 0.95 asks for .* can give"):
        pruned(drawn(Hybrid()), ratio=0.95)
    with pytest.raises(BuildError, match="no width of more than 128 units that may be cut"):
        pruned(drawn(Hybrid()), multiple=128, ratio=0.2)
    with pytest.raises(BuildError, match="Torch-Pruning cannot follow the widths of Sequential"):
        find_widths(no_linear().eval(), images()[:1])


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch_pruning":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingExtra, match="extra 'prune'"):
        find_widths(hybrid().eval(), images()[:1])


def test_a_study_knows_that_channels_apply_where_heads_do_not() -> None:
    channels = StepEntry.model_validate({"prune": {"ratio": 0.2, "targets": ["channels"]}}).varied_kind
    heads = StepEntry.model_validate({"prune": {"ratio": 0.2}}).varied_kind
    assert (channels, heads) == ("prune channels", "prune")
    assert why_not(hybrid(), [channels]) == "" and "timm attentions" in why_not(hybrid(), [heads])
