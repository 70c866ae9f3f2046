"""The page in a real browser: every chart is drawn, nothing on the console, nothing leaves a phone's screen."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from device_agents.wire import Window
from edgevit.report.page import write_page
from tests.support.judged import mixed, valid
from tests.support.runs import failed, measurement, run

EVIL = "</script><img src=x onerror=document.title='broken'>"


def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found:
        return found
    why = "no chromium here; sudo apt-get install chromium (make test installs it)"
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


def browse(page: Path, profile: Path, width: int, *more: str) -> tuple[str, str]:
    """The document after its scripts ran, and what the console said."""
    done = subprocess.run(
        [
            chromium(),
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
            f"--window-size={width},2400",
            "--enable-logging=stderr",
            "--virtual-time-budget=4000",
            *more,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (500, True)])
def test_every_chart_is_drawn_and_the_console_is_silent(tmp_path: Path, width: int, dark: bool) -> None:
    page = tmp_path / "page.html"
    write_page(mixed(), page, valid)
    scheme = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    document, console = browse(page, tmp_path / "profile", width, "--dump-dom", *scheme)
    assert console == ""
    assert 'data-drawn="yes"' in document
    plots = re.findall(r'<div class="plot"[^>]*>(.*?)</div></div>', document, re.DOTALL)
    assert len(plots) == 8
    for number, plot in enumerate(plots):
        assert "<svg" in plot, f"chart {number} was not drawn"
    widths = [float(w) for w in re.findall(r"<svg[^>]* width=\"(\d+)\"", document)]
    assert widths
    assert max(widths) <= width


def test_a_hostile_name_runs_nothing(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page([run(EVIL, measurements=(measurement(model=EVIL, recipe=EVIL), failed(model=EVIL)))], page, valid)
    document, console = browse(page, tmp_path / "profile", 1280, "--dump-dom")
    assert console == ""
    assert "<img" not in document
    assert "<title>broken" not in document
    assert 'data-drawn="yes"' in document


def test_a_screenshot_is_not_blank(tmp_path: Path) -> None:
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    write_page([run()], page, valid)
    browse(page, tmp_path / "profile", 1280, f"--screenshot={picture}")
    from PIL import Image

    colours = Image.open(picture).convert("RGB").getcolors(maxcolors=1 << 24)
    assert colours is not None
    assert len(colours) > 200


def test_minutes_of_load_are_drawn(tmp_path: Path) -> None:
    windows = tuple(Window(i * 1000, 1000, 100 - i // 4, 10_000_000 + 30_000 * i, 1) for i in range(240))
    base = measurement(processes=1)
    hot = dataclasses.replace(base, series=(dataclasses.replace(base.series[0], windows=windows),))
    page = tmp_path / "page.html"
    write_page([run(measurements=(hot,))], page, valid)
    document, console = browse(page, tmp_path / "profile", 1280, "--dump-dom")
    assert console == ""
    (plot,) = re.findall(r'<div class="plot"[^>]*data-chart="load"[^>]*>(.*?)</div></div>', document, re.DOTALL)
    assert "<svg" in plot and "seconds under load" in plot and "<path" in plot
