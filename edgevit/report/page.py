"""One self-contained HTML page of results: works offline, in light and dark, on a phone.

Everything a person should read stands in the HTML itself; the charts are drawn from JSON in the page by Observable Plot and
d3, embedded whole. Nothing is fetched: the content security policy allows the page's own scripts by their hashes, inline
styles, and no network. All text of others (names of models, targets, artifacts) is escaped here or set as text, never as HTML.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from device_agents.wire import SCHEMES, Measurement, Run, Variant
from edgevit.outputs import write_whole
from edgevit.report.page_plans import load_points, plans_html
from edgevit.report.table import EMPTY, ENERGY, NARROW, energy_scopes, order, verdict_notes, verdict_word
from edgevit.results.stats import Judge, Summary, pareto_front, percentile, summarize_all

MAX_LOSS = 0.01
"""The answer keeps top-1 within this share of its fp32; said on the page."""


def write_page(runs: Sequence[Run], path: Path, judge: Judge | None = None) -> None:
    """Write the page of ``runs`` to ``path``, whole or not at all. UsageError where it cannot be written."""
    write_whole(path, render_page(runs, judge))


def render_page(runs: Sequence[Run], judge: Judge | None = None) -> str:
    """The page as text. Pure but for the date and the files of this package."""
    summaries = order(summarize_all(runs, judge))
    sections = _sections(summaries, runs)
    data = {
        "schemes": list(SCHEMES),
        "sections": [{"rows": s["rows"], "readings": s["readings"]} for s in sections],
    }
    scripts = {"D3": _file("vendor/d3.min.js"), "PLOT": _file("vendor/plot.min.js"), "JS": _file("page.js")}
    models = list(dict.fromkeys(s.model for s in summaries if s.model))
    targets = list(dict.fromkeys(s.target for s in summaries))
    title = f"{', '.join(models) or 'Results'} on {', '.join(targets)}" if targets else "Results"
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    parts = {
        **scripts,
        "CSP": escape(_policy(list(scripts.values()))),
        "CSS": _file("page.css"),
        "TITLE": escape(title),
        "LEAD": escape(
            f"{_count(len(summaries), 'measurement')} in {_count(len(runs), 'run')}, measured on the devices themselves"
        ),
        "BODY": "\n".join(str(s["html"]) for s in sections) or "<p>There are no measurements.</p>",
        "FOOT": escape(f"Written by edgevit on {now}."),
        "LICENCES": escape("\n\n".join(f"{n}\n{_file(f'vendor/{n}.LICENSE')}" for n in ("d3", "plot"))),
        "DATA": _json(data),
    }
    # One pass, so that a name such as @@DATA@@ inside a value stays what it is.
    return re.sub(r"@@([A-Z0-9]+)@@", lambda m: parts.get(m[1], m[0]), _file("page.html"))


def _file(name: str) -> str:
    return (resources.files("edgevit.report") / name).read_text("utf-8")


def _policy(scripts: Sequence[str]) -> str:
    """No network at all. Plot writes style attributes, so inline styles are allowed; scripts only by their hash."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026").replace("\u2028", "\\u2028")


