"""``provision`` and ``unprovision``: a Python environment of the agent's own, from wheels that the host resolved and sends.

The device needs no network, no package of its system beyond Python, and no pip: pip is one of the wheels. An environment is
built aside, proven by an inference, and taken into use by one rename; whatever goes wrong before leaves the one in use alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import urllib.parse
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Deque, Dict, Iterator, List, Optional, Sequence, Set, Tuple

from device_agents import wire
from device_agents.conditions import restore_system
from device_agents.console import Console
from device_agents.environment import (
    MARK,
    copy_environment,
    environment_of,
    find_finished,
    list_environments,
    make_mark,
    python_of,
    read_environment,
    use_environment,
    used_environment,
)
from device_agents.errors import Refused, printable, refuse_os_error
from device_agents.intake import IDLE_S, locked_blobs, take_in
from device_agents.root import temp_name
from device_agents.service import remove_daemon
from device_agents.store import Store
from device_agents.supervise import root_of_boards
from device_agents.verify import parse_manifest

STEP_TIMEOUT_S = 3600.0
RUNTIME_PACKAGES = ("onnxruntime", "ai-edge-litert", "tflite-runtime")

_Proof = Tuple[Any, Tuple[wire.RuntimeFact, ...], Dict[str, str]]


def provision(store: Store, console: Console, agent_sha256: str) -> Dict[str, Any]:
    """Make the environment that was asked for and take it into use. The same request a second time does nothing.

    Raises ``no-runtime`` where no runtime, or none of those to keep, passes an inference in it: then nothing has changed.
    """
    request = parse_request(console.read_line(wire.MAX_JOB_BYTES, "provision", IDLE_S))
    store.create()
    os.umask(0o022)  # its files are read by a daemon's user too; the root above them is what keeps others out
    wanted = environment_of(request)
    folder = None if request.fresh else find_finished(store, wanted)
    received, made = 0, folder is None
    if folder is not None and folder == used_environment(store):
        console.emit({"type": "need", "blobs": [], "free_bytes": store.free_bytes(), "last": True})
        proof = _prove(store, console, agent_sha256, folder)
    else:
        with _no_job_running(store):
            if folder is None:
                there, _ = read_environment(store)
                with store.scratch() as scratch:
                    received, wheels = _receive(store, console, request, request.beyond(there), scratch)
                    folder = _make_environment(store, console, request, there, _Named(wheels, scratch))
            else:
                console.emit({"type": "need", "blobs": [], "free_bytes": store.free_bytes(), "last": True})
            try:
                proof = _prove(store, console, agent_sha256, folder)
                _check_proof(request, proof)
            except Refused:
                _discard(folder)
                raise
            use_environment(store, folder)
        with locked_blobs(store, console):
            _drop_wheels(store, request.wheels)
    version, runtimes, absent = proof
    return {"python": version, "runtimes": wire.encode(runtimes), "absent": absent, "made": made, "received_bytes": received}


def parse_request(line: bytes) -> wire.EnvironmentRequest:
    """A request with one wheel for each package, pip's own among them. Raises ``bad-request``."""
    try:
        request = wire.loads(wire.EnvironmentRequest, line, "provision", wire.MAX_JOB_BYTES)
    except wire.WireError as e:
        raise Refused("bad-request", str(e)) from e
    packages = [package_of(w.name) for w in request.wheels]
    twice = sorted({p for p in packages if packages.count(p) > 1})
    if twice:
        raise Refused("bad-request", "provision: more than one wheel of {}".format(", ".join(twice)))
    if packages and "pip" not in packages:
        raise Refused("bad-request", "provision: wheels without one of pip, which installs them")
    return request


def package_of(wheel: str) -> str:
    """The package in a wheel's file name, in its normal form (PEP 503)."""
    return wheel.partition("-")[0].replace("_", "-").replace(".", "-").lower()


@contextlib.contextmanager
def _no_job_running(store: Store) -> Iterator[None]:
    """Keeps servers and other provisionings away: building would disturb what they measure. Raises ``busy``."""
    lock = store.try_lock_server()
    if lock is None:
        raise Refused("busy", "a job is being measured on this device, or its environment is being made")
    try:
        yield
    finally:
        os.close(lock)


# ---- wheels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Named:
    """Wheels under their true names in ``folder``, which no garbage collection looks into; pip's other files lie there too."""

    wheels: Sequence[Tuple[wire.Wheel, Path]]
    folder: Path


