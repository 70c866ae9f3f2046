"""Progress on a terminal and without one, from several threads."""

from __future__ import annotations

import io
import threading

from rich.console import Console

from edgevit.report import cli_progress
from edgevit.report.cli_progress import RichProgress, count


def test_without_a_terminal_one_line_a_step_and_no_control_characters() -> None:
    stream = io.StringIO()
    with RichProgress(Console(file=stream, width=40)) as progress:
        progress.start("pi4", "pi4: sending [bold]deit[/bold]", 25e6, "B")
        progress.advance("pi4", 1e6)
        progress.finish("pi4", "pi4: sent a bundle with a rather long name, kept on one line")
        progress.advance("unknown", 1)
        progress.finish("unknown")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "pi4: sending [bold]deit[/bold]", "text of others is no markup"
    assert lines[1].startswith("pi4: sent a bundle with a rather long name, kept on one line (")
    assert len(lines) == 2
    assert "\x1b" not in stream.getvalue()


def test_long_work_without_a_terminal_says_how_far_it_is(monkeypatch: object) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(cli_progress, "LINE_EVERY_SECONDS", 0.0)  # type: ignore[attr-defined]
    with RichProgress(Console(file=stream, width=80)) as progress:
        progress.start("a", "timing", 64, "samples")
        progress.advance("a", 32)
        progress.advance("a", 64, "scoring")
    assert stream.getvalue().splitlines() == ["timing", "timing: 32 / 64 samples", "scoring: 64 / 64 samples"]


def test_on_a_terminal_several_devices_at_once() -> None:
    stream = io.StringIO()
    with RichProgress(Console(file=stream, width=100, force_terminal=True)) as progress:

        def work(name: str) -> None:
            progress.start(name, f"{name}: upload", 100, "B")
            progress.start(name, f"{name}: timing")
            for i in range(50):
                progress.advance(name, i)
            progress.finish(name, f"{name}: done")

        threads = [threading.Thread(target=work, args=(f"pi{i}",)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    for i in range(4):
        assert f"pi{i}: done" in stream.getvalue()


def test_counts() -> None:
    assert count(3.14e6, 25e6, "bytes") == "3.1 / 25.0 MB"
    assert count(3, 64, "images") == "3 / 64 images"
    assert count(0, None, "") == ""
