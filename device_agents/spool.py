"""Jobs in, results out, exactly once: ``submit follow ack cancel waiting resume`` and the files behind them.

A run is ``queue/ID.json`` until its result is on the disk, ``spool/ID.part`` while it runs, ``spool/ID.run`` until the host
says that it has it, and ``spool/ID.acked`` ever after, so that nothing is measured or brought home twice.
``queue/ID.cancel`` asks whoever serves the run to end it.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

from device_agents import wire
from device_agents.console import Console
from device_agents.errors import Refused, refuse_os_error
from device_agents.root import open_with_mode, sync_folder
from device_agents.servers import ensure_server, read_server_log
from device_agents.store import Store

POLL_S = 0.1
RESTART_AFTER_S = 1.0
"""So often ``follow`` looks whether a server is at work."""

MAX_STARTS = 20
"""So often ``follow`` starts a server while the job does not move, before it says that something is wrong."""


RESULT_BYTES = 4 * 1024 * 1024
"""Free on the disk before a job begins: what cannot be written down need not be measured."""


class PartWriter:
    """Appends to ``spool/ID.part``; each line is on the disk when :meth:`write` returns."""

    def __init__(self, store: Store, run_id: str) -> None:
        path = store.spool_path(run_id, "part")
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = open_with_mode(path, flags, store.file_mode)
            size = os.fstat(self._fd).st_size
            if size and os.pread(self._fd, 1, size - 1) != b"\n":
                os.write(self._fd, b"\n")  # its writer was killed in the middle of a line
            sync_folder(path.parent)
        except OSError as e:
            raise refuse_os_error(e, "opening {}".format(path)) from e

    def write(self, message: Dict[str, Any]) -> None:
        try:
            os.write(self._fd, json.dumps(message, separators=(",", ":")).encode("utf-8") + b"\n")
            os.fsync(self._fd)
        except OSError as e:
            raise refuse_os_error(e, "writing progress") from e

    def progress(self, stage: str, done: int, total: int, unit: str, text: str) -> None:
        self.write({"type": "progress", "stage": stage, "done": done, "total": total, "unit": unit, "text": text})

    def close(self) -> None:
        os.close(self._fd)


def count_attempts(store: Store, run_id: str) -> int:
    """How often a server has begun this run."""
    data = store.read(store.spool_path(run_id, "part"), wire.MAX_RUN_BYTES) or b""
    return sum(1 for line in _whole_lines(data) if _parse(line).get("type") == "attempt")


def submit(store: Store, console: Console, agent_sha256: str) -> Dict[str, Any]:
    """Queue a job unless its run is known already, and see to it that a server is at work."""
    line = console.read_line(wire.MAX_JOB_BYTES, "submit")
    try:
        job = wire.loads(wire.Job, line, "job", wire.MAX_JOB_BYTES)
    except wire.WireError as e:
        raise Refused("bad-job", str(e)) from e
    store.create()
    known = _state(store, job.run_id) is not None
    if not known:
        check_quota(store)
        check_room(store)
        name_current_agent(store, agent_sha256)
        store.write(store.queue_path(job.run_id), wire.dumps(job))
    if _state(store, job.run_id) in ("queued", "running"):
        ensure_server(store, agent_sha256)
    return {"run_id": job.run_id, "queued": not known}


def check_quota(store: Store) -> None:
    """Raises ``no-space`` where the daemon's quota is used up by what no garbage collection may touch."""
    state = read_daemon(store)
    if state is not None and state.quota_mb is not None and store.has_daemon():
        used = store.used_bytes() // 10**6
        if used > state.quota_mb:
            raise Refused(
                "no-space",
                "{:,} MB of the daemon's quota of {:,} MB are in use, {:,} results wait to be brought home".format(
                    used, state.quota_mb, len(store.spooled())
                ),
                "edgevit collect; then edgevit target daemon install … --disk-quota-mb",
            )


def check_room(store: Store) -> None:
    """Raises ``no-space`` where a result would not fit on the disk."""
    free = store.free_bytes()
    if free < RESULT_BYTES:
        raise Refused(
            "no-space",
            "{:,} bytes are free in {}, {:,} are wanted for a result".format(free, store.root, RESULT_BYTES),
            "edgevit target prune TARGET, or make room on the device; edgevit collect",
        )


def name_current_agent(store: Store, agent_sha256: str) -> None:
    """A daemon that was installed by an older host starts this agent for what this agent queues."""
    known = store.read(store.current_agent_path, 1000)
    if known is None or known.decode("ascii", "replace").strip() != agent_sha256:
        store.write(store.current_agent_path, agent_sha256.encode("ascii") + b"\n")


def read_daemon(store: Store) -> Optional[wire.DaemonState]:
    """What the daemon of this root wrote when it started last; None where there never was one, or where it is unreadable."""
    data = store.read(store.daemon_path, wire.MAX_JOB_BYTES)
    if data is None:
        return None
    try:
        return wire.loads(wire.DaemonState, data, "daemon.json", wire.MAX_JOB_BYTES)
    except wire.WireError:
        return None  # of another version: the next start of a daemon writes it anew


def _state(store: Store, run_id: str) -> Optional[str]:
    """acked, done, running, queued, or None where the run is not known.

    Looked for in the order in which a run passes through these files, each being there before the one before it goes: in any
    other order a run that moves on meanwhile could be seen nowhere.
    """
    part, queued = _exists(store.spool_path(run_id, "part")), _exists(store.queue_path(run_id))
    done = _exists(store.spool_path(run_id, "run"))
    if _exists(store.spool_path(run_id, "acked")):
        return "acked"
    if done:
        return "done"
    if queued:
        return "running" if part else "queued"
    return None


