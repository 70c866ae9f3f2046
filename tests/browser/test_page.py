"""The page in a real browser: every chart is drawn, what a person chooses takes effect, nothing on the console."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from device_agents.wire import OperatorProfile, OperatorTime, Window
from edgevit.report.page import write_page
from edgevit.report.page_load import Source
from edgevit.report.page_serve import PageServer
from edgevit.results.store import Batch, Store
from tests.support.browser import Browser
from tests.support.judged import mixed, valid
from tests.support.runs import failed, measurement, run, sha

EVIL = "</script><img src=x onerror=document.title='broken'>"
CHARTS = ["tradeoff", "latency", "cumulative", "time", "operators", "classes", "fleet"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two targets, a failure, operators and everything else that has a chart."""
    first, second = mixed()
    told = OperatorProfile(
        "ONNX Runtime", 10, (OperatorTime("fc1", "Gemm", "CPU", 10, 9 * 10**7), OperatorTime("n", "Add", "CPU", 10, 10**7))
    )
    profiled = (dataclasses.replace(first.measurements[0], profile=told), *first.measurements[1:])
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page([dataclasses.replace(first, measurements=profiled), second], path, valid)
    return path.as_uri()


def rows(browser: Browser) -> list[str]:
    found: list[str] = browser.js(
        "[...document.querySelectorAll('#table tr[data-row] td.name button')].map((b) => b.textContent)"
    )
    return found


