"""What this box has today. Runtimes count only after a real inference; whatever cannot be read is None with its reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Callable, Dict, List, Optional, Tuple

from device_agents import wire
from device_agents.activate import read_active, read_signers
from device_agents.boards import detect_board
from device_agents.boards.files import read_text
from device_agents.clock import utc_now
from device_agents.environment import read_environment
from device_agents.errors import Refused, printable
from device_agents.install import find_installed, verify_bundle
from device_agents.store import Store
from device_agents.supervise import Message, list_packages, prove_runtimes, root_of_boards, runtime_python

_RuntimesFound = Tuple[Optional[str], Tuple[wire.RuntimeFact, ...], Optional[str], Dict[str, str]]


def collect_facts(
    store: Store, agent_sha256: str, quick: bool, alive: Callable[[Message], None], anew: bool = False
) -> wire.Facts:
    """Everything there is to know. ``quick`` leaves out runtimes that were not proven before; ``anew`` proves all of them."""
    board = detect_board(root_of_boards())
    absent: Dict[str, str] = {}
    cpu_model, cpu_features = board.cpu()
    python, runtimes, numpy, runtimes_absent = find_runtimes(store, agent_sha256, quick, alive, anew=anew)
    absent.update(runtimes_absent)
    bundles, unreadable = find_installed(store)
    absent.update(unreadable)
    keygen, keygen_absent = find_ssh_keygen()
    environment, absent["environment"] = read_environment(store)
    if environment is not None:
        del absent["environment"]
    active = previous = None
    try:
        state = read_active(store)
        active, previous = (state.active, state.previous) if state else (None, None)
        if state is None:
            absent["active"] = "nothing was activated yet"
        if previous is None:
            absent["previous"] = "nothing was active before"
    except Refused as e:
        absent["active"] = absent["previous"] = str(e)[:400]
    host = os.uname()
    facts = wire.Facts(
        schema=wire.FACTS_SCHEMA,
        agent_version=wire.AGENT_VERSION,
        agent_sha256=agent_sha256,
        hostname=printable(host.nodename)[:255],
        board_model=_text(board.model()),
        os_name=_text(parse_os_release(read_text(board.root / "etc/os-release") or "")),
        kernel=printable(host.release)[:400],
        machine=printable(host.machine)[:60],
        cpu_model=_text(cpu_model),
        cpu_count=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1),
        cpu_features=cpu_features,
        python="{}.{}.{}".format(*sys.version_info[:3]),
        runtime_python=python,
        libc=_text(read_libc()),
        jetpack=_text(board.jetpack()),
        memory_mb=parse_memory_mb(read_text(board.root / "proc/meminfo") or ""),
        disk_free_mb=store.free_bytes() // 10**6,
        clock_utc=utc_now(),
        boot_id=_text(read_text(board.root / "proc/sys/kernel/random/boot_id")),
        numpy=numpy,
        runtimes=runtimes,
        sensors=board.sensors(),
        ssh_keygen=keygen,
        signers=len(read_signers(store)),
        bundles=tuple(bundles),
        active=active,
        waiting_runs=tuple(sorted(set(store.queued()) | set(store.spooled()))),
        absent={},
        soabi=_text(read_soabi()),
        environment=environment,
        previous=previous,
        active_refused=_refusal_of(store, active),
    )
    return _with_reasons(facts, absent, board.absent(), keygen_absent)


def _refusal_of(store: Store, active: Optional[wire.Active]) -> str:
    """Why the device would refuse what is active, were it offered today; it is not deactivated for that."""
    if active is None:
        return ""
    try:
        verify_bundle(store, *store.bundle_bytes(active.variant.bundle))
    except Refused as e:
        return printable("{}: {}".format(e.code, e))[:400]
    return ""


_REASONS = {
    "board_model": "neither a device tree nor firmware tables name the board",
    "os_name": "/etc/os-release has no PRETTY_NAME",
    "cpu_model": "/proc/cpuinfo names no processor that is known here",
    "libc": "the C library does not tell its version",
    "jetpack": "this is no Jetson (no /etc/nv_tegra_release)",
    "memory_mb": "/proc/meminfo is not readable",
    "boot_id": "/proc/sys/kernel/random/boot_id is not readable",
    "numpy": "no interpreter with numpy was found",
    "runtime_python": "no interpreter was found",
    "soabi": "this Python does not say what extension modules it loads",
}


def _with_reasons(facts: wire.Facts, absent: Dict[str, str], board_absent: Dict[str, str], keygen_absent: str) -> wire.Facts:
    """Every None gets its reason."""
    import dataclasses

    for name, reason in _REASONS.items():
        if getattr(facts, name) is None:
            absent.setdefault(name, reason)
    if facts.ssh_keygen is None:
        absent["ssh_keygen"] = keygen_absent
    absent.update(board_absent)
    return dataclasses.replace(facts, absent={k: printable(v)[:400] for k, v in absent.items()})


def _text(value: Optional[str]) -> Optional[str]:
    return printable(value)[:400] if value else None


# ---- runtimes -------------------------------------------------------------------------------------------------------


def find_runtimes(
    store: Store, agent_sha256: str, quick: bool, alive: Callable[[Message], None], python: str = "", anew: bool = False
) -> _RuntimesFound:
    """(runtime Python's version, proven runtimes, numpy's version, reasons for what is absent), in ``python`` where given.

    Remembered under the interpreter, its packages and this agent: a change of one of them proves anew, and so does ``anew``.
    What else a runtime needs (a driver, a library of the system, a group) comes and goes without a trace in these.
    """
    python = python or runtime_python(store)
    try:
        version, packages = list_packages(python)
    except Refused as e:
        return None, (), None, {"runtime_python": str(e)[:400]}
    place = os.path.join(os.path.realpath(os.path.dirname(python)), os.path.basename(python))  # "venv" is a link
    key = json.dumps([wire.AGENT_VERSION, agent_sha256, place, version, packages])
    known = None if anew else _read_cache(store, key)
    if known is not None:
        return (version,) + known
    if quick:
        reason = "not proven yet; a probe without --quick does"
        return version, (), None, {"runtimes": reason, "numpy": reason}
    runtimes, absent, numpy = prove_runtimes(python, agent_sha256, store, alive)
    if any(told.startswith(PASSING) for told in _failures(runtimes, absent)):
        return version, runtimes, numpy, absent
    store.create()
    document = {"key": key, "runtimes": wire.encode(runtimes), "numpy": numpy, "absent": absent}
    store.write(store.runtimes_path, json.dumps(document).encode("utf-8"))
    return version, runtimes, numpy, absent


PASSING = ("worker-timeout:", "worker-died: the worker was ended by SIGKILL")
"""How the reasons begin that say more about the moment (a busy board, no memory left) than about a runtime. Remembering them
would leave the runtime out until its package changes."""


def _failures(runtimes: Tuple[wire.RuntimeFact, ...], absent: Dict[str, str]) -> List[str]:
    return list(absent.values()) + [p.detail for r in runtimes for p in r.providers if not p.proven]


def _read_cache(store: Store, key: str) -> Optional[Tuple[Tuple[wire.RuntimeFact, ...], Optional[str], Dict[str, str]]]:
    data = store.read(store.runtimes_path, wire.MAX_JOB_BYTES)
    if data is None:
        return None
    try:
        document = wire.parse_json(data, "runtimes.json", wire.MAX_JOB_BYTES)
        if document["key"] != key:
            return None
        runtimes = tuple(wire.decode(wire.RuntimeFact, r, "runtimes") for r in document["runtimes"])
        return runtimes, document["numpy"], {str(k): str(v) for k, v in document["absent"].items()}
    except (wire.WireError, KeyError, TypeError, AttributeError):
        return None  # written by another agent, or damaged: proving again costs seconds and is right


# ---- readers --------------------------------------------------------------------------------------------------------


def parse_os_release(text: str) -> Optional[str]:
    """``PRETTY_NAME`` of os-release(5)."""
    for line in text.splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip().strip("\"'") or None
    return None


def parse_memory_mb(text: str) -> Optional[int]:
    """``MemTotal`` of ``/proc/meminfo`` in MB (10⁶ bytes)."""
    for line in text.splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024 // 10**6
    return None


def read_libc(loaders: str = "/lib") -> Optional[str]:
    """Such as ``glibc 2.36`` or ``musl 1.2.4``; musl tells its version only through its loader, in ``loaders``."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError):
        pass
    try:
        found = sorted(name for name in os.listdir(loaders) if name.startswith("ld-musl-"))
        told = subprocess.run(
            [os.path.join(loaders, found[0])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=20,
        )
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return None
    return parse_musl(told.stderr.decode("utf-8", "replace"))


def parse_musl(text: str) -> Optional[str]:
    """``musl 1.2.4`` from what musl's loader says of itself."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) < 2 or not lines[0].startswith("musl") or not lines[1].startswith("Version "):
        return None
    return "musl " + lines[1][len("Version ") :].split()[0]


def read_soabi() -> Optional[str]:
    """Such as ``cpython-311-aarch64-linux-gnu``: implementation, version and flags, and the machine Python was built for."""
    import sysconfig

    known = sysconfig.get_config_var("SOABI")
    if not known:
        known = str(sysconfig.get_config_var("EXT_SUFFIX") or "").strip(".").rpartition(".")[0]
    return known or None


def find_ssh_keygen() -> Tuple[Optional[str], str]:
    """(OpenSSH's version where its ssh-keygen can verify signatures, else why not)."""
    try:
        asked = subprocess.run(
            ["ssh-keygen", "-Y", "find-principals", "-s", os.devnull, "-f", os.devnull],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=20,
            env=dict(os.environ, LC_ALL="C"),
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        return None, "ssh-keygen does not run ({}); install openssh-client 8.1 or newer".format(e)
    err = asked.stderr.decode("utf-8", "replace")
    if "unknown option" in err or "illegal option" in err or "usage:" in err.lower():
        return None, "this ssh-keygen knows no -Y; openssh-client 8.1 or newer is needed"
    try:
        told = subprocess.run(
            ["ssh", "-V"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=20
        )
        return printable(told.stderr.decode("utf-8", "replace").strip())[:400] or "ssh-keygen -Y", ""
    except (OSError, subprocess.TimeoutExpired):
        return "ssh-keygen -Y", ""
