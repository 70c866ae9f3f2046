"""``edgevit run``: build, deploy, bench, table, in one command."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevit.cli.bench import Wanted, bench_bundles, require_valid_option, threads_option
from edgevit.cli.build import build_all, choose_profiles
from edgevit.cli.connect import Session, each_target
from edgevit.cli.console import json_option, say
from edgevit.cli.model_options import FILE, build_options, build_requests, model_options, model_source
from edgevit.cli.plan_options import plan_options
from edgevit.cli.selection import gate_options, make_gates
from edgevit.errors import UsageError
from edgevit.select import POLICIES, Gates

if TYPE_CHECKING:
    from device_agents.wire import RunPlan
    from edgevit.bundle import Bundle


@click.command()
@model_options
@build_options
@click.option("--target", "targets", multiple=True, required=True, metavar="T", help="Where to measure; several allowed.")
@click.option("-o", "--output", type=FILE, metavar="DIR", help="Keep the bundles here.")
@plan_options
@threads_option
@click.option(
    "--select",
    "policy",
    type=click.Choice(POLICIES),
    help="Measure every variant of the one recipe and activate this one.",
)
@gate_options
@require_valid_option
@click.option("--wide", is_flag=True, help="Every column.")
@json_option
def run(
    targets: Sequence[str],
    output: Path | None,
    plan: RunPlan,
    threads: Sequence[int],
    policy: str | None,
    max_loss: float,
    anyway: bool,
    require_valid: bool,
    wide: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Build MODEL for the targets' boards, ship the bundles, measure them there, show the table.

    All recipes are measured interleaved in one job a device. A single recipe is activated once it has been measured without a
    failure, with --select the variant that the policy chooses. Of several recipes, or of several schemes without --select,
    none is: choose from the table, then `edgevit deploy BUNDLE TARGET`.
    """
    gates = make_gates(max_loss, anyway, choosing=policy is not None, hint="edgevit run MODEL … --select fastest")
    ready, unready = each_target(targets, require_a_runtime, sign_key=options["sign_key"])
    if not ready:
        return unready
    names = [name for name, _ in ready]
    requests = build_requests(options, model_source(options), choose_profiles((), names))
    if policy and len(requests) > 1:
        raise UsageError(
            f"--select chooses among the variants of one bundle, got {len(requests)} recipes",
            hint="one recipe with a list below quantize, such as --recipe variants",
        )
    with tempfile.TemporaryDirectory(prefix="edgevit-") as scratch:
        place = output or Path(scratch)
        bundles = build_all(requests, place, options["sign_key"])
        if output is not None:
            say(f"bundles: {', '.join(str(b.path) for b in bundles)}")
        wanted = Wanted(bundles, plan, threads, every=bool(policy))
        code = bench_bundles(
            wanted, names, gates, sign_key=options["sign_key"], require_valid=require_valid, wide=wide, as_json=as_json
        )
        if not code and len(bundles) == 1 and (policy or len(requests[0].recipe.schemes) == 1):
            code = _activate(bundles[0], names, policy, gates)
        return unready or code


def _activate(bundle: Bundle, names: Sequence[str], policy: str | None, gates: Gates) -> int:
    from contextlib import ExitStack

    from edgevit.cli.connect import select_targets, show_failures
    from edgevit.cli.deploy import ship_all
    from edgevit.cli.ship import Order
    from edgevit.fleet.operator import this_operator
    from edgevit.fleet.retry import RETRIES
    from edgevit.results.store import open_store

    with ExitStack() as stack:
        store = stack.enter_context(open_store()) if policy else None
        operator = this_operator(f"run {bundle.manifest.name} v{bundle.manifest.version}")
        order = Order(bundle, operator, wanted=policy, gates=gates, store=store, retries=RETRIES)
        done, failed = ship_all(order, select_targets(names))
    for _, one in done:
        say(one.outcome.text())
        if one.choice is not None:
            say(f"  {one.choice.policy}: {one.choice.reason}, by run {', '.join(one.choice.runs)}")
    return show_failures(failed)


def require_a_runtime(session: Session) -> None:
    """Minutes of building are not begun for a device that could run nothing."""
    from edgevit.errors import NotProvisioned

    name, facts = session.target.name, session.agent.probe()
    if not facts.runtimes:
        raise NotProvisioned(f"{name} has no inference runtime", hint=f"edgevit target provision {name}")
