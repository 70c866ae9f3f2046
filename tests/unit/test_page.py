"""The page as text: structure, the answer, escaping, nothing fetched."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from device_agents.wire import Measurement, OperatorProfile, OperatorTime, Run, Verdict, Window
from edgevit.errors import UsageError
from edgevit.report.page import choose_answer, render_page, write_page
from tests.support.judged import mixed, summaries, valid
from tests.support.runs import failed, measurement, run

EVIL = "</script><img src=x onerror=alert(1)>&\"'@@DATA@@"


class Page(HTMLParser):
    """Elements with attributes, and the text by element."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]

    def prose(self) -> str:
        return " ".join(" ".join(data for where, data in self.texts if where not in ("script", "style")).split())


def data_of(page: Page) -> Any:
    (text,) = [data for where, data in page.texts if where == "script" and data.startswith("{")]
    return json.loads(text)


def test_the_answer_the_table_the_reasons_and_the_digests() -> None:
    page = Page(render_page(mixed(), valid))
    prose = page.prose()
    for said in (
        "Ship int8-dynamic-tflite in litert: p50 20.98 ms, 2.47 × fp32, 6.3 MB, top-1 80.77 % on 650 images",
        "p50 of fp32-onnx on onnxruntime 1.31.1",
        "20 samples, 64 are needed",
        "golden-mismatch: golden image 3",
        "the power went away three times",
        measurement().artifact_sha256,
        measurement().variant.bundle,
        "ondemand",
    ):
        assert said in prose, f"the page does not say {said!r}"
    assert len(page.all("section")) == 2
    charts = [a["data-chart"] for a in page.all("div") if "data-chart" in a]
    assert charts == ["latency", "accuracy", "cumulative", "conditions"] * 2
    sections = data_of(page)["sections"]
    assert [len(s["rows"]) for s in sections] == [4, 5], "what has no samples has no place in a chart"
    row = sections[0]["rows"][0]
    assert len(row["q"]) == 101
    assert row["q"] == sorted(row["q"])
    assert row["q"][50] == row["p50_ms"]
    assert [r["label"] for r in sections[0]["rows"] if r["front"]] == ["int8-dynamic-tflite", "fp32-tflite", "fp32-onnx"]


def test_nothing_is_fetched() -> None:
    text = render_page(mixed(), valid)
    page = Page(text)
    for tag, attrs in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster", "ping"):
            assert name not in attrs, f"<{tag}> would fetch {attrs[name]}"
    assert not page.all("link") and not page.all("img") and not page.all("iframe")
    style = "".join(data for where, data in page.texts if where == "style")
    assert "url(" not in style and "@import" not in style
    assert len(text) < 3_000_000


def test_scripts_run_by_their_hash_alone() -> None:
    text = render_page([run()], valid)
    page = Page(text)
    (policy,) = [a["content"] or "" for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    allowed = re.search(r"script-src ([^;]+);", policy)
    assert allowed is not None
    assert "unsafe" not in allowed[1]
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts]
    assert hashes == allowed[1].split()


def test_names_of_others_are_harmless() -> None:
    m = measurement("fp32", "onnx")
    evil = dataclasses.replace(
        m,
        model=EVIL,
        recipe=EVIL,
        bundle_name=EVIL,
        variant=dataclasses.replace(m.variant, artifact=EVIL, provider=EVIL),
        accuracy=None,
        accuracy_absent=EVIL,
    )
    broken = dataclasses.replace(failed(), model=EVIL)
    one = run(EVIL, batch="b", run_id=EVIL, measurements=(evil, broken))
    facts = dataclasses.replace(one.facts, board_model=EVIL, os_name=EVIL, hostname=EVIL, kernel=EVIL)
    hostile = dataclasses.replace(one, facts=facts, governor=EVIL, reason=EVIL)

    def judge(_run: Run, _m: Measurement) -> Verdict:
        return Verdict(1, False, (EVIL,), (EVIL,))

    plain, page = Page(render_page([run()], valid)), Page(render_page([hostile], judge))
    assert not page.all("img")
    assert len(page.all("script")) == len(plain.all("script"))
    assert EVIL in page.prose()
    assert data_of(page)["sections"][0]["rows"][0]["label"] == EVIL
    assert "onerror" not in {name for _, attrs in page.elements for name in attrs}


