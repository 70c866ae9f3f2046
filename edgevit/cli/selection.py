"""Choosing a variant from stored measurements: what ``bench --variants``, ``deploy --select`` and ``run --select`` share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgevit.cli.console import FloatRange, emit_json, json_failed, out, say
from edgevit.errors import NoChoice, UsageError
from edgevit.plans import ranks
from edgevit.results.conditions import board_of
from edgevit.select import MAX_LOSS, POLICIES, Choice, Gates, admit, choose, find_evidence

if TYPE_CHECKING:
    from device_agents.wire import Facts
    from edgevit.bundle import Bundle
    from edgevit.errors import EdgevitError
    from edgevit.results.store import Store
    from edgevit.results.summary import Summary
    from edgevit.variants import Runnable

F = TypeVar("F", bound=Callable[..., Any])


def gate_options(command: F) -> F:
    """What a variant must hold to be chosen; the values make :class:`edgevit.select.Gates`."""
    command = click.option("--anyway", is_flag=True, help="Choose among INVALID figures too.")(command)
    return click.option(
        "--max-loss",
        type=FloatRange(0, 100),
        default=MAX_LOSS,
        show_default=True,
        metavar="POINTS",
        help="Top-1 that a variant may lose against float.",
    )(command)


def make_gates(max_loss: float, anyway: bool, *, choosing: bool, hint: str) -> Gates:
    """What :func:`gate_options` gave. UsageError where it was given and nothing is chosen by it: nobody may believe that a loss
    is held which no one looks at."""
    gates = Gates(max_loss, anyway)
    if gates != Gates() and not choosing:
        raise UsageError("--max-loss and --anyway say which variant may be chosen, and no policy chooses here", hint=hint)
    return gates


def choose_stored(
    store: Store, target: str, bundle: Bundle, facts: Facts, found: Runnable, policy: str, gates: Gates
) -> Choice:
    """The choice that the store's runs of ``bundle`` on ``target`` allow, those left out that another board gave which had the
    name before. Raises :class:`NoChoice` with the next command."""
    stored = store.runs(target=target, bundles=[bundle.digest])
    runs = [run for run in stored if ranks(run.job.plan) and board_of(run.facts) == board_of(facts)]
    versions = {r.runtime: r.version for r in facts.runtimes}
    figures, not_measured = find_evidence(runs, bundle.digest, found.variants, versions)
    if not figures:
        what = "measured there in the runtimes it has now" if runs else "measured there yet"
        name = f"{bundle.manifest.name} version {bundle.manifest.version}"
        raise NoChoice(
            f"{target}: {name} was not {what}, so there is nothing to choose by",
            hint=f"edgevit bench {bundle.path} {target} --variants",
        )
    return choose(figures, policy, gates, not_measured)


def show_variants(
    store: Store,
    batch: str,
    gates: Gates,
    failed: Sequence[tuple[str, EdgevitError]] = (),
    *,
    wide: bool,
    as_json: bool,
    require_valid: bool,
) -> int:
    """The variants of each bundle on each target of one batch, and what each policy would choose; 1 where for one of them no
    policy could, or ``require_valid`` and a figure is INVALID. ``failed``: targets that gave no run, and why, for JSON."""
    from edgevit.cli.results import summarize_runs
    from edgevit.report.table import json_rows, render_table
    from edgevit.report.variants_view import render_variants

    summaries = summarize_runs(store.runs(batch_id=batch))
    groups: dict[tuple[str, str], list[Summary]] = {}
    for s in summaries:
        groups.setdefault((s.target, s.bundle), []).append(s)
    if wide and not as_json:
        out(wide).print(render_table(summaries, wide=True))
    choices: list[Choice] = []
    code = 0
    for members in groups.values():
        here, none = _by_policy(members, gates)
        choices += here
        code = code or int(not here)
        if not as_json:
            out().print(render_variants(members, admit(members, gates), here, none))
    if as_json:
        from device_agents.wire import encode

        document = {"batch": batch, "rows": json_rows(summaries), "choices": [encode(c) for c in choices]}
        emit_json("results", {**document, "failed": json_failed(failed)} if failed else document)
    else:
        say(f"batch {batch}; edgevit deploy BUNDLE TARGET --select {'|'.join(POLICIES)}")
    return code or int(require_valid and any(not s.failure and not s.verdict.valid for s in summaries))


def _by_policy(members: Sequence[Summary], gates: Gates) -> tuple[list[Choice], list[tuple[str, str]]]:
    chosen, none = [], []
    for policy in POLICIES:
        try:
            chosen.append(choose(members, policy, gates))
        except NoChoice as e:
            several = len(str(e).splitlines()) > 1
            none.append((policy, f"every variant was dropped; {e.hint}" if several else str(e).partition(": ")[2]))
    return chosen, none
