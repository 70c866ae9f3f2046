"""``edgevit bench``: one plan over many devices and bundles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgevit.cli.connect import (
    Session,
    at_once_option,
    max_rate_option,
    open_session,
    over_devices,
    say_stopping,
    select_targets,
    show_failures,
)
from edgevit.cli.console import FloatRange, emit_json, json_option, say
from edgevit.cli.model_options import FILE
from edgevit.cli.plan_options import plan_options
from edgevit.cli.progress_context import showing_progress
from edgevit.cli.results import show_batch
from edgevit.cli.selection import gate_options, make_gates, show_variants
from edgevit.errors import DeviceRefused, EdgevitError, LostLink, Unreachable, UsageError
from edgevit.schedule import AT_ONCE, Piece, Rest, Turn, device_of, run_schedule, sort_outcomes
from edgevit.select import Gates
from edgevit.variants import name_variant

if TYPE_CHECKING:
    from device_agents.wire import Facts, Job, RunPlan, Variant
    from edgevit.bundle import Bundle
    from edgevit.fleet.agent import Agent
    from edgevit.fleet.inventory import Target
    from edgevit.fleet.outbox import Entry, Hold
    from edgevit.progress import Progress
    from edgevit.results.store import Store
    from edgevit.variants import Runnable

threads_option = click.option(
    "--threads", type=click.IntRange(1), multiple=True, help="Threads; default: what the profile says."
)
require_valid_option = click.option("--require-valid", is_flag=True, help="Exit 1 if a measurement is INVALID.")


@click.command()
@click.argument("bundle", type=FILE)
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@click.option(
    "--and",
    "more",
    type=FILE,
    multiple=True,
    metavar="BUNDLE",
    help="Measure this bundle as well, interleaved in the same job of each target; repeat it for more.",
)
@plan_options
@click.option(
    "--against",
    type=FILE,
    metavar="BUNDLE",
    help="Compare with this bundle: ABBA blocks of BUNDLE (A) and it (B), and the ratio of their latency with its interval.",
)
@click.option("--blocks", type=click.IntRange(3, 50), metavar="N", help="Of --against: blocks of ABBA.  [default: 8]")
@click.option(
    "--memory-limit",
    type=FloatRange(1),
    metavar="MB",
    help="End a worker that holds more; default: what leaves a board a fifth of its memory, none on local.",
)
@threads_option
@click.option(
    "--variants",
    "every",
    is_flag=True,
    help="Every artifact in every proven runtime, provider and thread count, and what each policy of deploy would choose.",
)
@gate_options
@require_valid_option
@click.option(
    "--detach",
    is_flag=True,
    help="Submit and return; `edgevit collect` brings the results home. The job of a device that is off waits here for it.",
)
@at_once_option
@max_rate_option
@click.option("--wide", is_flag=True, help="Every column.")
@json_option
def bench(
    bundle: Path,
    targets: Sequence[str],
    more: Sequence[Path],
    plan: RunPlan,
    against: Path | None,
    blocks: int | None,
    memory_limit: float | None,
    threads: Sequence[int],
    every: bool,
    max_loss: float,
    anyway: bool,
    require_valid: bool,
    detach: bool,
    at_once: int,
    max_rate: float | None,
    wide: bool,
    as_json: bool,
) -> int:
    """Measure BUNDLE on TARGETs: latency, memory, and accuracy if the bundle carries an evaluation set.

    Sends what is missing there. What is active on the device stays as it is. With --variants a variant that fails is dropped
    and named; the exit code is 1 only where none is left to choose. All devices measure at the same time, also where fewer
    connections are held (--at-once), and each does one job at a time.
    """
    from edgevit.bundle import open_bundle
    from edgevit.plans import with_blocks

    gates = make_gates(max_loss, anyway, choosing=every, hint="edgevit bench BUNDLE TARGET --variants")
    opened = [open_bundle(path, None) for path in (bundle, *more, *([against] if against is not None else ()))]
    if against is not None and more:
        raise UsageError("--against compares two bundles", hint="leave --and out")
    if twice := [b.manifest.name for i, b in enumerate(opened) if b.digest in {o.digest for o in opened[:i]}]:
        raise UsageError(
            f"there is nothing to compare: {twice[0]} was given twice", hint="edgevit bench BUNDLE … with different bundles"
        )
    if against is not None and every:
        raise UsageError("--against compares two bundles variant by variant", hint="leave --variants out")
    if detach and require_valid:
        raise UsageError("--detach waits for no verdict that --require-valid could go by", hint="edgevit collect --wait, later")
    if detach and max_rate is not None:
        raise UsageError(
            "--max-rate holds while bench itself sends; what --detach leaves waiting is sent by collect",
            hint="edgevit deploy BUNDLE TARGET --max-rate MBIT first",
        )
    if blocks is not None:
        plan = with_blocks(plan, blocks)
    wanted = Wanted(opened, plan, threads, every, memory_limit, max_rate)
    return bench_bundles(
        wanted,
        targets,
        gates,
        require_valid=require_valid,
        detach=detach,
        at_once=at_once,
        wide=wide,
        as_json=as_json,
    )


@dataclass(frozen=True)
class Wanted:
    """What to measure on each target, interleaved in one job: of each artifact the first variant that runs there, or with
    ``every`` all. ``threads`` empty: as the profile says; ``memory_limit_mb`` None: by the board's memory; ``max_rate_mbit``:
    what is sent keeps to it."""

    bundles: Sequence[Bundle]
    plan: RunPlan
    threads: Sequence[int] = ()
    every: bool = False
    memory_limit_mb: float | None = None
    max_rate_mbit: float | None = None


def bench_bundles(
    wanted: Wanted,
    targets: Sequence[str],
    gates: Gates,
    *,
    sign_key: Path | None = None,
    require_valid: bool = False,
    detach: bool = False,
    at_once: int = AT_ONCE,
    wide: bool = False,
    as_json: bool = False,
) -> int:
    """One batch: ``wanted`` on all ``targets``, shown; of every variant also what ``gates`` leave to choose. With ``detach``
    nobody waits for what is measured."""
    from edgevit.results.store import open_store

    chosen = select_targets(targets)
    with open_store() as store, showing_progress() as progress:
        batch = store.new_batch(f"bench {' '.join(b.manifest.name for b in wanted.bundles)} on {' '.join(targets)}")
        fleet = FleetBench(wanted, batch, store, progress, sign_key)
        if detach:
            return _submit_all(fleet, chosen, at_once, as_json)
        done, failed = sort_outcomes(run_schedule([fleet.piece(t) for t in chosen], at_once=at_once, on_stop=say_stopping))
        code = show_failures(failed)
        if not done and not as_json:
            return code
        if wanted.every:
            shown = show_variants(store, batch, gates, failed, wide=wide, as_json=as_json, require_valid=require_valid)
        else:
            operators = wanted.plan.profile_ops
            shown = show_batch(
                store, batch, failed, wide=wide, as_json=as_json, require_valid=require_valid, operators=operators
            )
        return code or shown


@dataclass(frozen=True)
class FleetBench:
    """One batch over many targets."""

    wanted: Wanted
    batch: str
    store: Store
    progress: Progress
    sign_key: Path | None = None

    def piece(self, target: Target) -> Piece[str]:
        """Begin the job there; where other devices still wait for their beginning, follow it later, over a new connection."""
        return Piece(target.name, device_of(target), lambda turn: self._begin(target, turn))

    def _begin(self, target: Target, turn: Turn) -> str | Rest[str]:
        with open_session(target, self.sign_key) as session:
            _bring_home(session, self.store, self.progress)
            job = prepare_job(session, self.wanted, self.batch, self.progress)
            submitted = False
            if not turn.others_wait:
                return self._finish(session, job, submitted)
            try:
                session.agent.submit(job)
                submitted = True
            except LostLink:
                self.progress.advance(target.name, 0, f"{target.name}: the link was lost while submitting; tried again later")
        return Rest(lambda _turn: self._come_back(target, job, submitted))

    def _come_back(self, target: Target, job: Job, submitted: bool) -> str:
        from edgevit.bench import left_behind

        with ExitStack() as opened:
            try:
                session = opened.enter_context(open_session(target, self.sign_key))
            except (LostLink, Unreachable) as error:
                raise left_behind(error, job, submitted=submitted) from error
            return self._finish(session, job, submitted)

    def _finish(self, session: Session, job: Job, submitted: bool) -> str:
        from edgevit.bench import measure

        with ExitStack() as links:

            def reconnect() -> Agent:
                return links.enter_context(open_session(session.target, self.sign_key)).agent

            return measure(session.agent, job, self.store, self.progress, reconnect, submitted=submitted).run.job.run_id


def bench_session(
    session: Session, wanted: Wanted, batch: str, store: Store, progress: Progress, sign_key: Path | None = None
) -> str:
    """Bring home what waits, install what is missing, measure what is ``wanted``; the run's id."""
    _bring_home(session, store, progress)
    job = prepare_job(session, wanted, batch, progress)
    return FleetBench(wanted, batch, store, progress, sign_key)._finish(session, job, False)


