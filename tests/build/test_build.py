"""Whole builds of small real models: what is in the bundle is right, and what cannot be right is not built."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_agents import wire
from device_agents.golden import compare
from edgevit import build as build_module
from edgevit.bundle import open_bundle
from edgevit.cache import Cache
from edgevit.errors import BuildError, DataError, ModelError
from edgevit.export.runtime import run_artifact
from edgevit.model import ModelSource
from tests.build.conftest import Build, Recorder, blob, old_onnxruntime, write_images

HYBRID = ModelSource("tests.support.models:hybrid", random_weights=True)
ALL = ("onnx", "tflite")


def test_fp32_without_data_is_synthetic_and_says_so(build: Build) -> None:
    bundle = build("fp32")
    manifest = bundle.manifest
    assert open_bundle(bundle.path, None).digest == bundle.digest
    cut = wire.check_index(bundle.read_chunk_index(), {b.sha256: b.size for b in manifest.blobs()})
    assert set(cut) == {b.sha256 for b in manifest.blobs() if b != manifest.chunks}
    assert (manifest.golden.source, manifest.golden.count) == ("synthetic", 16)
    assert manifest.evaluation is None and "without --eval" in manifest.evaluation_absent
    assert [s.step for s in manifest.steps] == ["rewrite", "quantize"]
    assert manifest.steps[0].summary.startswith("rewritten exactly: ") and manifest.steps[0].layers
    (artifact,) = manifest.artifacts
    assert (artifact.input.dtype, artifact.input.layout) == ("uint8", "NHWC")
    assert (artifact.name, artifact.opset, artifact.ir_version) == ("onnx-fp32", 18, 10)
    assert artifact.parity.max_relative_error < 1e-4
    assert any("not run in onnxruntime 1.19" in note for note in artifact.notes)


@pytest.mark.parametrize("scheme", ["fp32", "fp16", "int8-dynamic", "int8-static"])
def test_every_scheme_in_both_formats(build: Build, images: Path, scheme: str) -> None:
    bundle = build(scheme, ALL, eval_data=images, calib_data=images, profiles=("raspberry-pi-4b", "generic-x86-64"))
    manifest = bundle.manifest
    assert [a.name for a in manifest.artifacts] == [f"onnx-{scheme}", f"tflite-{scheme}"]
    pixels = blob(bundle, manifest.golden.blob.sha256)
    assert pixels.shape == (16, 32, 32, 3) and manifest.golden.source == "images"
    for artifact in manifest.artifacts:
        recorded = blob(bundle, artifact.golden.blob.sha256)
        model = bundle.blob_path(artifact.blob.sha256).read_bytes()
        again = run_artifact(artifact.format, model, pixels, manifest.preprocessing, artifact.input)
        assert compare(again, recorded, artifact.golden.tolerance).passed
        # What a device must never let through, on this very artifact.
        faults = {
            "swapped channels": run_artifact(artifact.format, model, pixels[..., ::-1], manifest.preprocessing, artifact.input),
            "half as bright": run_artifact(artifact.format, model, pixels // 2, manifest.preprocessing, artifact.input),
        }
        if artifact.format == "onnx":
            zeroed = zero_layer(model, "blocks.0.mlp.fc2")
            faults["a zeroed layer"] = run_artifact("onnx", zeroed, pixels, manifest.preprocessing, artifact.input)
        for fault, outputs in faults.items():
            assert not compare(outputs, recorded, artifact.golden.tolerance).passed, f"{artifact.name} lets {fault} pass"


def zero_layer(model: bytes, layer: str) -> bytes:
    """The same ONNX file with one layer's weight all zeros, whatever its precision."""
    import onnx
    from onnx import numpy_helper

    proto = onnx.load_model_from_string(model)
    names = [f"{layer}.weight", f"{layer}.weight_int8", f"{layer}.weight_int"]
    (weight,) = (i for i in proto.graph.initializer if i.name in names)
    weight.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(weight)), weight.name))
    out: bytes = proto.SerializeToString()
    return out


