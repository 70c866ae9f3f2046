"""The server: works the queue oldest first, one job at a time on the whole machine, and leaves each result in the spool.

Three locks, all released by the kernel when their holder dies: ``ROOT/lock`` for the one server of a root, and an abstract
Unix socket for the one timed job of a machine (or network namespace), whoever's root it comes from. Numpy and the runtimes
are never imported here: they live and die in workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import faulthandler
import os
import socket
import sys
import time
import traceback
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

from device_agents import wire
from device_agents.clock import utc_now
from device_agents.conditions import restore_system
from device_agents.errors import Cancelled, Refused, printable
from device_agents.job import JobWorker
from device_agents.probe import collect_facts
from device_agents.spool import PartWriter, check_room, count_attempts, is_cancelled
from device_agents.store import Store
from device_agents.supervise import root_of_boards

DEVICE_LOCK = b"\0edgevit-device-lock"
MAX_ATTEMPTS = 3
HUNG_AFTER_S = 600.0
CANCELLED = "cancelled on request"
MOST_BYTES = wire.MAX_RUN_BYTES - 4096
"""Of a result; around it on its way stands one more object."""

BESIDE_BYTES, LEAST_BYTES = 64 * 1024, 256 * 1024
"""What stays free beside a result, and the size below which none is thinned for want of room."""

THIN_ABOVE = 2000
"""Samples of a series: fewer are kept whole, whatever the size of the result."""


def serve_once(store: Store, agent_sha256: str, inherited: Optional[int] = None) -> Dict[str, Any]:
    """Work until the queue is empty. Another server at work is no error: the queue is in its hands.

    ``inherited`` is the server's lock as an open descriptor, taken by whoever started this server.
    """
    store.create()
    done = 0
    lock = store.adopt_server_lock(inherited) if inherited is not None else _take_server_lock(store)
    while True:
        if lock is None:
            return {"served": done}
        try:
            store.clean_temporaries()
            left_tuned = restore_system(store, root_of_boards())
            if left_tuned:
                sys.stderr.write("{} {}\n".format(utc_now(), left_tuned))
            while True:
                run_id = next(iter(store.queued()), None)
                if run_id is None:
                    break
                _work(store, agent_sha256, run_id)
                done += 1
        finally:
            os.close(lock)
        # A job queued between the last look and the release would wait for nobody: look once more without the lock.
        if not store.queued():
            return {"served": done}
        lock = _take_server_lock(store)


def _take_server_lock(store: Store) -> Optional[int]:
    """Tries a while: others take the lock for an instant to see whether a server is there."""
    for _ in range(20):
        lock = store.try_lock_server()
        if lock is not None:
            return lock
        time.sleep(0.02)
    return None


def _work(store: Store, agent_sha256: str, run_id: str) -> None:
    """One queue file → one ``.run`` file, whatever happens in between."""
    if os.path.lexists(str(store.spool_path(run_id, "run"))) or os.path.lexists(str(store.spool_path(run_id, "acked"))):
        _forget(store, run_id)  # the server was killed between the result and this
        return
    if not is_cancelled(store, run_id):
        check_room(store)  # else it would be measured, and lost with the attempt
    attempts = count_attempts(store, run_id)
    part = PartWriter(store, run_id)
    try:
        job, problem = _read_job(store, run_id)
        if job is None:
            # Submitting checks jobs, so this file was damaged, or put, here; there is no job that a Run could carry.
            sys.stderr.write("{} job {}: removed, it is no job of this name: {}\n".format(utc_now(), run_id, problem))
            _forget(store, run_id)
            return
        if is_cancelled(store, run_id):
            run = _without_measurements(store, agent_sha256, job, "interrupted", CANCELLED, max(attempts, 1))
        elif attempts >= MAX_ATTEMPTS:
            reason = "the server died {} times in the middle of this run; what those attempts measured is lost".format(attempts)
            run = _without_measurements(store, agent_sha256, job, "interrupted", reason, attempts)
        else:
            part.write({"type": "attempt", "attempt": attempts + 1, "at": utc_now()})
            if attempts:
                text = "starting again, attempt {} of {}: the server died before".format(attempts + 1, MAX_ATTEMPTS)
                part.progress("waiting", 0, 1, "", text)
            run = _attempt(store, agent_sha256, job, part, attempts + 1)
        # What ran for minutes is not to be lost, and run again, because the disk filled up meanwhile.
        most_bytes = min(MOST_BYTES, max(store.free_bytes() - BESIDE_BYTES, LEAST_BYTES))
        store.write(store.spool_path(run_id, "run"), fit_result(run, most_bytes))
    finally:
        part.close()
    _forget(store, run_id)


def fit_result(run: wire.Run, most_bytes: int = MOST_BYTES) -> bytes:
    """A run as it goes home. One that no host would take is made smaller as a worker does it with a series: of each long one
    every second sample is dropped, and so on, so that what stays is spread evenly."""
    data = wire.dumps(run)
    while len(data) > most_bytes:
        thinner = dataclasses.replace(run, measurements=tuple(_thin(m) for m in run.measurements))
        if thinner == run:
            why = "its result has {:,} bytes, at most {:,} can be brought home; measure fewer variants at a time"
            run = dataclasses.replace(run, status="failed", reason=why.format(len(data), most_bytes), measurements=())
            return wire.dumps(run)
        run, data = thinner, wire.dumps(thinner)
    return data


def _thin(measurement: wire.Measurement) -> wire.Measurement:
    series = [
        dataclasses.replace(s, samples_ns=s.samples_ns[::2], stride=2 * s.stride) if len(s.samples_ns) > THIN_ABOVE else s
        for s in measurement.series
    ]
    return dataclasses.replace(measurement, series=tuple(series))


def _forget(store: Store, run_id: str) -> None:
    store.discard(store.queue_path(run_id))
    store.remove(store.spool_path(run_id, "part"))
    store.remove(store.cancel_path(run_id))


def _read_job(store: Store, run_id: str) -> Tuple[Optional[wire.Job], str]:
    try:
        data = store.read(store.queue_path(run_id), wire.MAX_JOB_BYTES) or b""
        job = wire.loads(wire.Job, data, "job", wire.MAX_JOB_BYTES)
    except (Refused, wire.WireError) as e:
        return None, str(e)
    return (job, "") if job.run_id == run_id else (None, "it holds the job of run {}".format(job.run_id))


def _attempt(store: Store, agent_sha256: str, job: wire.Job, part: PartWriter, attempt: int) -> wire.Run:
    def check_wanted() -> None:
        if is_cancelled(store, job.run_id):
            raise Cancelled

    try:
        with device_lock(part, check_wanted):
            # A server that hangs holds the whole device: it ends itself, saying where it stood; the next counts the attempt.
            faulthandler.dump_traceback_later(job.timeout_seconds + HUNG_AFTER_S, exit=True)
            try:
                return JobWorker(store, agent_sha256, job, part, attempt, check_wanted).work()
            finally:
                faulthandler.cancel_dump_traceback_later()
    except Cancelled:
        return _without_measurements(store, agent_sha256, job, "interrupted", CANCELLED, attempt)
    except Refused as e:
        return _without_measurements(store, agent_sha256, job, "failed", "{}: {}".format(e.code, e), attempt)
    except Exception:  # noqa: BLE001 - mapping edge: the host must learn of a defect here instead of waiting for ever
        return _without_measurements(
            store, agent_sha256, job, "failed", "defect of the agent: {}".format(traceback.format_exc()[-3000:]), attempt
        )


def _without_measurements(store: Store, agent_sha256: str, job: wire.Job, status: str, reason: str, attempt: int) -> wire.Run:
    now = utc_now()
    return wire.Run(
        schema=wire.RUN_SCHEMA,
        job=job,
        status=status,
        reason=printable(reason)[:4000],
        attempt=attempt,
        started_at=now,
        ended_at=now,
        facts=collect_facts(store, agent_sha256, True, lambda message: None),
        governor=None,
        measurements=(),
    )


@contextlib.contextmanager
def device_lock(part: PartWriter, check_wanted: Callable[[], None]) -> Iterator[None]:
    """One timed job on this machine at a time, over all roots and users; says so while it waits. ``check_wanted`` is called
    meanwhile and may raise."""
    said = False
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        while True:
            try:
                lock.bind(DEVICE_LOCK)
                break
            except OSError as e:
                if e.errno != errno.EADDRINUSE:
                    raise Refused("io-error", "taking the device's lock: {}".format(e)) from e
            if not said:
                part.progress("waiting", 0, 1, "", "another job is being measured on this device")
                said = True
            check_wanted()
            time.sleep(0.2)
        yield
    finally:
        lock.close()