def _bring_home(session: Session, store: Store, progress: Progress) -> None:
    from edgevit.bench import bring_home

    try:
        for old in bring_home(session.agent, store, progress, wait=False):
            say(f"{session.target.name}: brought home {old.run.job.run_id}, measured {old.run.ended_at}")
    except DeviceRefused as error:
        if error.code != "run-damaged":
            raise
        say(f"{error}; next: {error.hint}")  # no reason to measure nothing more there


def prepare_job(session: Session, wanted: Wanted, batch: str, progress: Progress, run_id: str = "") -> Job:
    """Install what is missing there; the job for what is ``wanted`` and runs there."""
    from edgevit.bench import make_job
    from edgevit.plans import memory_limit_mb as limit_of

    facts = session.agent.probe()
    variants = _install_and_list(session, wanted, facts, progress)
    limit = wanted.memory_limit_mb or (None if session.target.is_local else limit_of(facts))
    scored = {b.digest: b.manifest.evaluation.count for b in wanted.bundles if b.manifest.evaluation is not None}
    images = sum(scored.get(v.bundle, 0) for v in variants)
    return make_job(session.target.name, batch, wanted.plan, variants, memory_limit_mb=limit, run_id=run_id, images=images)


def _install_and_list(session: Session, wanted: Wanted, facts: Facts, progress: Progress) -> list[Variant]:
    from edgevit.plans import pair_variants
    from edgevit.variants import Runnable, list_variants, require_runnable

    profile = session.profile(facts)
    found = [
        list_variants(b.manifest, b.digest, facts, profile, threads=wanted.threads, every=wanted.every) for b in wanted.bundles
    ]
    together = Runnable(tuple(v for f in found for v in f.variants), tuple(left for f in found for left in f.left_out))
    require_runnable(together, session.target.name, facts)
    for left in together.left_out:
        say(f"{session.target.name}: {left.artifact} is left out: {left.reason}")
    variants = list(together.variants)
    if wanted.plan.order == "mirrored":
        variants, alone = pair_variants(*(f.variants for f in found))
        _require_pairs(session.target.name, variants, found)
        for variant in alone:
            say(f"{session.target.name}: {name_variant(variant)} is left out: it has no partner in the other bundle")
    for bundle in wanted.bundles:
        if any(v.bundle == bundle.digest for v in variants):
            session.agent.max_rate_mbit = wanted.max_rate_mbit
            # Measuring replaces nothing, so an older version than the active one may come.
            session.agent.install(bundle, progress, allow_older=True)
    return variants


