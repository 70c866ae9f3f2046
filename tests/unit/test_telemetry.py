"""ONNX Runtime reports nothing to its maker, on the host and on devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "code",
    ["import edgevit, onnxruntime", "from device_agents.runtimes.onnx import OnnxBackend; OnnxBackend()"],
    ids=("host", "device"),
)
def test_no_identifier_of_this_machine_is_kept_for_reports(code: str, tmp_path: Path) -> None:
    # Continuous integration switches the reports off by itself, which would hide that nothing else does.
    quiet = ("CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "XDG_CACHE_HOME")
    env = {k: v for k, v in os.environ.items() if k not in quiet}
    env["HOME"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=ROOT, timeout=60)
    assert not list(tmp_path.rglob("*"))
