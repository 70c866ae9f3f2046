"""Submit, follow, acknowledge: a measurement on a device that comes home exactly once.

The device works a job whether or not anyone is connected. So a lost link costs nothing: :func:`measure` connects again and
follows on; a host that dies leaves the result in the device's spool, and :func:`bring_home` fetches it later. A run is
acknowledged only after the store has it, and the store knows each ``run_id`` once.
"""

from __future__ import annotations

import getpass
import socket
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from device_agents import wire
from edgevit.errors import DeviceRefused, LostLink, Unreachable, UsageError
from edgevit.fleet.agent import Agent
from edgevit.progress import Progress

RECONNECTS = 8
"""How often a lost link is taken up again in one follow before it is reported; the result stays on the device."""


class RunStore(Protocol):
    """The part of the results store that measuring needs."""

    def add_run(self, run: wire.Run) -> bool: ...

    def runs_of(self, run_ids: Sequence[str]) -> list[wire.Run]: ...


SCORE_S = 3.0
"""What an image may take where accuracy is counted: a transformer of 5 GMACs in float on a Raspberry Pi 3 comes near it."""


def now() -> str:
    """UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def new_id() -> str:
    """Sorts by time; unique."""
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:8]


def make_job(
    target: str,
    batch_id: str,
    plan: wire.RunPlan,
    variants: Sequence[wire.Variant],
    *,
    memory_limit_mb: float | None = None,
    run_id: str = "",
    images: int = 0,
) -> wire.Job:
    """A job for one device; ``run_id`` where it has one already. Its time limit follows from the plan and ``images``, which
    all variants together are scored on: nothing hangs for good."""
    if not variants:
        raise UsageError(f"nothing to measure on {target}: no variant of the bundle runs there")
    cooling = plan.cool_seconds if plan.cool_to_c is not None or plan.cool_within_c is not None else 0.0
    each = 1.5 * plan.max_seconds + plan.warmup_seconds + cooling
    return wire.Job(
        schema=wire.JOB_SCHEMA,
        run_id=run_id or new_id(),
        batch_id=batch_id,
        target=target,
        submitted_at=now(),
        submitted_by=f"{getpass.getuser()}@{socket.gethostname()}"[:200],
        plan=plan,
        variants=tuple(variants),
        timeout_seconds=min(
            7 * 86_400.0, 300.0 + len(variants) * (600.0 + plan.processes * (each + 120.0)) + SCORE_S * images * plan.accuracy
        ),
        memory_limit_mb=memory_limit_mb,
    )


@dataclass(frozen=True)
class Measured:
    """One job's way home."""

    run: wire.Run
    newly_stored: bool


def measure(
    agent: Agent,
    job: wire.Job,
    store: RunStore,
    progress: Progress,
    reconnect: Callable[[], Agent] | None = None,
    *,
    submitted: bool = False,
) -> Measured:
    """Submit ``job`` (unless ``submitted`` says that it was), follow it to its end through lost links, store the run,
    acknowledge it. A run that another command brought home into the same store meanwhile is taken from there.

    ``reconnect`` makes a fresh agent for the same device. Submitting twice is harmless (the device knows ``run_id``), so a
    link lost while submitting is taken up the same way. Raises what the device or the link says once all attempts are used;
    the result then still waits on the device for ``edgevit collect``. Once the store has the run, only its acknowledgement is
    tried again: where that fails too the device offers the run once more, and the store knows it.
    """
    delay = 0.5
    home: Measured | None = None
    for attempt in range(RECONNECTS + 1):
        try:
            if home is None:
                if not submitted:
                    agent.submit(job)
                    submitted = True
                run = agent.follow(job.run_id, progress)
                home = Measured(run=run, newly_stored=store.add_run(run))
            agent.ack(job.run_id)
            return home
        except DeviceRefused as error:
            stored = store.runs_of([job.run_id]) if error.code == "no-such-run" else []
            if not stored:
                raise
            return Measured(run=stored[0], newly_stored=False)
        except (LostLink, Unreachable) as error:
            if reconnect is None or attempt == RECONNECTS:
                if home is not None:
                    progress.advance(
                        job.target, 0, f"the link is lost; run {job.run_id} is stored, {job.target} keeps its copy"
                    )
                    return home
                raise left_behind(error, job, submitted=submitted) from error
            progress.advance(job.target, 0, f"link lost, trying again in {delay:.1f} s")
            time.sleep(delay)
            delay = min(delay * 2, 20.0)
            try:
                agent = reconnect()
            except (LostLink, Unreachable):
                continue
    raise LostLink(f"{job.target}: no answer", hint=f"edgevit collect {job.target}")


def left_behind(error: LostLink | Unreachable, job: wire.Job, *, submitted: bool) -> LostLink | Unreachable:
    """``error``, with what it means for the run of ``job``: ``submitted`` where the device said that it has it."""
    if submitted:
        said = f"{error} (run {job.run_id} goes on there; its result waits on the device)"
        return type(error)(said, hint=f"edgevit collect {job.target}")
    said = f"{error} (whether {job.target} has run {job.run_id} is not known: it was cut off while submitting)"
    return type(error)(said, hint=f"edgevit collect {job.target} tells; where it does not, the same command again")


def _store_and_acknowledge(agent: Agent, run: wire.Run, store: RunStore) -> Measured:
    newly = store.add_run(run)
    agent.ack(run.job.run_id)
    return Measured(run=run, newly_stored=newly)


def bring_home(
    agent: Agent, store: RunStore, progress: Progress, *, wait: bool, wait_for: Collection[str] = ()
) -> list[Measured]:
    """Every result that waits on the device, oldest first; with ``wait`` those still being measured as well, or those runs of
    them that ``wait_for`` names. A result that is damaged, or cannot be read here, is raised once the others are home."""
    home: list[Measured] = []
    damaged: list[DeviceRefused] = []
    for entry in agent.waiting():
        if entry.state == "done" or wait or entry.run_id in wait_for:
            try:
                run = agent.follow(entry.run_id, progress)
            except DeviceRefused as error:
                if error.code == "run-damaged":
                    damaged.append(error)  # the others come home first
                elif error.code != "no-such-run":  # else: whoever submitted it brought it home since the device was asked
                    raise
                continue
            home.append(_store_and_acknowledge(agent, run, store))
    if damaged:
        raise damaged[0]
    return home


def cancel_runs(agent: Agent, run_ids: Collection[str]) -> set[str]:
    """Ask for the end of those of ``run_ids`` that this device knows; which they were."""
    there = {run.run_id for run in agent.waiting()} & set(run_ids)
    for run_id in sorted(there):
        agent.cancel(run_id)
    return there
