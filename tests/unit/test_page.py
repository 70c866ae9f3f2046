"""The page as text: structure, escaping, nothing fetched, and the answers it gives without scripts."""

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

from device_agents.wire import Measurement, Run, Verdict
from edgevit.errors import UsageError
from edgevit.report.page import policy, render_page, write_page
from edgevit.report.page_answer import answers, cards, in_words
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


def column(data: Any, name: str) -> list[Any]:
    table = data["table"]
    if name in table["texts"]:
        told = table["texts"][name]
        return [told["values"][k] for k in told["at"]]
    found: list[Any] = table["numbers"][name]
    return found


def test_the_answers_stand_in_the_page_without_scripts() -> None:
    prose = Page(render_page([run()], valid)).prose()
    assert "pi4: ship int8-dynamic-tflite in litert 2.3.0, XNNPACK, 4 threads: p50 20.98 ms, against fp32 2.47 ×" in prose
    assert "top-1 80.77 %, file 6.30 MB" in prose


def test_every_measurement_with_its_reasons_is_in_the_data() -> None:
    data = data_of(Page(render_page(mixed(), valid)))
    assert data["table"]["count"] == 11
    told = "\n".join(column(data, "reasons") + column(data, "p90_absent"))
    for said in ("golden-mismatch: golden image 3", "the power went away three times", "20 samples, 64 are needed"):
        assert said in told, f"the page does not say {said!r}"
    assert measurement().artifact_sha256 in column(data, "artifact")
    assert set(data["spread"]) == {str(i) for i, n in enumerate(column(data, "n")) if n}, "what has no samples has no quantiles"
    first = data["spread"]["0"]["q"]
    assert len(first) == 101 and first == sorted(first) and first[50] == column(data, "p50")[0]
    assert "ondemand" in json.dumps(data["evidence"])


def test_nothing_is_fetched_and_no_handler_stands_in_an_attribute() -> None:
    text = render_page(mixed(), valid)
    page = Page(text)
    for tag, attrs in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster", "ping"):
            assert name not in attrs, f"<{tag}> would fetch {attrs[name]}"
        assert not [name for name in attrs if name.startswith("on")], f"<{tag}> has a handler"
    assert not page.all("link") and not page.all("img") and not page.all("iframe")
    style = "".join(data for where, data in page.texts if where == "style")
    assert "url(" not in style and "@import" not in style
    assert len(text) < 3_000_000


def test_scripts_run_by_their_hash_alone_and_only_a_served_page_may_ask() -> None:
    text = render_page([run()], valid)
    (told,) = [a["content"] or "" for a in Page(text).all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert told == policy(live=False)
    assert told.startswith("default-src 'none';")
    assert "connect-src" not in told
    assert "connect-src 'self';" in policy(live=True)
    allowed = re.search(r"script-src ([^;]+);", told)
    assert allowed is not None and "unsafe" not in allowed[1]
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
    assert column(data_of(page), "label")[0] == EVIL
    assert "onerror" not in {name for _, attrs in page.elements for name in attrs}


def test_an_answer_needs_a_valid_figure_that_keeps_its_accuracy() -> None:
    rows = summaries(run())
    (first,) = answers(rows)
    assert first.word == "ship" and first.best is not None and first.best.artifact == "int8-dynamic-tflite"
    (second,) = answers([dataclasses.replace(s, top1=0.5) if s is first.best else s for s in rows])
    assert second.best is not None and second.best.artifact == "int8-dynamic-onnx"
    assert any("loses 31.54 points" in reason for _, reason in second.dropped)
    (none,) = answers([dataclasses.replace(s, verdict=Verdict(1, False, ("throttled",), ())) for s in rows])
    assert (none.word, none.best) == ("none", None)
    assert "nothing to ship yet: no measurement is VALID" in in_words(cards([none])[0])


def test_what_is_missing_for_an_answer_is_named_with_the_command_that_gets_it() -> None:
    rows = summaries(run())
    (unscored,) = answers([dataclasses.replace(s, top1=None, top1_absent="no labelled images in the bundle") for s in rows])
    assert unscored.word == "missing"
    assert "accuracy was not measured: no labelled images in the bundle" in in_words(cards([unscored])[0])
    assert any("--eval DATA" in command for command in unscored.commands)
    (no_float,) = answers([s for s in rows if s.scheme != "fp32"])
    assert no_float.word == "missing" and "no float variant" in no_float.missing[0]
    assert any("--recipe fp32" in command for command in no_float.commands)


def test_figures_of_two_batches_are_never_compared() -> None:
    """Yesterday's faster int8 has no fp32 beside it: the batch with most variants answers."""
    yesterday = run(batch="b0", measurements=(measurement("int8-dynamic", "tflite", 5.0),), started_at="2025-01-14T10:00:00Z")
    (told,) = answers(summaries(yesterday, run(batch="b1")))
    assert told.best is not None and told.best.batch_id == "b1"


def test_devices_of_one_kind_with_one_answer_share_a_card() -> None:
    found = cards(answers(summaries(*(run(f"pi-{k:02d}") for k in range(12)))))
    assert [len(card["targets"]) for card in found] == [12]
    assert len(found[0]["each"]) == 12 and "the median of 12 targets" in found[0]["figures_of"]
    other = dataclasses.replace(run("zero"), facts=dataclasses.replace(run().facts, board_model="Raspberry Pi Zero 2 W"))
    assert len(cards(answers(summaries(run("a"), run("b"), other)))) == 2


def test_only_failures_make_a_page_too(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_page([run(measurements=(failed(),))], path, valid)
    assert "nothing to ship yet: no measurement is VALID" in Page(path.read_text("utf-8")).prose()
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_a_page_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        write_page([run()], tmp_path / "absent" / "page.html", valid)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="cannot be written"):
        write_page([run()], tmp_path / "folder", valid)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_the_libraries_come_with_their_licences() -> None:
    vendor = Path(__file__).resolve().parents[2] / "edgevit" / "report" / "vendor"
    for script in vendor.glob("*.js"):
        assert script.stat().st_size < 1_000_000
        assert "Permission to use, copy, modify" in (vendor / f"{script.name.split('.')[0]}.LICENSE").read_text("utf-8")
