"""Whole studies of a small real model through the command: what fails, what cannot apply, what is done twice, and a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgevit.cache import Cache
from edgevit.cli import run_cli
from edgevit.results.store import open_store
from tests.support.local import installed_locally
from tests.support.processes import is_alive
from tests.support.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]

STUDY = """\
schema: edgevit.study/1
name: small
summary: for a test
models:
  - name: tests.support.models:tiny_vit
    title: tiny
    random_weights: true
    eval: {images}
recipes:
  - fp32
  - int8-dynamic
  - int8-static
  - name: broken
    steps:
      - merge_tokens: {{merge: {{'0': 99}}}}
      - quantize: {{scheme: fp32}}
plan: quick
"""

BROKEN = STUDY[STUDY.index("  - name: broken") : STUDY.index("plan: quick")]


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, dict[str, Any], str]:
    """One study: its exit code, its JSON, and what it said to people."""
    capsys.readouterr()
    code = run_cli(["study", *map(str, argv), "--json", "--jobs", "1"])
    said = capsys.readouterr()
    return code, json.loads(said.out), said.err


def counted() -> tuple[int, int]:
    """(entries of the cache, runs in the store): what grows when something is built or measured."""
    with open_store() as store:
        return len(list((Cache().root / "entries").iterdir())), len(store.runs())


def without_doubt(rows: list[dict[str, Any]]) -> bool:
    """Whether every measurement is VALID: another program at work on this machine makes one INVALID, and it is taken again."""
    return all(r["valid"] for r in rows if r["state"] == "measured")


def test_a_study_from_nothing_to_nothing_left_to_do(
    home: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(STUDY.format(images=images))
    code, first, said = run(capsys, path)
    rows = {r["recipe"]: r for r in first["rows"]}

    # Static int8 has no calibration images: told before anything was built, and no failure.
    assert rows["int8-static"]["state"] == "n/a" and "needs unlabelled images" in rows["int8-static"]["reason"]
    assert said.index("n/a: tiny int8-static onnx") < said.index("building 3 cells")
    # More tokens than there are cannot merge: the cell keeps its error, the others finish, and the code says so.
    assert rows["broken"]["state"] == "failed" and "99" in rows["broken"]["reason"] and code == 1
    for name in ("fp32", "int8-dynamic"):
        assert rows[name]["state"] == "measured" and rows[name]["p50_ms"] > 0 and rows[name]["images"] == 24
        assert rows[name]["parameters"] > 0 and rows[name]["macs"] > 0
    assert rows["fp32"]["difference"] == 0 and rows["fp32"]["agreement"] == 1
    assert rows["int8-dynamic"]["file_mb"] < rows["fp32"]["file_mb"] and rows["int8-dynamic"]["agreement"] > 0.5
    assert sorted(first["built"]) == ["tiny fp32 onnx", "tiny int8-dynamic onnx"] and os.getpid() not in first["processes"]
    assert installed_locally() == [], "bundles that are kept nowhere else are left on the target"

    # Unchanged but for the cell that can never be: nothing is built, nothing is measured.
    path.write_text(path.read_text().replace(BROKEN.format(), ""))
    before = counted()
    code, second, said = run(capsys, path)
    assert code == 0 and second["built"] == [] and sorted(second["reused"]) == sorted(first["built"])
    if without_doubt(first["rows"]):
        assert second["measured"] == {} and counted() == before and "measure" not in said
        figures = [(r["recipe"], r["p50_ms"], r["run"]) for r in second["rows"] if r["state"] == "measured"]
        assert figures == [(n, rows[n]["p50_ms"], rows[n]["run"]) for n in ("fp32", "int8-dynamic")]

    # One recipe more: it alone is built, and it is measured beside fp32.
    path.write_text(path.read_text().replace("  - int8-static\n", "  - fp16\n"))
    code, third, _ = run(capsys, path, "-o", tmp_path / "kept", "--markdown", tmp_path / "t.md", "--csv", tmp_path / "t.csv")
    assert code == 0 and third["built"] == ["tiny fp16 onnx"]
    assert {"tiny fp32 onnx", "tiny fp16 onnx"} <= set(third["measured"]["local"])
    if without_doubt(first["rows"]):
        assert "tiny int8-dynamic onnx" not in third["measured"]["local"]
    assert run_cli(["verify", str(tmp_path / "kept" / "tiny" / "fp16-onnx")]) == 0
    assert len(installed_locally()) >= 2, "-o keeps on the target what was sent to it"
    assert "| fp16 |" in (tmp_path / "t.md").read_text() and "fp16" in (tmp_path / "t.csv").read_text()

    # --again measures all of it once more and builds none of it.
    code, fourth, _ = run(capsys, path, "--again")
    assert fourth["built"] == [] and len(fourth["measured"]["local"]) == 3


def test_a_killed_study_goes_on_where_it_stood(
    home: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(STUDY.format(images=images).replace(BROKEN.format(), "").replace("int8-static", "fp16"))
    argv = [sys.executable, "-m", "edgevit", "study", str(path), "--json", "--jobs", "1"]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    seen = ""
    while "1 / 3 cells" not in seen and "int8-dynamic onnx: exporting" not in seen:
        line = process.stderr.readline()
        assert line, f"it ended by itself: {seen}"
        seen += line
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert workers
    wait_for(lambda: not any(is_alive(pid) for pid in workers), "the end of workers without their parent")

    code, after, _ = run(capsys, path)
    assert code == 0 and [r["state"] for r in after["rows"]] == ["measured"] * 3
    assert "tiny fp32 onnx" in after["reused"], "what was built before the kill is built again"
    assert set(after["built"]) | set(after["reused"]) == {f"tiny {r} onnx" for r in ("fp32", "int8-dynamic", "fp16")}


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(p) for p in found]


def test_a_model_that_cannot_be_loaded_fails_all_of_its_cells_and_no_other(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(
        "schema: edgevit.study/1\nname: two\nsummary: for a test\ntargets: []\nprofiles: [generic-x86-64]\nmodels:\n"
        "  - {name: 'tests.support.models:raises', random_weights: true}\n"
        "  - {name: 'tests.support.models:no_linear', title: plain, random_weights: true}\n"
        "recipes: [fp32, int8-dynamic]\n"
    )
    code, got, _ = run(capsys, path)
    states = {(r["model"], r["recipe"]): (r["state"], r["reason"]) for r in got["rows"]}
    assert code == 1 and got["measured"] == {}
    assert states["plain", "fp32"] == ("built", "")
    assert states["plain", "int8-dynamic"][0] in ("failed", "n/a") and "no layer" in states["plain", "int8-dynamic"][1]
    for recipe in ("fp32", "int8-dynamic"):
        state, reason = states["tests.support.models:raises", recipe]
        assert state == "failed" and "the moon is full" in reason

    # A target that nobody answers for: what was built is kept and shown, and the code says that a device was not reached.
    fleet = home / "config" / "fleet.yaml"
    fleet.parent.mkdir(parents=True, exist_ok=True)
    fleet.write_text(
        "schema: edgevit.fleet/1\ntargets:\n  ghost: {host: 127.0.0.1, port: 9, user: nobody, profile: generic-x86-64}\n"
    )
    fleet.chmod(0o600)
    path.write_text(path.read_text().replace("  - {name: 'tests.support.models:raises', random_weights: true}\n", ""))
    code, got, said = run(capsys, path, "--target", "ghost")
    (row,) = [r for r in got["rows"] if r["recipe"] == "fp32"]
    assert code == 3 and got["reused"] == ["plain fp32 onnx"] and "ghost" in said
    assert (row["state"], row["target"], row["reason"]) == ("built", "ghost", "the target failed or was not reached")
