"""``edgevit target prune``: what lies on boards and nobody uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from edgevit.cli.connect import Session, show_failures, try_each_target
from edgevit.cli.console import emit_json, json_failed, json_option

if TYPE_CHECKING:
    from device_agents.wire import Facts, InstalledBundle
    from edgevit.fleet.agent import Freed


@click.command()
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option("--take-over", is_flag=True, help="Take the lock of another operator who is gone; it ends by itself too.")
@json_option
def prune(targets: Sequence[str], dry_run: bool, take_over: bool, as_json: bool) -> int:
    """Remove bundles from TARGETs that are neither active nor were before it.

    Each benchmark leaves its bundle there, so that the next need not send it again; on a small card they add up. What a queued
    measurement needs stays, and so do results and the Python environment.
    """
    from edgevit.fleet.audit import Action
    from edgevit.fleet.operator import holding_where_it_fits, this_operator

    operator = this_operator("target prune")

    def work(session: Session) -> tuple[list[InstalledBundle], Freed | None]:
        idle = idle_bundles(session.agent.probe(quick=True))
        if dry_run or not idle:
            return idle, None
        with holding_where_it_fits(session.agent, operator, take_over=take_over):
            freed = session.agent.uninstall([one.bundle for one in idle])
        session.note(bundles=freed.removed_bundles, bytes=freed.freed_bytes)
        return idle, freed

    done, failed = try_each_target(targets, work, action=None if dry_run else Action("target prune"))
    code = show_failures(failed)
    if as_json:
        rows = [
            {
                "target": name,
                "idle": [{"bundle": one.bundle, "name": one.name, "version": one.version} for one in idle],
                "removed_bundles": freed.removed_bundles if freed else 0,
                "freed_bytes": freed.freed_bytes if freed else 0,
            }
            for name, (idle, freed) in done
        ]
        emit_json("target-prune", {"dry_run": dry_run, "targets": rows, "failed": json_failed(failed)})
        return code
    for name, (idle, freed) in done:
        click.echo(f"{name}: {said(idle, freed)}")
        for one in idle if dry_run else ():
            click.echo(f"  {one.name} version {one.version}")
    return code


def idle_bundles(facts: Facts) -> list[InstalledBundle]:
    """What is installed and neither active nor was before it."""
    used = {one.variant.bundle for one in (facts.active, facts.previous) if one is not None}
    return [one for one in facts.bundles if one.bundle not in used]


def said(idle: Sequence[InstalledBundle], freed: Freed | None) -> str:
    if not idle:
        return "nothing lies there that nobody uses"
    if freed is None:
        return f"{len(idle)} bundles would go"
    stay = len(idle) - freed.removed_bundles
    queued = f"; {stay} stay for measurements that wait there" if stay else ""
    return f"{freed.removed_bundles} bundles removed, {freed.freed_bytes / 1e6:,.1f} MB free again{queued}"