def test_the_evaluation_set_is_one_blob_for_all_recipes(build: Build, images: Path) -> None:
    one, two = (build(r, eval_data=images).manifest.evaluation for r in ("fp32", "int8-dynamic"))
    assert one is not None and one == two
    bundle = build("fp32", eval_data=images)
    assert bundle.manifest.evaluation is not None
    stored, labels = (blob(bundle, b.sha256) for b in (bundle.manifest.evaluation.images, bundle.manifest.evaluation.labels))
    assert stored.shape == (24, 32, 32, 3) and stored.dtype == np.uint8 and labels.dtype == np.int64
    assert labels.tolist() == sorted(labels.tolist())
    assert bundle.manifest.labels is not None
    names = json.loads(bundle.blob_path(bundle.manifest.labels.sha256).read_text())
    assert names == [f"colour{i}" for i in range(10)]


def test_dynamic_int8_does_not_fit_a_board_that_has_only_tflite_runtime() -> None:
    from edgevit.artifacts import fitting_profiles, refusals
    from edgevit.profile import load_profile

    board = load_profile("raspberry-pi-4b")
    only = board.model_copy(update={"runtimes": tuple(o for o in board.runtimes if o.runtime == "tflite-runtime")})
    assert only.runtimes, "the profile no longer lists tflite-runtime"
    assert fitting_profiles("tflite", "int8-dynamic", [only]) == ()
    assert fitting_profiles("tflite", "int8-static", [only]) == (only,)
    assert "tflite-runtime" in refusals("tflite", "int8-dynamic")[0]