def _require_pairs(target: str, pairs: Sequence[Variant], found: Sequence[Runnable]) -> None:
    if not pairs:
        sides = [", ".join(name_variant(v) for v in side.variants) or "nothing" for side in found]
        raise UsageError(
            f"{target}: nothing to compare: A runs as {sides[0]}, B as {sides[1]}; no two of them share runtime, provider and "
            "threads",
            hint="build both for the same format, or edgevit bench A TARGET, then edgevit bench B TARGET",
        )


# --------------------------------------------------------------------------------------------------------------------
# Detached: through the outbox, so that a device that is off loses nothing
# --------------------------------------------------------------------------------------------------------------------


def _submit_all(fleet: FleetBench, chosen: Sequence[Target], at_once: int, as_json: bool) -> int:
    """Put a job for each target into the outbox and send what can be sent; the exit code. What a device refuses is given up."""
    from edgevit.fleet import outbox
    from edgevit.places import outbox_dir

    by_name, entries, misfits = {t.name: t for t in chosen}, {}, []
    for target in chosen:
        try:
            _require_fit(target, fleet.wanted.bundles)
        except UsageError as error:
            misfits.append((target.name, error))
            continue
        entries[target.name] = make_entry(target.name, fleet.wanted, fleet.batch)
        outbox.put(outbox_dir(), entries[target.name])

    def send(name: str) -> Hold:
        with open_session(by_name[name], fleet.sign_key) as session:
            _bring_home(session, fleet.store, fleet.progress)
            return deliver(session, entries[name], fleet.store, fleet.progress, fleet.wanted)

    _, failed = over_devices({name: by_name[name] for name in entries}, send, at_once=at_once)
    waiting = {name: error for name, error in failed if isinstance(error, Unreachable | LostLink)}
    refused = [(name, error) for name, error in failed if name not in waiting]
    for name, _ in refused:
        outbox.remove(outbox_dir(), entries[name].run_id)
    given_up = {name for name, _ in refused}
    _show_submitted([e for e in entries.values() if e.target not in given_up], waiting, fleet.batch, as_json)
    return show_failures([*misfits, *refused])


