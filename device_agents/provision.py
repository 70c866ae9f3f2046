"""``provision`` and ``unprovision``: an environment of the agent's own, by the device's own Python and pip."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from typing import Any, Deque, Dict, Iterator, List

from device_agents import wire
from device_agents.console import Console
from device_agents.errors import Refused, printable, refuse_os_error
from device_agents.store import Store

STEP_TIMEOUT_S = 3600.0
_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(\[[A-Za-z0-9,._-]+\])?\s*([<>=!~]=?=?\s*[A-Za-z0-9.*+!_-]+\s*,?\s*)*")


def provision(store: Store, console: Console, agent_sha256: str) -> Dict[str, Any]:
    """Make ``ROOT/venv``, install into it, prove what came of it. The same request a second time installs nothing."""
    from device_agents.probe import find_runtimes

    requirements, system_site = parse_requirements(console.read_json("provision"))
    store.create()
    mark = store.venv_folder / "edgevit.json"
    wanted = json.dumps({"python": sys.version, "requirements": requirements, "system_site": system_site}, sort_keys=True)
    python = str(store.venv_folder / "bin" / "python")
    # A mark in an environment still called unfinished was made just before its agent was killed: it would never be used.
    made = (store.read(mark, wire.MAX_JOB_BYTES) or b"").decode("utf-8") == wanted and Path(python).exists()
    if not made or store.venv_unfinished_path.exists():
        with _no_job_running(store):
            store.write(store.venv_unfinished_path, b"provision was at work here\n")
            _make_environment(store, console, system_site)
            if requirements:
                options = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--"]
                _run_step([python, "-m", "pip", "install"] + options + requirements, console, "install", "no-runtime")
            store.write(mark, wanted.encode("utf-8"))
            store.remove(store.venv_unfinished_path)
    with console.heartbeat():
        version, runtimes, _, absent = find_runtimes(store, agent_sha256, False, lambda message: None)
    if not runtimes and requirements:
        reasons = "; ".join("{}: {}".format(k, v) for k, v in sorted(absent.items()))
        raise Refused("no-runtime", "the environment was made, but no runtime works in it: {}".format(reasons))
    return {"python": version, "runtimes": wire.encode(runtimes), "absent": absent}


@contextlib.contextmanager
def _no_job_running(store: Store) -> Iterator[None]:
    """Keeps servers and other provisionings away: both would find the environment half made. Raises ``busy``."""
    lock = store.try_lock_server()
    if lock is None:
        raise Refused("busy", "a job is being measured on this device, or its environment is being made")
    try:
        yield
    finally:
        os.close(lock)


def parse_requirements(request: Any) -> Any:
    if not isinstance(request, dict) or not set(request) <= {"requirements", "system_site"}:
        raise Refused("bad-request", 'provision: expected {"requirements": […], "system_site": true or false}')
    requirements, system_site = request.get("requirements", []), request.get("system_site", False)
    if not isinstance(requirements, list) or not isinstance(system_site, bool):
        raise Refused("bad-request", "provision: requirements is a list, system_site a truth value")
    for item in requirements:
        if not isinstance(item, str) or len(item) > 200 or _REQUIREMENT.fullmatch(item) is None:
            raise Refused("bad-request", "provision: {!r} is not a requirement such as numpy>=1.26,<2".format(str(item)[:80]))
    return list(requirements), system_site


def _make_environment(store: Store, console: Console, system_site: bool) -> None:
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as e:
        package = "python{}.{}-venv".format(*sys.version_info[:2])
        raise Refused(
            "no-python",
            "this Python cannot make environments: {}".format(e),
            "on the device: sudo apt install python3-venv (or {})".format(package),
        ) from e
    command = [sys.executable, "-m", "venv", "--clear"] + (["--system-site-packages"] if system_site else [])
    _run_step(command + [str(store.venv_folder)], console, "environment", "no-python")


def _run_step(command: List[str], console: Console, stage: str, code: str, timeout_s: float = STEP_TIMEOUT_S) -> None:
    """Run a command, passing on its lines; a failure is a refusal with its last lines. One that takes too long is ended, also
    where it says nothing at all."""
    tail: Deque[str] = deque(maxlen=30)
    late = threading.Event()
    env = dict(os.environ, PYTHONNOUSERSITE="1", PIP_NO_COLOR="1")
    with console.heartbeat():
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=env,
                cwd="/",
                start_new_session=True,
            )
        except OSError as e:
            raise refuse_os_error(e, "starting {}".format(command[0])) from e
        stdout: Any = process.stdout

        def end() -> None:
            late.set()
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(timeout_s, end)
        timer.daemon = True
        timer.start()
        try:
            for raw in stdout:
                line = printable(raw.decode("utf-8", "replace")).strip()
                if line:
                    tail.append(line)
                    console.progress(stage, 0, 0, "", line[:400])
            status = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                end()
            process.wait()
            stdout.close()
    if late.is_set():
        text = "; its last lines:\n" + "\n".join(tail) if tail else ", in silence"
        raise Refused(code, "{} took over {:.0f} s{}".format(" ".join(command[:4]), timeout_s, text))
    if status != 0:
        text = "\n".join(tail)
        full = "No space left" in text
        raise Refused("no-space" if full else code, "{} ended with status {}:\n{}".format(" ".join(command[:4]), status, text))


def unprovision(store: Store, console: Console) -> Dict[str, Any]:
    """Remove everything the agent ever put on this device. Refused while a job runs, and where the root is not an agent's."""
    root = store.root
    if not root.exists():
        return {"removed": False}
    home = Path.home()
    if root.resolve() in (Path("/"), home, home.parent) or not (root / "agent").is_dir():
        raise Refused("bad-request", "{} does not look like an agent's folder and is left alone".format(root))
    lock = store.try_lock_server()
    if lock is None:
        raise Refused("busy", "a job is being measured on this device", "edgevit collect, or wait for it")
    try:
        with console.heartbeat():
            shutil.rmtree(str(root))
    except OSError as e:
        raise refuse_os_error(e, "removing {}".format(root)) from e
    finally:
        os.close(lock)
    return {"removed": True}