def _exists(path: Path) -> bool:
    return os.path.lexists(str(path))


def follow(store: Store, console: Console, agent_sha256: str, run_id: str) -> None:
    """Stream a run's progress and write its result line, from whatever moment on."""
    offset, starts, checked = 0, 0, 0.0
    while True:
        # The state is read before the progress: whatever the server wrote before it finished is then seen below.
        state = _state(store, run_id)
        if state == "acked":
            raise Refused("no-such-run", "run {} came home already and was acknowledged".format(run_id))
        if state is None:
            raise Refused("no-such-run", "this device knows no run {}".format(run_id), "edgevit bench submits one")
        before, offset = offset, _stream_part(store, console, run_id, offset)
        if offset != before:
            starts = 0
        if state == "done":
            data = store.read(store.spool_path(run_id, "run"), wire.MAX_RUN_BYTES)
            if data is not None:
                _check_result(store, run_id, data)
                console.emit_line(b'{"type":"result","value":' + data.strip() + b"}")
                return
            continue
        if time.monotonic() - checked >= RESTART_AFTER_S:
            checked = time.monotonic()
            if not store.has_server() and _state(store, run_id) in ("queued", "running"):
                check_room(store)  # no server would begin it: the run waits for room
            starts += ensure_server(store, agent_sha256)
            if starts >= MAX_STARTS:
                raise Refused(
                    "io-error",
                    "the server ends without taking run {}: {}".format(run_id, (read_server_log(store)[-2000:] or "no log")),
                )
        console.alive()
        time.sleep(POLL_S)


def _check_result(store: Store, run_id: str, data: bytes) -> None:
    """A result that the disk damaged is set aside, so that it holds up no other, and refused as ``run-damaged``."""
    try:
        if isinstance(json.loads(data.decode("utf-8")), dict):
            return
        problem = "it is no object"
    except ValueError as e:
        problem = str(e)
    aside = store.spool_path(run_id, "damaged")
    try:
        os.rename(str(store.spool_path(run_id, "run")), str(aside))
        sync_folder(aside.parent)
    except OSError as e:
        raise refuse_os_error(e, "setting {} aside".format(aside)) from e
    raise Refused(
        "run-damaged",
        "the result of run {} was damaged on the device's disk ({}); it is set aside as {}".format(run_id, problem, aside),
        "check the device's card, then bench again",
    )


def _stream_part(store: Store, console: Console, run_id: str, offset: int) -> int:
    """Pass on the whole lines from ``offset`` on; the new offset."""
    try:
        fd = store.open_regular(store.spool_path(run_id, "part"))
    except FileNotFoundError:
        return offset
    with os.fdopen(fd, "rb") as f:
        f.seek(offset)
        data = f.read()
    end = data.rfind(b"\n") + 1
    for line in _whole_lines(data[:end]):
        message = _parse(line)
        if message.get("type") == "progress":
            console.emit(message)
    return offset + end


def _whole_lines(data: bytes) -> List[bytes]:
    return data[: data.rfind(b"\n") + 1].splitlines()


def _parse(line: bytes) -> Dict[str, Any]:
    """A line of a part; one that a killed server left torn says nothing."""
    try:
        message = json.loads(line.decode("utf-8"))
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def acknowledge(store: Store, run_id: str) -> Dict[str, Any]:
    """The host has stored the run: only the mark stays. False where that was said before."""
    state = _state(store, run_id)
    if state not in ("acked", "done"):
        raise Refused("no-such-run", "run {} has no result to acknowledge (state: {})".format(run_id, state or "unknown"))
    run, mark = store.spool_path(run_id, "run"), store.spool_path(run_id, "acked")
    if state == "acked":
        store.remove(run)  # killed between the mark and the removal, by an agent that wrote the one and then removed the other
    try:
        if state == "done":
            os.rename(str(run), str(mark))  # a full disk has no room for another file
        os.close(os.open(str(mark), os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC))
        sync_folder(mark.parent)
    except OSError as e:
        raise refuse_os_error(e, "acknowledging run {}".format(run_id)) from e
    return {"acknowledged": state == "done"}


def cancel(store: Store, agent_sha256: str, run_id: str) -> Dict[str, Any]:
    """Ask for the end of a run that is queued or running; it comes home as interrupted. False where it is done already."""
    state = _state(store, run_id)
    if state is None:
        raise Refused("no-such-run", "this device knows no run {}".format(run_id), "edgevit collect")
    if state in ("done", "acked"):
        return {"cancelled": False, "state": state}
    store.write(store.cancel_path(run_id), b"")
    state = str(_state(store, run_id))
    if state not in ("queued", "running"):  # it ended meanwhile, and nobody will ever look for this mark
        store.remove(store.cancel_path(run_id))
        return {"cancelled": False, "state": state}
    ensure_server(store, agent_sha256)
    return {"cancelled": True, "state": state}


def is_cancelled(store: Store, run_id: str) -> bool:
    return _exists(store.cancel_path(run_id))


def waiting(store: Store) -> Dict[str, Any]:
    """Runs that are queued, running, or done and not yet acknowledged."""
    found: List[Dict[str, str]] = []
    for run_id in store.queued() + store.spooled():
        state = _state(store, run_id)
        if state in ("queued", "running", "done") and all(r["run_id"] != run_id for r in found):
            found.append({"run_id": run_id, "state": state})
    return {"runs": found}


def resume(store: Store, agent_sha256: str) -> Dict[str, Any]:
    """Begin what is queued and what a server left when it ended, at a reboot say, where nobody works it now; false where there
    is nothing to do or somebody does."""
    return {"begun": bool(store.queued()) and ensure_server(store, agent_sha256)}
