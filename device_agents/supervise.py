"""Worker processes seen from the server: started, drained, timed, and ended for certain."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

from device_agents import wire
from device_agents.boards.files import read_text
from device_agents.errors import Refused, printable
from device_agents.servers import agent_argv
from device_agents.store import Store

MAX_LINE_BYTES = 64 * 1024 * 1024
STDERR_TAIL_BYTES = 8 * 1024
PROVE_TIMEOUT_S = 120.0
LOOK_EVERY_S = 0.25
GONE_AFTER_S = 2.0

Message = Dict[str, Any]


def runtime_python(store: Store) -> str:
    """The interpreter that has the runtimes: the provisioned environment's, else the one running now."""
    python = store.venv_folder / "bin" / "python"
    return str(python) if python.exists() else sys.executable


def run_worker(
    argv: List[str],
    request: Any,
    timeout_s: float,
    on_message: Callable[[Message], None],
    payload: bytes = b"",
    memory_limit_mb: Optional[float] = None,
) -> Dict[str, Any]:
    """Run one worker to its end and return its result. ``on_message`` gets every other line, and ``{}`` about twice a second.

    Raises what the worker refused, ``worker-timeout``, ``worker-died`` naming the signal, ``worker-memory`` where it held more
    than ``memory_limit_mb`` (10⁶ bytes resident, looked at four times a second), or ``worker-failed``.
    """
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, cwd="/"
        )
    except OSError as e:
        raise Refused("worker-failed", "{} cannot be started: {}".format(argv[0], e)) from e
    try:
        with _Conversation(process, wire.dumps(request) + payload, timeout_s, on_message, memory_limit_mb) as conversation:
            return conversation.hold()
    finally:
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill the worker and whatever it started; closing its streams ends the threads that read them."""
    try:
        os.killpg(process.pid, signal.SIGKILL)  # also where the worker itself is gone: what it started may not be
    except OSError:
        if process.poll() is None:
            process.kill()
    process.wait()


def resident_mb(pid: int) -> Optional[float]:
    """What a process holds in memory now, in MB (10⁶ bytes); None where it is gone."""
    text = read_text(Path("/proc", str(pid), "statm"))
    return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6 if text else None


class _Conversation:
    """Drains both streams in threads, so a worker that floods one of them never blocks on the other."""

    def __init__(
        self,
        process: "subprocess.Popen[bytes]",
        data: bytes,
        timeout_s: float,
        on_message: Callable[[Message], None],
        memory_limit_mb: Optional[float],
    ):
        self._process = process
        self._deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._on_message = on_message
        self._memory_limit_mb = memory_limit_mb
        self._over = False
        self._silent_since = 0.0
        self._lines: "queue.Queue[Optional[bytes]]" = queue.Queue(1000)
        self._errors = b""
        self._threads = [
            threading.Thread(target=self._write, args=(data,), daemon=True),
            threading.Thread(target=self._read_lines, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def hold(self) -> Dict[str, Any]:
        last: Message = {}
        while True:
            line = self._next_line()
            if line is None:
                break
            last = self._parse(line)
            if last["type"] in ("result", "refusal"):
                break
            self._on_message(last)
        if last.get("type") == "refusal":
            refusal = wire.decode(wire.Refusal, last.get("refusal"), "refusal")
            raise Refused(refusal.code, refusal.message, refusal.hint)
        if last.get("type") == "result" and isinstance(last.get("value"), dict):
            return dict(last["value"])
        raise self._died()

    def __enter__(self) -> "_Conversation":
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True

    def _next_line(self) -> Optional[bytes]:
        heard = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= self._deadline:
                raise Refused("worker-timeout", "no result after {:.1f} s{}".format(self._timeout_s, self._tail()))
            self._check_memory()
            try:
                return self._lines.get(timeout=min(self._deadline - now, LOOK_EVERY_S))
            except queue.Empty:
                if now - heard >= 0.5:
                    heard = now
                    self._on_message({})
                if self._is_gone():
                    return None

    def _check_memory(self) -> None:
        if self._memory_limit_mb is None:
            return
        held = resident_mb(self._process.pid)
        if held is not None and held > self._memory_limit_mb:
            raise Refused(
                "worker-memory",
                "the worker held {:,.0f} MB resident, at most {:,.0f} MB are allowed; it was ended".format(
                    held, self._memory_limit_mb
                ),
                "edgevit bench --memory-limit MB, or a smaller model",
            )

    def _is_gone(self) -> bool:
        """Whether the worker ended a while ago and its output is still open: something that it started holds it."""
        if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        self._silent_since = self._silent_since or time.monotonic()
        return time.monotonic() - self._silent_since >= GONE_AFTER_S

    def _parse(self, line: bytes) -> Message:
        try:
            message = wire.parse_json(line, "worker", MAX_LINE_BYTES)
        except wire.WireError as e:
            raise Refused("worker-failed", "the worker wrote a line that is no message: {}{}".format(e, self._tail())) from e
        if not isinstance(message, dict) or not isinstance(message.get("type"), str):
            raise Refused("worker-failed", "the worker wrote a line that is no message" + self._tail())
        return message

    def _died(self) -> Refused:
        try:
            status = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return Refused("worker-failed", "the worker closed its output without a result" + self._tail())
        self._threads[2].join(2)
        if status < 0:
            try:
                name = signal.Signals(-status).name
            except ValueError:
                name = "signal {}".format(-status)
            why = " (out of memory?)" if name == "SIGKILL" else ""
            return Refused("worker-died", "the worker was ended by {}{}{}".format(name, why, self._tail()))
        return Refused("worker-failed", "the worker ended with status {} and no result{}".format(status, self._tail()))

    def _tail(self) -> str:
        text = printable(self._errors[-STDERR_TAIL_BYTES:].decode("utf-8", "replace")).strip()
        return "; the end of its standard error:\n" + text if text else ""

    def _write(self, data: bytes) -> None:
        """Standard input stays open afterwards: its closing tells the worker that its server is gone."""
        stdin: Any = self._process.stdin
        try:
            stdin.write(data)
            stdin.flush()
        except OSError:
            pass  # the worker died early: its status says so

    def _read_lines(self) -> None:
        stdout: Any = self._process.stdout
        try:
            while True:
                line = stdout.readline(MAX_LINE_BYTES)
                if not line:
                    break
                self._put(line.rstrip(b"\n") if line.endswith(b"\n") else b"a line over the limit")
        except (OSError, ValueError):
            pass
        self._put(None)

    def _put(self, line: Optional[bytes]) -> None:
        """Into the queue, or nowhere once nobody reads it any more: a worker that floods must leave no thread behind."""
        while not self._over:
            try:
                self._lines.put(line, timeout=1.0)
                return
            except queue.Full:
                continue

    def _read_errors(self) -> None:
        stderr: Any = self._process.stderr
        try:
            while True:
                chunk = stderr.read1(65_536)
                if not chunk:
                    return
                self._errors = (self._errors + chunk)[-STDERR_TAIL_BYTES:]
        except (OSError, ValueError):
            return


def prove_runtimes(
    python: str, agent_sha256: str, store: Store, alive: Callable[[Message], None]
) -> Tuple[Tuple[wire.RuntimeFact, ...], Dict[str, str], Optional[str]]:
    """(runtimes proven by an inference, why others are absent, numpy's version). Each proof is a process of its own."""
    found: List[wire.RuntimeFact] = []
    absent: Dict[str, str] = {}
    numpy = None
    argv = agent_argv(python, agent_sha256, store, "worker")
    for runtime in wire.RUNTIMES:
        first = "CPUExecutionProvider" if runtime == "onnxruntime" else "XNNPACK"
        try:
            told = _prove(argv, store, runtime, first, alive)
            numpy = str(told["numpy"])
            facts = [_fact(first, told["proof"])]
            for name in told["providers"]:
                if name != first:
                    try:
                        facts.append(_fact(name, _prove(argv, store, runtime, name, alive)["proof"]))
                    except Refused as e:
                        facts.append(wire.ProviderFact(name, False, "{}: {}".format(e.code, e)[:4000]))
            found.append(wire.RuntimeFact(runtime, str(told["version"]), tuple(facts)))
        except Refused as e:
            absent[runtime] = "{}: {}".format(e.code, e)[:400]
            if e.code == "no-numpy":
                absent["numpy"] = str(e)[:400]
    return tuple(found), absent, numpy


def _prove(argv: List[str], store: Store, runtime: str, provider: str, alive: Callable[[Message], None]) -> Dict[str, Any]:
    request = {"kind": "prove", "root": str(store.root), "runtime": runtime, "provider": provider}
    return run_worker(argv, request, PROVE_TIMEOUT_S, alive)


def _fact(name: str, proof: Any) -> wire.ProviderFact:
    return wire.ProviderFact(str(name), bool(proof["proven"]), printable(str(proof["detail"]))[:4000])


LIST_PACKAGES = r"""
import sys, os, json
found = set()
for place in sys.path:
    try:
        names = os.listdir(place or ".")
    except OSError:
        continue
    for name in names:
        low = name.lower().replace("-", "_")
        if low.startswith(("numpy_", "onnxruntime", "ai_edge_litert", "tflite_runtime")) and low.endswith("_info"):
            found.add(name)
print(json.dumps(["%d.%d.%d" % sys.version_info[:3], sorted(found)]))
"""


def list_packages(python: str) -> Tuple[str, Tuple[str, ...]]:
    """(version, installed distributions that matter) of an interpreter, without importing any. Raises ``no-python``."""
    try:
        done = subprocess.run(
            [python, "-c", LIST_PACKAGES], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60, cwd="/"
        )
        version, names = json.loads(done.stdout.decode("utf-8"))
        return str(version), tuple(str(n) for n in names)
    except (OSError, ValueError, subprocess.TimeoutExpired) as e:
        raise Refused("no-python", "{} does not run: {}".format(python, e), "edgevit target provision") from e


def root_of_boards() -> Path:
    """Where the kernel's files hang on the device the agent runs on."""
    return Path("/")
