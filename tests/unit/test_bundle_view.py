"""What `edgevit explain` shows: where parameters, MACs and accuracy went, step by step and layer by layer."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

from rich.console import Console

from device_agents import wire
from edgevit.bundle import Bundle
from edgevit.report.bundle_view import render_bundle, render_explanation
from tests.support.bundles import make_manifest

LONG = "head width 64 → 48, error 0.031" + " of what the layer gives" * 5
LAYERS = {f"blocks.{i}.attn.a_rather_long_name_of_a_layer.qkv": LONG for i in range(3)}
STEPS = (
    wire.StepReport(
        "prune",
        24,
        "a quarter of the MACs: 12 × heads 64 → 48, 12 × hidden 768 → 576",
        LAYERS,
        wire.BeforeAfter(5_717_416, 4_490_152),
        wire.BeforeAfter(1_258_000_000, 943_000_000),
        wire.Damage(64, 0.91237, 0.859375),
        21.42,
    ),
    wire.StepReport(
        "distil",
        150,
        "25 minutes, 900 steps",
        {"training": "900 steps of 32 images"},
        wire.BeforeAfter(4_490_152, 4_490_152),
        wire.BeforeAfter(943_000_000, 943_000_000),
        wire.Damage(64, 0.9812, 0.96875),
        1500.0,
    ),
    wire.StepReport("rewrite", 0, "no rewrite was applied", {}),
    wire.StepReport("quantize", 50, "int8-dynamic: 50 linear layers", {"head": "weights int8 per channel"}),
)


def bundle(looked_at: str = "images") -> Bundle:
    manifest, _ = make_manifest()
    golden = dataclasses.replace(manifest.golden, source=looked_at)
    return Bundle(Path("bundles/all"), dataclasses.replace(manifest, steps=STEPS, golden=golden), b"", b"", "0" * 64)


def shown(what: object) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(what)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    return text


def test_each_step_is_a_row_with_what_it_took_and_what_it_cost() -> None:
    text = shown(render_explanation(bundle(), None))
    prune = next(line for line in text.splitlines() if line.startswith("prune  "))
    for figure in ("24", "5.72 → 4.49 (-21.5 %)", "1,258.0 → 943.0 (-25.0 %)", "0.9124", "85.9", "21.4"):
        assert figure in prune, figure
    distil = next(line for line in text.splitlines() if line.startswith("distil "))
    assert "→" not in distil and "96.9" in distil and "1500.0" in distil
    quantize = next(line for line in text.splitlines() if line.startswith("quantize "))
    assert quantize.split()[1:] == ["50", *"–––––"], "what was not measured is empty, not 0"
    assert "on 64 calibration images" in text and "head width" not in text


def test_an_artifact_brings_every_layer() -> None:
    made = bundle()
    text = shown(render_explanation(made, made.manifest.artifacts[0].name))
    for said in ("blocks.2.attn", "head width 64 → 48", "weights int8 per channel", "900 steps of 32 images"):
        assert said in text


def test_a_build_says_what_was_left_of_the_model() -> None:
    text = shown(render_bundle(bundle()))
    assert "prune + distil: -21.5 % parameters, -25.0 % MACs, top-1 agrees on 96.9 % of 64 calibration images" in text
    plain = dataclasses.replace(bundle().manifest, steps=STEPS[2:])
    assert "MACs" not in shown(render_bundle(dataclasses.replace(bundle(), manifest=plain)))


def test_what_was_measured_on_synthetic_images_says_so() -> None:
    for text in (shown(render_explanation(bundle("synthetic"), None)), shown(render_bundle(bundle("synthetic")))):
        assert "top-1 agrees on 96.9 % of 64 synthetic images" in text and "calibration images" not in text


def test_an_artifact_says_what_runs_where() -> None:
    placed = wire.Placement(
        runtime="litert",
        runtime_version="2.3.0",
        macs=1_254_000_000,
        int8_share=0.875,
        int4_share=0.0,
        float_operators={"BATCH_MATMUL": 24, "CONV_2D": 1},
        nodes={"XNNPACK": 1_210, "LiteRT": 3},
        outside={"CUMSUM": 2, "GATHER_ND": 1},
        partitions=4,
        leftover_pairs=5,
        activation_bytes=2_500_000,
    )
    plain = bundle()
    first = dataclasses.replace(plain.manifest.artifacts[0], placement=placed)
    manifest = dataclasses.replace(plain.manifest, artifacts=(first, *plain.manifest.artifacts[1:]))
    text = shown(render_explanation(dataclasses.replace(plain, manifest=manifest), first.name))
    for line in (
        "1,254.0 M: 87.5 % in int8",
        "BATCH_MATMUL 24, CONV_2D 1",
        "1,210 by XNNPACK, 3 by LiteRT, in 4 pieces, in litert 2.3.0",
        "CUMSUM 2, GATHER_ND 1",
        "5 pairs of QuantizeLinear and DequantizeLinear",
        "2.50 MB of activations",
    ):
        assert line in text, text
    assert wire.loads(wire.Manifest, wire.dumps(manifest), "manifest", wire.MAX_MANIFEST_BYTES) == manifest
