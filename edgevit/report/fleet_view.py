"""A fleet as one table for people, within 100 columns, with what is wrong below it; and as plain values for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgevit.fleet.check import proven_runtimes

if TYPE_CHECKING:
    from edgevit.errors import EdgevitError
    from edgevit.fleet.audit import Entry
    from edgevit.fleet.check import Checked
    from edgevit.fleet.status import Deployed, TargetStatus

HIDDEN = ("bundle", "version", "digest", "policy", "activated_at", "send_ms")
STYLES = {"ok": "green", "warning": "yellow"}


def render_check(checked: Sequence[Checked]) -> RenderableType:
    """One row a target; findings as footnotes with the next command each."""
    table = _table("target", "state", "agent", "runtimes", "free GB", "clock s", "daemon", "waits", "notes")
    notes: list[tuple[str, str, str]] = []
    for one in checked:
        found = [(f.message, f.hint) for f in one.findings]
        if one.error is not None:
            found = [(_own_words(one.target.name, str(one.error)), one.error.hint)]
        first = len(notes) + 1
        notes += [(one.target.name, message, hint) for message, hint in found]
        numbers = ", ".join(str(n) for n in range(first, len(notes) + 1))
        _row(table, one.target.name, Text(one.state, style=STYLES.get(one.state, "red")), *_cells(one), numbers)
    lines = [_note(number, *note) for number, note in enumerate(notes, 1)]
    return Group(table, *([Text(""), *lines] if lines else []))


def _cells(one: Checked) -> list[str]:
    if one.seen is None:
        return ["–"] * 6
    facts, daemon, clock = one.seen.facts, one.seen.daemon, one.seen.clock
    return [
        "sent now" if one.seen.sent_agent else "current",
        ", ".join(proven_runtimes(facts)) or "none",
        f"{facts.disk_free_mb / 1000:.1f}",
        f"{clock.seconds:+.2f} ±{clock.uncertainty:.2f}",
        "at work" if daemon.at_work else ("down" if daemon.kind else "none"),
        str(len(daemon.queued) + len(daemon.spooled)),
    ]


def json_check(checked: Sequence[Checked]) -> list[dict[str, Any]]:
    """Every figure of the table and more, one object a target."""
    return [_check_values(one) for one in checked]


def _check_values(one: Checked) -> dict[str, Any]:
    values: dict[str, Any] = {
        "target": one.target.name,
        "host": one.target.host,
        "state": one.state,
        "seconds": round(one.seconds, 3),
        "error": _error_values(one.error),
        "findings": [asdict(finding) for finding in one.findings],
    }
    seen = one.seen
    if seen is None:
        return values
    return {
        **values,
        "agent": {"sha256": seen.facts.agent_sha256, "version": seen.facts.agent_version, "sent_now": seen.sent_agent},
        "board": seen.facts.board_model,
        "runtimes": list(proven_runtimes(seen.facts)),
        "signers": seen.facts.signers,
        "disk_free_mb": seen.facts.disk_free_mb,
        "clock_skew_s": round(seen.clock.seconds, 4),
        "clock_uncertainty_s": round(seen.clock.uncertainty, 4),
        "daemon": {"at_work": seen.daemon.at_work, "kind": seen.daemon.kind, "unit_state": seen.daemon.unit_state},
        "queued": list(seen.daemon.queued),
        "spooled": list(seen.daemon.spooled),
    }


def render_status(statuses: Sequence[TargetStatus]) -> RenderableType:
    """What is active where; what was not asked of the device itself is marked with where it is from, and as of when."""
    table = _table("target", "active", "variant", "since (UTC)", "before", "last run (UTC)", "verdict", "waits")
    notes = []
    for one in statuses:
        mark = ""
        if one.error is not None:
            notes.append((one.target, _off(one), one.error.hint))
            mark = f" [{len(notes)}]"
        active = one.active
        _row(
            table,
            one.target + mark,
            _named(active) if active else ("nothing" if one.error is None else "–"),
            active.variant if active else "–",
            _minute(active.since) if active else "–",
            _named(one.previous) if one.previous else "–",
            _last_run(one),
            Text(one.last_run.verdict, style="green" if one.last_run.verdict == "VALID" else "red") if one.last_run else "–",
            "–" if one.waiting is None else str(one.waiting),
        )
    lines = [_note(number, *note) for number, note in enumerate(notes, 1)]
    return Group(table, *([Text(""), *lines] if lines else []))


def _last_run(one: TargetStatus) -> str:
    if one.last_run is None:
        return "none"
    last, valid = _minute(one.last_run.ended_at), one.last_valid_run
    if valid == one.last_run:
        return last
    return f"{last}\n{'none' if valid is None else _minute(valid.ended_at)} VALID"


def _off(one: TargetStatus) -> str:
    known = "nothing is known of it here" if not one.as_of else f"shown is what the {one.source} says, as of {one.as_of}"
    return f"{_own_words(one.target, str(one.error))}; {known}"


def json_status(statuses: Sequence[TargetStatus]) -> list[dict[str, Any]]:
    """One object a target."""
    return [
        {
            "target": one.target,
            "source": one.source,
            "as_of": one.as_of or None,
            "active": asdict(one.active) if one.active else None,
            "previous": asdict(one.previous) if one.previous else None,
            "last_run": asdict(one.last_run) if one.last_run else None,
            "last_valid_run": asdict(one.last_valid_run) if one.last_valid_run else None,
            "waiting": one.waiting,
            "error": _error_values(one.error),
        }
        for one in statuses
    ]


def render_audit(entries: Sequence[Entry]) -> RenderableType:
    """One row an action, oldest first."""
    table = _table("when (UTC)", "who", "what", "target", "outcome", "s", "details")
    for one in entries:
        done = one.outcome == "done"
        outcome = Text(one.outcome, style="green" if done else "red")
        details = f"{_details(one.details)}{'; ' if one.error and one.details else ''}{one.error}"
        _row(table, _minute(one.at), one.who, one.action, one.target, outcome, f"{one.seconds:.1f}", details)
    return table


def _details(details: Mapping[str, Any]) -> str:
    """The details that fit into a table; ``--json`` has all of them."""
    shown = []
    if "bundle" in details:
        shown.append(f"{details['bundle']} v{details.get('version', '?')}")
    shown += [f"{key} {value}" for key, value in details.items() if key not in HIDDEN and value is not False]
    return ", ".join(shown)


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


def _row(table: Table, *cells: str | Text) -> None:
    """Texts as they are: what a device or a log says is no markup."""
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))


def _note(number: int, target: str, message: str, hint: str) -> Text:
    text = Text.assemble((f"{number}  {target}: ", "bold"), message)
    if hint:
        text.append("\n   next:  ", style="cyan").append(hint)
    return text


def _own_words(target: str, message: str) -> str:
    return message.removeprefix(f"{target}: ").removeprefix(f"{target} ")


def _named(deployed: Deployed) -> str:
    return f"{deployed.name} v{deployed.version}"


def _minute(moment: str) -> str:
    """``2026-01-31T12:00:59.123Z`` → ``2026-01-31 12:00``."""
    return moment[:16].replace("T", " ")


def _error_values(error: EdgevitError | None) -> dict[str, Any] | None:
    if error is None:
        return None
    return {
        "kind": type(error).__name__,
        "code": getattr(error, "code", None),
        "message": str(error),
        "hint": error.hint,
    }