def pick(browser: Browser, label: str, value: str) -> None:
    browser.js(
        f"(() => {{ const s = document.querySelector('select[aria-label=\"{label}\"]'); s.value = {value!r};"
        " s.dispatchEvent(new Event('change')); })()"
    )  # fmt: skip


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, True)])
def test_every_chart_is_drawn_within_the_window_and_the_console_is_silent(
    browser: Browser, page: str, width: int, dark: bool
) -> None:
    browser.said.clear()
    browser.show(page, width, 900, dark)
    browser.draw_all()
    drawn = browser.js(
        "[...document.querySelectorAll('.plot')].filter((p) => p.querySelector('svg')).map((p) => p.dataset.chart)"
    )
    assert drawn == CHARTS
    paper = browser.js("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) < 384) is dark
    assert browser.js("document.documentElement.scrollWidth") <= width, "the body scrolls sideways"
    widest = browser.js("Math.max(...[...document.querySelectorAll('.plot svg')].map((s) => s.getBoundingClientRect().right))")
    assert widest <= width
    assert browser.said == []


def test_filters_sorting_and_axes_take_effect(browser: Browser, page: str) -> None:
    browser.said.clear()
    browser.show(page)
    everything = browser.js("document.getElementById('count').textContent")
    assert everything == "11 measurements"
    assert len(rows(browser)) == 11
    pick(browser, "target", "pi4")
    assert browser.js("document.getElementById('count').textContent") == "4 of 11 measurements"
    pick(browser, "scheme", "fp32")
    assert sorted(rows(browser)) == ["fp32-onnx", "fp32-tflite"]
    pick(browser, "scheme", "")
    pick(browser, "target", "")
    pick(browser, "verdict", "failed")
    assert sorted(rows(browser)) == ["fp16-onnx", "int8-static-onnx"]
    assert "golden-mismatch" in browser.js("document.getElementById('verdicts').textContent")
    pick(browser, "verdict", "")
    browser.js(
        "(() => { const t = document.querySelector('input[type=search]'); t.value = 'attic STATIC';"
        " t.dispatchEvent(new Event('input')); })()"
    )
    browser.wait("document.getElementById('count').textContent === '2 of 11 measurements'")
    browser.js("[...document.querySelectorAll('#filters button')].at(-1).click()")
    assert len(rows(browser)) == 11

    browser.js("document.querySelector('[data-sort=p50]').click()")
    shown = browser.js(
        "[...document.querySelectorAll('#table tr[data-row] td:nth-child(3)')].map((c) => parseFloat(c.textContent))"
    )
    known = [v for v in shown if v is not None]
    assert known == sorted(known)
    assert shown[-2:] == [None, None], "what was not timed comes last"
    browser.js("document.querySelector('[data-sort=p50]').click()")
    assert browser.js("document.querySelector('[data-sort=p50]').parentElement.ariaSort") == "descending"
    shown = browser.js(
        "[...document.querySelectorAll('#table tr[data-row] td:nth-child(3)')].map((c) => parseFloat(c.textContent))"
    )
    assert shown[0] == max(known) and shown[-2:] == [None, None]

    browser.js("document.querySelector('#table button.open').click()")
    assert "artifact sha256" in browser.js("document.querySelector('#table tr.more').textContent")
    pick(browser, "across", "file")
    pick(browser, "up", "p50")
    browser.draw_all()
    axes = browser.js("document.querySelector('[data-chart=tradeoff]').textContent")
    assert "file size (MB)" in axes and "p50 latency (ms)" in axes and "Down and left is better" in axes
    assert browser.said == []


def test_a_hostile_name_runs_nothing(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_page([run(EVIL, measurements=(measurement(model=EVIL, recipe=EVIL), failed(model=EVIL)))], path, valid)
    browser.said.clear()
    browser.show(path.as_uri())
    browser.draw_all()
    assert browser.said == []
    assert browser.js("document.querySelectorAll('img').length") == 0
    assert browser.js("document.title").startswith("</script>")


def test_the_policy_holds_the_page_back_from_any_network(browser: Browser, page: str) -> None:
    browser.said.clear()
    browser.show(page)
    refused = browser.js("fetch('http://127.0.0.1:9/').then(() => 'fetched', (e) => e.message)")
    assert refused != "fetched"
    assert any("Content Security Policy" in told for told in browser.said), "it was refused, but not by the policy"
    browser.said.clear()


def test_minutes_of_load_are_drawn(browser: Browser, tmp_path: Path) -> None:
    windows = tuple(
        Window(i * 1000, 1000, 100 if i < 120 else 70, 10**7 if i < 120 else 14 * 10**6, 2 * 10**7) for i in range(300)
    )
    base = measurement(processes=1)
    hot = dataclasses.replace(base, series=(dataclasses.replace(base.series[0], windows=windows),))
    path = tmp_path / "page.html"
    write_page([run(measurements=(hot,))], path, valid)
    browser.said.clear()
    browser.show(path.as_uri())
    browser.draw_all()
    told = browser.js("document.getElementById('time').textContent")
    for said in ("retention 71.4 %", "latency (ms)", "temperature (°C)", "CPU clock (MHz)", "median of each second"):
        assert said in told, f"the section does not say {said!r}"
    assert browser.said == []


def test_a_served_page_shows_what_comes_and_keeps_what_was_chosen(browser: Browser, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'results.sqlite'}"
    with Store(url) as writing:
        writing.add_batch(Batch("b1", "2025-01-15T10:00:00Z", "bench"))
        writing.add_run(run("pi4"))
        with Store(url, read_only=True) as reading:
            server = PageServer(Source(reading), "127.0.0.1", 0)
            serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
            serving.start()
            browser.said.clear()
            try:
                browser.show(server.url)
                assert browser.js("document.getElementById('count').textContent") == "4 measurements"
                pick(browser, "scheme", "int8-dynamic")
                writing.add_run(run("pi5"))
                browser.wait("document.getElementById('count')?.textContent === '4 of 8 measurements'")
                assert browser.js("document.querySelector('select[aria-label=scheme]').value") == "int8-dynamic"
                assert browser.js("document.getElementById('live').textContent").startswith("live")
                # Chromium breaks off a request when any interface of the machine changes; the page asks again.
                assert [told for told in browser.said if "ERR_NETWORK_CHANGED" not in told] == []
            finally:
                server.shutdown()
                serving.join()
                server.server_close()
            browser.wait("document.getElementById('live').textContent.startsWith('not live')")
            assert len(rows(browser)) == 4, "what was known last stays"
            browser.said.clear()


def test_a_filter_of_what_is_not_shown_any_more_hides_nothing(browser: Browser, tmp_path: Path) -> None:
    """Without a batch named the newest is followed, and that may be of other targets."""
    url = f"sqlite:///{tmp_path / 'results.sqlite'}"
    with Store(url) as writing:
        writing.add_batch(Batch("b1", "2025-01-15T10:00:00Z", "bench"))
        for target in ("pi4", "pi5"):
            writing.add_run(run(target))
        with Store(url, read_only=True) as reading, PageServer(Source(reading), "127.0.0.1", 0) as server:
            serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
            serving.start()
            try:
                browser.show(server.url)
                browser.wait("document.getElementById('live').textContent.startsWith('live')")
                assert "last result" not in browser.js("document.getElementById('live').textContent"), "nothing came since"
                pick(browser, "target", "pi5")
                pick(browser, "scheme", "fp32")
                writing.add_batch(Batch("b2", "2025-01-16T10:00:00Z", "bench"))
                writing.add_run(run("pi4", batch="b2"))
                browser.wait("document.getElementById('title').textContent.endsWith('on pi4')")
                assert browser.js("document.getElementById('count').textContent") == "2 of 4 measurements"
                assert "last result" in browser.js("document.getElementById('live').textContent")
            finally:
                server.shutdown()
                serving.join()
        browser.said.clear()


def test_builds_of_one_name_are_each_held_between_devices(browser: Browser, tmp_path: Path) -> None:
    runs = []
    for build, ms in (("first", 20.0), ("second", 40.0)):
        one = dataclasses.replace(measurement(p50_ms=ms), artifact_sha256=sha(build))
        runs += [run(target, batch=build, measurements=(one,)) for target in ("pi-a", "pi-b")]
    path = tmp_path / "page.html"
    write_page(runs, path, valid)
    browser.show(path.as_uri())
    options = browser.js(
        "[...document.querySelector('select[aria-label=variant]').options].map((o) => [o.value, o.textContent])"
    )
    assert len({told for _, told in options}) == 2, "nobody can tell them apart"
    axes = set()
    for value, _ in options:
        browser.js(
            f"(() => {{ const s = document.querySelector('select[aria-label=variant]'); s.value = {json.dumps(value)};"
            " s.dispatchEvent(new Event('change')); })()"
        )  # fmt: skip
        browser.draw_all()
        ticks = "[data-chart=fleet] [aria-label='x-axis tick label'] text"
        axes.add(browser.js(f'[...document.querySelectorAll("{ticks}")].map((t) => t.textContent).join()'))
    assert len(axes) == 2, "one of the two is never drawn"


def test_a_screenshot_is_not_blank(browser: Browser, page: str, tmp_path: Path) -> None:
    from PIL import Image

    browser.show(page)
    browser.draw_all()
    browser.picture(tmp_path / "page.png")
    colours: Any = Image.open(tmp_path / "page.png").convert("RGB").getcolors(maxcolors=1 << 24)
    assert colours is not None and len(colours) > 200
