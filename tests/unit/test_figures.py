"""Figures for papers: every plot's data with the evidence for it, and the drawing."""

from __future__ import annotations

import csv
import dataclasses
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from device_agents.wire import OperatorProfile, OperatorTime
from edgevit.cli import run_cli
from edgevit.report import figures_svg
from edgevit.report.figures import make_figures, pareto_front, write_csv
from edgevit.report.figures_svg import write_svg
from edgevit.report.page_data import Shown, page_data
from edgevit.results.stats import summarize_all
from edgevit.results.store import Store
from tests.support.judged import mixed, valid
from tests.support.runs import measurement, run


@pytest.fixture(scope="module")
def figures() -> list[figures_svg.Figure]:
    first, second = mixed()
    told = OperatorProfile("ONNX Runtime", 10, (OperatorTime("fc1", "Gemm", "CPU", 10, 9 * 10**7),))
    first = dataclasses.replace(
        first, measurements=(dataclasses.replace(first.measurements[0], profile=told), *first.measurements[1:])
    )
    runs = [first, second]
    return make_figures(page_data(Shown(summarize_all(runs, valid), runs, 2)))


def test_every_plot_has_its_data_with_run_and_digest(figures: list[figures_svg.Figure], tmp_path: Path) -> None:
    assert sorted({f.kind for f in figures}) == ["classes", "devices", "quantiles", "stacked", "time", "tradeoff"]
    assert write_csv(figures, tmp_path) == len(figures) == len(list(tmp_path.iterdir()))
    for path in tmp_path.iterdir():
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        assert rows, f"{path.name} is empty"
        for row in rows:
            assert row["run"] in ("b1-pi4", "b1-attic-pi5-with-a-long-name")
            assert len(row["artifact_sha256"]) == len(row["bundle_sha256"]) == 64


def test_a_trade_off_has_its_errors_and_its_front(figures: list[figures_svg.Figure]) -> None:
    figure = next(f for f in figures if f.name.startswith("tradeoff-p50-top1"))
    one = next(r for r in figure.rows if r["variant"] == "int8-dynamic-tflite" and r["target"] == "pi4")
    assert one["p50_ms_low"] <= one["p50_ms"] <= one["p50_ms_high"]
    assert one["top1_percent_low"] < one["top1_percent"] < one["top1_percent_high"]
    front = {r["variant"] for r in figure.rows if r["target"] == "pi4" and r["on_front"]}
    assert front == {"int8-dynamic-tflite", "fp32-tflite", "fp32-onnx"}


def test_figures_of_different_batches_share_no_front(tmp_path: Path) -> None:
    days = [run(batch=day, measurements=(measurement(p50_ms=ms),)) for day, ms in (("b1", 20.0), ("b2", 10.0))]
    drawn = make_figures(page_data(Shown(summarize_all(days, valid), days, 2)))
    figure = next(f for f in drawn if f.name.startswith("tradeoff-p50-top1"))
    assert {r["batch"]: r["on_front"] for r in figure.rows} == {"b1": 1, "b2": 1}, "the quicker day took the other's front away"
    write_svg([figure], tmp_path)
    lines = ElementTree.parse(tmp_path / f"{figure.name}.svg").iterfind(".//*[@style]")
    assert sum("stroke-dasharray" in one.attrib["style"] and "#777" in one.attrib["style"] for one in lines) == 2


def test_every_kind_is_drawn_and_says_what_it_shows(figures: list[figures_svg.Figure], tmp_path: Path) -> None:
    one_each = [dataclasses.replace(f, title=f"{f.title}, $\\frac$") for f in {f.kind: f for f in figures}.values()]
    assert write_svg(one_each, tmp_path) == len(one_each)
    for figure in one_each:
        text = (tmp_path / f"{figure.name}.svg").read_text("utf-8")
        ElementTree.fromstring(text)
        assert all(str(row[name]) in text for row in figure.rows for name in ("run", "artifact_sha256")), (
            f"{figure.name} does not say what it shows"
        )
        assert figure.title in text, "text is not text any more"
    write_svg(one_each[:1], tmp_path / "again")
    name = f"{one_each[0].name}.svg"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes(), "the same data drew another file"


def test_the_command_writes_all_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path / 'results.sqlite'}"
    monkeypatch.setenv("EDGEVIT_DB", url)
    with Store(url) as store:
        store.add_run(run(measurements=(measurement(samples=70),)))
    out = tmp_path / "out"
    assert run_cli(["report", "-o", str(tmp_path / "r.html"), "--svg", str(out), "--csv", str(out)]) == 0
    assert {p.suffix for p in out.iterdir()} == {".svg", ".csv"}
    assert "1 run, 0." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing was asked for"),
        (["--serve", "-o", "x.html"], "--serve excludes"),
        (["--batch", "b", "--all", "-o", "x.html"], "exclude each other"),
    ],
)
def test_wrong_use_is_said(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["report", *words]) == 2
    assert said in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert run_cli(["report", "--svg", str(tmp_path / "svg")]) == 2
    assert "pip install 'edgevit[figures]'" in capsys.readouterr().err


def test_pareto_front() -> None:
    assert pareto_front([(1, 1), (2, 3), (3, 2), (2, 3), (4, 4), (1, 0)]) == [0, 1, 4]
    assert pareto_front([]) == []
