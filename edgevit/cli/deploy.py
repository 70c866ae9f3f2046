"""``edgevit deploy`` and ``edgevit rollback``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from device_agents.wire import encode
from edgevit.cli.connect import Session, each_target
from edgevit.cli.console import emit_json, json_option
from edgevit.cli.model_options import FILE
from edgevit.cli.progress_context import showing_progress
from edgevit.cli.selection import choose_stored, gate_options
from edgevit.select import POLICIES, Gates

if TYPE_CHECKING:
    from device_agents.wire import Active, Facts, Variant
    from edgevit.bundle import Bundle
    from edgevit.results.store import Store
    from edgevit.select import Choice


@click.command()
@click.argument("bundle", type=FILE)
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@click.option("--dry-run", is_flag=True, help="Say what would be sent, installed and activated; change nothing.")
@click.option(
    "--select",
    "wanted",
    metavar="POLICY|VARIANT",
    help="fastest, smallest or most-accurate of what was measured there; or ARTIFACT[:RUNTIME[:PROVIDER[:THREADS]]].",
)
@gate_options
@click.option("--allow-older", is_flag=True, help="Let an older version replace a newer one.")
@json_option
def deploy(
    bundle: Path,
    targets: Sequence[str],
    dry_run: bool,
    wanted: str | None,
    max_loss: float,
    anyway: bool,
    allow_older: bool,
    as_json: bool,
) -> int:
    """Ship BUNDLE to TARGETs and activate it there, after the device itself has verified signature and bytes.

    Without --select the first artifact of the bundle that a proven runtime of the device runs is activated. With a policy the
    variant is chosen for each target from what `edgevit bench BUNDLE TARGET --variants` measured on it; the evidence is in
    `edgevit results choices`. A second deploy of the same bundle sends and changes nothing.
    """
    from edgevit.bundle import open_bundle

    opened, gates = open_bundle(bundle, None), Gates(max_loss, anyway)
    done, code = deploy_bundle(opened, targets, wanted, gates, dry_run=dry_run, allow_older=allow_older)
    if as_json:
        emit_json("deploy", {"dry_run": dry_run, "targets": done})
    else:
        for value in done:
            click.echo(value["text"])
    return code


def deploy_bundle(
    opened: Bundle,
    targets: Sequence[str],
    wanted: str | None,
    gates: Gates,
    *,
    dry_run: bool = False,
    allow_older: bool = False,
) -> tuple[list[dict[str, Any]], int]:
    """Plan and (unless ``dry_run``) ship and activate on every target: what became of each, and the exit code. ``wanted`` is a
    policy, a variant, or None for the first that runs."""
    from edgevit.fleet.audit import Action, Detail
    from edgevit.fleet.deploy import apply_plan, describe, plan_deploy
    from edgevit.results.store import open_store

    named: dict[str, Detail] = {"bundle": opened.manifest.name, "version": opened.manifest.version, "digest": opened.digest}
    action = None if dry_run else Action("deploy", named)
    with ExitStack() as opened_now:
        progress = opened_now.enter_context(showing_progress())
        store = opened_now.enter_context(open_store()) if wanted in POLICIES else None

        def work(session: Session) -> dict[str, Any]:
            facts = session.agent.probe()
            variant, policy, choice = _pick(session, opened, facts, wanted, gates, store)
            session.note(variant=describe(variant), policy=policy)
            have = session.agent.have(opened.manifest.blobs())
            plan = plan_deploy(opened, session.target.name, facts, have, variant, policy, allow_older=allow_older)
            value = (plan if dry_run else apply_plan(plan, opened, session.agent, progress)).as_json()
            if choice is None:
                return value
            if store is not None and not dry_run:
                store.add_choice(choice)
            return {**value, "choice": encode(choice), "text": value["text"] + _because(choice)}

        done, code = each_target(targets, work, action=action)
    return [value for _, value in done], code


def _pick(
    session: Session, opened: Bundle, facts: Facts, wanted: str | None, gates: Gates, store: Store | None
) -> tuple[Variant, str, Choice | None]:
    """The variant to activate, how it was chosen in the words that the device keeps, and the choice where a policy made it."""
    from edgevit.variants import find_variant, list_variants, require_runnable

    name = session.target.name
    found = list_variants(opened.manifest, opened.digest, facts, session.profile(facts), every=wanted is not None)
    require_runnable(found, name, facts)
    if wanted is None:
        return found.variants[0], "first that runs", None
    if store is None:
        return find_variant(found, wanted), f"selected: {wanted}", None
    choice = choose_stored(store, name, opened, facts, found, wanted, gates)
    return choice.variant, f"{wanted} by {', '.join(choice.runs)}"[:400], choice


def _because(choice: Choice) -> str:
    """The lines below a deployment that say what the choice rests on."""
    from edgevit.variants import name_variant

    lines = [f"{choice.policy}: {name_variant(choice.variant)}, {choice.reason}, by run {', '.join(choice.runs)}"]
    lines += [f"dropped {name_variant(one.variant)}: {one.reason}" for one in choice.dropped]
    lines += [f"not held: {reason}" for reason in choice.not_held]
    if choice.not_measured:
        measures = f"edgevit bench BUNDLE {choice.target} --variants"
        lines.append(f"not measured: {len(choice.not_measured)} more variants that run there; {measures} measures all of them")
    return "".join(f"\n  {line}" for line in lines)


@click.command()
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@json_option
def rollback(targets: Sequence[str], as_json: bool) -> int:
    """Activate what was active before, on TARGETs."""
    from edgevit.fleet.audit import Action
    from edgevit.fleet.deploy import describe

    def work(session: Session) -> Active:
        active = session.agent.rollback()
        session.note(bundle=active.bundle_name, version=active.bundle_version, digest=active.variant.bundle)
        session.note(variant=describe(active.variant), policy=active.policy)
        return active

    done, code = each_target(targets, work, action=Action("rollback"))
    if as_json:
        emit_json("rollback", {"targets": [{"target": name, "active": encode(active)} for name, active in done]})
        return code
    for name, active in done:
        click.echo(f"{name}: {active.bundle_name} version {active.bundle_version}, {active.variant.artifact} is active again")
    return code