def test_a_second_build_is_instant_and_imports_no_torch(build_home: Path, key: Path, tmp_path: Path) -> None:
    script = """
import sys, time, json
from pathlib import Path
from edgevit import signing
from edgevit.build import BuildRequest, build_bundle
from edgevit.model import ModelSource
from edgevit.profile import load_profile
from edgevit.progress import Quiet
from edgevit.recipe import load_recipe
source = ModelSource("vit_tiny_patch16_224", random_weights=True, model_args={"depth": 1}, img_size=32, num_classes=5)
request = BuildRequest(source, load_recipe("fp32"), (load_profile("raspberry-pi-4b"),), ("onnx",))
start = time.perf_counter()
bundle = build_bundle(request, Path(sys.argv[1]), lambda d: signing.sign(d, Path(sys.argv[2])), Quiet())
heavy = sorted({"torch", "timm", "onnx", "onnxruntime"} & set(sys.modules))
print(json.dumps([time.perf_counter() - start, bundle.digest, heavy]))
"""
    results = []
    for name in ("one", "two"):
        argv = [sys.executable, "-c", script, str(tmp_path / name), str(key)]
        env = {"EDGEVIT_HOME": str(build_home), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=200, env=env, cwd=Path(__file__).parents[2], check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = results
    assert second[1] == first[1], "the same build must give the same manifest"
    assert second[2] == [], f"a cached build imported {second[2]}"
    assert second[0] < 1.0, f"a cached build took {second[0]:.2f} s"


def test_a_build_is_deterministic(key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing shared: two empty homes, both formats, a quantized and a float recipe."""
    from edgevit import signing
    from edgevit.build import BuildRequest, build_bundle
    from edgevit.profile import load_profile
    from edgevit.progress import Quiet
    from edgevit.recipe import load_recipe

    digests = []
    for home in ("a", "b"):
        monkeypatch.setenv("EDGEVIT_HOME", str(tmp_path / home))
        request = BuildRequest(HYBRID, load_recipe("int8-dynamic"), (load_profile("raspberry-pi-4b"),), ALL)
        bundle = build_bundle(request, tmp_path / f"out-{home}", lambda d: signing.sign(d, key), Quiet())
        digests.append([b.sha256 for b in bundle.manifest.blobs()])
    assert digests[0] == digests[1]


def test_versions_only_rise(build: Build, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build("fp32").manifest.version
    other = build("fp32", eval_data=images).manifest.version
    monkeypatch.setattr(time, "time", lambda: 1.0)
    back = build("fp32").manifest.version
    assert first < other < back, "going back to an earlier build must not give an older version"
    assert build("fp32").manifest.version == back


def test_a_damaged_cache_is_said_and_made_anew(build: Build, build_home: Path) -> None:
    bundle = build("fp32", name="damaged")
    sha = bundle.manifest.artifacts[0].golden.blob.sha256
    cached = build_home / "cache" / "blobs" / sha
    data = cached.read_bytes()
    cached.unlink()
    cached.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    progress = Recorder()
    again = build("fp32", name="damaged", progress=progress)
    assert any("damaged or gone" in text for text in progress.said)
    assert hashlib.sha256(again.blob_path(sha).read_bytes()).hexdigest() == sha


def test_a_changed_weight_is_another_build(build: Build) -> None:
    one = build("fp32")
    two = build("fp32", source=ModelSource("tests.support.models:tiny_vit", random_weights=True, model_args={"seed": 1}))
    assert one.manifest.model.digest != two.manifest.model.digest
    assert one.manifest.artifacts[0].blob != two.manifest.artifacts[0].blob


def test_the_last_block_of_a_class_token_model_is_cut_and_quantized_in_both_formats(build: Build, images: Path) -> None:
    source = ModelSource("tests.support.models:tiny_vit", random_weights=True, model_args={"global_pool": "token"})
    bundle = build("int8-dynamic", ALL, source=source, calib_data=images)
    report, quantized = bundle.manifest.steps
    assert report.macs is not None and report.macs.after < report.macs.before
    assert {"blocks.1.q", "blocks.1.kv", "patch_embed.proj"} <= set(quantized.details)
    for artifact in bundle.manifest.artifacts:
        assert (artifact.input.dtype, artifact.input.shape) == ("uint8", (1, 32, 32, 3))
        assert artifact.parity.min_cosine > 0.98


def test_a_batch_of_four(build: Build, images: Path) -> None:
    bundle = build("int8-static", ALL, calib_data=images, batch=4)
    for artifact in bundle.manifest.artifacts:
        assert artifact.batch == 4 and artifact.input.shape == (4, 32, 32, 3)
    assert bundle.manifest.golden.count % 4 == 0


def test_a_hybrid_quantizes_depthwise_and_padded_convolutions(build: Build, images: Path) -> None:
    bundle = build("int8-static", ALL, source=HYBRID, calib_data=images)
    # The convolution that reads the image stays float: two convolutions with ranges behind them as well, and the head.
    assert bundle.manifest.steps[-1].layers == 3
    assert bundle.manifest.artifacts[0].operators["QuantizeLinear"] == 5


def test_static_without_calibration_images_is_refused(build: Build, images: Path) -> None:
    for data in ({}, {"eval_data": images}):
        with pytest.raises(
            DataError, match="int8-static needs unlabelled images for its step quantize, and was given no images"
        ) as caught:
            build("int8-static", **data)
        assert "--calib" in caught.value.hint


def test_a_scheme_that_applies_to_no_layer_is_refused(build: Build) -> None:
    with pytest.raises(BuildError, match="int8-dynamic applies to no layer"):
        build("int8-dynamic", source=ModelSource("tests.support.models:no_linear", random_weights=True))


def test_bad_data_stops_the_build(build: Build, images: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        build("fp32", calib_data=tmp_path / "empty")
    table = tmp_path / "labels.csv"
    first = next(images.rglob("*.png"))
    table.write_text(f"path,label\n{first},10\n")
    with pytest.raises(DataError, match="got label 10, expected 0 to 9"):
        build("fp32", eval_data=table)
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "a.png").write_bytes(first.read_bytes())
    with pytest.raises(DataError, match="has no labels"):
        build("fp32", eval_data=flat)
    broken = write_images(tmp_path / "broken", 20)
    next(broken.rglob("3.png")).write_bytes(b"\x89PNG but not really")
    with pytest.raises(DataError, match=r"3\.png"):
        build("fp32", calib_data=broken)


def test_nothing_is_left_behind_by_a_failed_build(build: Build, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        build("fp32", source=ModelSource("tests.support.models:returns_tuple_module", random_weights=True))
    assert not [p for p in tmp_path.iterdir() if "bundle" in p.name]


def test_a_finetuned_checkpoint_goes_through_whole(build: Build, tmp_path: Path) -> None:
    """Seven classes with names of their own, 64 pixels, a training checkpoint: nothing is said by hand but the file."""
    from edgevit.torchsetup import import_timm, import_torch

    timm, torch = import_timm(), import_torch()
    torch.manual_seed(1)
    module = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=64, depth=2)
    for p in module.parameters():
        if p.ndim >= 2:
            torch.nn.init.normal_(p, 0, 1.5 / p[0].numel() ** 0.5)
    torch.save(
        {"epoch": 9, "state_dict": {f"module.{k}": v for k, v in module.state_dict().items()}}, tmp_path / "birds.pth.tar"
    )
    names = ["robin", "wren", "crow", "jay", "tit", "owl", "kite"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    source = ModelSource(
        "vit_tiny_patch16_224", weights=tmp_path / "birds.pth.tar", labels=tmp_path / "names.txt", model_args={"depth": 2}
    )
    bundle = build("int8-dynamic", source=source)
    manifest = bundle.manifest
    assert manifest.model.classes == 7 and manifest.preprocessing.height == 64
    assert manifest.artifacts[0].output.shape == (1, 7)
    assert manifest.labels and json.loads(bundle.blob_path(manifest.labels.sha256).read_text()) == names
    assert {"num_classes", "img_size"} <= set(manifest.model.overrides)


def test_the_oldest_runtime_really_runs_the_files(
    build: Build, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = old_onnxruntime()
    if python is None:
        pytest.skip("no Python 3.8 with onnxruntime 1.19.2 in .cache/pythons/3.8")
    place = tmp_path / "runtimes" / "onnxruntime-1.19.2" / "bin"
    place.mkdir(parents=True)
    (place / "python").write_text(f'#!/bin/sh\nexec "{python}" "$@"\n')
    (place / "python").chmod(0o755)
    for scheme in ("fp32", "fp16", "int8-dynamic", "int8-static"):
        bundle = _build_with_runtimes(build, scheme, images, tmp_path / "runtimes", monkeypatch)
        (artifact,) = bundle.manifest.artifacts
        (checked,) = artifact.checked
        assert (checked.runtime, checked.version) == ("onnxruntime", "1.19.2")
        assert checked.min_cosine >= artifact.golden.tolerance.min_cosine, scheme


def _build_with_runtimes(build: Build, scheme: str, images: Path, runtimes: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("EDGEVIT_RUNTIMES", str(runtimes))
    return build(scheme, calib_data=images)


def test_a_file_the_oldest_runtime_refuses_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgevit.errors import ExportError
    from edgevit.export.oldest import run_in_oldest

    place = tmp_path / "onnxruntime-1.19.2" / "bin"
    place.mkdir(parents=True)
    (place / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (place / "python").chmod(0o755)
    monkeypatch.setenv("EDGEVIT_RUNTIMES", str(tmp_path))
    inputs = np.zeros((1, 1, 3, 8, 8), np.float32)
    with pytest.raises(ExportError, match=r"onnxruntime 1\.19\.2, the oldest its profiles allow, refuses"):
        run_in_oldest(b"not a model", "onnx", [("onnxruntime", "1.19.2")], inputs, np.zeros((1, 10), np.float32))


def test_cache_keys_follow_edgevits_own_code() -> None:
    assert len(build_module.code_digest()) == 64
    assert Cache().root.name == "cache"