def test_the_answer_needs_a_valid_run_that_keeps_its_accuracy() -> None:
    rows = summaries(run())
    best = choose_answer(rows)
    assert best is not None and best.artifact == "int8-dynamic-tflite"
    worse = [dataclasses.replace(s, top1=0.5) if s is best else s for s in rows]
    second = choose_answer(worse)
    assert second is not None and second.artifact == "int8-dynamic-onnx"
    invalid = [dataclasses.replace(s, verdict=Verdict(1, False, ("throttled",), ())) for s in rows]
    assert choose_answer(invalid) is None
    unscored = [dataclasses.replace(s, top1=None) for s in rows]
    third = choose_answer(unscored)
    assert third is not None and third.artifact == "int8-dynamic-tflite"


def test_only_failures_make_a_page_too(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_page([run(measurements=(failed(),))], path, valid)
    assert "Nothing to ship yet: no measurement is VALID" in Page(path.read_text("utf-8")).prose()
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_a_page_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        write_page([run()], tmp_path / "absent" / "page.html", valid)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="cannot be written"):
        write_page([run()], tmp_path / "folder", valid)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_several_batches_tell_the_same_artifact_apart() -> None:
    later = dataclasses.replace(run(batch="b2"), started_at="2025-02-01T08:30:00Z")
    prose = Page(render_page([run(), later], valid)).prose()
    assert "fp32-onnx (2025-01-15 10:00)" in prose
    assert "fp32-onnx (2025-02-01 08:30)" in prose


def test_the_libraries_come_with_their_licences() -> None:
    vendor = Path(__file__).resolve().parents[2] / "edgevit" / "report" / "vendor"
    for script in vendor.glob("*.js"):
        assert script.stat().st_size < 1_000_000
        assert "Permission to use, copy, modify" in (vendor / f"{script.name.split('.')[0]}.LICENSE").read_text("utf-8")


def test_what_plans_found_stands_on_the_page() -> None:
    """Minutes of load as a chart and a line, a comparison in words, operators as a table, all of it escaped."""
    hot = tuple(Window(i * 1000, 1000, 100 if i < 120 else 70, 10_000_000 if i < 120 else 14_000_000, 1) for i in range(1300))
    base = measurement("fp32", "onnx", processes=1)
    told = OperatorProfile(EVIL, 10, (OperatorTime(EVIL, "Gemm", "CPU", 10, 5_000_000), OperatorTime("b", "Add", "CPU", 10, 1)))
    m = dataclasses.replace(base, series=(dataclasses.replace(base.series[0], windows=hot),), profile=told)
    other = dataclasses.replace(measurement("int8-dynamic", "onnx"), profile_absent="no-profiler: none")
    made = run(measurements=(m, other))
    plan = dataclasses.replace(made.job.plan, order="mirrored", processes=6)
    page = Page(render_page([dataclasses.replace(made, job=dataclasses.replace(made.job, plan=plan))], valid))
    (section,) = data_of(page)["sections"]
    points = [len(row["load"]) for row in section["rows"]]
    assert sorted(points) == [0, 434], "at most 600 points, evenly taken"
    assert [row["knee_s"] for row in section["rows"] if row["load"]] == [120.0]
    assert "load" in [a.get("data-chart") for a in page.all("div")]
    text = page.prose()
    assert "retention 71.4 %: 100.0 inferences/s at first, 70.0 after 120 s" in text
    assert "no ratio: 0 blocks are left" in text and "no operator times: no-profiler" in text
    assert "by kind: Gemm 100.0 %, Add 0.0 %; profiling slows" in text
    assert "ms each inference" in text and "0.500" in text and not page.all("img")
