"""What runs where: from the device where it answers, else what this host knows from its log and its results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgevit.fleet.audit import Entry, last_activation
from edgevit.fleet.deploy import describe
from edgevit.results.stats import summarize

if TYPE_CHECKING:
    from device_agents.wire import Active, Facts, Run
    from edgevit.errors import EdgevitError

DEVICE, LOG, RESULTS, NOTHING = "device", "audit log", "results", "nothing known"
VALID = "VALID"
LOOK_BACK = 20
"""How many of a target's runs are gone through for the last VALID one."""


@dataclass(frozen=True)
class Deployed:
    """What is active. ``digest`` may be empty where only a name is known; ``since``: UTC, ISO 8601."""

    name: str
    version: int
    digest: str
    variant: str
    since: str


@dataclass(frozen=True)
class LastRun:
    """The last measurement that came home. ``verdict``: VALID, INVALID or FAILED, and of how many where they differ."""

    run_id: str
    batch_id: str
    ended_at: str
    verdict: str


@dataclass(frozen=True)
class Runs:
    """Of a target: the ``last`` run that came home, and the last that was ``valid`` whole; None where there is none."""

    last: Run | None = None
    valid: LastRun | None = None


@dataclass(frozen=True)
class TargetStatus:
    """One target. ``source``: where ``active`` is from; ``as_of``: when that was so, UTC. ``waiting``: runs on the device, None
    where it was not reached; ``error``: why not."""

    target: str
    source: str
    as_of: str
    active: Deployed | None
    previous: Deployed | None
    last_run: LastRun | None
    last_valid_run: LastRun | None
    waiting: int | None
    error: EdgevitError | None


def find_runs(newest_first: Iterable[Run]) -> Runs:
    """The first of these runs, and the first that is VALID; no more are taken than that needs."""
    last: Run | None = None
    for run in newest_first:
        last = last or run
        judged = judge_run(run)
        if judged is not None and judged.verdict == VALID:
            return Runs(last, judged)
    return Runs(last)


def from_device(target: str, facts: Facts, runs: Runs, now: str) -> TargetStatus:
    """What a device that answered has. Pure."""
    return TargetStatus(
        target=target,
        source=DEVICE,
        as_of=now,
        active=_deployed(facts.active),
        previous=_deployed(facts.previous),
        last_run=judge_run(runs.last),
        last_valid_run=runs.valid,
        waiting=len(facts.waiting_runs),
        error=None,
    )


def from_here(target: str, error: EdgevitError, entries: Sequence[Entry], runs: Runs) -> TargetStatus:
    """What this host knows of a device that did not answer: the newer of its own last action and of the last run's facts.

    A device may have been changed from elsewhere since. Pure."""
    last, logged = runs.last, last_activation(entries, target)
    found, source, as_of = None, NOTHING, ""
    if logged is not None and "bundle" in logged.details:
        found, source, as_of = _from_entry(logged), LOG, logged.at
    # ISO 8601 in UTC sorts by time; a run's may carry a fraction of a second, which changes nothing here.
    if last is not None and last.ended_at > as_of:
        changed = [e for e in entries if e.target == target and e.outcome == "done" and e.action == "unprovision"]
        if not changed or changed[-1].at < last.ended_at:
            found, source, as_of = _deployed(last.facts.active), RESULTS, last.ended_at
    return TargetStatus(target, source, as_of, found, None, judge_run(last), runs.valid, None, error)


def _deployed(active: Active | None) -> Deployed | None:
    if active is None:
        return None
    variant = describe(active.variant)
    return Deployed(active.bundle_name, active.bundle_version, active.variant.bundle, variant, active.activated_at)


def _from_entry(entry: Entry) -> Deployed:
    details = entry.details
    version = details.get("version")
    return Deployed(
        name=str(details["bundle"]),
        version=version if isinstance(version, int) else 0,
        digest=str(details.get("digest", "")),
        variant=str(details.get("variant", "")),
        since=entry.at,
    )


def judge_run(run: Run | None) -> LastRun | None:
    """A run's verdict in a word, judged anew from what was recorded."""
    if run is None:
        return None
    found = summarize(run)
    failed = sum(bool(s.failure) for s in found)
    invalid = sum(not s.failure and not s.verdict.valid for s in found)
    verdict = VALID
    for word, count in (("FAILED", failed), ("INVALID", invalid)):
        if count:
            verdict = word if count == len(found) else f"{word} {count} of {len(found)}"
            break
    if not found:
        verdict = "FAILED"
    return LastRun(run.job.run_id, run.job.batch_id, run.ended_at, verdict)
