"""The table of results: within 100 columns, every empty cell and every verdict explained by a footnote. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgevit.plans import list_cpus

if TYPE_CHECKING:
    from edgevit.results.summary import Summary

EMPTY = "–"
SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


class Footnotes:
    """Numbers texts in the order they are first used; the same text gets the same number."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return str(self.texts.index(text) + 1).translate(SUPERSCRIPT)


def order(summaries: Sequence[Summary]) -> list[Summary]:
    """By model and target in the order they came, fastest first, INVALID after VALID and failures last."""
    models = list(dict.fromkeys(s.model for s in summaries))
    targets = list(dict.fromkeys(s.target for s in summaries))
    return sorted(
        summaries,
        key=lambda s: (
            models.index(s.model),
            targets.index(s.target),
            s.p50_ms is None,
            not s.rankable,
            s.p50_ms if s.p50_ms is not None else 0.0,
        ),
    )


def verdict_word(s: Summary) -> str:
    """``VALID``, ``INVALID``, or ``failed`` where there is no figure to judge."""
    if s.failure:
        return "failed"
    return "VALID" if s.verdict.valid else "INVALID"


def render_table(summaries: Sequence[Summary], wide: bool = False) -> RenderableType:
    """One table per model, then the footnotes; ``wide`` gives every column."""
    if not summaries:
        return Text("no measurements")
    notes = Footnotes()
    parts: list[RenderableType] = []
    rows = order(summaries)
    for model in dict.fromkeys(s.model for s in rows):
        group = [s for s in rows if s.model == model]
        if parts:
            parts.append(Text(""))
        parts.append(_wide(model, group, notes) if wide else _narrow(model, group, notes))
    for line in _references(rows, wide):
        parts.append(Text(line, style="dim"))
    parts += [Text(f"{str(i).translate(SUPERSCRIPT)} {text}") for i, text in enumerate(notes.texts, 1)]
    return Group(*parts)


def _references(rows: Sequence[Summary], wide: bool) -> list[str]:
    names = list(dict.fromkeys(s.reference for s in rows if s.reference))
    said = [f"× fp32: p50 of {' or '.join(names)} ÷ p50, on the same target and at the same thread count"] if names else []
    if any(s.top1_error is not None for s in rows):
        images = sorted({s.images for s in rows if s.images})
        said.append(f"top-1 in percent ± its standard error, on {' or '.join(f'{n:,}' for n in images)} images")
    said += [
        f"{s.label} on {s.target}: p50 and p90 are of a batch of {s.batch} images: {_number(s.image_p50_ms, '', 2)[0]} ms an "
        f"image, {s.images_per_s:,.0f} images/s"
        for s in rows
        if s.batch > 1 and s.images_per_s is not None
    ]
    rules = sorted({s.verdict.rules for s in rows})
    said.append(f"verdicts by rules {' or '.join(map(str, rules))}, judged now from what was recorded")
    return said + (energy_scopes(rows) if wide else [])


Cell = Callable[["Summary"], tuple[str, str]]
"""A summary → what the cell shows (empty: a dash) and the footnote, if any."""


def _number(value: float | None, absent: str, digits: int) -> tuple[str, str]:
    if value is None:
        return "", absent
    # Three significant digits at least: 0.123 ms is not "0.12".
    return f"{value:,.{digits if abs(value) >= 1 else digits + 1}f}", ""


def _init(s: Summary) -> tuple[str, str]:
    """The first load of what had to be compiled is a figure of its own."""
    if s.init_cold_ms is None:
        return _number(s.init_ms, s.p50_absent, 1)
    return f"{_number(s.init_ms, '', 1)[0] or '–'}, cold {s.init_cold_ms:,.0f}", ""


def _p50(s: Summary) -> tuple[str, str]:
    return _number(s.p50_ms, s.p50_absent, 2 if (s.p50_ms or 0) < 100 else 1)


def _span(interval: tuple[float, float] | None) -> str:
    return "–".join(_number(value, "", 2)[0] for value in interval) if interval else ""


def _p90(s: Summary) -> tuple[str, str]:
    return _number(s.p90_ms, s.p90_absent, 2 if (s.p90_ms or 0) < 100 else 1)


