"""Bad input before anything is built or shipped, through the command line: exit code 2, what was got and expected, what to type
next, and nothing left behind."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from edgevit.cli import run_cli
from tests.support.agent_bundle import make_bundle, make_signer

ROOT = Path(__file__).resolve().parents[2]
MODEL = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints: seven.pth.tar fits MODEL with depth 2 at 64 pixels, the others are wrong in one way each."""
    from edgevit.torchsetup import import_timm, import_torch

    timm, torch = import_timm(), import_torch()
    from safetensors.torch import save_file

    place = tmp_path_factory.mktemp("weights")
    torch.manual_seed(1)
    module = timm.create_model(MODEL, num_classes=7, img_size=64, depth=2)
    torch.save({"state_dict": module.state_dict()}, place / "seven.pth.tar")
    save_file(module.state_dict(), place / "seven.safetensors")
    for name in ("seven.pth.tar", "seven.safetensors"):
        data = (place / name).read_bytes()
        (place / f"cut-{name}").write_bytes(data[: len(data) // 2])
    (place / "page.pth").write_text("<!doctype html><html>404</html>")
    (place / "empty.pth").write_bytes(b"")
    torch.save({"layer.weight": torch.zeros(3, 3)}, place / "foreign.pth")
    torch.save([1, 2], place / "list.pth")
    (place / "six.txt").write_text("\n".join("abcdef"))
    (place / "seven.txt").write_text("robin\nwren\ncrow\njay\ntit\nowl\nkite\n")
    return place


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data sets, each wrong in one way."""
    from PIL import Image

    place = tmp_path_factory.mktemp("data")
    (place / "folder").mkdir()
    Image.new("RGB", (80, 80), (9, 99, 200)).save(place / "a.png")
    (place / "cut.png").write_bytes((place / "a.png").read_bytes()[:60])
    for name, text in {
        "nothing": "",
        "header": "path,label\n",
        "range": "path,label\na.png,7\n",
        "name": "path,label\na.png,wern\n",
        "half": "path,label\na.png,1\na.png,\n",
        "gone": "path,label\nnone.png,1\n",
        "cut": "path,label\na.png,1\ncut.png,2\n",
    }.items():
        (place / f"{name}.csv").write_text(text)
    return place


def build(tmp_path: Path, *argv: object) -> int:
    options = ["--recipe", "fp32", "--profile", "generic-x86-64", "--format", "onnx", "-o", str(tmp_path / "out")]
    return run_cli(["build", *map(str, argv), *options])


def check(capsys: pytest.CaptureFixture[str], code: int, message: str, hint: str = "") -> None:
    err = capsys.readouterr().err
    assert code == 2 and re.search(message, err), err
    assert re.search(r"^next: .*" + hint, err, re.MULTILINE) or not hint, err


@pytest.mark.parametrize(
    ("argv", "message", "hint"),
    [
        (["cut-seven.pth.tar"], r"cut-seven.pth.tar \([\d,]+ bytes\) is truncated or not", "download or copy the file again"),
        (["cut-seven.safetensors"], r"\([\d,]+ bytes\) is truncated or not a safetensors", "download or copy the file again"),
        (["page.pth"], "page.pth is a web page, expected weights", "download the file itself"),
        (["empty.pth"], "empty.pth is empty", ""),
        (["none.pth"], "no weights at .*none.pth", "ls "),
        (["list.pth"], "holds list, expected tensors by name", ""),
        (
            ["foreign.pth"],
            r"does not fit vit_tiny_patch16_224 .*missing: cls_token.*unexpected: layer.weight",
            "--model-arg K=V",
        ),
        (["seven.pth.tar", "--labels", "six.txt"], "six.txt names 6 classes, vit_tiny_patch16_224 has 7", ""),
        (["seven.pth.tar", "--labels", "none.txt"], "none.txt cannot be read: No such file", "ls "),
        (["seven.pth.tar", "--num-classes", "8"], "8.*7|7.*8", ""),
    ],
)
def test_wrong_weights(
    argv: list[str], message: str, hint: str, weights: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [str(weights / a) if a.endswith((".pth", ".tar", ".safetensors", ".txt")) else a for a in argv]
    check(capsys, build(tmp_path, MODEL, "--model-arg", "depth=2", "--weights", *named), message, hint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "message", "hint"),
    [
        (["--eval", "none"], "no image folder, CSV or parquet file at", "ls "),
        (["--eval", "folder"], "folder holds no image", "path,label"),
        (["--calib", "folder"], "folder holds no image", "path,label"),
        (["--eval", "nothing.csv"], "nothing.csv:1: got columns none, expected path,label", ""),
        (["--eval", "header.csv"], "header.csv holds no image", ""),
        (["--eval", "range.csv"], "range.csv:2: a.png: got label 7, expected 0 to 6, the 7 classes", ""),
        (["--eval", "name.csv"], "name.csv:2: a.png and the rest: got 1 class names such as 'wern', .* has 7", "--labels FILE"),
        (["--eval", "name.csv", "--labels"], "name.csv:2: a.png: no class named 'wern'; did you mean 'wren'", "--labels FILE"),
        (["--eval", "half.csv"], "half.csv:3", ""),
        (["--eval", "gone.csv"], "gone.csv:2", ""),
        (["--eval", "cut.csv"], "cut.csv:3: cut.png: the image is damaged or unreadable", ""),
        (["--calib", "cut.csv"], "cut.csv:3: cut.png: the image is damaged or unreadable", ""),
    ],
)
def test_wrong_data(
    argv: list[str],
    message: str,
    hint: str,
    weights: Path,
    data: Path,
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    named = [argv[0], str(data / argv[1]), *argv[2:], *([str(weights / "seven.txt")] if "--labels" in argv else [])]
    code = build(tmp_path, MODEL, "--model-arg", "depth=2", "--weights", weights / "seven.pth.tar", *named)
    check(capsys, code, message, hint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "message", "hint"),
    [
        (["vit_tiny_patch16_242"], "no timm model named .* did you mean vit_tiny_patch16_224", "package.module:factory"),
        ([MODEL, "--profile", "raspbery-pi-5"], "did you mean raspberry-pi-5", "edgevit profiles"),
        ([MODEL, "--recipe", "int8-statc"], "did you mean int8-static", "edgevit recipes"),
        ([MODEL, "--for", "lcoal"], "no target named 'lcoal'; did you mean local", "edgevit target list"),
    ],
)
def test_unknown_names_offer_the_nearest(
    argv: list[str], message: str, hint: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(capsys, build(tmp_path, "--random-weights", *argv), message, hint)


@pytest.mark.parametrize(("target", "code"), [("nosuch", 2), ("ghost", 3)])
def test_the_demo_trains_nothing_for_a_target_that_is_not_there(target: str, code: int, home: Path) -> None:
    write_ghost(home)
    assert run_cli(["demo", "--target", target]) == code
    assert not (home / "data" / "demo").exists()


@pytest.mark.parametrize("more", [[], ["--variants"]])
def test_json_of_a_measurement_names_the_targets_that_gave_none(
    more: list[str], home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_ghost(home)
    bundle = make_bundle(make_signer(tmp_path)).write(tmp_path / "bundle")
    assert run_cli(["bench", str(bundle), "ghost", "--json", *more]) == 3
    told = json.loads(capsys.readouterr().out)
    assert told["schema"] == "edgevit.results/1" and told["rows"] == []
    (failed,) = told["failed"]
    assert failed["target"] == "ghost" and failed["error"]["kind"] == "Unreachable" and "port 9" in failed["error"]["message"]


def write_ghost(home: Path) -> None:
    """A fleet of one target that nobody answers for."""
    (home / "config").mkdir(parents=True, exist_ok=True)
    fleet = home / "config" / "fleet.yaml"
    fleet.write_text("schema: edgevit.fleet/1\ntargets:\n  ghost: {host: 127.0.0.1, port: 9, user: nobody}\n")
    fleet.chmod(0o600)


# ---- what is not installed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "argv", "extra"),
    [
        ("torch", ["build", MODEL, "--random-weights"], "build"),
        ("timm", ["build", MODEL, "--random-weights"], "build"),
        ("onnx", ["build", MODEL, "--random-weights", "--format", "onnx"], "build"),
        ("onnxscript", ["build", MODEL, "--random-weights", "--format", "onnx"], "build"),
        ("onnxruntime", ["build", MODEL, "--random-weights", "--format", "onnx"], "build"),
        ("litert_torch", ["build", MODEL, "--random-weights", "--format", "tflite"], "tflite"),
        ("ai_edge_litert", ["build", MODEL, "--random-weights", "--format", "tflite"], "tflite"),
        ("sklearn", ["demo"], "build"),
        ("numpy", ["predict"], "runtime"),
        ("PIL", ["predict"], "runtime"),
    ],
)
def test_a_missing_extra_prints_its_install_line(module: str, argv: list[str], extra: str, tmp_path: Path, home: Path) -> None:
    if argv[0] == "build":
        argv = [*argv, "--recipe", "fp32", "--profile", "generic-x86-64", "-o", str(tmp_path / "out")]
    elif argv[0] == "predict":
        bundle = make_bundle(make_signer(tmp_path)).write(tmp_path / "bundle")
        argv = ["predict", str(bundle), "local", str(tmp_path / "image.png")]
    code = f"import sys\nsys.modules[{module!r}] = None\nfrom edgevit.cli import run_cli\nsys.exit(run_cli({argv!r}))\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert done.returncode == 2, done.stderr
    assert f"it comes with the extra '{extra}'" in done.stderr and f"pip install 'edgevit[{extra}]'" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def _named_extras() -> list[tuple[str, str, str]]:
    """(where, package, extra) of every MissingExtra in the package whose extra is written out."""
    found: list[tuple[str, str, str]] = []
    for path in sorted((ROOT / "edgevit").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "MissingExtra":
                package: Any = node.args[0].values[-1] if isinstance(node.args[0], ast.BoolOp) else node.args[0]
                if isinstance(package, ast.Constant) and isinstance(node.args[1], ast.Constant):
                    name = str(package.value).split(" ")[0]
                    found.append((f"{path.name}:{node.lineno}", name, str(node.args[1].value)))
    return found


def test_the_extra_that_is_named_really_brings_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = _named_extras()
    assert len(names) > 10
    for where, package, extra in names:
        brought = {re.split(r"[<>=\[]", requirement)[0] for requirement in extras[extra]}
        assert package in brought, f"{where} promises that edgevit[{extra}] brings {package}; it brings {sorted(brought)}"
