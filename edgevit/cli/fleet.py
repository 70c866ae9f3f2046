"""``edgevit fleet``: all targets at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from edgevit.cli import exit_code_of
from edgevit.cli.connect import at_once_option, over_devices, select_targets
from edgevit.cli.console import FloatRange, emit_json, json_option, out, say
from edgevit.cli.progress_context import showing_progress
from edgevit.errors import UnknownName, UsageError

if TYPE_CHECKING:
    from edgevit.fleet.audit import Entry
    from edgevit.fleet.check import Checked
    from edgevit.fleet.inventory import Target
    from edgevit.fleet.status import TargetStatus

targets_argument = click.argument("targets", nargs=-1, metavar="[TARGET...]")
timeout_option = click.option(
    "--timeout",
    "limit_s",
    type=FloatRange(1, 3600),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a target may take to answer once it is reached.",
)


@click.group()
def fleet() -> None:
    """All targets at once: are they well, what runs on them, what was done to them."""


@fleet.command()
@targets_argument
@click.option("--prove", is_flag=True, help="Run an inference in every runtime there; default: those proven before count.")
@timeout_option
@at_once_option
@json_option
def check(targets: Sequence[str], prove: bool, limit_s: float, at_once: int, as_json: bool) -> int:
    """Validate the fleet file and reach TARGETs (all of it if none is named), all at once: one table.

    Host key, login, agent, proven runtimes, disk, clock, daemon, what waits there; what is wrong stands below the table with
    the next command. Nothing is changed there, except that the agent is sent where it is absent; no host key is approved.

    The exit code is 3 if a target was unreachable or refused, else 1 if something would keep a deployment from working (no
    proven runtime, nobody who may sign, a board that is not what its profile says), else 0; warnings do not count.
    """
    from edgevit.agentpack import agent_pyz
    from edgevit.fleet.check import NoNewKeys, check_targets
    from edgevit.report.fleet_view import json_check, render_check

    chosen = chosen_targets(targets)
    answered, lock = [], threading.Lock()
    with showing_progress() as progress:
        progress.start("fleet", f"looking at {count_targets(chosen)}", len(chosen), "targets")

        def on_done(one: Checked) -> None:
            with lock:
                answered.append(one)
                progress.advance("fleet", len(answered), f"looking at {count_targets(chosen)}; {one.target.name}: {one.state}")

        prompts, host_agent = NoNewKeys(), agent_pyz().sha256
        checked = check_targets(chosen, prompts, host_agent, prove=prove, limit_s=limit_s, on_done=on_done, at_once=at_once)
        progress.finish("fleet", f"looked at {count_targets(chosen)}")
    code = exit_code_of_check(checked)
    if as_json:
        emit_json("fleet-check", {"exit_code": code, "targets": json_check(checked)})
    else:
        out().print(render_check(checked))
    return code


def exit_code_of_check(checked: Sequence[Checked]) -> int:
    """Of the errors that kept targets from being looked at, else 1 where a finding is an error."""
    failed = exit_code_of(one.error for one in checked if one.error is not None)
    return failed or int(any(one.state == "error" for one in checked))


@fleet.command()
@targets_argument
@timeout_option
@at_once_option
@json_option
def status(targets: Sequence[str], limit_s: float, at_once: int, as_json: bool) -> int:
    """What is active on TARGETs (all if none is named), since when, what was before, and the last run that came home;
    where that is not VALID also the last that was.

    Of a target that is off this shows what this machine knows from its audit log and its results, marked so; the exit code is
    then 3. The verdict of a run is judged anew.
    """
    from edgevit.bench import now
    from edgevit.fleet.audit import read_log
    from edgevit.fleet.check import NoNewKeys, probe_bounded
    from edgevit.fleet.status import LOOK_BACK, Runs, find_runs, from_device, from_here
    from edgevit.places import audit_path
    from edgevit.report.fleet_view import json_status, render_status
    from edgevit.results.store import open_store

    chosen = {target.name: target for target in chosen_targets(targets)}
    log = read_log(audit_path())
    warn_unreadable(log.unreadable)
    with open_store() as store, showing_progress() as progress:
        progress.start("fleet", f"asking {count_targets(chosen)}")
        answered, failed = over_devices(chosen, lambda name: probe_bounded(chosen[name], NoNewKeys(), limit_s), at_once=at_once)
        progress.finish("fleet", f"asked {count_targets(chosen)}")

        def runs_of(name: str) -> Runs:
            # One at a time: the first is mostly enough, and each comes with all its samples.
            return find_runs(run for run_id in store.last_run_ids(name, LOOK_BACK) for run in store.runs_of([run_id]))

        found: dict[str, TargetStatus] = {}
        for name, facts in answered:
            found[name] = from_device(name, facts, runs_of(name), now())
        for name, error in failed:
            found[name] = from_here(name, error, log.entries, runs_of(name))
    statuses = [found[name] for name in chosen]
    code = exit_code_of(error for _, error in failed)
    if as_json:
        emit_json("fleet-status", {"exit_code": code, "targets": json_status(statuses)})
    else:
        out().print(render_status(statuses))
    return code


@fleet.command()
@targets_argument
@click.option("--since", "since_text", metavar="WHEN", help="From then on: a span (12h, 7d, 2w) or a date (2026-01-31).")
@json_option
def audit(targets: Sequence[str], since_text: str | None, as_json: bool) -> None:
    """What was done to TARGETs (all if none is named) from this machine, newest last: who, when, what, how it ended.

    Kept for deploy, gate, rollback, provision, unprovision, daemon install and remove, key allow and revoke, target add,
    trust, prune and remove.
    Names of targets that are gone from the fleet file work too.
    """
    from datetime import UTC, datetime

    from edgevit.fleet.audit import as_values, parse_since, read_log, since
    from edgevit.places import audit_path
    from edgevit.report.fleet_view import render_audit

    moment = parse_since(since_text, datetime.now(UTC)) if since_text is not None else None
    log = read_log(audit_path())
    warn_unreadable(log.unreadable)
    entries = list(log.entries) if moment is None else since(log.entries, moment)
    if targets:
        wanted = _names_in_log(targets, log.entries)
        entries = [entry for entry in entries if entry.target in wanted]
    if as_json:
        emit_json("fleet-audit", {"entries": [as_values(e) for e in entries], "unreadable": list(log.unreadable)})
    elif entries:
        out().print(render_audit(entries))
    else:
        say(f"nothing is recorded{' for these' if targets or moment else ' yet'} in {audit_path()}")


def chosen_targets(patterns: Sequence[str]) -> list[Target]:
    """What ``patterns`` select; without any the whole fleet file. UsageError where that holds nobody."""
    from edgevit.fleet.inventory import load_fleet
    from edgevit.places import fleet_path

    if patterns:
        return select_targets(patterns)
    found = load_fleet(fleet_path())
    if not found.targets:
        raise UsageError(f"there is no target in {found.path}", hint="edgevit target add NAME USER@HOST")
    return list(found.targets)


def count_targets(targets: Sequence[object] | dict[str, Target]) -> str:
    """``1 target``, ``12 targets``."""
    return f"{len(targets)} target{'s' if len(targets) != 1 else ''}"


def warn_unreadable(lines: Sequence[str]) -> None:
    """Name lines of the audit log that are no entries, for people."""
    for line in lines:
        say(f"skipped  {line}")


def _names_in_log(patterns: Sequence[str], entries: Sequence[Entry]) -> set[str]:
    """The target names that ``patterns`` mean, of those in the log and of those in the fleet file."""
    from edgevit.fleet.inventory import names_matching

    recorded = {entry.target for entry in entries}
    wanted: set[str] = set()
    for pattern in patterns:
        matched = names_matching(sorted(recorded), pattern)
        try:
            matched |= {target.name for target in select_targets([pattern])}
        except UnknownName as e:
            if not matched:
                raise UnknownName("target", pattern, sorted(recorded), hint="edgevit fleet audit") from e
        except UsageError:
            if not matched:
                raise
        wanted |= matched
    return wanted
