"""The table of the page as columns: one entry a measurement, texts by their place among the distinct ones. Pure.

Columns keep a page of ten thousand runs small, and let a browser read it at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from edgevit.report.table import verdict_word
from edgevit.results.summary import Summary

DIGITS = 5
"""Significant digits of what is drawn; every figure in the store keeps all of its own."""

Text = Callable[[Summary], str]
Number = Callable[[Summary], float | None]


def short(value: float | None) -> float | None:
    """A figure to :data:`DIGITS` significant digits."""
    if value is None or not math.isfinite(value):
        return None
    rounded = float(f"{value:.{DIGITS}g}")
    if math.isinf(rounded):
        return value
    return int(rounded) if rounded.is_integer() else rounded


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _end(span: tuple[float, float] | None, which: int) -> float | None:
    return None if span is None else span[which]


TEXTS: dict[str, Text] = {
    "run": lambda s: s.run_id,
    "batch_id": lambda s: s.batch_id,
    "started": lambda s: s.started_at,
    "target": lambda s: s.target,
    "board": lambda s: s.board,
    "model": lambda s: s.model,
    "label": lambda s: s.label,
    "scheme": lambda s: s.scheme,
    "runtime": lambda s: s.runtime,
    "version": lambda s: s.runtime_version,
    "provider": lambda s: s.provider,
    "plan": lambda s: s.plan,
    "verdict": lambda s: shown_verdict(s),
    "reasons": lambda s: "\n".join(reasons(s)),
    "artifact": lambda s: s.artifact_sha256,
    "bundle": lambda s: s.bundle,
    "reference": lambda s: s.reference,
    "interval_of": lambda s: s.interval_of,
    "scope": lambda s: s.energy_scope if s.energy_gross_mj is not None else "",
    "p50_absent": lambda s: s.p50_absent,
    "p90_absent": lambda s: s.p90_absent,
    "p99_absent": lambda s: s.p99_absent,
    "speedup_absent": lambda s: s.speedup_absent,
    "peak_absent": lambda s: s.peak_absent,
    "top1_absent": lambda s: s.top1_absent,
    "agreement_absent": lambda s: s.agreement_absent,
    "energy_absent": lambda s: s.energy_absent,
    "gross_absent": lambda s: s.energy_gross_absent,
}

NUMBERS: dict[str, Number] = {
    "threads": lambda s: s.threads,
    "batch": lambda s: s.batch,
    "n": lambda s: s.n,
    "processes": lambda s: s.processes,
    "p50": lambda s: s.p50_ms,
    "p50_low": lambda s: _end(s.p50_interval_ms, 0),
    "p50_high": lambda s: _end(s.p50_interval_ms, 1),
    "p90": lambda s: s.p90_ms,
    "p90_low": lambda s: _end(s.p90_interval_ms, 0),
    "p90_high": lambda s: _end(s.p90_interval_ms, 1),
    "p99": lambda s: s.p99_ms,
    "p99_low": lambda s: _end(s.p99_interval_ms, 0),
    "p99_high": lambda s: _end(s.p99_interval_ms, 1),
    "first": lambda s: s.first_inference_ms,
    "init": lambda s: s.init_ms,
    "rate": lambda s: s.images_per_s,
    "speedup": lambda s: s.speedup,
    "peak": lambda s: s.peak_mb,
    "file": lambda s: s.file_mb,
    "top1": lambda s: _percent(s.top1),
    "top1_low": lambda s: None if s.top1 is None or s.top1_error is None else 100 * (s.top1 - s.top1_error),
    "top1_high": lambda s: None if s.top1 is None or s.top1_error is None else 100 * (s.top1 + s.top1_error),
    "images": lambda s: s.images or None,
    "agreement": lambda s: _percent(s.agreement),
    "energy": lambda s: s.energy_mj,
    "gross": lambda s: s.energy_gross_mj,
    "hottest": lambda s: _end(s.temperature_c, 1),
    "retention": lambda s: _percent(s.sustained.retention) if s.sustained else None,
}


def shown_verdict(s: Summary) -> str:
    """``VALID``, ``warned`` (VALID, with something to say), ``INVALID`` or ``failed``."""
    word = verdict_word(s)
    return "warned" if word == "VALID" and s.verdict.warnings else word


def reasons(s: Summary) -> list[str]:
    """What stands behind the verdict: why it failed or is INVALID, else its warnings."""
    if s.failure:
        return [s.failure]
    return list(s.verdict.warnings if s.verdict.valid else s.verdict.reasons)


def columns(summaries: Sequence[Summary]) -> dict[str, Any]:
    """``{"count", "texts": {name: {"values", "at"}}, "numbers": {name: [...]}}``; a column of nothing but absent figures is
    left out."""
    texts: dict[str, Any] = {}
    for name, text_of in TEXTS.items():
        place: dict[str, int] = {}
        texts[name] = {"at": [place.setdefault(text_of(s), len(place)) for s in summaries], "values": list(place)}
    numbers = {name: [short(number_of(s)) for s in summaries] for name, number_of in NUMBERS.items()}
    return {
        "count": len(summaries),
        "texts": texts,
        "numbers": {name: values for name, values in numbers.items() if any(v is not None for v in values)},
    }


METRICS: tuple[dict[str, str], ...] = (
    {
        "key": "p50", "label": "p50 latency", "unit": "ms", "better": "less", "low": "p50_low", "high": "p50_high",
        "error": "95 % interval",
    },
    {
        "key": "p90", "label": "p90 latency", "unit": "ms", "better": "less", "low": "p90_low", "high": "p90_high",
        "error": "95 % interval",
    },
    {
        "key": "p99", "label": "p99 latency", "unit": "ms", "better": "less", "low": "p99_low", "high": "p99_high",
        "error": "95 % interval",
    },
    {
        "key": "top1", "label": "top-1", "unit": "%", "better": "more", "low": "top1_low", "high": "top1_high",
        "error": "± its standard error",
    },
    {"key": "agreement", "label": "agreement with fp32", "unit": "%", "better": "more"},
    {"key": "file", "label": "file size", "unit": "MB", "better": "less"},
    {"key": "peak", "label": "peak memory", "unit": "MB", "better": "less"},
    {"key": "energy", "label": "energy, net of idle", "unit": "mJ", "better": "less"},
    {"key": "gross", "label": "energy, gross", "unit": "mJ", "better": "less"},
    {"key": "first", "label": "first inference", "unit": "ms", "better": "less"},
    {"key": "init", "label": "init time", "unit": "ms", "better": "less"},
    {"key": "rate", "label": "throughput", "unit": "images/s", "better": "more"},
)  # fmt: skip
"""What the trade-off can be drawn in. ``low`` and ``high`` name the columns of its error bars."""