def _count(n: int, word: str) -> str:
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def _sections(summaries: Sequence[Summary], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One per model and target, in the table's order."""
    measured = {(r.job.run_id, *_variant(m.variant)): m for r in runs for m in r.measurements}
    by_run = {r.job.run_id: r for r in runs}
    out: list[dict[str, Any]] = []
    for model, target in dict.fromkeys((s.model, s.target) for s in summaries):
        members = [s for s in summaries if (s.model, s.target) == (model, target)]
        many = len({s.batch_id for s in members}) > 1
        here = [by_run[i] for i in dict.fromkeys(s.run_id for s in members)]
        ranked = [s for s in members if s.rankable and s.top1 is not None]
        front = {id(ranked[i]) for i in pareto_front([(s.p50_ms or 0.0, s.top1 or 0.0) for s in ranked])}
        rows = [_chart_row(i, s, measured[s.run_id, *_variant(s)], id(s) in front, many) for i, s in enumerate(members) if s.n]
        readings = [r for run in here for r in _readings(run)]
        html = _section_html(len(out), model, target, members, here, rows, readings, many)
        out.append({"rows": rows, "readings": readings, "html": html})
    return out


def _variant(of: Summary | Variant) -> tuple[str, str, str, str, int]:
    return of.bundle, of.artifact, of.runtime, of.provider, of.threads


def _chart_row(number: int, s: Summary, m: Measurement, front: bool, many: bool) -> dict[str, Any]:
    """What the charts need of one measurement: 101 percentiles stand for its samples."""
    ordered = sorted(ns for one in m.series for ns in one.samples_ns)
    return {
        "id": number,
        "label": _label(s, many),
        "scheme": s.scheme,
        "runtime": s.runtime,
        "n": s.n,
        "processes": s.processes,
        "q": [ordered[0] / 1e6] + [percentile(ordered, i / 100) / 1e6 for i in range(1, 101)],
        "process_p50_ms": list(s.process_p50_ms),
        "p50_ms": s.p50_ms,
        "p90_ms": s.p90_ms,
        "top1": None if s.top1 is None else 100 * s.top1,
        "top1_error": None if s.top1_error is None else 100 * s.top1_error,
        "file_mb": s.file_mb,
        "valid": s.rankable,
        "front": front,
        "load": load_points(m),
        "knee_s": s.sustained.knee.at_s if s.sustained is not None and s.sustained.knee is not None else None,
    }


def _label(s: Summary, many: bool) -> str:
    return f"{s.label} ({s.started_at[:16].replace('T', ' ')})" if many else s.label


def _readings(run: Run) -> list[dict[str, Any]]:
    """Temperature, frequency and limits against the seconds since the run began."""
    start = _seconds(run.started_at)
    out = []
    for i, m in enumerate(run.measurements):
        for one in m.series:
            began = _seconds(one.started_at)
            offset = began - start if began is not None and start is not None else 0.0
            for r in one.readings:
                out.append(
                    {
                        "s": round(offset + r.at_ms / 1000, 2),
                        "t": r.temperature_c,
                        "f": r.frequency_mhz,
                        "g": r.gpu_frequency_mhz,
                        "p": None if r.power_mw is None else round(r.power_mw / 1000, 4),
                        "limited": bool(r.throttle),
                        "z": f"{run.job.run_id}/{i}/{one.process}",
                    }
                )
    return out


def _seconds(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def _section_html(
    number: int,
    model: str,
    target: str,
    members: Sequence[Summary],
    runs: Sequence[Run],
    rows: Sequence[dict[str, Any]],
    readings: Sequence[dict[str, Any]],
    many: bool,
) -> str:
    facts = runs[-1].facts
    board = " · ".join(x for x in (facts.board_model or facts.cpu_model, facts.os_name, f"{facts.cpu_count} cores") if x)
    best = choose_answer(members)
    parts = [
        '<section class="target">',
        f"<h2>{escape(target)}{': ' + escape(model) if model else ''}</h2>",
        f'<p class="soft">{escape(board)}</p>',
        _answer_html(best, members),
        _table_html(members, best, many),
        plans_html(members, runs),
    ]
    charts = []
    if rows:
        charts.append(
            _chart(number, "latency", "Latency", "bar: middle half, line: p1–p99, tick: p50, dots: each process's own p50")
        )
        if any(r["top1"] is not None for r in rows):
            charts.append(
                _chart(
                    number,
                    "accuracy",
                    "Accuracy against latency",
                    "up and left is better; dashed: Pareto front; bars: std. error, p50–p90; squares: TFLite; hollow: INVALID",
                )
            )
        if any(r["load"] for r in rows):
            charts.append(_chart(number, "load", "Latency through minutes of load", "median of each second; dashed: the knee"))
        charts.append(_chart(number, "cumulative", "Latency, cumulative", "solid: ONNX, dashed: TFLite; up to the slowest p99"))
    if any(r["t"] is not None or r["f"] is not None for r in readings):
        charts.append(_chart(number, "conditions", "While it ran", "red: throttled or under-voltage at that moment"))
    else:
        parts.append('<p class="soft">Temperature and frequency could not be read on this device.</p>')
    parts.append(f'<div class="charts">{"".join(charts)}</div>')
    parts.append(_details_html(members, runs))
    parts.append("</section>")
    return "\n".join(parts)


def _chart(number: int, kind: str, title: str, caption: str) -> str:
    return (
        f'<div class="chart"><h3>{escape(title)}</h3><p class="soft">{escape(caption)}</p>'
        f'<div class="plot" data-section="{number}" data-chart="{kind}"></div></div>'
    )


def choose_answer(members: Sequence[Summary]) -> Summary | None:
    """The fastest VALID measurement whose top-1 stays within :data:`MAX_LOSS` of the best fp32; where nothing was scored, the
    fastest VALID one; None where nothing is VALID. Figures of minutes of heat count only where there are no others."""
    valid = [s for s in members if s.rankable and s.sustained is None] or [s for s in members if s.rankable]
    reference = max((s.top1 for s in members if s.scheme == "fp32" and s.top1 is not None), default=None)
    if reference is not None:
        valid = [s for s in valid if s.top1 is not None and s.top1 >= reference - MAX_LOSS]
    return min(valid, key=lambda s: s.p50_ms or 0.0, default=None)


def _answer_html(best: Summary | None, members: Sequence[Summary]) -> str:
    if best is None or best.p50_ms is None:
        why = "no measurement is VALID" if not any(s.rankable for s in members) else "none keeps top-1 within 1 point of fp32"
        return f'<p class="answer none"><strong>Nothing to ship yet:</strong> {escape(why)}; the reasons stand below.</p>'
    told = [f"p50 {best.p50_ms:.2f} ms"]
    if best.speedup is not None and abs(best.speedup - 1) > 0.005:
        told.append(f"{best.speedup:.2f} × fp32")
    if best.file_mb is not None:
        told.append(f"{best.file_mb:.1f} MB")
    if best.top1 is not None:
        told.append(f"top-1 {100 * best.top1:.2f} % on {best.images:,} images")
    rule = (
        "the fastest VALID one within 1 point of fp32"
        if best.top1 is not None
        else "the fastest VALID one; accuracy was not measured"
    )
    return (
        f'<p class="answer">Ship <strong>{escape(best.label)}</strong> in {escape(best.runtime)}: '
        f'{escape(", ".join(told))} <span class="soft">({escape(rule)})</span></p>'
    )


def _table_html(members: Sequence[Summary], best: Summary | None, many: bool) -> str:
    notes: list[str] = []

    def mark(text: str) -> str:
        if not text:
            return ""
        if text not in notes:
            notes.append(text)
        return f"<sup>{notes.index(text) + 1}</sup>"

    columns = NARROW + (ENERGY if any(s.energy_gross_mj is not None for s in members) else ())
    heads = ["artifact", "runtime", *(name.replace("\n", " ") for name, _ in columns), "verdict"]
    classes = ["name", "left", *[""] * len(columns), "left"]
    head = "".join(f'<th class="{c}">{escape(h)}</th>' for h, c in zip(heads, classes, strict=True))
    body = []
    for s in members:
        cells = [
            f'<td class="name">{escape(_label(s, many))}</td>',
            f'<td class="left">{escape(s.runtime)} {escape(s.runtime_version)}<span class="small">{escape(s.provider)}, '
            f"{_count(s.threads, 'thread')}</span></td>",
        ]
        for _, make in columns:
            shown, note = make(s)
            cells.append(f"<td>{escape(shown) if shown else EMPTY + mark('' if note == s.failure else note)}</td>")
        word = verdict_word(s)
        style = {"VALID": "warned" if s.verdict.warnings else "valid", "INVALID": "invalid", "failed": "failed"}[word]
        cells.append(f'<td class="left {style}">{word}{",".join(mark(n) for n in verdict_notes(s))}</td>')
        body.append(f"<tr{' class=best' if s is best else ''}>{''.join(cells)}</tr>")
    references = list(dict.fromkeys(s.reference for s in members if s.reference))
    legend = f'<p class="soft">× fp32: p50 of {escape(" or ".join(references))} ÷ p50.</p>' if references else ""
    legend += "".join(f'<p class="soft">{escape(line)}</p>' for line in energy_scopes(members))
    listed = f'<ol class="notes">{"".join(f"<li>{escape(n)}</li>" for n in notes)}</ol>' if notes else ""
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>{legend}{listed}'
    )


def _details_html(members: Sequence[Summary], runs: Sequence[Run]) -> str:
    """What identifies the figures: digests, versions, the plan, the device."""
    lines: list[tuple[str, str]] = []
    for run in runs:
        facts, plan = run.facts, run.job.plan
        lines += [
            ("run", f"{run.job.run_id}, batch {run.job.batch_id}, {run.status}, {run.started_at} to {run.ended_at}"),
            ("plan", f"{plan.name}: {plan.processes} fresh worker process(es), each ≥ {plan.min_samples} samples"),
            (
                "device",
                f"{facts.hostname}, {facts.machine}, kernel {facts.kernel}, Python {facts.runtime_python or facts.python}",
            ),
            (
                "governor",
                (run.governor or "not readable") + (f", {run.governor_before} before and after" * bool(run.governor_before)),
            ),
        ]
    if all(s.energy_gross_mj is None for s in members):
        lines += [("energy", reason) for reason in dict.fromkeys(s.energy_gross_absent for s in members) if reason]
    watched = [s.sampler_cpu for s in members if s.sampler_cpu is not None]
    if watched:
        lines.append(("watching", f"reading the sensors took up to {100 * max(watched):.2f} % of one core while timed"))
    for s in members:
        if s.artifact_sha256:
            lines.append((s.label, f"artifact sha256 {s.artifact_sha256}, bundle {s.bundle_name} {s.bundle}"))
    shown = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in lines)
    return f"<details><summary>Digests, device and plan</summary><dl>{shown}</dl></details>"
