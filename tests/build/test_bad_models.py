"""Models that cannot become files: each is refused with what it does, and where, through the command itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgevit.cli import run_cli
from edgevit.errors import ExportError
from edgevit.export.readback import read_onnx
from edgevit.export.trouble import explain_failure
from edgevit.quantspec import QuantSpec
from tests.build.conftest import Build


def refused(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    argv = [
        "build",
        f"tests.support.models:{model}",
        "--random-weights",
        "--profile",
        "generic-x86-64",
        "-o",
        str(tmp_path / "b"),
    ]
    code = run_cli([*argv, "--recipe", "fp32", "--format", "onnx", *more])
    assert not (tmp_path / "b").exists()
    return code, " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("model", "got"),
    [
        ("returns_tuple_module", "returned tuple of 0: torch.float32 of shape (), 1:"),
        ("returns_dict_module", "returned dict of logits: torch.float32 of shape (1, 10), aux: NoneType"),
        ("returns_tokens_module", "returned torch.float32 of shape (1, 17, 48)"),
    ],
)
def test_an_output_that_is_not_logits(
    model: str, got: str, build_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = refused(model, tmp_path, capsys)
    assert code == 2 and got in said and "expected a (1, classes) float tensor" in said


def test_control_flow_that_hangs_on_the_image(build_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = refused("decides_by_values", tmp_path, capsys)
    assert code == 1 and "decides by the values of the image at models.py:" in said and "`if x.mean() > 0:`" in said
    assert "expected torch.where" in said


def test_an_operator_the_format_does_not_have(build_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = refused("unknown_operator", tmp_path, capsys)
    assert code == 1 and "ONNX opset 18 has no operator for aten.linalg_qr" in said


def test_a_file_of_a_newer_opset_than_the_profile_allows(build: Build) -> None:
    bundle = build("fp32")
    (artifact,) = bundle.manifest.artifacts
    data = bundle.blob_path(artifact.blob.sha256).read_bytes()
    with pytest.raises(ExportError, match=r"has IR 10 and opset 18, its profiles allow IR ≤ 10 and opset ≤ 17"):
        read_onnx(data, data, QuantSpec("fp32"), (10, 17))


def test_the_innermost_reason_is_told() -> None:
    try:
        try:
            raise ValueError("the lower floor burns")
        except ValueError as e:
            raise RuntimeError("step 3/3 failed\n- file an issue") from e
    except RuntimeError as e:
        assert explain_failure(e, "TFLite") == "ValueError: the lower floor burns"
