"""``edgevit deploy`` and ``edgevit rollback``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevit.cli.connect import Session, each_target
from edgevit.cli.console import emit_json, json_option
from edgevit.cli.model_options import FILE
from edgevit.cli.progress_context import showing_progress

if TYPE_CHECKING:
    from edgevit.bundle import Bundle


@click.command()
@click.argument("bundle", type=FILE)
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@click.option("--dry-run", is_flag=True, help="Say what would be sent, installed and activated; change nothing.")
@click.option("--select", "wanted", metavar="VARIANT", help="ARTIFACT[:RUNTIME[:PROVIDER[:THREADS]]] to activate.")
@click.option("--allow-older", is_flag=True, help="Let an older version replace a newer one.")
@json_option
def deploy(bundle: Path, targets: Sequence[str], dry_run: bool, wanted: str | None, allow_older: bool, as_json: bool) -> int:
    """Ship BUNDLE to TARGETs and activate it there, after the device itself has verified signature and bytes.

    Without --select the first artifact of the bundle that a proven runtime of the device runs is activated.
    A second deploy of the same bundle sends and changes nothing.
    """
    from edgevit.bundle import open_bundle

    done, code = deploy_bundle(open_bundle(bundle, None), targets, wanted, dry_run=dry_run, allow_older=allow_older)
    if as_json:
        emit_json("deploy", {"dry_run": dry_run, "targets": done})
    else:
        for value in done:
            click.echo(value["text"])
    return code


def deploy_bundle(
    opened: Bundle, targets: Sequence[str], wanted: str | None, *, dry_run: bool = False, allow_older: bool = False
) -> tuple[list[dict[str, Any]], int]:
    """Plan and (unless ``dry_run``) ship and activate on every target: what became of each, and the exit code."""
    from edgevit.fleet.deploy import apply_plan, plan_deploy
    from edgevit.variants import find_variant, list_variants, require_runnable

    with showing_progress() as progress:

        def work(session: Session) -> dict[str, Any]:
            facts = session.agent.probe()
            found = list_variants(opened.manifest, opened.digest, facts, session.profile(facts), every=wanted is not None)
            require_runnable(found, session.target.name, facts)
            variant = find_variant(found, wanted) if wanted else found.variants[0]
            policy = f"selected: {wanted}" if wanted else "first that runs"
            have = session.agent.have(opened.manifest.blobs())
            plan = plan_deploy(opened, session.target.name, facts, have, variant, policy, allow_older=allow_older)
            return (plan if dry_run else apply_plan(plan, opened, session.agent, progress)).as_json()

        done, code = each_target(targets, work)
    return [value for _, value in done], code


@click.command()
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@json_option
def rollback(targets: Sequence[str], as_json: bool) -> int:
    """Activate what was active before, on TARGETs."""
    from device_agents.wire import encode

    done, code = each_target(targets, lambda session: session.agent.rollback())
    if as_json:
        emit_json("rollback", {"targets": [{"target": name, "active": encode(active)} for name, active in done]})
        return code
    for name, active in done:
        click.echo(f"{name}: {active.bundle_name} version {active.bundle_version}, {active.variant.artifact} is active again")
    return code
