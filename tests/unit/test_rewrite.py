"""Exact rewrites: each keeps every answer, on images with extreme borders too, and one that does not is refused by name."""

from __future__ import annotations

import copy
import sys
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_agents.wire import Preprocessing
from edgevit import rewrite
from edgevit.compress import CalibrationData, Compressed, StepContext, apply_step
from edgevit.compress.calibrate import normalise
from edgevit.compress.quantize import QuantizeConfig
from edgevit.export import onnx as onnx_files
from edgevit.export.runtime import image_spec, run_artifact
from edgevit.golden import synthetic_images
from edgevit.quantspec import LayerQuant, QuantSpec
from edgevit.rewrite import REWRITES, Applied, apply_rewrites
from edgevit.rewrite.pixels import takes_pixels
from edgevit.torchsetup import import_timm, import_torch
from tests.build.conftest import Recorder
from tests.support.models import MEAN, STD, hybrid

SHAPE = Preprocessing(32, 32, 36, "bicubic", "center", MEAN, STD)
PIXELS = synthetic_images(16, SHAPE)
DATA = CalibrationData(PIXELS, None, real=False)


def vit(**changes: Any) -> Any:
    """A class-token ViT of three blocks with weights, norms and positions that all matter."""
    torch = import_torch()
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    distilled = changes.pop("distilled", False)
    if distilled:
        from timm.models.deit import VisionTransformerDistilled as VisionTransformer  # type: ignore[no-redef]
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10, **changes}
    model = VisionTransformer(**settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.ndim >= 2:
                parameter.normal_(0, 1.6 / parameter[0].numel() ** 0.5)
            elif "norm" in name or "gamma" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.normal_(0, 0.3)
    return model.eval()


def merged_vit() -> Any:
    from edgevit.compress.merge_tokens import restructure

    return restructure(vit(), {"merge": [(0, 3), (1, 3)]}).eval()


def rewritten(module: Any, off: tuple[str, ...] = ()) -> Compressed:
    return apply_rewrites(Compressed(module, SHAPE, module), DATA, Recorder(), off)


def put_first(broken: Callable[[Any], Applied], monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewrite of the name ``broken`` comes before all others."""
    module = types.ModuleType("broken_rewrite")
    module.rewrite = broken  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "broken_rewrite", module)
    monkeypatch.setattr(rewrite, "REWRITES", {"broken": "broken_rewrite", **REWRITES})


def applied(state: Compressed) -> set[str]:
    return {name for name, text in state.reports[-1].details.items() if text[0].isdigit()}


def outputs(state: Compressed, pixels: Any) -> Any:
    with import_torch().no_grad():
        return state.module(normalise(pixels, state.preprocessing)).numpy()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (vit, {"norm_affine", "class_token", "attention", "centre", "pixels", "patches"}),
        (
            lambda: vit(init_values=0.5),
            {"layer_scale", "norm_affine", "class_token", "attention", "centre", "pixels", "patches"},
        ),
        (lambda: vit(distilled=True), {"norm_affine", "class_token", "attention", "centre", "pixels", "patches"}),
        (lambda: vit(reg_tokens=2), {"norm_affine", "class_token", "attention", "centre", "pixels", "patches"}),
        (lambda: vit(qk_norm=True), {"norm_affine", "centre", "pixels", "patches"}),
        (lambda: vit(global_pool="avg"), {"norm_affine", "attention", "centre", "pixels", "patches"}),
        (merged_vit, {"norm_affine", "class_token", "attention", "centre", "pixels", "patches"}),
        (hybrid, {"batch_norm", "pixels"}),
    ],
    ids=["vit", "layer_scale", "distilled", "registers", "qk_norm", "avg", "merged", "hybrid"],
)
def test_every_answer_stays(make: Any, expected: set[str]) -> None:
    module = make().eval()
    before = copy.deepcopy(module.state_dict())
    state = rewritten(module)
    assert applied(state) == expected, state.reports[-1].details
    assert all(bool((before[k] == v).all()) for k, v in module.state_dict().items()), "the module that came was changed"
    fresh = synthetic_images(24, SHAPE)[16:]
    fresh[:2, 0], fresh[2:4, :, -1] = 255, 0
    reference = outputs(Compressed(module, SHAPE, module), fresh)
    assert np.abs(outputs(state, fresh) - reference).max() <= 1e-4 * np.abs(reference).max()
    assert np.abs(outputs(state, fresh[:1]) - reference[:1]).max() <= 1e-4 * np.abs(reference).max(), "one image at a time"


def nearly_tied_vit() -> Any:
    """Every pair of its tokens is as much alike as any other, up to float noise, though the tokens differ: which pairs merge is
    anybody's guess, and another guess is another answer."""
    torch = import_torch()
    module = merged_vit()
    width = 48
    with torch.no_grad():
        for block in module.blocks:
            block.attn.qkv.weight[width : 2 * width].mul_(1e-5)
            block.attn.qkv.bias[width : 2 * width].fill_(1.0)
    return module


def test_near_ties_between_tokens_that_merge_keep_no_rewrite_out() -> None:
    assert applied(rewritten(nearly_tied_vit())) == {"norm_affine", "class_token", "attention", "centre", "pixels", "patches"}


def test_a_rewrite_that_would_merge_other_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its outputs are right as long as it is told what merges: that is not enough."""

    def broken(subject: Any) -> Applied:
        made = copy.deepcopy(subject.module)
        made.blocks[0].attn.register_forward_hook(lambda _layer, _args, out: (out[0], out[1].flip(1), *out[2:]))
        return Applied(made, 1)

    put_first(broken, monkeypatch)
    assert rewritten(merged_vit()).reports[-1].details["broken"].startswith("refused: outputs moved by")


def test_a_rewrite_that_leaves_a_merge_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(subject: Any) -> Applied:
        made = copy.deepcopy(subject.module)
        made.blocks.schedule.pop(1)
        return Applied(made, 1)

    put_first(broken, monkeypatch)
    assert rewritten(merged_vit()).reports[-1].details["broken"] == "refused: 1 merges of tokens are left out"


def test_the_last_block_computes_less_and_the_report_counts_it() -> None:
    macs = rewritten(vit()).reports[-1].macs
    assert macs is not None and macs.after < 0.9 * macs.before


@pytest.mark.parametrize("name", list(REWRITES))
def test_each_can_be_switched_off(name: str) -> None:
    state = rewritten(vit(init_values=0.5), (name,))
    assert state.reports[-1].details[name] == "switched off by the recipe"
    assert name not in applied(state)
    assert takes_pixels(state.preprocessing) is (name != "pixels")


@pytest.mark.parametrize("fault", ["wrong", "crashing", "nan"])
def test_one_that_breaks_parity_is_refused_by_name_and_the_rest_goes_on(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(subject: Any) -> Applied:
        torch = import_torch()
        made = copy.deepcopy(subject.module)
        with torch.no_grad():
            made.head.weight.mul_(float("nan") if fault == "nan" else 1.01)
        if fault == "crashing":
            made.head = torch.nn.Linear(7, 10)
        return Applied(made, 1)

    put_first(broken, monkeypatch)
    state = rewritten(vit())
    report = state.reports[-1]
    assert report.details["broken"].startswith("refused: ") and "broken" in report.summary.split("refused")[1]
    assert "class_token" in applied(state)


def test_one_that_cannot_be_carried_out_is_refused_and_the_rest_goes_on() -> None:
    """timm asks every part that has a ``fuse`` to fuse itself; here that word means something else."""
    torch = import_torch()

    class Gate(torch.nn.Linear):  # type: ignore[misc]
        def fuse(self, other: Any, share: float) -> Any:
            return self(other) * share

    torch.manual_seed(0)
    stem = torch.nn.Conv2d(3, 16, 4, stride=4)
    layers = [stem, torch.nn.BatchNorm2d(16), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), Gate(16, 10)]
    state = rewritten(torch.nn.Sequential(*layers).eval())
    report = state.reports[-1]
    assert report.details["branches"].startswith("refused: it fails: TypeError: "), report.details["branches"]
    assert "branches" in report.summary.split("refused")[1]
    assert applied(state) == {"batch_norm", "pixels"}, report.details


def test_a_batch_norm_without_statistics_is_left_alone() -> None:
    torch = import_torch()
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(16, track_running_stats=False)
    layers = [torch.nn.Conv2d(3, 16, 4, stride=4), norm, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    state = rewritten(torch.nn.Sequential(*layers, torch.nn.Linear(16, 10)).eval())
    assert state.reports[-1].details["batch_norm"] == "does not apply: no BatchNorm reads a convolution alone"


def test_one_that_only_many_images_tell_apart_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What slips through the first look of eight images is found by all of them together."""

    def sly(subject: Any) -> Applied:
        torch = import_torch()
        made = copy.deepcopy(subject.module)
        rare = normalise(PIXELS[:1], subject.preprocessing)

        def spoil(layer: Any, args: Any, output: Any) -> Any:
            hit = (args[0][:, None] - rare[None]).flatten(2).abs().amax(2) < 1e-6
            return output + hit.any(1, keepdim=True).to(torch.float32)

        made.register_forward_hook(spoil)
        return Applied(made, 1)

    module = types.ModuleType("sly_rewrite")
    module.rewrite = sly  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sly_rewrite", module)
    monkeypatch.setattr(rewrite, "REWRITES", {"sly": "sly_rewrite"})
    assert rewritten(vit()).reports[-1].details["sly"].startswith("refused: outputs moved by")


def test_a_padded_stem_keeps_its_subtraction() -> None:
    """Folded into a padded convolution, the mean would leak in at the border."""
    state = rewritten(hybrid().eval())
    stem = state.module[0]
    assert [type(part).__name__ for part in stem] == ["SubtractMean", "Conv2d"]


def test_branches_of_training_become_one_layer() -> None:
    """A RepViT whose norms have seen images: 3 × 3, 1 × 1 and identity side by side, and token mixers with BatchNorm behind."""
    torch = import_torch()
    shape = Preprocessing(64, 64, 64, "bicubic", "center", MEAN, STD)
    pixels = synthetic_images(8, shape)
    torch.manual_seed(0)
    module = import_timm().create_model("repvit_m0_9", num_classes=10, embed_dim=(16, 16, 16, 16), depth=(1, 1, 2, 1))
    with torch.no_grad():
        module.train()(normalise(pixels, shape))
    before = sum(isinstance(m, torch.nn.BatchNorm2d) for m in module.modules())
    state = apply_rewrites(Compressed(module.eval(), shape, module), CalibrationData(pixels, None, real=False), Recorder())
    assert {"branches", "pixels"} <= applied(state), state.reports[-1].details
    assert before and not any(isinstance(m, torch.nn.BatchNorm2d) for m in state.module.modules())


def test_quantizing_still_balances_an_attention_that_was_laid_out_anew(tmp_path: Path) -> None:
    real = CalibrationData(PIXELS, None, real=True)
    context = StepContext(real, lambda: pytest.fail("nothing is trained here"), 8, tmp_path, Recorder())
    state = apply_step(rewritten(vit()), QuantizeConfig(scheme="int8-static", images=16), context)
    report = state.reports[-1]
    assert "balanced" in report.details["blocks.0.attn.proj"]
    assert report.details["patch_embed.proj"].startswith("stays float: it reads the image")


def test_the_onnx_file_takes_pixels_and_the_runtime_fuses_what_it_knows(tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    module = vit()
    state = rewritten(module)
    data = onnx_files.export_float(state.module, state.preprocessing, 1)
    spec = image_spec("input", "uint8", (1, 32, 32, 3))
    got = run_artifact("onnx", data, PIXELS[:6], SHAPE, spec)
    reference = outputs(Compressed(module, SHAPE, module), PIXELS[:6])
    assert np.abs(got - reference).max() <= 1e-4 * np.abs(reference).max()
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    operators = Counter(n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert (operators["Gelu"], operators["Erf"]) == (3, 0), operators
    assert operators["SimplifiedLayerNormalization"] == 7 and not operators["ReduceMean"], operators
    assert operators["Conv"] == 0 and operators["FusedConv"] == 0, "patches are embedded by a matrix product"


def test_no_static_layer_is_left_to_a_float_product(tmp_path: Path) -> None:
    """ONNX Runtime joins MatMul and bias into a Gemm before it looks for integers, unless the bias is kept apart: the head and
    the last block, whose products have few rows, too."""
    import onnx
    import onnxruntime

    torch = import_torch()
    state = rewritten(vit())
    float_file = onnx_files.export_float(state.module, state.preprocessing, 1)
    names = [n for n, m in state.module.named_modules() if isinstance(m, torch.nn.Linear)]
    spec = QuantSpec("int8-static", tuple(LayerQuant(n, "linear", False, 8, "static", (-6.0, 6.0), (-9.0, 9.0)) for n in names))
    data = onnx_files.apply_spec(float_file, spec, state.module, PIXELS, state.preprocessing)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    operators = Counter(n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert operators["Gemm"] == 0 and operators["MatMulIntegerToFloat"] == len(names), operators