def _receive(
    store: Store, console: Console, request: wire.EnvironmentRequest, wheels: Sequence[wire.Wheel], folder: Path
) -> Tuple[int, List[Tuple[wire.Wheel, Path]]]:
    """(Bytes received, the wheels by their names in ``folder``). What an earlier attempt left unfinished, and the environment
    before the one in use, go first."""
    with locked_blobs(store, console):
        with console.heartbeat():
            store.clean_temporaries()
            used = used_environment(store)
            for environment in list_environments(store):
                if environment != used:
                    _discard(environment)
        blobs = tuple({w.sha256: wire.Blob(w.sha256, w.size) for w in wheels}.values())
        received, _ = take_in(store, console, blobs, "the environment", request.unpacked_bytes)
        with console.heartbeat():
            return received, [(wheel, _name_wheel(store, wheel, folder)) for wheel in wheels]


def _discard(folder: Path) -> None:
    """Invisible in one rename, then removed, so that a killed removal leaves no half environment under its name."""
    doomed = folder.parent.parent / temp_name()
    try:
        os.rename(str(folder), str(doomed))
        if doomed.is_symlink() or not doomed.is_dir():
            doomed.unlink()
        else:
            shutil.rmtree(str(doomed))
    except OSError as e:
        raise refuse_os_error(e, "removing {}".format(folder)) from e


def _name_wheel(store: Store, wheel: wire.Wheel, folder: Path) -> Path:
    """Where it lies under its true name: pip knows a wheel by its file name."""
    path, blob = folder / wheel.name, store.blob_path(wheel.sha256)
    try:
        try:
            os.link(str(blob), str(path))
        except OSError:  # a file system without hard links
            shutil.copyfile(str(blob), str(path))
    except OSError as e:
        raise refuse_os_error(e, "naming the wheel {}".format(wheel.name)) from e
    return path


def _drop_wheels(store: Store, wheels: Sequence[wire.Wheel]) -> None:
    """What is installed need not lie there a second time. Blobs that an installed bundle names stay."""
    named: Set[str] = set()
    for digest in store.bundle_digests():
        with contextlib.suppress(Refused):
            named.update(b.sha256 for b in parse_manifest(store.bundle_bytes(digest)[0]).blobs())
    for wheel in wheels:
        if wheel.sha256 not in named:
            store.remove(store.blob_path(wheel.sha256))


# ---- building --------------------------------------------------------------------------------------------------------


def _make_environment(
    store: Store, console: Console, request: wire.EnvironmentRequest, there: Optional[wire.Environment], named: _Named
) -> Path:
    """A finished environment that is not yet in use, grown from the one in use (``there``) where that is enough.

    Raises ``no-python`` or ``no-runtime``; nothing is left then.
    """
    try:
        import venv  # noqa: F401
    except ImportError as e:
        package = "python{}.{}-venv".format(*sys.version_info[:2])
        hint = "on the device: sudo apt install python3-venv (or {})".format(package)
        raise Refused("no-python", "this Python cannot make environments: {}".format(e), hint) from e
    folder = store.environments_folder / os.urandom(8).hex()
    try:
        folder.parent.mkdir(mode=0o755, exist_ok=True)
    except OSError as e:
        raise refuse_os_error(e, "making {}".format(folder.parent)) from e
    site = ["--system-site-packages"] if request.system_site else []
    try:
        if request.grows(there):
            with console.heartbeat():
                copy_environment(Path(os.path.realpath(str(store.venv_folder))), folder)
        else:
            # Without pip: many a board's Python has no ensurepip, and pip comes along as a wheel.
            command = [sys.executable, "-m", "venv", "--without-pip"] + site + [str(folder)]
            _run_step(command, console, "environment", "no-python")
        _install_wheels(store, console, named, str(python_of(folder)))
        store.write(folder / MARK, make_mark(environment_of(request)))
    except Refused:
        if folder.exists():
            _discard(folder)
        raise
    return folder


def _install_wheels(store: Store, console: Console, named: _Named, python: str) -> None:
    found = {package_of(wheel.name): (wheel, path) for wheel, path in named.wheels}
    if set(found) <= {"pip"}:
        return
    _, pip = found.pop("pip")
    lines = []
    for package, (wheel, path) in found.items():
        url = "file://" + urllib.parse.quote(str(path))
        lines.append("{} @ {} --hash=sha256:{}\n".format(package, url, wheel.sha256))
    listed = named.folder / "requirements.txt"
    store.write(listed, "".join(lines).encode("utf-8"))
    # No cache and no compiling of what may never run: nothing is left outside the root, and a Pi Zero is spared minutes.
    options = ["--no-index", "--no-deps", "--no-cache-dir", "--no-compile", "--ignore-installed", "--require-hashes"]
    quiet = ["--disable-pip-version-check", "--no-input", "--no-warn-script-location", "--progress-bar", "off"]
    command = [python, str(pip / "pip"), "install"] + options + quiet + ["-r", str(listed)]
    _run_step(command, console, "install", "no-runtime", temporary=named.folder)


