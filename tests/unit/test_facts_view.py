"""What is said of a box and of its daemon is so."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from device_agents.wire import DaemonState, DaemonStatus
from edgevit.report.facts_view import render_daemon, render_facts
from tests.support.runs import facts, sha

STATE = DaemonState("edgevit.daemon/1", sha("agent"), 408, "pi", "unit", "2026-01-31T12:00:00.000Z", None, None, {})


def printed(renderable: object) -> str:
    stream = io.StringIO()
    Console(file=stream, width=100, highlight=False).print(renderable)
    return " ".join(stream.getvalue().split())


@pytest.mark.parametrize(
    ("at_work", "state", "kind", "said"),
    [
        (True, STATE, "system", "at work since 2026-01-31T12:00:00.000Z, as pi, process 408"),
        (True, None, "system", "at work yes; it does not say yet what it runs under"),
        (False, STATE, "system", "at work no; next: edgevit target daemon logs box"),
        (False, None, "", "at work no; next: edgevit target daemon install box"),
    ],
)
def test_a_daemon_that_is_at_work_is_not_to_be_installed(
    at_work: bool, state: DaemonState | None, kind: str, said: str
) -> None:
    """It holds its lock before it has told what it is, for seconds on a slow board; one that ended has a log."""
    assert said in printed(render_daemon("box", DaemonStatus(at_work, state, "unit", kind, "", None, None, (), (), 0)))


def test_runs_that_wait_are_no_results_yet() -> None:
    assert "1 run, measured or to be; next" in printed(render_facts("box", "p", facts(waiting_runs=("queued",))))
    assert "2 runs, measured" in printed(render_facts("box", "p", facts(waiting_runs=("queued", "done"))))
