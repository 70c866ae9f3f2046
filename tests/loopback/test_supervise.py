"""Workers that misbehave, run by the real supervisor: each ends for certain, and the reason is named."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from device_agents.errors import Refused
from device_agents.supervise import resident_mb, run_worker
from tests.support.processes import is_alive
from tests.support.waiting import wait_for

RESULT = 'print(\'{"type":"result","value":{"x":1}}\', flush=True)'


def worker(code: str, timeout: float = 30.0, heard: list[Any] | None = None, **more: Any) -> dict[str, Any]:
    argv = [sys.executable, "-c", "import os, signal, sys, time, subprocess\n" + code]
    return run_worker(argv, {"kind": "x"}, timeout, (heard if heard is not None else []).append, **more)


def refused(code: str, **more: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        worker(code, **more)
    return caught.value


def test_an_ordinary_one() -> None:
    heard: list[Any] = []
    assert worker('print(\'{"type":"progress"}\')\n' + RESULT, heard=heard) == {"x": 1}
    assert {"type": "progress"} in heard


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGKILL", "SIGBUS", "SIGFPE"])
def test_death_by_signal_names_it(name: str) -> None:
    error = refused(f"sys.stderr.write('last words')\nsys.stderr.flush()\nos.kill(os.getpid(), signal.{name})")
    assert error.code == "worker-died" and name in str(error) and "last words" in str(error)
    assert ("out of memory?" in str(error)) == (name == "SIGKILL")


def test_a_hang_ends_at_its_time() -> None:
    start = time.monotonic()
    error = refused("time.sleep(600)", timeout=1.0)
    assert error.code == "worker-timeout" and time.monotonic() - start < 20


def test_a_leak_ends_at_the_limit_and_the_figures_are_named() -> None:
    leak = "kept = []\nwhile True:\n    kept.append(b'x' * 4_000_000)\n    time.sleep(0.02)"
    error = refused(leak, memory_limit_mb=120.0)
    assert error.code == "worker-memory" and "at most 120 MB" in str(error)
    held = float(str(error).split(" MB")[0].split()[-1].replace(",", ""))
    assert 120 < held < 600, error
    assert "--memory-limit" in error.hint


def test_a_worker_within_its_limit_is_left_alone() -> None:
    assert worker("time.sleep(0.8)\n" + RESULT, memory_limit_mb=500.0) == {"x": 1}
    assert (resident_mb(os.getpid()) or 0) > 5 and resident_mb(2**22 - 1) is None


def test_floods_of_both_streams_block_nothing() -> None:
    line = '\'{"type":"progress","n":"\' + \'o\' * 50_000 + \'"}\''
    code = f"for i in range(200):\n    sys.stderr.write('e' * 100_000)\n    print({line})\n"
    heard: list[Any] = []
    assert worker(code + RESULT, heard=heard) == {"x": 1}
    assert sum(1 for m in heard if m.get("type") == "progress") == 200


def test_what_floods_on_after_its_result_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    code = RESULT + '\nwhile True: print(\'{"type":"progress"}\')'
    assert worker(code) == {"x": 1}
    wait_for(lambda: threading.active_count() <= before, "the end of every thread")


@pytest.mark.parametrize("line", ["hello", '{"no":"type"}', "[1]", '{"type":1}', "{" * 50])
def test_a_line_that_is_no_message(line: str) -> None:
    error = refused(f"print({line!r}, flush=True)\ntime.sleep(60)")
    assert error.code == "worker-failed" and "no message" in str(error)


def test_an_end_without_a_result() -> None:
    error = refused("sys.stderr.write('Traceback: boom')\nsys.exit(3)")
    assert error.code == "worker-failed" and "status 3" in str(error) and "boom" in str(error)


def test_a_grandchild_that_holds_the_output_is_not_waited_for(tmp_path: Path) -> None:
    """The worker is gone, what it started lives on with the worker's own pipe in its hands."""
    note = tmp_path / "pid"
    code = f"child = subprocess.Popen(['sleep', '600'])\nopen({str(note)!r}, 'w').write(str(child.pid))\nos._exit(4)"
    start = time.monotonic()
    error = refused(code, timeout=120.0)
    assert error.code == "worker-failed" and time.monotonic() - start < 30
    pid = int(note.read_text())
    wait_for(lambda: not is_alive(pid), "the end of what a worker had started", 10)