def _require_fit(target: Target, bundles: Sequence[Bundle]) -> None:
    """A target that is off cannot refuse a bundle for other boards: what is known of it does."""
    from edgevit.fleet.deploy import check_fits

    if target.profile is None:
        return
    refusals = []
    for bundle in bundles:
        try:
            check_fits(bundle.manifest, target.name, target.profile)
        except UsageError as error:
            refusals.append(error)
    if len(refusals) == len(bundles):
        raise refusals[0]


def make_entry(target: str, wanted: Wanted, batch: str) -> Entry:
    """What waits in the outbox until ``target`` has it."""
    from edgevit.bench import new_id, now
    from edgevit.fleet.audit import operator
    from edgevit.fleet.outbox import SCHEMA, Entry, KeptBundle

    kept = tuple(KeptBundle(str(b.path.absolute()), b.digest, b.manifest.name) for b in wanted.bundles)
    threads, limit = tuple(wanted.threads), wanted.memory_limit_mb
    return Entry(SCHEMA, new_id(), batch, target, now(), operator()[:200], kept, wanted.plan, threads, wanted.every, limit)


def deliver(session: Session, entry: Entry, store: Store, progress: Progress, wanted: Wanted | None = None) -> Hold:
    """Send what waits in the outbox for this target, after installing what it lacks; whether it was sent from here.

    BundleError where a bundle of it vanished or changed; whatever is raised leaves the entry where it is."""
    from edgevit.fleet import outbox
    from edgevit.places import outbox_dir

    folder = outbox_dir()
    with outbox.hold(folder, entry.run_id, wait=False) as standing:
        if standing is not outbox.Hold.MINE:
            return standing
        if not (store.has_run(entry.run_id) or any(run.run_id == entry.run_id for run in session.agent.waiting())):
            if wanted is None:
                limit = entry.memory_limit_mb
                wanted = Wanted(outbox.open_kept(entry), entry.plan, entry.threads, entry.every, limit)
            job = prepare_job(session, wanted, entry.batch_id, progress, entry.run_id)
            outbox.note_asked(folder, entry.run_id)
            session.agent.submit(job)
        outbox.remove(folder, entry.run_id)
        return standing


def _show_submitted(entries: Sequence[Entry], waiting: Mapping[str, EdgevitError], batch: str, as_json: bool) -> None:
    if as_json:
        states = dict.fromkeys(waiting, "waits-here")
        rows = [{"target": e.target, "run": e.run_id, "state": states.get(e.target, "submitted")} for e in entries]
        emit_json("submitted", {"batch": batch, "runs": rows})
        return
    for one in entries:
        if one.target in waiting:
            click.echo(f"{one.target}: run {one.run_id} waits here; edgevit collect sends it when {one.target} can be reached")
            say(f"  {waiting[one.target]}")
        else:
            click.echo(f"{one.target}: run {one.run_id} is submitted; next: edgevit collect {one.target}")
