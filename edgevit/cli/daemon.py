"""``edgevit target daemon``: the agent kept running on a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from edgevit.cli.connect import Session, each_target, show_failures, try_each_target
from edgevit.cli.console import emit_json, json_failed, json_option, out
from edgevit.cli.progress_context import showing_progress
from edgevit.errors import EdgevitError, UsageError

if TYPE_CHECKING:
    from device_agents.wire import DaemonStatus

targets_argument = click.argument("targets", nargs=-1, required=True, metavar="TARGET...")


@click.group()
def daemon() -> None:
    """The agent kept running: works detached jobs off, survives reboots."""


@daemon.command()
@targets_argument
@click.option(
    "--unit",
    "kind",
    type=click.Choice(["auto", "system", "user"]),
    default="auto",
    show_default=True,
    help="A system unit (needs `sudo -n` on the device once) or one of the SSH user; auto: system where that is allowed.",
)
@click.option("--as", "user", metavar="USER", help="The device's user that the system unit runs as; default: the SSH user.")
@click.option("--disk-quota-mb", "quota_mb", type=click.IntRange(1), help="What the agent's folder may take; default: all.")
@json_option
def install(targets: Sequence[str], kind: str, user: str | None, quota_mb: int | None, as_json: bool) -> int:
    """Keep the agent running on TARGETs, and show which protections really hold there."""
    from edgevit.fleet.audit import Action

    if user is not None and kind == "user":
        raise UsageError("--as names who a system unit runs as; one of the user runs as the SSH user", hint="leave --unit out")
    with showing_progress() as progress:

        def work(session: Session) -> DaemonStatus:
            needs = session.profile(session.agent.probe(quick=True)).daemon
            status, _ = session.agent.install_daemon(
                kind="system" if user is not None else kind,
                user=user,
                groups=needs.groups if needs else (),
                devices=needs.devices if needs else (),
                quota_mb=quota_mb,
                progress=progress,
            )
            session.note(unit=status.unit, kind=status.kind)
            return status

        done, failed = try_each_target(targets, work, action=Action("daemon install"))
    return _show(done, failed, as_json)


@daemon.command()
@targets_argument
@json_option
def status(targets: Sequence[str], as_json: bool) -> int:
    """Whether a daemon is at work on TARGETs, what waits there, what it takes, what protects it."""
    return _show(*try_each_target(targets, lambda session: session.agent.daemon_status()), as_json)


@daemon.command()
@targets_argument
@click.option("--lines", type=click.IntRange(1, 10_000), default=30, show_default=True)
@json_option
def logs(targets: Sequence[str], lines: int, as_json: bool) -> int:
    """The last lines of the daemon's log, and of the servers' that worked its jobs, each of which says when it began."""
    done, failed = try_each_target(targets, lambda session: session.agent.daemon_logs(lines))
    code = show_failures(failed)
    if as_json:
        rows = [{"target": n, "daemon": d, "server": s} for n, (d, s) in done]
        emit_json("daemon-logs", {"targets": rows, "failed": json_failed(failed)})
        return code
    for name, (said, server) in done:
        for line in said or ["no daemon ever ran here"]:
            click.echo(f"{name}: {line}")
        for line in server:
            click.echo(f"{name}: a server: {line}")
    return code


@daemon.command()
@targets_argument
def remove(targets: Sequence[str]) -> int:
    """Stop the daemon of TARGETs and remove its unit. What waits in its queue and spool stays."""
    from edgevit.fleet.audit import Action

    def work(session: Session) -> bool:
        removed = session.agent.remove_daemon()
        session.note(removed=removed)
        return removed

    done, code = each_target(targets, work, action=Action("daemon remove"))
    for name, removed in done:
        click.echo(f"{name}: {'the daemon is gone' if removed else 'there was no daemon'}")
    return code


def _show(found: Sequence[tuple[str, DaemonStatus]], failed: Sequence[tuple[str, EdgevitError]], as_json: bool) -> int:
    """Show the daemons that answered and the targets that did not; the exit code."""
    from device_agents.wire import encode
    from edgevit.report.facts_view import render_daemon

    code = show_failures(failed)
    if as_json:
        rows = [{"target": name, "status": encode(status)} for name, status in found]
        emit_json("daemon", {"targets": rows, "failed": json_failed(failed)})
        return code
    for name, one in found:
        out().print(render_daemon(name, one))
    return code
