"""``edgevit bench`` and ``edgevit collect``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgevit.cli.connect import Session, each_target, open_session
from edgevit.cli.console import emit_json, json_option, say
from edgevit.cli.model_options import FILE
from edgevit.cli.plan_options import plan_options
from edgevit.cli.progress_context import showing_progress
from edgevit.cli.results import show_batch
from edgevit.cli.selection import gate_options, show_variants
from edgevit.errors import UsageError
from edgevit.select import Gates
from edgevit.variants import name_variant

if TYPE_CHECKING:
    from device_agents.wire import Facts, RunPlan, Variant
    from edgevit.bench import Measured
    from edgevit.bundle import Bundle
    from edgevit.fleet.agent import Agent, WaitingRun
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
    type=click.FloatRange(1),
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
@click.option("--detach", is_flag=True, help="Submit and return; `edgevit collect` brings the results home.")
@click.option("--wide", is_flag=True, help="Every column.")
@json_option
def bench(
    bundle: Path,
    targets: Sequence[str],
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
    wide: bool,
    as_json: bool,
) -> int:
    """Measure BUNDLE on TARGETs: latency, memory, and accuracy if the bundle carries an evaluation set.

    Sends what is missing there. What is active on the device stays as it is. With --variants a variant that fails is dropped
    and named; the exit code is 1 only where none is left to choose.
    """
    from edgevit.bundle import open_bundle
    from edgevit.plans import with_blocks

    opened = [open_bundle(path, None) for path in (bundle, against) if path is not None]
    if against is not None and every:
        raise UsageError("--against compares two bundles variant by variant", hint="leave --variants out")
    if blocks is not None:
        plan = with_blocks(plan, blocks)
    wanted = Wanted(opened, plan, threads, every, memory_limit)
    return bench_bundles(
        wanted,
        targets,
        Gates(max_loss, anyway),
        require_valid=require_valid,
        detach=detach,
        wide=wide,
        as_json=as_json,
    )


@dataclass(frozen=True)
class Wanted:
    """What to measure on each target, interleaved in one job: of each artifact the first variant that runs there, or with
    ``every`` all. ``threads`` empty: as the profile says; ``memory_limit_mb`` None: by the board's memory."""

    bundles: Sequence[Bundle]
    plan: RunPlan
    threads: Sequence[int] = ()
    every: bool = False
    memory_limit_mb: float | None = None


def bench_bundles(
    wanted: Wanted,
    targets: Sequence[str],
    gates: Gates,
    *,
    sign_key: Path | None = None,
    require_valid: bool = False,
    detach: bool = False,
    wide: bool = False,
    as_json: bool = False,
) -> int:
    """One batch: ``wanted`` on all ``targets``, shown; of every variant also what ``gates`` leave to choose. With ``detach``
    nobody waits for what is measured."""
    from edgevit.results.store import open_store

    with open_store() as store, showing_progress() as progress:
        batch = store.new_batch(f"bench {' '.join(b.manifest.name for b in wanted.bundles)} on {' '.join(targets)}")

        def work(session: Session) -> str:
            return bench_session(session, wanted, batch, store, progress, sign_key, detach=detach)

        done, code = each_target(targets, work, sign_key=sign_key)
        if not done:
            return code
        if detach:
            _show_submitted(done, batch, as_json)
            return code
        if not wanted.every:
            return code or show_batch(
                store, batch, wide=wide, as_json=as_json, require_valid=require_valid, operators=wanted.plan.profile_ops
            )
        return code or show_variants(store, batch, gates, wide=wide, as_json=as_json, require_valid=require_valid)


