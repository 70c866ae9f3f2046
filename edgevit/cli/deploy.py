"""``edgevit deploy`` and ``edgevit rollback``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from device_agents.wire import encode
from edgevit.cli.connect import (
    Session,
    at_once_option,
    max_rate_option,
    open_session,
    over_devices,
    select_targets,
    show_failures,
)
from edgevit.cli.console import emit_json, error_json, json_option, out, say
from edgevit.cli.model_options import FILE
from edgevit.cli.progress_context import showing_progress
from edgevit.cli.rollout_options import Rollout, rollout_options
from edgevit.cli.selection import gate_options, make_gates
from edgevit.fleet.retry import RETRIES
from edgevit.schedule import AT_ONCE
from edgevit.select import POLICIES

if TYPE_CHECKING:
    from device_agents.wire import Active
    from edgevit.bundle import Bundle
    from edgevit.cli.ship import Order, Planned, Shipped
    from edgevit.errors import EdgevitError
    from edgevit.fleet.inventory import Target
    from edgevit.progress import Progress
    from edgevit.select import Choice

F = TypeVar("F", bound=Callable[..., Any])


def lock_options(command: F) -> F:
    """What to do where another operator is at work, where a target is pinned, and where a link is lost."""
    command = click.option(
        "--retries",
        type=click.IntRange(0, 100),
        default=RETRIES,
        show_default=True,
        metavar="N",
        help="How often a lost link is taken up again, with growing, random waits. A device that is off is not waited for.",
    )(command)
    command = click.option("--despite-pin", is_flag=True, help="Also where the fleet file pins the target to another version.")(
        command
    )
    return click.option(
        "--take-over", is_flag=True, help="Take the lock of another operator who is gone; it ends by itself too."
    )(command)


@click.command()
@click.argument("bundle", type=FILE)
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@click.option("--dry-run", is_flag=True, help="Say what would be sent, installed, activated and removed; change nothing.")
@click.option(
    "--select",
    "wanted",
    metavar="POLICY|VARIANT",
    help="fastest, smallest or most-accurate of what was measured there; or ARTIFACT[:RUNTIME[:PROVIDER[:THREADS]]].",
)
@gate_options
@click.option("--allow-older", is_flag=True, help="Let an older version replace a newer one.")
@click.option("--prune", is_flag=True, help="Then remove bundles that are neither active, previous nor newest of their name.")
@rollout_options
@lock_options
@at_once_option
@max_rate_option
@json_option
def deploy(
    bundle: Path,
    targets: Sequence[str],
    dry_run: bool,
    wanted: str | None,
    max_loss: float,
    anyway: bool,
    allow_older: bool,
    prune: bool,
    rollout: Rollout | None,
    take_over: bool,
    despite_pin: bool,
    retries: int,
    at_once: int,
    max_rate: float | None,
    as_json: bool,
) -> int:
    """Ship BUNDLE to TARGETs and activate it there, after the device itself has verified signature and bytes.

    Without --select the first artifact of the bundle that a proven runtime of the device runs is activated. With a policy the
    variant is chosen for each target from what `edgevit bench BUNDLE TARGET --variants` measured on it; the evidence is in
    `edgevit results choices`. A second deploy of the same bundle sends and changes nothing.

    With --wave the devices are taken in waves, in the fleet file's order. After each wave every device of it must hold the
    gates against what was active there before; else the whole wave goes back to that, and the roll-out ends (exit code 1).
    Killed and started again, it goes on where it was.

    One operator at a time: a device is locked while it is deployed to. Targets that are off or refuse do not keep the others
    from being finished; the exit code is then 3.
    """
    from edgevit.bundle import open_bundle
    from edgevit.cli.ship import Order
    from edgevit.fleet.operator import this_operator
    from edgevit.results.store import open_store

    gates = make_gates(max_loss, anyway, choosing=wanted in POLICIES, hint="edgevit deploy BUNDLE TARGET --select fastest")
    opened = open_bundle(bundle, None)
    with ExitStack() as stack:
        store = stack.enter_context(open_store()) if wanted in POLICIES else None
        order = Order(
            bundle=opened,
            operator=this_operator(f"deploy {opened.manifest.name} v{opened.manifest.version}"),
            wanted=wanted,
            gates=gates,
            store=store,
            allow_older=allow_older,
            prune=prune,
            take_over=take_over,
            despite_pin=despite_pin,
            retries=retries,
            max_rate_mbit=max_rate,
        )
        chosen = select_targets(targets)
        if rollout is not None:
            from edgevit.cli.rollout import roll_out

            return roll_out(order, rollout, chosen, bundle, dry_run=dry_run, at_once=at_once, as_json=as_json)
        if dry_run:
            return show_plans(order, chosen, at_once=at_once, as_json=as_json)
        return _deploy_now(order, chosen, at_once=at_once, as_json=as_json)


def show_plans(order: Order, targets: Sequence[Target], *, at_once: int, as_json: bool) -> int:
    """What a deployment would do to each; the exit code."""
    from edgevit.cli.ship import plan_one
    from edgevit.fleet.audit import read_log
    from edgevit.places import audit_path
    from edgevit.report.deploy_view import render_plans

    entries = read_log(audit_path()).entries

    def work(target: Target, progress: Progress) -> Planned:
        return plan_one(order, target, entries, progress)

    done, failed = on_devices(f"planning {_named(order.bundle)}", targets, work, at_once=at_once)
    code = show_failures(failed)
    if as_json:
        values = [one.as_json() for _, one in done] + [failure_json(name, error) for name, error in failed]
        emit_json("deploy", {"dry_run": True, "targets": values})
        return code
    if done:
        out().print(render_plans(done))
    show_choices([one.choice for _, one in done])
    return code


def _deploy_now(order: Order, targets: Sequence[Target], *, at_once: int, as_json: bool) -> int:
    done, failed = ship_all(order, targets, at_once=at_once)
    code = show_failures(failed)
    if as_json:
        values = [one.as_json() for _, one in done] + [failure_json(name, error) for name, error in failed]
        emit_json("deploy", {"dry_run": False, "targets": values})
        return code
    show_shipped(order.bundle.manifest.name, targets, done, failed)
    return code


def ship_all(
    order: Order, targets: Sequence[Target], *, at_once: int = AT_ONCE
) -> tuple[list[tuple[str, Shipped]], list[tuple[str, EdgevitError]]]:
    """Deploy to every target, with progress: what was done and what failed."""
    from edgevit.cli.ship import ship_one

    title = f"deploying {_named(order.bundle)}"
    return on_devices(title, targets, lambda target, progress: ship_one(order, target, progress), at_once=at_once)


def show_shipped(
    bundle: str, targets: Sequence[Target], done: Sequence[tuple[str, Shipped]], failed: Sequence[tuple[str, EdgevitError]]
) -> None:
    """One row a target, in the fleet's order, and what choices rest on."""
    from edgevit.cli.ship import outcome_word
    from edgevit.report.deploy_view import render_shipped

    found: dict[str, Shipped | str] = {**dict(done), **{name: outcome_word(error) for name, error in failed}}
    out().print(render_shipped(bundle, [(target.name, found[target.name]) for target in targets]))
    show_choices([one.choice for _, one in done])
    for name, one in done:
        if one.took_over:
            say(f"{name}: took the lock over from {one.took_over}")


