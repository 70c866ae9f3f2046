"""Comparisons of stored runs and the history of a bundle, for people and for programs. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgevit.report.table import EMPTY
from edgevit.results.sides import ratio_of
from edgevit.select import show_ms

if TYPE_CHECKING:
    from edgevit.results.history import History
    from edgevit.results.sides import Pair, Paired, Side


def render_paired(paired: Paired) -> RenderableType:
    """A table for each pair, its labels above it and its reasons below."""
    parts: list[RenderableType] = []
    for pair in paired.pairs:
        parts += [*([Text("")] if parts else []), *_render(pair)]
    for name, alone in (("A", paired.only_a), ("B", paired.only_b)):
        parts += [Text(f"only in {name}: {text}", style="dim") for text in alone]
    return Group(*parts)


def labels(pair: Pair) -> list[str]:
    """What marks a pair whose figures do not compare, wherever it is shown; empty where they do."""
    return [f"INCOMPARABLE: {difference}" for difference in pair.differs] + [f"DOUBTFUL: {doubt}" for doubt in pair.doubts]


def _render(pair: Pair) -> list[RenderableType]:
    a, b = pair.a, pair.b
    title = [Text(f"{name}  {_describe(side)}", style="bold") for name, side in (("A", a), ("B", b))]
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("")
    for name in ("A", "B", "B ÷ A", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in figure_rows(pair):
        table.add_row(*row)
    return [*title, *(Text(label, style="red") for label in labels(pair)), table, *map(Text, sentences(pair))]


def _describe(side: Side) -> str:
    s = side.summary
    return f"{s.target}: {s.label} on {s.runtime} {s.runtime_version} ×{s.threads}, run {s.run_id}"


def figure_rows(pair: Pair) -> list[tuple[str, ...]]:
    """(figure, A, B, B ÷ A, its interval) of all that both or one of them has."""
    a, b = pair.a.summary, pair.b.summary
    interval = pair.latency.interval if pair.latency else None
    span = f"{interval[0]:.4f}–{interval[1]:.4f}" if interval else EMPTY
    rows: list[tuple[str, ...]] = [
        ("p50 ms", _ms(a.p50_ms), _ms(b.p50_ms), f"{pair.latency.value:.4f}" if pair.latency else EMPTY, span),
        ("p90 ms", _ms(a.p90_ms), _ms(b.p90_ms), _ratio(a.p90_ms, b.p90_ms), EMPTY),
        ("p99 ms", _ms(a.p99_ms), _ms(b.p99_ms), _ratio(a.p99_ms, b.p99_ms), EMPTY),
        ("load ms", _ms(a.init_ms), _ms(b.init_ms), _ratio(a.init_ms, b.init_ms), EMPTY),
        ("peak memory MB", _mb(a.peak_mb), _mb(b.peak_mb), _ratio(a.peak_mb, b.peak_mb), EMPTY),
        ("file MB", _mb(a.file_mb), _mb(b.file_mb), _ratio(a.file_mb, b.file_mb), EMPTY),
    ]
    if a.energy_scope == b.energy_scope:
        rows.append(("energy mJ", _mb(a.energy_mj), _mb(b.energy_mj), _ratio(a.energy_mj, b.energy_mj), EMPTY))
    found = pair.accuracy
    if found is not None:
        low, high = found.difference_interval
        change = f"{100 * found.difference:+.2f} points"
        rows.append(
            (
                "top-1 %",
                f"{100 * found.a_top1:.2f}",
                f"{100 * found.b_top1:.2f}",
                change,
                f"{100 * low:+.2f} to {100 * high:+.2f}",
            )
        )
        low, high = found.agreement_interval
        rows.append(("same answer %", "", "", f"{100 * found.agreement:.2f}", f"{100 * low:.2f}–{100 * high:.2f}"))
    return rows


def sentences(pair: Pair) -> list[str]:
    """What the figures allow one to say, and why one is missing."""
    said = []
    if pair.latency is None:
        said.append(f"no ratio of latencies: {pair.latency_absent}")
    else:
        interval = pair.latency.interval
        if interval is None:
            said.append(f"latency: {pair.latency.how}")
        elif interval[0] <= 1.0 <= interval[1]:
            said.append(f"latency: no difference can be told ({pair.latency.how})")
        else:
            faster, times = ("B", 1 / pair.latency.value) if pair.latency.value < 1 else ("A", pair.latency.value)
            said.append(f"latency: {faster} is {times:.3f} times as fast ({pair.latency.how})")
    found = pair.accuracy
    if found is None:
        said.append(f"accuracy is not compared: {pair.accuracy_absent}")
    else:
        told = f"of {found.images:,} images A alone is right on {found.only_a:,}, B alone on {found.only_b:,}"
        sure = "no difference can be told" if found.p_value > 0.05 else "they differ"
        said.append(f"accuracy: {told}: {sure} (McNemar's exact test, p = {found.p_value:.2g})")
    a, b = pair.a.summary, pair.b.summary
    if a.energy_scope != b.energy_scope:
        said.append(f"energy does not compare: A {a.energy_scope or a.energy_absent}, B {b.energy_scope or b.energy_absent}")
    return said


def _ms(value: float | None) -> str:
    return EMPTY if value is None else show_ms(value)


def _mb(value: float | None) -> str:
    return EMPTY if value is None else f"{value:,.2f}"


def _ratio(a: float | None, b: float | None) -> str:
    found = ratio_of(a, b)
    return EMPTY if found is None else f"{found:.4f}"


def json_paired(paired: Paired) -> dict[str, Any]:
    """All of it but the raw runs; ``comparable`` is false where ``--anyway`` shows what does not compare."""
    from device_agents.wire import encode

    pairs = []
    for pair in paired.pairs:
        pairs.append(
            {
                "a": _json_side(pair.a),
                "b": _json_side(pair.b),
                "comparable": pair.comparable,
                "labels": labels(pair),
                "differs": [encode(d) for d in pair.differs],
                "doubts": list(pair.doubts),
                "latency": encode(pair.latency) if pair.latency else None,
                "latency_absent": pair.latency_absent,
                "accuracy": encode(pair.accuracy) if pair.accuracy else None,
                "accuracy_absent": pair.accuracy_absent,
            }
        )
    return {"pairs": pairs, "only_a": list(paired.only_a), "only_b": list(paired.only_b)}


def _json_side(side: Side) -> dict[str, Any]:
    s = side.summary
    names = (
        "run_id", "batch_id", "target", "board", "bundle", "bundle_name", "artifact", "runtime", "runtime_version", "provider",
        "threads", "plan", "p50_ms", "p90_ms", "p99_ms", "init_ms", "peak_mb", "file_mb", "energy_mj", "energy_scope", "top1",
    )  # fmt: skip
    return {name: getattr(s, name) for name in names} | {"valid": s.verdict.valid}


def render_history(name: str, target: str, found: Sequence[History]) -> RenderableType:
    """One table a variant, its steps marked and told in words."""
    parts: list[RenderableType] = []
    for history in found:
        if parts:
            parts.append(Text(""))
        parts.append(Text(f"{name} on {target}: {history.variant}, plan {history.plan}", style="bold"))
        table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for title in ("version", "bundle", "runs", "p50 ms", "lowest–highest", ""):
            table.add_column(title, justify="right" if title in ("runs", "p50 ms", "lowest–highest") else "left", no_wrap=True)
        at = {one.bundle: one.step for one in history.steps}
        for v in history.versions:
            step = at.get(v.bundle)
            mark = f"← {step.ratio:.3f} times" if step else ""
            span = f"{show_ms(min(v.p50_ms))}–{show_ms(max(v.p50_ms))}"
            table.add_row(show_version(v.version), v.bundle[:12], str(len(v.runs)), show_ms(v.mean_ms), span, mark)
        parts.append(table)
        if history.ordered_by == "measured":
            parts.append(Text("in the order of measuring: no run told the version of some", style="dim"))
        parts += [Text(text) for text in _told(history)]
        parts += [Text(f"left out: {text}", style="dim") for text in history.left_out]
    return Group(*parts)


def _told(history: History) -> list[str]:
    if history.absent:
        return [f"no step can be told: {history.absent}"]
    if not history.steps:
        return ["no step: runs in any order look as even as these (at 5 %)"]
    said = []
    for found in history.steps:
        step = found.step
        span = f"{step.interval[0]:.3f} to {step.interval[1]:.3f}, 95 %" if step.interval else "no interval: a side has one run"
        word = "slower" if step.ratio > 1 else "faster"
        said.append(
            f"from {found.bundle[:12]} on {word}: {step.ratio:.3f} times the p50 before ({span}); "
            f"{step.before} runs against {step.after}, p = {step.p_value:.2g}"
        )
        if found.also_changed:
            said.append(f"  not only the version changed there: {'; '.join(map(str, found.also_changed))}")
    return said


def show_version(version: int | None) -> str:
    """The second it was built in, or the number itself where it is none."""
    if version is None:
        return EMPTY
    try:
        return datetime.fromtimestamp(version, UTC).strftime("%Y-%m-%d %H:%M:%S") if version > 10**9 else str(version)
    except (OverflowError, ValueError, OSError):
        return str(version)


def json_history(found: Sequence[History]) -> list[dict[str, Any]]:
    from device_agents.wire import encode

    return [encode(history) for history in found]