def bench_session(
    session: Session,
    wanted: Wanted,
    batch: str,
    store: Store,
    progress: Progress,
    sign_key: Path | None = None,
    *,
    detach: bool = False,
) -> str:
    """Bring home what waits, install what is missing, measure what is ``wanted``; the run's id. With ``detach`` the device is
    left to measure alone."""
    from edgevit.bench import bring_home, make_job, measure
    from edgevit.plans import memory_limit_mb as limit_of

    name = session.target.name
    for old in bring_home(session.agent, store, progress, wait=False):
        say(f"{name}: brought home {old.run.job.run_id}, measured {old.run.ended_at}")
    facts = session.agent.probe()
    variants = _install_and_list(session, wanted, facts, progress)
    limit = wanted.memory_limit_mb or (None if session.target.is_local else limit_of(facts))
    job = make_job(name, batch, wanted.plan, variants, memory_limit_mb=limit)
    if detach:
        session.agent.submit(job)
        return job.run_id
    with ExitStack() as links:

        def reconnect() -> Agent:
            return links.enter_context(open_session(session.target, sign_key)).agent

        return measure(session.agent, job, store, progress, reconnect).run.job.run_id


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
            session.agent.install(bundle, progress)
    return variants


def _require_pairs(target: str, pairs: Sequence[Variant], found: Sequence[Runnable]) -> None:
    if not pairs:
        sides = [", ".join(name_variant(v) for v in side.variants) or "nothing" for side in found]
        raise UsageError(
            f"{target}: nothing to compare: A runs as {sides[0]}, B as {sides[1]}; no two of them share runtime, provider and "
            "threads",
            hint="build both for the same format, or edgevit bench A TARGET, then edgevit bench B TARGET",
        )


def _show_submitted(runs: Sequence[tuple[str, str]], batch: str, as_json: bool) -> None:
    if as_json:
        emit_json("submitted", {"batch": batch, "runs": [{"target": name, "run": run} for name, run in runs]})
        return
    for name, run in runs:
        click.echo(f"{name}: run {run} is submitted; next: edgevit collect {name}")


@click.command()
@click.argument("targets", nargs=-1, metavar="[TARGET...]")
@click.option("--wait", is_flag=True, help="Also wait for what is still being measured.")
@click.option("--cancel", "cancelled", multiple=True, metavar="RUN", help="End this run there; it comes home as interrupted.")
def collect(targets: Sequence[str], wait: bool, cancelled: Sequence[str]) -> int:
    """Bring home results that wait on TARGETs (all targets if none is named)."""
    from edgevit.bench import bring_home, cancel_runs
    from edgevit.fleet.inventory import load_fleet
    from edgevit.places import fleet_path
    from edgevit.results.store import open_store

    names = list(targets) or ["local", *(t.name for t in load_fleet(fleet_path()).targets if t.name != "local")]
    known: set[str] = set()
    with open_store() as store, showing_progress() as progress:

        def work(session: Session) -> tuple[list[Measured], tuple[WaitingRun, ...]]:
            ended = cancel_runs(session.agent, cancelled)
            known.update(ended)
            home = bring_home(session.agent, store, progress, wait=wait, wait_for=ended)
            left = session.agent.waiting()
            if any(run.state == "done" for run in left):  # done since the device was asked
                home += bring_home(session.agent, store, progress, wait=False)
                left = session.agent.waiting()
            return home, left

        done, code = each_target(names, work)
    batches: dict[str, None] = {}
    for name, (home, waiting) in done:
        for one in home:
            note = "" if one.newly_stored else " (was here already)"
            click.echo(f"{name}: {one.run.job.run_id} measured {one.run.ended_at}, {one.run.status}{note}")
            batches[one.run.job.batch_id] = None
        for left in waiting:
            click.echo(f"{name}: {left.run_id} is {left.state}")
        if not home and not waiting:
            click.echo(f"{name}: nothing waits")
    if unknown := [run for run in cancelled if run not in known]:
        raise UsageError(f"no run {', '.join(unknown)} is queued or running on {', '.join(names)}", hint="edgevit collect")
    for batch in batches:
        say(f"next:  edgevit results show {batch}")
    return code
