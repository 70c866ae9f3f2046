"""The table: within 100 columns, every empty cell explained, order and JSON rows."""

from __future__ import annotations

import dataclasses
import io
import json
import re

from rich.console import Console

from device_agents.wire import Verdict
from edgevit.report.table import json_rows, render_table
from edgevit.results.summary import Summary
from tests.support.judged import mixed, summaries
from tests.support.runs import run


def shown(rows: list[Summary], width: int = 100, wide: bool = False) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(render_table(rows, wide))
    return stream.getvalue()


def test_it_fits_100_columns_and_80_without_losing_a_column() -> None:
    for width in (100, 80):
        text = shown(summaries(*mixed()), width)
        assert max(len(line) for line in text.splitlines()) <= width
        for word in (
            "target",
            "artifact",
            "runtime",
            "p50",
            "p90",
            "fp32",
            "peak",
            "file",
            "top-1",
            "verdict",
            "VALID",
            "failed",
        ):
            assert word in text, f"{word} is cut away at {width} columns"


def test_it_fits_with_the_worst_names_and_figures() -> None:
    rows = summaries(
        run(),
        target="t" * 120,
        artifact="a" * 120,
        model="m" * 200,
        p50_ms=123456.789,
        p90_ms=223456.789,
        peak_mb=12345.6,
        verdict=Verdict(1, False, ("throttled " * 60,), ()),
    )
    text = shown(rows)
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "".join(text.split()).count("a" * 11) >= 4, "folded, not cut"
    assert "INVALID¹" in text


def test_shipped_names_stay_on_one_line_at_100_columns() -> None:
    lines = shown(summaries(run())).splitlines()
    row = next(line for line in lines if "int8-dynamic-tflite" in line)
    assert re.search(r"pi4 +int8-dynamic-tflite +litert +2\d\.\d\d +2\d\.\d\d +2\.\d\d +92\.5 +6\.3 +80\.77±1\.5 +VALID", row)


def test_every_dash_has_its_reason() -> None:
    text = shown(summaries(*mixed()))
    for line in text.splitlines():
        if "–" in line and "failed" not in line:
            assert not re.search(r"–(?![¹²³⁴⁵⁶⁷⁸⁹])", line), f"a dash without a footnote: {line}"
    for reason in (
        "20 samples, 64 are needed",
        "no labelled images in the bundle",
        "golden-mismatch: golden image 3",
        "not measured: the run is interrupted, the power went away three times",
        "p50 of fp32-onnx on onnxruntime 1.31.1",
        "on 650 images",
    ):
        assert reason in text.replace("\n", " ")


def test_fastest_first_invalid_after_valid_failed_last() -> None:
    rows = summaries(run())
    fastest = min(rows, key=lambda s: s.p50_ms or 0)
    rows = [dataclasses.replace(s, verdict=Verdict(1, False, ("throttled",), ())) if s is fastest else s for s in rows]
    names = [row["artifact"] for row in json_rows(rows)]
    assert names == ["int8-dynamic-onnx", "fp32-tflite", "fp32-onnx", "int8-dynamic-tflite"]
    assert "INVALID: throttled" in shown(rows)


def test_warnings_are_shown_and_still_valid() -> None:
    rows = summaries(run(), verdict=Verdict(1, True, (), ("standard deviation is 12 % of the mean", "others were busy")))
    text = shown(rows)
    assert "VALID¹,²" in text
    assert "² warning: others were busy" in text
    assert "¹ warning: standard deviation is 12 % of the mean" in text


def test_names_are_text_not_markup() -> None:
    assert "[red]x[/red]" in shown(summaries(run(), artifact="[red]x[/red]"))


def test_wide_has_the_rest_and_json_has_all() -> None:
    rows = summaries(*mixed())
    text = shown(rows, 300, wide=True)
    for word in ("p99", "p90 es", "init", "first", "agrees", "provider", "XNNPACK", "°C"):
        assert word in text
    plain = json.loads(json.dumps(json_rows(rows)))
    assert len(plain) == len(rows)
    assert {"p50_ms", "p90_early_stopping_ms", "top1_absent", "process_p50_ms", "agreement"} <= set(plain[0])
    assert "predictions" not in plain[0]
    assert plain[0]["verdict"]["word"] == "VALID"


def test_nothing_measured_is_said() -> None:
    assert shown([]) == "no measurements\n"