def _top1(s: Summary) -> tuple[str, str]:
    if s.top1 is None:
        return "", s.top1_absent
    error = f"±{100 * s.top1_error:.1f}" if s.top1_error is not None else ""
    return f"{100 * s.top1:.2f}{error}", ""


def verdict_notes(s: Summary) -> list[str]:
    """What stands behind the word: the failure, the reasons, or the warnings, one footnote each."""
    if s.failure:
        return [s.failure]
    if not s.verdict.valid:
        return [f"INVALID: {reason}" for reason in s.verdict.reasons]
    return [f"warning: {warning}" for warning in s.verdict.warnings]


NARROW: tuple[tuple[str, Cell], ...] = (
    ("p50\nms", _p50),
    ("p90\nms", _p90),
    ("×\nfp32", lambda s: _number(s.speedup, s.speedup_absent, 2)),
    ("peak\nMB", lambda s: _number(s.peak_mb, s.peak_absent, 0 if (s.peak_mb or 0) >= 100 else 1)),
    ("file\nMB", lambda s: _number(s.file_mb, s.p50_absent, 1)),
    ("top-1\n%", _top1),
)

ENERGY: tuple[tuple[str, Cell], ...] = (
    ("energy\nmJ", lambda s: _number(s.energy_mj, s.energy_absent, 2)),
    ("gross\nmJ", lambda s: _number(s.energy_gross_mj, s.energy_gross_absent, 2)),
)


def energy_scopes(rows: Sequence[Summary]) -> list[str]:
    """What the figures of energy among ``rows`` are of, one line a scope."""
    scopes = dict.fromkeys((s.energy_scope, s.energy_covers) for s in rows if s.energy_gross_mj is not None)
    return [f"energy of one inference, net of the idle board; scope {scope}: {covers}" for scope, covers in scopes]


def _narrow(model: str, rows: Sequence[Summary], notes: Footnotes) -> Table:
    threads = sorted({s.threads for s in rows})
    counts = f" · {threads[0]} thread{'s' if threads[0] != 1 else ''}" if len(threads) == 1 else ""
    table = _bare(f"{model or 'never reached'}{counts}")
    # Limits chosen so that 100 columns hold the names of shipped recipes on one line, and 80 still show every column.
    table.add_column("target", overflow="fold", min_width=6, max_width=16)
    table.add_column("artifact", overflow="fold", min_width=10)
    table.add_column("runtime", overflow="fold", min_width=6)
    for name, _ in NARROW:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold", min_width=9)
    best = _best(rows)
    for s in rows:
        runtime = s.runtime if len(threads) == 1 else f"{s.runtime} ×{s.threads}"
        cells = [Text(s.target), Text(s.label, style="bold" if id(s) in best else ""), Text(runtime)]
        cells += [_cell(s, make, notes) for _, make in NARROW]
        table.add_row(*cells, _verdict_cell(s, notes))
    return table