def _run_step(
    command: List[str], console: Console, stage: str, code: str, timeout_s: float = STEP_TIMEOUT_S, temporary: Any = None
) -> None:
    """Run a command, passing on its lines; a failure is a refusal with its last lines. One that takes too long is ended, also
    where it says nothing at all. Settings that the user of the device has for Python or pip do not reach it."""
    tail: Deque[str] = deque(maxlen=30)
    late = threading.Event()
    with console.heartbeat():
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=_clean_environment(temporary),
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


def _clean_environment(temporary: Any) -> Dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))}
    env.update(PYTHONNOUSERSITE="1", PYTHONDONTWRITEBYTECODE="1", PIP_CONFIG_FILE=os.devnull, PIP_ROOT_USER_ACTION="ignore")
    if temporary is not None:
        # The system's folder for that may be a small one in memory; and pip starts programs that leave things in a home.
        env.update(TMPDIR=str(temporary), HOME=str(temporary))
    return env


# ---- proof -----------------------------------------------------------------------------------------------------------


def _prove(store: Store, console: Console, agent_sha256: str, folder: Path) -> _Proof:
    from device_agents.probe import find_runtimes

    console.progress("proof", 0, 0, "", "an inference in each runtime")
    with console.heartbeat():
        version, runtimes, _, absent = find_runtimes(store, agent_sha256, False, lambda message: None, str(python_of(folder)))
    return version, runtimes, absent


def _check_proof(request: wire.EnvironmentRequest, proof: _Proof) -> None:
    _, runtimes, absent = proof
    proven = {"{}/{}".format(r.runtime, p.name) for r in runtimes for p in r.providers if p.proven}
    reasons = ["{}: {}".format(k, v) for k, v in sorted(absent.items())]
    reasons += ["{}: {}".format(p.name, p.detail) for r in runtimes for p in r.providers if not p.proven]
    why = "; ".join(reasons) or "no reason was given"
    if any(package_of(w.name) in RUNTIME_PACKAGES for w in request.wheels) and not proven:
        raise Refused(
            "no-runtime", "no runtime passed an inference in the new environment, nothing was changed: {}".format(why)
        )
    lost = [pair for pair in request.keep if pair not in proven]
    if lost:
        message = "the board's own {} passed no inference in the new environment, nothing was changed: {}"
        raise Refused("no-runtime", message.format(", ".join(lost), why))


# ---- removal ---------------------------------------------------------------------------------------------------------


def unprovision(store: Store, console: Console) -> Dict[str, Any]:
    """Remove everything the agent ever put on this device. Refused while a job runs, and where the root is not an agent's."""
    root = store.root
    if not root.exists():
        return {"removed": False}
    home = Path.home()
    if root.resolve() in (Path("/"), home, home.parent) or not (root / "agent").is_dir():
        raise Refused("bad-request", "{} does not look like an agent's folder and is left alone".format(root))
    if store.has_server():  # before the daemon goes, which would take its job along
        raise Refused("busy", "a job is being measured on this device; edgevit collect --cancel RUN ends it")
    with console.heartbeat():
        remove_daemon(store)
    if store.has_daemon():
        raise Refused("busy", "a daemon that no unit here started serves {}".format(root), "end it, then unprovision")
    lock = store.try_lock_server()
    if lock is None:
        raise Refused("busy", "a job is being measured on this device", "edgevit collect, or wait for it")
    try:
        left_tuned = restore_system(store, root_of_boards())
        if left_tuned:
            raise Refused("needs-root", "{}; then unprovision again".format(left_tuned))
        with console.heartbeat():
            for entry in sorted(root.iterdir()):
                store.discard(entry)
            # A root that an administrator made for two users to share lies where neither may remove it.
            if os.access(str(root.parent), os.W_OK):
                root.rmdir()
    except OSError as e:
        raise refuse_os_error(e, "removing {}".format(root)) from e
    finally:
        os.close(lock)
    return {"removed": True}
