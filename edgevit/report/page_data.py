"""Runs and their summaries → the one JSON document that the page draws everything from. Pure but for images of bundles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from device_agents.wire import SCHEMES, Measurement, Run, Variant
from edgevit.report.page_accuracy import accuracy_groups
from edgevit.report.page_answer import answers, cards
from edgevit.report.page_bundles import NOTHING, FromBundles, thumbnails
from edgevit.report.page_fleet import fleet_groups
from edgevit.report.page_rows import METRICS, columns, short
from edgevit.report.page_traces import distribution, trace
from edgevit.report.plans_view import in_words, knee_in_words
from edgevit.report.table import energy_scopes, order
from edgevit.results.compare import compare_pairs
from edgevit.results.summary import Summary

DETAIL_RUNS = 200
"""Runs, the newest, whose distributions, predictions and operators are drawn; the table and the answers hold every run."""
TRACED_RUNS = 40
"""Runs, the newest, that are drawn through time."""
TOP_OPERATORS = 15


@dataclass(frozen=True)
class Shown:
    """What a page is of. ``summaries``: every measurement. ``details``: the runs at hand with all their samples, oldest first,
    at least the newest :data:`DETAIL_RUNS`. ``runs``: how many runs the summaries are of. ``live``: the page is served and
    asks for what is new."""

    summaries: Sequence[Summary]
    details: Sequence[Run]
    runs: int
    bundles: FromBundles = field(default=NOTHING)
    live: bool = False


def page_data(shown: Shown) -> dict[str, Any]:
    """The document, as plain JSON values."""
    ordered = order(shown.summaries)
    rows = {id(s): i for i, s in enumerate(ordered)}
    at = {(s.run_id, variant_key(s)): i for i, s in enumerate(ordered)}
    details = sorted(shown.details, key=lambda r: (r.started_at, r.job.run_id))[-DETAIL_RUNS:]
    measured = [(at[run.job.run_id, variant_key(m.variant)], m) for run in details for m in run.measurements]
    detailed = {run.job.run_id for run in details}
    near = [s for s in ordered if s.run_id in detailed]
    traced = [run for run in reversed(details) if any(m.series for m in run.measurements)]
    accuracy = accuracy_groups(near, rows, shown.bundles.names)
    _add_images(accuracy, ordered, shown.bundles)
    return {
        "schema": "edgevit.page/1",
        "title": title(ordered),
        "lead": lead(ordered, shown.runs),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "live": shown.live,
        "schemes": list(SCHEMES),
        "metrics": list(METRICS),
        "answers": cards(answers(ordered)),
        "table": columns(ordered),
        "spread": {str(row): distribution(m) for row, m in measured if any(s.samples_ns for s in m.series)},
        "runs": [trace(r, [at[r.job.run_id, variant_key(m.variant)] for m in r.measurements]) for r in traced[:TRACED_RUNS]],
        "operators": [_operators(row, m) for row, m in measured if m.profile is not None],
        "operators_absent": sorted({m.profile_absent for _, m in measured if m.profile_absent}),
        "accuracy": accuracy,
        "fleet": fleet_groups(ordered, rows),
        "coverage": _coverage(ordered, shown.bundles),
        "plans": _plans(near, rows, details),
        "scopes": energy_scopes(ordered),
        "evidence": [_evidence(run) for run in reversed(details)],
        "thinned": _thinned(shown.runs, len(details), len(traced)),
    }


def variant_key(of: Summary | Variant) -> tuple[str, str, str, str, int]:
    return of.bundle, of.artifact, of.runtime, of.provider, of.threads


def title(summaries: Sequence[Summary]) -> str:
    """The models and the targets, the number of either where they are many."""
    models = list(dict.fromkeys(s.model for s in summaries if s.model))
    targets = list(dict.fromkeys(s.target for s in summaries))
    if not targets:
        return "Results"
    what = ", ".join(models) if len(models) <= 2 else f"{len(models)} models"
    where = ", ".join(targets) if len(targets) <= 3 else f"{len(targets)} targets"
    return f"{what or 'Results'} on {where}"


def lead(summaries: Sequence[Summary], runs: int) -> str:
    samples = sum(s.n for s in summaries)
    counts = (_count(len(summaries), "measurement"), _count(runs, "run"), _count(samples, "timed inference"))
    return f"{counts[0]} in {counts[1]}, {counts[2]}, all on the devices themselves"


def _count(n: int, word: str) -> str:
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def _thinned(runs: int, detailed: int, traced: int) -> list[str]:
    told = []
    if detailed < runs:
        told.append(
            f"Distributions, operators and predictions are of the newest {detailed:,} of {runs:,} runs; the answers, the table "
            "and the trade-off hold all of them."
        )
    if traced > TRACED_RUNS:
        told.append(f"The newest {TRACED_RUNS} runs are drawn through time.")
    told.append(
        "Lines through time show the fastest, the median and the slowest sample of each stretch; statistics use every sample."
    )
    return told


def _operators(row: int, m: Measurement) -> dict[str, Any]:
    profile = m.profile
    if profile is None:
        raise ValueError("the measurement was not profiled")
    total = max(sum(o.total_ns for o in profile.operators) + profile.left_out_ns, 1)
    kinds: dict[str, int] = {}
    for o in profile.operators:
        kinds[o.kind] = kinds.get(o.kind, 0) + o.total_ns
    each = 1e6 * profile.inferences
    rest = profile.operators[TOP_OPERATORS:]
    return {
        "row": row,
        "profiler": profile.profiler,
        "inferences": profile.inferences,
        "total": short(total / each),
        "kinds": [[kind, short(ns / each), short(100 * ns / total)] for kind, ns in sorted(kinds.items(), key=lambda k: -k[1])],
        "top": [
            [o.name, o.kind, o.provider, short(o.total_ns / each), short(100 * o.total_ns / total), o.calls]
            for o in profile.operators[:TOP_OPERATORS]
        ],
        "rest": len(rest) + profile.left_out,
        "rest_ms": short((sum(o.total_ns for o in rest) + profile.left_out_ns) / each),
    }


def _coverage(ordered: Sequence[Summary], bundles: FromBundles) -> list[dict[str, Any]]:
    """One entry for each measured artifact that a bundle tells of."""
    first: dict[str, int] = {}
    for i, s in enumerate(ordered):
        if s.artifact_sha256 in bundles.coverage:
            first.setdefault(s.artifact_sha256, i)
    return [{"row": row, **bundles.coverage[sha256]} for sha256, row in first.items()]


def _add_images(groups: list[dict[str, Any]], ordered: Sequence[Summary], bundles: FromBundles) -> None:
    for group in groups:
        held = next((ordered[r].bundle for r in group["variants"] if ordered[r].bundle in bundles.evaluation), None)
        wanted = [image for image, *_ in group["disputed"]]
        group["pictures"] = thumbnails(bundles.evaluation[held], wanted) if held else {}


def _plans(summaries: Sequence[Summary], rows: Mapping[int, int], runs: Sequence[Run]) -> dict[str, Any]:
    """What plans of their own kind found, in words: pairs compared in ABBA blocks, and minutes of load."""
    pairs = []
    for c in (c for run in runs for c in compare_pairs(run)):
        ratio = None if c.ratio is None or c.interval is None else [short(v) for v in (c.ratio, *c.interval)]
        pairs.append(
            {
                "target": c.target, "a": c.a_name, "b": c.b_name, "ratio": ratio, "blocks": c.blocks,
                "words": in_words(c) if ratio else f"no ratio: {c.absent}", "left_out": list(c.left_out),
            }
        )  # fmt: skip
    loads = []
    for s in summaries:
        told = s.sustained
        if told is None:
            continue
        kept = f"retention {100 * told.retention:.1f} %" if told.retention is not None else told.retention_absent
        loads.append(
            {
                "run": s.run_id,
                "row": rows[id(s)],
                "name": f"{s.label} in {s.runtime} on {s.target}",
                "minutes": short(told.seconds / 60),
                "words": f"{kept}{knee_in_words(told)}",
                "knee": None if told.knee is None else told.knee.at_s,
            }
        )
    return {"pairs": pairs, "loads": loads}


def _evidence(run: Run) -> dict[str, Any]:
    """What identifies a run's figures: ids, digests, versions, the plan, the device."""
    facts, plan = run.facts, run.job.plan
    governor = (run.governor or "not readable") + (f", {run.governor_before} before and after" if run.governor_before else "")
    lines = [
        ["batch", f"{run.job.batch_id}, by {run.job.submitted_by}"],
        ["when", f"{run.started_at} to {run.ended_at}, {run.status}" + (f": {run.reason}" if run.reason else "")],
        ["plan", f"{plan.name}: {plan.processes} fresh worker processes, at least {plan.min_samples} samples each"],
        ["device", f"{facts.hostname}: {facts.board_model or facts.cpu_model}, {facts.cpu_count} cores, {facts.machine}"],
        ["software", f"{facts.os_name}, kernel {facts.kernel}, Python {facts.runtime_python or facts.python}"],
        ["governor", governor],
    ]
    for m in run.measurements:
        lines.append([m.variant.artifact, f"artifact sha256 {m.artifact_sha256}, bundle {m.bundle_name} {m.variant.bundle}"])
    return {"run": run.job.run_id, "target": run.job.target, "lines": lines}
