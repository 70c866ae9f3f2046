"""The page's part on what the plans beyond ``quick`` and ``standard`` found: comparisons, minutes of load, operators. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from device_agents.wire import Measurement, Run
from edgevit.report.plans_view import TOP_OPERATORS, in_words, knee_in_words, operator_rows
from edgevit.results.compare import compare_pairs
from edgevit.results.stats import Summary

MAX_POINTS = 600


def load_points(m: Measurement) -> list[list[float]]:
    """[seconds, median ms] through a sustained series, at most :data:`MAX_POINTS` of them; empty for any other."""
    windows = next((s.windows for s in m.series if s.windows), ())
    step = -(-len(windows) // MAX_POINTS) or 1
    return [[round(w.at_ms / 1000, 1), w.p50_ns / 1e6] for w in windows[::step]]


def plans_html(members: Sequence[Summary], runs: Sequence[Run]) -> str:
    """Lines for people; empty where neither was asked for."""
    parts = []
    for c in (c for run in runs for c in compare_pairs(run)):
        names = f"A {c.a_name}, B {c.b_name}"
        if c.ratio is None or c.interval is None:
            parts.append(_line(f"{names}: no ratio: {c.absent}"))
        else:
            low, high = c.interval
            words = f"B ÷ A {c.ratio:.4f} ({low:.4f} to {high:.4f}, 95 %, {c.blocks} blocks): {in_words(c)}"
            parts.append(_line(f"{names}: {words}"))
        parts += [_line(f"left out: {text}") for text in c.left_out]
    for s in members:
        if s.sustained is not None:
            told = s.sustained
            kept = f"retention {100 * told.retention:.1f} %" if told.retention is not None else told.retention_absent
            parts.append(_line(f"{s.label} under load for {told.seconds / 60:.1f} minutes: {kept}{knee_in_words(told)}"))
    parts += [_operators(s) for s in members if s.profile is not None]
    parts += [_line(f"{s.label}: no operator times: {s.profile_absent}") for s in members if s.profile_absent]
    return "\n".join(parts)


def _line(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def _operators(s: Summary) -> str:
    title, rows, rest = operator_rows(s, TOP_OPERATORS)
    head = "".join(f"<th>{escape(name)}</th>" for name in ("operator", "kind", "share %", "ms each inference", "calls"))
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f"<details><summary>{escape(title)}</summary>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{_line(rest)}</details>'
    )