def _wide(model: str, rows: Sequence[Summary], notes: Footnotes) -> Table:
    columns: tuple[tuple[str, Cell], ...] = (
        *NARROW[:2],
        ("p50\n95 %", lambda s: (_span(s.p50_interval_ms), s.p50_absent)),
        ("p90\n95 %", lambda s: (_span(s.p90_interval_ms), s.p90_absent)),
        ("p99\nms", lambda s: _number(s.p99_ms, s.p99_absent, 2)),
        ("p90 es\nms", lambda s: _number(s.p90_early_stopping_ms, s.p90_absent, 2)),
        ("p99 es\nms", lambda s: _number(s.p99_early_stopping_ms, s.p99_absent, 2)),
        ("mean\nms", lambda s: _number(s.mean_ms, s.p50_absent, 2)),
        ("std\nms", lambda s: _number(s.std_ms, s.p50_absent, 2)),
        ("process p50\nms", lambda s: (" ".join(f"{v:.2f}" for v in s.process_p50_ms), s.p50_absent)),
        ("first\nms", lambda s: _number(s.first_inference_ms, s.p50_absent, 1)),
        ("init\nms", _init),
        ("n", lambda s: (f"{s.n:,}" + (f" of {s.n * s.stride:,}" if s.stride > 1 else ""), "")),
        ("batch", lambda s: (str(s.batch), "")),
        ("images\n/s", lambda s: _number(s.images_per_s, s.p50_absent, 1 if (s.images_per_s or 0) < 100 else 0)),
        ("an image\nms", lambda s: _number(s.image_p50_ms, s.p50_absent, 2)),
        *NARROW[2:4],
        ("Δ\nMB", lambda s: _number(s.memory_delta_mb, s.peak_absent, 1)),
        *NARROW[4:],
        ("agrees\n%", lambda s: _number(None if s.agreement is None else 100 * s.agreement, s.agreement_absent, 2)),
        ("°C", lambda s: (f"{s.temperature_c[0]:.0f}–{s.temperature_c[1]:.0f}" if s.temperature_c else "", "")),
        ("CPUs", lambda s: (list_cpus(s.affinity), "")),
        ("governor", lambda s: (s.governor, "")),
        ("waits\n%", lambda s: (f"{100 * s.waiting:.1f}" if s.waiting is not None else "", "")),
        ("MHz", lambda s: (f"{s.frequency_mhz[0]:.0f}–{s.frequency_mhz[1]:.0f}" if s.frequency_mhz else "", "")),
        ("GPU\n%", lambda s: (f"{100 * s.gpu_load[0]:.0f}–{100 * s.gpu_load[1]:.0f}" if s.gpu_load else "", "")),
        *ENERGY,
        ("power\nW", lambda s: _number(None if s.power_mw is None else s.power_mw / 1000, s.energy_gross_absent, 2)),
        ("idle\nW", lambda s: _number(None if s.idle_power_mw is None else s.idle_power_mw / 1000, s.energy_absent, 2)),
        ("watching\n% core", lambda s: (f"{100 * s.sampler_cpu:.2f}" if s.sampler_cpu is not None else "", "")),
    )
    table = _bare(model or "never reached")
    for name in ("target", "artifact", "scheme", "runtime", "provider", "threads", "plan"):
        table.add_column(name, overflow="fold")
    for name, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for s in rows:
        words = (s.target, s.label, s.scheme, f"{s.runtime} {s.runtime_version}".strip(), s.provider, str(s.threads), s.plan)
        cells = [Text(w) for w in words] + [_cell(s, make, notes) for _, make in columns]
        table.add_row(*cells, _verdict_cell(s, notes))
    return table


def _bare(title: str) -> Table:
    return Table(
        box=None,
        pad_edge=False,
        show_edge=False,
        header_style="bold",
        title=Text(title),
        title_justify="left",
        padding=(0, 1, 0, 0),
    )


def _cell(s: Summary, make: Cell, notes: Footnotes) -> Text:
    shown, note = make(s)
    if shown:
        return Text(shown)
    if note == s.failure:
        note = ""  # the mark beside the row's verdict says it once
    return Text(EMPTY + (notes.mark(note) if note else ""), style="dim")


def _verdict_cell(s: Summary, notes: Footnotes) -> Text:
    word = verdict_word(s)
    marks = ",".join(notes.mark(note) for note in verdict_notes(s))
    return Text(word + marks, style="green" if word == "VALID" else "red")


def _best(rows: Sequence[Summary]) -> set[int]:
    """The fastest rankable row of each target."""
    found: dict[str, Summary] = {}
    for s in rows:
        if s.rankable:
            found.setdefault(s.target, s)
    return {id(s) for s in found.values()}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def json_rows(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """The table's rows as plain JSON values in the table's order, all of :class:`Summary` but the predictions."""
    rows = []
    for s in order(summaries):
        row = {
            f.name: _plain(getattr(s, f.name))
            for f in dataclasses.fields(s)
            if f.name not in ("predictions", "labels", "verdict")
        }
        row["verdict"] = {
            "word": verdict_word(s),
            "valid": s.verdict.valid,
            "rules": s.verdict.rules,
            "reasons": list(s.verdict.reasons),
            "warnings": list(s.verdict.warnings),
        }
        rows.append(row)
    return rows
