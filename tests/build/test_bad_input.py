"""A fine-tuned checkpoint with seven classes of its own, through the commands from the file to labels on a device; and what the
commands refuse to build."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from device_agents import wire
from edgevit.cli import run_cli
from tests.build.conftest import Build, old_onnxruntime
from tests.support.agent_bundle import AgentProcess, Signer, TinyBundle, make_job

MODEL = "vit_tiny_patch16_224"
NAMES = ["robin", "wren", "crow", "jay", "tit", "owl", "kite"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """As a training script leaves it: epoch, optimizer, and a state_dict with the prefix of DataParallel."""
    from edgevit.torchsetup import import_timm, import_torch

    timm, torch = import_timm(), import_torch()
    torch.manual_seed(1)
    module = timm.create_model(MODEL, num_classes=len(NAMES), img_size=64, depth=2)
    for p in module.parameters():
        if p.ndim >= 2:
            torch.nn.init.normal_(p, 0, 1.5 / p[0].numel() ** 0.5)
    path = tmp_path / "birds.pth.tar"
    state = {f"module.{name}": value for name, value in module.state_dict().items()}
    torch.save({"epoch": 9, "optimizer": {"lr": 0.1}, "state_dict": state}, path)
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    return path


def reference(checkpoint: Path, image: Path) -> int:
    """The class that timm itself gives the image."""
    from edgevit.torchsetup import import_timm, import_torch

    timm, torch = import_timm(), import_torch()
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    module = timm.create_model(MODEL, num_classes=len(NAMES), img_size=64, depth=2).eval()
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    module.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    config = resolve_data_config({"input_size": (3, 64, 64)}, model=module)
    with torch.no_grad(), Image.open(image) as opened:
        return int(module(create_transform(**config)(opened.convert("RGB"))[None]).argmax())


def test_seven_classes_from_the_checkpoint_to_labels_on_the_device(
    checkpoint: Path, images: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "birds.csv"
    pictures = sorted(images.rglob("*.png"))[:20]
    table.write_text("path,label\n" + "".join(f"{p},{NAMES[i % 7]}\n" for i, p in enumerate(pictures)))
    out = tmp_path / "out"
    said_by_hand = ["--weights", str(checkpoint), "--labels", str(tmp_path / "names.txt"), "--model-arg", "depth=2"]
    made = ["--recipe", "fp32", "--format", "onnx", "--profile", "generic-x86-64", "--eval", str(table), "-o", str(out)]
    assert run_cli(["build", MODEL, *said_by_hand, *made]) == 0
    capsys.readouterr()

    assert run_cli(["bench", str(out), "local", "--plan", "quick", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["failure"] == "" and row["p50_ms"] > 0 and row["images"] == 20
    expected = [reference(checkpoint, p) for p in pictures]
    right = sum(NAMES[e] == NAMES[i % 7] for i, e in enumerate(expected))
    assert row["correct"] == right, "the device counts other images as right than timm does"

    assert run_cli(["predict", str(out), "local", *map(str, pictures), "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["images"]
    assert [a["top5"][0]["label"] for a in answers] == [NAMES[e] for e in expected]
    assert run_cli(["predict", str(out), "local", str(pictures[0])]) == 0
    assert f"%  {NAMES[expected[0]]}" in capsys.readouterr().out.splitlines()[1]


def test_a_checkpoint_of_another_depth_names_what_is_missing(
    checkpoint: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ["--recipe", "fp32", "--profile", "generic-x86-64", "-o", str(tmp_path / "out")]
    assert run_cli(["build", MODEL, "--weights", str(checkpoint), *made]) == 2
    err = capsys.readouterr().err
    assert "152 tensors expected, 32 in the file): 120 missing: blocks.2.norm1.weight" in err and "--model-arg K=V" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("version", ["1.19.2", "newest"])
def test_right_int8_files_pass_the_golden_check_and_wrong_ones_do_not(
    version: str, build: Build, images: Path, key: Path, tmp_path: Path
) -> None:
    """Integer kernels differ from one release to the next: the tolerance must let that through, and no fault."""
    old = old_onnxruntime()
    if version == "1.19.2" and old is None:
        pytest.skip("no Python 3.8 with onnxruntime 1.19.2 in .cache/pythons/3.8: python scripts/pythons.py")
    agent = AgentProcess(tmp_path / "root", str(old) if version == "1.19.2" else sys.executable).upload()
    agent.allow(Signer(key))
    for scheme in ("int8-dynamic", "int8-static"):
        made = build(scheme, calib_data=images)
        blobs = {b.sha256: made.blob_path(b.sha256).read_bytes() for b in made.manifest.blobs()}
        p = made.manifest.preprocessing
        fault = dataclasses.replace(p, mean=p.mean[::-1], std=p.std[::-1])
        for name, manifest, failure in (
            ("right", made.manifest, None),
            (
                "swapped",
                dataclasses.replace(made.manifest, preprocessing=fault, version=made.manifest.version + 1),
                "golden-mismatch",
            ),
        ):
            data = wire.dumps(manifest)
            bundle = TinyBundle(manifest, data, Signer(key).sign(data), blobs)
            agent.install(bundle)
            run_id = f"{scheme}-{name}"
            agent.call("submit", stdin=wire.encode(make_job(bundle, run_id, bundle.variant(manifest.artifacts[0].name))))
            (m,) = agent.follow(run_id).measurements
            assert (m.failure.code if m.failure else None) == failure, f"{run_id} on onnxruntime {version}: {m.failure}"
