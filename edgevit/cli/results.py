"""``edgevit results``: what has been measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from edgevit.cli.console import emit_json, json_failed, json_option, out, say
from edgevit.cli.results_compare import compare, history
from edgevit.cli.results_store import export, import_, prune
from edgevit.errors import UsageError

if TYPE_CHECKING:
    from device_agents.wire import Run
    from edgevit.errors import EdgevitError
    from edgevit.results.spread import DeviceSpread
    from edgevit.results.store import Store
    from edgevit.results.summary import Summary


RECENT = 10
"""Runs of a target that tell its noise: more narrow nothing that the number of devices does not bound."""


def summarize_runs(runs: Sequence[Run]) -> list[Summary]:
    """Runs → summaries, with what relates them to fp32 on the same target."""
    from edgevit.results.reference import relate
    from edgevit.results.stats import summarize

    return relate([s for run in runs for s in summarize(run)])


def show_batch(
    store: Store,
    batch: str,
    failed: Sequence[tuple[str, EdgevitError]] = (),
    *,
    wide: bool,
    as_json: bool,
    require_valid: bool = False,
    operators: bool = False,
) -> int:
    """The table (or JSON) of one batch, what its plan found besides, and with ``operators`` their times; 1 where a measurement
    failed, or ``require_valid`` and one is INVALID. ``failed``: targets that gave no run, and why, for JSON."""
    from edgevit.results.compare import compare_pairs

    runs = store.runs(batch_id=batch)
    summaries = summarize_runs(runs)
    comparisons = [c for run in runs for c in compare_pairs(run)]
    spreads = _device_spreads(store, runs, batch)
    if as_json:
        from edgevit.report.plans_view import json_comparisons
        from edgevit.report.spread_view import json_spreads
        from edgevit.report.table import json_rows

        document: dict[str, Any] = {"batch": batch, "rows": json_rows(summaries)}
        if spreads:
            document["device_spread"] = json_spreads(spreads)
        if failed:
            document["failed"] = json_failed(failed)
        emit_json("results", {**document, "comparisons": json_comparisons(comparisons)} if comparisons else document)
    else:
        from edgevit.report.plans_view import render_comparisons, render_operators, render_sustained
        from edgevit.report.spread_view import render_spreads
        from edgevit.report.table import render_table

        out(wide).print(render_table(summaries, wide=wide))
        if spreads:
            out(wide).print(render_spreads(spreads))
        if any(s.sustained is not None for s in summaries):
            out(wide).print(render_sustained(summaries))
        if comparisons:
            out(wide).print(render_comparisons(comparisons))
        if operators:
            _require_operators(summaries)
            out(wide).print(render_operators(summaries))
        say(f"batch {batch}; edgevit report --batch {batch} -o report.html")
    return int(any(s.failure or (require_valid and not s.verdict.valid) for s in summaries))


def _device_spreads(store: Store, runs: Sequence[Run], batch: str) -> list[DeviceSpread]:
    """How much devices of one profile differ, of a batch on two or more targets; other runs of the same bundles there help to
    tell devices from noise, the newest of them."""
    from edgevit.results.spread import device_spreads

    targets = {run.job.target for run in runs}
    if len(targets) < 2:
        return []
    bundles = sorted({v.bundle for run in runs for v in run.job.variants})
    known = {run.job.run_id for run in runs}
    others = [run for run in store.recent_runs(bundles, targets, RECENT) if run.job.run_id not in known]
    every = sorted([*runs, *others], key=lambda run: (run.started_at, run.job.run_id))
    return device_spreads(every, summarize_runs(every), batch)


def _require_operators(summaries: Sequence[Summary]) -> None:
    if not any(s.profile is not None or s.profile_absent for s in summaries):
        raise UsageError("no operator was timed in this batch", hint="edgevit bench BUNDLE TARGET --profile-ops")


@click.group()
def results() -> None:
    """What has been measured, in batches: one a command that measured."""


LISTED = 50


@results.command("list")
@click.option("--limit", type=click.IntRange(0), help=f"The newest so many; 0: all. Default: {LISTED}, with --json all.")
@json_option
def list_(limit: int | None, as_json: bool) -> None:
    """The batches, newest first."""
    from edgevit.results.store import open_store

    if limit is None:
        limit = 0 if as_json else LISTED
    with open_store() as store:
        batches = store.batches(limit or None)
        more = store.count_batches() - len(batches)
    if as_json:
        rows = [{"batch": b.id, "created_at": b.created_at, "command": b.command, "runs": b.runs} for b in batches]
        emit_json("batches", {"batches": rows})
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("batch", "when (UTC)", "runs", "what"):
        table.add_column(title, overflow="fold")
    for b in batches:
        table.add_row(b.id, b.created_at, f"{b.runs:,}", b.command)
    out().print(table)
    if more > 0:
        say(f"{more:,} older batches are not listed; edgevit results list --limit 0")


@results.command()
@click.argument("batch", required=False)
@click.option("--wide", is_flag=True, help="Every column.")
@click.option("--ops", is_flag=True, help="Also the operators that took most, where --profile-ops timed them.")
@json_option
def show(batch: str | None, wide: bool, ops: bool, as_json: bool) -> None:
    """The table of one BATCH; the newest if none is named. Verdicts are judged anew from what was recorded."""
    from edgevit.results.store import open_store

    with open_store() as store:
        show_batch(store, _batch_id(store, batch), wide=wide, as_json=as_json, operators=ops)


@results.command()
@click.argument("choice", required=False)
@json_option
def choices(choice: str | None, as_json: bool) -> None:
    """Which variants were chosen to run where, newest first; or one CHOICE in full, with its evidence and what was dropped."""
    from device_agents.wire import encode
    from edgevit.errors import UnknownName
    from edgevit.report.variants_view import render_choice, render_choices
    from edgevit.results.store import open_store

    with open_store() as store:
        stored = store.choices()
    if choice is not None:
        stored = [one for one in stored if one.id == choice] or stored
        if stored == [] or stored[0].id != choice:
            raise UnknownName("choice", choice, [one.id for one in stored], hint="edgevit results choices")
    if as_json:
        rows = [{"id": one.id, "created_at": one.created_at, **encode(one.choice)} for one in stored]
        emit_json("choices", {"choices": rows})
        return
    if not stored:
        raise UsageError("nothing has been chosen yet", hint="edgevit deploy BUNDLE TARGET --select fastest")
    out().print(render_choices(stored) if choice is None else render_choice(stored[0]))


def _batch_id(store: Store, wanted: str | None) -> str:
    from edgevit.errors import UnknownName

    newest = store.latest_batch()
    if newest is None:
        raise UsageError("nothing has been measured yet", hint="edgevit bench BUNDLE TARGET")
    if wanted is None:
        return newest.id
    known = [b.id for b in store.batches()]
    if wanted not in known:
        raise UnknownName("batch", wanted, known, hint="edgevit results list")
    return wanted


for _command in (compare, history, export, import_, prune):
    results.add_command(_command)