T = TypeVar("T")


def on_devices(
    title: str, targets: Sequence[Target], work: Callable[[Target, Progress], T], *, at_once: int
) -> tuple[list[tuple[str, T]], list[tuple[str, EdgevitError]]]:
    """``work`` for each target at most ``at_once`` together, with one line of progress for each and one for all."""
    import threading

    by_name, over, lock = {t.name: t for t in targets}, [0], threading.Lock()
    with showing_progress() as progress:
        several = len(targets) > 1
        if several:
            progress.start("all devices", f"{title} to {len(targets)} devices", len(targets), "devices")

        def one(name: str) -> T:
            try:
                return work(by_name[name], progress)
            finally:
                with lock:
                    over[0] += 1
                    progress.advance("all devices", over[0])

        done, failed = over_devices(by_name, one, at_once=at_once)
        progress.finish("all devices", f"{title}: {len(done)} of {len(targets)} done")
    return done, failed


def failure_json(name: str, error: EdgevitError) -> dict[str, Any]:
    """A target that was not deployed to, in ``--json``."""
    from edgevit.cli.ship import outcome_word

    return {"target": name, "outcome": outcome_word(error), "error": error_json(error)}


def _named(bundle: Bundle) -> str:
    return f"{bundle.manifest.name} v{bundle.manifest.version}"


def show_choices(choices: Sequence[Choice | None]) -> None:
    """The lines below a deployment that say what each choice rests on."""
    from edgevit.variants import name_variant

    for choice in choices:
        if choice is None:
            continue
        head = f"{choice.policy}: {name_variant(choice.variant)}, {choice.reason}, by run {', '.join(choice.runs)}"
        lines = [head, *(f"dropped {name_variant(one.variant)}: {one.reason}" for one in choice.dropped)]
        lines += [f"not held: {reason}" for reason in choice.not_held]
        if choice.not_measured:
            measures = f"edgevit bench BUNDLE {choice.target} --variants"
            lines.append(
                f"not measured: {len(choice.not_measured)} more variants that run there; {measures} measures all of them"
            )
        click.echo(f"{choice.target}:")
        for line in lines:
            click.echo(f"  {line}")


@click.command()
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@lock_options
@at_once_option
@json_option
def rollback(targets: Sequence[str], take_over: bool, despite_pin: bool, retries: int, at_once: int, as_json: bool) -> int:
    """Activate what was active before, on TARGETs."""
    from edgevit.fleet.audit import Action, recording
    from edgevit.fleet.deploy import describe
    from edgevit.fleet.operator import this_operator
    from edgevit.fleet.retry import keep_trying
    from edgevit.fleet.undo import go_back

    operator = this_operator("rollback")

    def work(target: Target, progress: Progress) -> Active:
        progress.start(target.name, f"{target.name}: going back")
        undo: list[str] = []

        def one(session: Session) -> Active:
            return go_back(session.agent, operator, undo, target, take_over=take_over, despite_pin=despite_pin)

        try:
            with recording(Action("rollback"), target) as record:
                active, _ = keep_trying(
                    lambda: open_session(target),
                    one,
                    retries=retries,
                    on_wait=lambda text: progress.start(target.name, f"{target.name}: {text}"),
                )
                record.note(bundle=active.bundle_name, version=active.bundle_version, digest=active.variant.bundle)
                record.note(variant=describe(active.variant), policy=active.policy)
            return active
        finally:
            progress.finish(target.name)

    done, failed = on_devices("rolling back", select_targets(targets), work, at_once=at_once)
    code = show_failures(failed)
    if as_json:
        values: list[dict[str, Any]] = [{"target": name, "active": encode(active)} for name, active in done]
        emit_json("rollback", {"targets": values + [failure_json(name, error) for name, error in failed]})
        return code
    for name, active in done:
        click.echo(f"{name}: {active.bundle_name} version {active.bundle_version}, {active.variant.artifact} is active again")
    return code
