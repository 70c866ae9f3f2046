"""What the plans beyond ``quick`` and ``standard`` found, for people: comparisons, minutes of load, operators. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgevit.report.table import EMPTY
from edgevit.select import show_ms

if TYPE_CHECKING:
    from edgevit.results.compare import Comparison
    from edgevit.results.summary import Summary
    from edgevit.results.sustained import Sustained

TOP_OPERATORS = 15
TOP_KINDS = 6


def render_comparisons(comparisons: Sequence[Comparison]) -> RenderableType:
    """A line for each pair in words, what was left out below it."""
    parts: list[RenderableType] = []
    for c in comparisons:
        parts.append(Text(f"{c.target}: A {c.a_name}, B {c.b_name}, {c.a.runtime}", style="bold"))
        if c.ratio is None or c.interval is None:
            parts.append(Text(f"  no ratio: {c.absent}"))
        else:
            parts.append(Text(f"  B ÷ A  {c.ratio:.4f} ({c.interval[0]:.4f} to {c.interval[1]:.4f}, 95 %), {c.blocks} blocks"))
            parts.append(Text(f"  {in_words(c)}"))
        parts += [Text(f"  left out: {text}", style="dim") for text in c.left_out]
    return Group(*parts)


def in_words(c: Comparison) -> str:
    """Which of the two is how much faster, or that no difference can be told."""
    a, b = (f"{show_ms(v)} ms" if v is not None else EMPTY for v in (c.a_p50_ms, c.b_p50_ms))
    if not c.differs:
        more = min(2 * max(c.blocks, 8), 50)
        return f"no difference can be told: A {a}, B {b}; more blocks narrow the interval: --blocks {more}"
    ratio = c.ratio or 1.0
    faster, times = ("B", 1 / ratio) if ratio < 1 else ("A", ratio)
    return f"{faster} is {times:.3f} times as fast: A {a}, B {b}"


def render_sustained(summaries: Sequence[Summary]) -> RenderableType:
    """One row for each sustained measurement, what it says in words below."""
    found = [(s, s.sustained) for s in summaries if s.sustained is not None]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("under load", overflow="fold")
    for name in ("minutes", "first min\nms", "last min\nms", "retention\n%", "knee\nafter s", "at\n°C", "°C"):
        table.add_column(name, justify="right", no_wrap=True)
    notes = []
    for s, told in found:
        table.add_row(
            Text(f"{s.target} {s.label} {s.runtime}"),
            f"{told.seconds / 60:.1f}",
            show_ms(told.first_ms) if told.first_ms is not None else EMPTY,
            show_ms(told.last_ms) if told.last_ms is not None else EMPTY,
            f"{100 * told.retention:.1f}" if told.retention is not None else EMPTY,
            f"{told.knee.at_s:.0f}" if told.knee else EMPTY,
            f"{told.knee.temperature_c:.1f}" if told.knee and told.knee.temperature_c is not None else EMPTY,
            f"{told.temperature_c[0]:.0f}–{told.temperature_c[1]:.0f}" if told.temperature_c else EMPTY,
        )
        if told.retention is None:
            notes.append(f"{s.label} on {s.target}: no retention: {told.retention_absent}")
        if told.knee is not None:
            notes.append(f"{s.label} on {s.target}{knee_in_words(told)}")
    legend = Text("retention: median latency of the first minute ÷ that of the last; knee: throughput stays 5 % lower", "dim")
    return Group(table, legend, *(Text(n) for n in notes))


def knee_in_words(told: Sustained) -> str:
    """What was lost, and when; empty where nothing was."""
    knee = told.knee
    if knee is None:
        return ""
    warm = f" at {knee.temperature_c:.1f} °C" if knee.temperature_c is not None else ""
    lost = 1 - knee.after / knee.plateau
    return f": {knee.plateau:,.1f} inferences/s at first, {knee.after:,.1f} after {knee.at_s:.0f} s{warm} ({lost:.0%} less)"


def operator_rows(s: Summary, top: int) -> tuple[str, list[tuple[str, ...]], str]:
    """(title, a row of texts for each of the ``top`` operators, what the rest took) of a profiled measurement."""
    profile = s.profile
    if profile is None:
        return "", [], ""
    total = max(sum(o.total_ns for o in profile.operators) + profile.left_out_ns, 1)
    rows: list[tuple[str, ...]] = [
        (
            o.name,
            o.kind,
            f"{100 * o.total_ns / total:.1f}",
            f"{o.total_ns / 1e6 / profile.inferences:.3f}",
            f"{o.calls:,}",
        )
        for o in profile.operators[:top]
    ]
    rest = profile.operators[top:]
    less = 100 * (sum(o.total_ns for o in rest) + profile.left_out_ns) / total
    count = len(rest) + profile.left_out
    more = f"{count} more operators: {less:.1f} %; " if count else ""
    kinds: dict[str, int] = {}
    for o in profile.operators:
        kinds[o.kind] = kinds.get(o.kind, 0) + o.total_ns
    most = sorted(kinds.items(), key=lambda item: -item[1])[:TOP_KINDS]
    more += "by kind: " + ", ".join(f"{kind} {100 * ns / total:.1f} %" for kind, ns in most) + "; "
    title = f"{s.target} {s.label}: operators by {profile.profiler}, {profile.inferences} inferences"
    return title, rows, f"{more}profiling slows a model down: compare shares, not times"


def render_operators(summaries: Sequence[Summary], top: int = TOP_OPERATORS) -> RenderableType:
    """Of each profiled measurement the operators that took most, with their share; or why there are none."""
    parts: list[RenderableType] = []
    for s in summaries:
        if s.profile is None:
            if s.profile_absent:
                parts.append(Text(f"{s.target} {s.label}: no operator times: {s.profile_absent}"))
            continue
        title, rows, rest = operator_rows(s, top)
        table = Table(box=None, pad_edge=False, header_style="bold", title=Text(title), title_justify="left")
        table.add_column("operator", overflow="fold")
        table.add_column("kind", overflow="fold")
        for name in ("share %", "ms each inference", "calls"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*map(Text, row))
        parts += [table, Text(rest, style="dim")]
    return Group(*parts)


def json_comparisons(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Every field, the pair's variants as JSON objects."""
    from device_agents.wire import encode

    return [encode(c) for c in comparisons]
