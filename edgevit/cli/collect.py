"""``edgevit collect``: sends what waits here for devices that were off, brings results home."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevit.cli.bench import deliver
from edgevit.cli.connect import Session, at_once_option, open_session, say_stopping, select_targets, show_failures
from edgevit.cli.console import emit_json, json_option, say
from edgevit.cli.progress_context import showing_progress
from edgevit.errors import DeviceError, EdgevitError, UnknownName, UsageError
from edgevit.fleet import outbox
from edgevit.fleet.outbox import Entry, Hold, Listing
from edgevit.schedule import Piece, Rest, Turn, device_of, run_schedule

if TYPE_CHECKING:
    from edgevit.bench import Measured
    from edgevit.fleet.agent import WaitingRun
    from edgevit.fleet.inventory import Target
    from edgevit.progress import Progress
    from edgevit.results.store import Store


@click.command()
@click.argument("targets", nargs=-1, metavar="[TARGET...]")
@click.option("--wait", is_flag=True, help="Also wait for what is still being measured.")
@click.option(
    "--cancel",
    "cancelled",
    multiple=True,
    metavar="RUN",
    help="End this run there: it comes home as interrupted. One that still waits here is taken back.",
)
@at_once_option
@json_option
def collect(targets: Sequence[str], wait: bool, cancelled: Sequence[str], at_once: int, as_json: bool) -> int:
    """Send what waits here for TARGETs (all if none is named) that were off, and bring home results that wait there.

    Each job is sent once, whoever is killed and however many collect at the same time. One whose bundle vanished or changed is
    an error and stays until it is cancelled; the rest goes on. What a device left undone when it was switched off begins again.
    """
    from edgevit.places import outbox_dir
    from edgevit.results.store import open_store

    folder = outbox_dir()
    taken = outbox.take_back(folder, cancelled)
    listing = outbox.read(folder)
    for line in listing.unreadable:
        say(f"skipped  {line}")
    if cancelled and len(taken) == len(set(cancelled)):
        _show(_Report(taken=taken), as_json)
        return 0
    chosen, strangers = _choose(targets, listing)
    with open_store() as store, showing_progress() as progress:
        collecting = _Collecting(folder, listing, store, progress, wait, frozenset(cancelled) - set(taken))
        outcomes = run_schedule([collecting.piece(t) for t in chosen], at_once=at_once, on_stop=say_stopping)
    code = show_failures([(o.name, o.error) for o in outcomes if o.error is not None] + strangers + collecting.failed)
    names = {target.name for target in chosen} | {name for name, _ in strangers}
    left = [entry for entry in outbox.read(folder).entries if entry.target in names]
    homes = {o.name: o.value for o in outcomes if o.value is not None}
    taken += collecting.taken
    _show(_Report(taken, collecting.sent, homes, left), as_json)
    if unknown := [run for run in cancelled if run not in {*taken, *collecting.ended}]:
        nowhere = f"no run {', '.join(unknown)} is queued or running on {', '.join(t.name for t in chosen)}"
        if code == 3:
            raise DeviceError(f"{nowhere}, as far as they were reached", hint="the same command once the others can be reached")
        raise UsageError(nowhere, hint="edgevit collect")
    return code


def _choose(patterns: Sequence[str], listing: Listing) -> tuple[list[Target], list[tuple[str, EdgevitError]]]:
    """The targets meant, ``local`` and the whole fleet file where none is named; and what waits here for others."""
    chosen = select_targets(patterns or ["*"])
    if patterns:
        return chosen, []
    known = [target.name for target in chosen]
    strangers: list[tuple[str, EdgevitError]] = [
        (
            entry.target,
            UnknownName(
                "target",
                entry.target,
                known,
                hint=f"edgevit target add {entry.target} …, or edgevit collect --cancel {entry.run_id}",
            ),
        )
        for entry in listing.entries
        if entry.target not in known
    ]
    return chosen, strangers


@dataclass(frozen=True)
class _Home:
    """What came home from one target, and what is still there."""

    measured: tuple[Measured, ...]
    left: tuple[WaitingRun, ...]


@dataclass(frozen=True)
class _Report:
    taken: Sequence[str] = ()
    sent: Sequence[Entry] = ()
    homes: dict[str, _Home] = field(default_factory=dict)
    waiting_here: Sequence[Entry] = ()


@dataclass
class _Collecting:
    """One ``collect`` over many targets. Its lists grow from threads; each append is atomic."""

    folder: Path
    listing: Listing
    store: Store
    progress: Progress
    wait: bool
    cancelled: frozenset[str]
    sent: list[Entry] = field(default_factory=list)
    failed: list[tuple[str, EdgevitError]] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)

    def piece(self, target: Target) -> Piece[_Home]:
        return Piece(target.name, device_of(target), lambda turn: self._first(target, turn))

    def _first(self, target: Target, turn: Turn) -> _Home | Rest[_Home]:
        with open_session(target) as session:
            self._cancel(session)
            for entry in outbox.of_target(self.listing, target.name):
                if entry.run_id not in self.cancelled:
                    self._send(session, entry)
            # Waiting is for later where other devices still wait to be sent their jobs.
            later = self.wait and turn.others_wait
            home = self._bring(session, wait=self.wait and not later)
        return Rest(lambda _turn: self._again(target, home)) if later and home.left else home

    def _again(self, target: Target, before: _Home) -> _Home:
        with open_session(target) as session:
            after = self._bring(session, wait=True)
        return _Home((*before.measured, *after.measured), after.left)

    def _cancel(self, session: Session) -> None:
        from edgevit.bench import cancel_runs

        entries = outbox.of_target(self.listing, session.target.name)
        with ExitStack() as held:
            # Their sending was cut off, so whether they arrived is asked; and nobody may send them again meanwhile.
            holds = {
                entry.run_id: held.enter_context(outbox.hold(self.folder, entry.run_id, wait=True))
                for entry in entries
                if entry.run_id in self.cancelled
            }
            there = cancel_runs(session.agent, self.cancelled)
            self.ended.extend(there)
            for run_id, standing in holds.items():
                if standing is Hold.MINE:
                    outbox.remove(self.folder, run_id)
                    self.taken += [run_id] if run_id not in there else []

    def _send(self, session: Session, entry: Entry) -> None:
        try:
            standing = deliver(session, entry, self.store, self.progress)
        except EdgevitError as error:
            from edgevit.errors import LostLink, Unreachable

            if isinstance(error, LostLink | Unreachable):
                raise
            self.failed.append((session.target.name, error))
            return
        if standing is Hold.MINE:
            self.sent.append(entry)
        elif standing is Hold.ELSEWHERE:
            say(f"{entry.target}: run {entry.run_id} is being sent by another edgevit")

    def _bring(self, session: Session, *, wait: bool) -> _Home:
        from edgevit.bench import bring_home

        home = bring_home(session.agent, self.store, self.progress, wait=wait, wait_for=self.cancelled)
        left = session.agent.waiting()
        if any(run.state == "done" for run in left):  # done since the device was asked
            home += bring_home(session.agent, self.store, self.progress, wait=False)
            left = session.agent.waiting()
        if left and session.agent.resume():
            say(f"{session.target.name}: nobody was at work on what waits there, after a reboot say; it goes on")
        return _Home(tuple(home), left)


def _show(report: _Report, as_json: bool) -> None:
    if as_json:
        emit_json("collect", _as_json(report))
        return
    for run_id in report.taken:
        click.echo(f"run {run_id} is taken back; it was not sent")
    for entry in report.sent:
        click.echo(f"{entry.target}: {entry.run_id} is sent; it waited here since {entry.queued_at}")
    batches: dict[str, None] = {}
    waiting = {entry.target for entry in report.waiting_here}
    for name, home in report.homes.items():
        for one in home.measured:
            note = "" if one.newly_stored else " (was here already)"
            click.echo(f"{name}: {one.run.job.run_id} measured {one.run.ended_at}, {one.run.status}{note}")
            batches[one.run.job.batch_id] = None
        for left in home.left:
            click.echo(f"{name}: {left.run_id} is {left.state}")
        if not home.measured and not home.left and name not in waiting:
            click.echo(f"{name}: nothing waits")
    for entry in report.waiting_here:
        what = ", ".join(kept.name for kept in entry.bundles)
        click.echo(f"{entry.target}: {entry.run_id} waits here since {entry.queued_at} ({what}, for {entry.owner})")
    for batch in batches:
        say(f"next:  edgevit results show {batch}")


def _as_json(report: _Report) -> dict[str, Any]:
    return {
        "taken_back": list(report.taken),
        "sent": [{"target": e.target, "run": e.run_id, "queued_at": e.queued_at} for e in report.sent],
        "targets": [
            {
                "target": name,
                "home": [
                    {
                        "run": one.run.job.run_id,
                        "batch": one.run.job.batch_id,
                        "status": one.run.status,
                        "ended_at": one.run.ended_at,
                        "newly_stored": one.newly_stored,
                    }
                    for one in home.measured
                ],
                "there": [{"run": left.run_id, "state": left.state} for left in home.left],
            }
            for name, home in report.homes.items()
        ],
        "waits_here": [
            {
                "target": e.target,
                "run": e.run_id,
                "batch": e.batch_id,
                "queued_at": e.queued_at,
                "owner": e.owner,
                "bundles": [{"name": kept.name, "path": kept.path, "digest": kept.digest} for kept in e.bundles],
            }
            for e in report.waiting_here
        ],
    }
