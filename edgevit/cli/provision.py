"""``edgevit target provision`` and ``unprovision``: the Python environment on a device, made and taken away."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgevit.cli.connect import Session, each_target, select_targets, show_failures, try_each_target
from edgevit.cli.console import emit_json, has_terminal, json_failed, json_option, out
from edgevit.cli.model_options import FILE
from edgevit.cli.progress_context import showing_progress
from edgevit.errors import UsageError

if TYPE_CHECKING:
    from device_agents.wire import Facts
    from edgevit.fleet.agent import Provisioned
    from edgevit.fleet.provision import Prepared, Wishes


@click.command()
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@click.option("--dry-run", is_flag=True, help="Say what would be sent and installed; change nothing.")
@click.option(
    "--wheelhouse",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder with the wheels, pip's own among them; no index is asked.",
)
@click.option("--with-pillow", is_flag=True, help="Pillow too, so that the device itself can read JPEG and PNG.")
@click.option("--upgrade", is_flag=True, help="Ask the index for newer versions, also where all is there.")
@click.option("--sign-key", type=FILE, help="Whose signatures the target shall accept; default: edgevit's own key.")
@json_option
def provision(
    targets: Sequence[str],
    dry_run: bool,
    wheelhouse: Path | None,
    with_pillow: bool,
    upgrade: bool,
    sign_key: Path | None,
    as_json: bool,
) -> int:
    """Make a private Python environment on TARGETs with the runtimes that fit, and say who may sign for them.

    The wheels are resolved here, for each target's Python, machine and C library, through your own pip configuration, and sent:
    the device needs neither network nor pip. Where all is there already, nothing is sent or changed; what broke off goes on
    where it stopped. The environment is taken into use once a runtime has passed an inference in it.
    """
    from edgevit.fleet.provision import Wishes

    if upgrade and wheelhouse is not None:
        raise UsageError("--upgrade asks an index for newer wheels, --wheelhouse asks none", hint="leave one of them out")
    wishes = Wishes(wheelhouse.absolute() if wheelhouse else None, with_pillow, upgrade)
    return provision_targets(targets, sign_key, wishes, dry_run=dry_run, as_json=as_json)


def provision_targets(
    targets: Sequence[str],
    sign_key: Path | None = None,
    wishes: Wishes | None = None,
    *,
    dry_run: bool = False,
    as_json: bool = False,
) -> int:
    """Provision what ``targets`` selects, show what became of each, and return the exit code."""
    from edgevit import signing
    from edgevit.cli.build import signing_key
    from edgevit.cli.key import principal
    from edgevit.fleet.audit import Action
    from edgevit.fleet.provision import Wishes, prepare, provision_target
    from edgevit.report.provision_view import as_values, render_provision

    select_targets(targets)  # a name mistyped must not leave a new signing key behind
    public = signing.public_line(signing_key(sign_key))
    line = signing.allowed_signers_line(principal(), public)
    action = None if dry_run else Action("provision", {"key": signing.fingerprint(public), "signer": principal()})
    with showing_progress() as progress:

        def work(session: Session) -> tuple[Prepared, Facts, Provisioned | None]:
            agent, name = session.agent, session.target.name
            facts = agent.probe(anew=True)  # what is remembered may have come or gone since: a vendor's runtime, a library
            prepared = prepare(agent, name, session.profile(facts), facts, line, wishes or Wishes(), progress)
            if dry_run:
                return prepared, facts, None
            session.note(runtimes=", ".join(prepared.plan.runtimes), requirements=", ".join(prepared.plan.requirements))
            now, provisioned = provision_target(agent, name, prepared, line, progress)
            session.note(made=provisioned.made)
            return prepared, now, provisioned

        done, failed = try_each_target(targets, work, sign_key=sign_key, action=action)
    code = show_failures(failed)
    if as_json:
        rows = [{"target": name, **as_values(*found)} for name, found in done]
        emit_json("provision", {"dry_run": dry_run, "targets": rows, "failed": json_failed(failed)})
        return code
    for name, found in done:
        out().print(render_provision(name, *found))
    return code


@click.command()
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--take-over", is_flag=True, help="Take the lock of another operator who is gone; it ends by itself too.")
def unprovision(targets: Sequence[str], yes: bool, take_over: bool) -> int:
    """Take everything edgevit put on TARGETs away: bundles, results that wait there, the Python environment."""
    chosen = [t.name for t in select_targets(targets)]
    if not yes:
        if not has_terminal():
            raise UsageError("this removes the agent's whole folder there; nobody can be asked", hint="… --yes")
        click.confirm(f"Remove everything of edgevit from {', '.join(chosen)}?", abort=True, err=True)
    from edgevit.fleet.audit import Action
    from edgevit.fleet.operator import holding_where_it_fits, this_operator

    operator = this_operator("target unprovision")

    def work(session: Session) -> None:
        # The lock goes with everything else.
        with holding_where_it_fits(session.agent, operator, take_over=take_over, keep=True):
            session.agent.unprovision()

    done, code = each_target(chosen, work, action=Action("unprovision"))
    for name, _ in done:
        click.echo(f"{name}: nothing of edgevit is left there")
    return code
