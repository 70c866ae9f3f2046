"""``edgevit bench`` and ``edgevit collect``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgevit.cli.connect import Session, each_target, open_session
from edgevit.cli.console import json_option, say
from edgevit.cli.model_options import FILE
from edgevit.cli.progress_context import showing_progress
from edgevit.cli.results import show_batch
from edgevit.cli.selection import gate_options, show_variants
from edgevit.select import Gates

if TYPE_CHECKING:
    from device_agents.wire import Facts, RunPlan, Variant
    from edgevit.bundle import Bundle
    from edgevit.fleet.agent import Agent
    from edgevit.progress import Progress
    from edgevit.results.store import Store

plan_option = click.option(
    "--plan", "plan_name", type=click.Choice(["quick", "standard"]), default="standard", show_default=True
)
threads_option = click.option(
    "--threads", type=click.IntRange(1), multiple=True, help="Threads; default: what the profile says."
)
require_valid_option = click.option("--require-valid", is_flag=True, help="Exit 1 if a measurement is INVALID.")


@click.command()
@click.argument("bundle", type=FILE)
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@plan_option
@threads_option
@click.option(
    "--variants",
    "every",
    is_flag=True,
    help="Every artifact in every proven runtime, provider and thread count, and what each policy of deploy would choose.",
)
@gate_options
@require_valid_option
@click.option("--wide", is_flag=True, help="Every column.")
@json_option
def bench(
    bundle: Path,
    targets: Sequence[str],
    plan_name: str,
    threads: Sequence[int],
    every: bool,
    max_loss: float,
    anyway: bool,
    require_valid: bool,
    wide: bool,
    as_json: bool,
) -> int:
    """Measure BUNDLE on TARGETs: latency, memory, and accuracy if the bundle carries an evaluation set.

    Sends what is missing there. What is active on the device stays as it is. With --variants a variant that fails is dropped
    and named; the exit code is 1 only where none is left to choose.
    """
    from edgevit.bench import PLANS
    from edgevit.bundle import open_bundle

    opened = open_bundle(bundle, None)
    gates = Gates(max_loss, anyway) if every else None
    return bench_bundles([opened], targets, PLANS[plan_name], threads, gates, None, require_valid, wide, as_json)


def bench_bundles(
    bundles: Sequence[Bundle],
    targets: Sequence[str],
    plan: RunPlan,
    threads: Sequence[int],
    gates: Gates | None,
    sign_key: Path | None,
    require_valid: bool,
    wide: bool,
    as_json: bool,
) -> int:
    """One batch: all ``bundles`` on all ``targets``, each device its own job with what it measures interleaved: with ``gates``
    every variant there is, shown with what may be chosen of them; without, the first that runs of each artifact."""
    from edgevit.results.store import open_store

    with open_store() as store, showing_progress() as progress:
        batch = store.new_batch(f"bench {' '.join(b.manifest.name for b in bundles)} on {' '.join(targets)}")

        def work(session: Session) -> str:
            return bench_session(session, bundles, plan, threads, gates is not None, batch, store, progress, sign_key)

        done, code = each_target(targets, work, sign_key=sign_key)
        if not done:
            return code
        if gates is None:
            return code or show_batch(store, batch, wide=wide, as_json=as_json, require_valid=require_valid)
        return code or show_variants(store, batch, gates, wide=wide, as_json=as_json, require_valid=require_valid)


def bench_session(
    session: Session,
    bundles: Sequence[Bundle],
    plan: RunPlan,
    threads: Sequence[int],
    every: bool,
    batch: str,
    store: Store,
    progress: Progress,
    sign_key: Path | None = None,
) -> str:
    """Bring home what waits, install what is missing, measure every variant of ``bundles``; the run's id."""
    from edgevit.bench import bring_home, make_job, measure

    name = session.target.name
    for old in bring_home(session.agent, store, progress, wait=False):
        say(f"{name}: brought home {old.run.job.run_id}, measured {old.run.ended_at}")
    facts = session.agent.probe()
    variants = _install_and_list(session, bundles, facts, threads, every, progress)
    job = make_job(name, batch, plan, variants)
    with ExitStack() as links:

        def reconnect() -> Agent:
            return links.enter_context(open_session(session.target, sign_key)).agent

        return measure(session.agent, job, store, progress, reconnect).run.job.run_id


def _install_and_list(
    session: Session, bundles: Sequence[Bundle], facts: Facts, threads: Sequence[int], every: bool, progress: Progress
) -> list[Variant]:
    from edgevit.variants import Runnable, list_variants, require_runnable

    profile = session.profile(facts)
    found = [list_variants(b.manifest, b.digest, facts, profile, threads=threads, every=every) for b in bundles]
    together = Runnable(tuple(v for f in found for v in f.variants), tuple(left for f in found for left in f.left_out))
    require_runnable(together, session.target.name, facts)
    for left in together.left_out:
        say(f"{session.target.name}: {left.artifact} is left out: {left.reason}")
    for bundle, runnable in zip(bundles, found, strict=True):
        if runnable.variants:
            session.agent.install(bundle, progress)
    return list(together.variants)


@click.command()
@click.argument("targets", nargs=-1, metavar="[TARGET...]")
@click.option("--wait", is_flag=True, help="Also wait for what is still being measured.")
def collect(targets: Sequence[str], wait: bool) -> int:
    """Bring home results that wait on TARGETs (all targets if none is named)."""
    from edgevit.bench import bring_home
    from edgevit.fleet.inventory import load_fleet
    from edgevit.places import fleet_path
    from edgevit.results.store import open_store

    names = list(targets) or ["local", *(t.name for t in load_fleet(fleet_path()).targets if t.name != "local")]
    with open_store() as store, showing_progress() as progress:
        done, code = each_target(names, lambda session: bring_home(session.agent, store, progress, wait=wait))
    for name, home in done:
        for one in home:
            note = "" if one.newly_stored else " (was here already)"
            click.echo(f"{name}: {one.run.job.run_id} measured {one.run.ended_at}, {one.run.status}{note}")
        if not home:
            click.echo(f"{name}: nothing waits")
    return code
