"""Results in the formats of other programs: tables as CSV and Parquet, Bencher's metric format. One row a measurement, or one a
timed inference."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevit.errors import MissingExtra
from edgevit.outputs import as_cell, writing_whole

if TYPE_CHECKING:
    from device_agents.wire import Run
    from edgevit.results.summary import Summary

Row = dict[str, Any]

FIGURES: tuple[tuple[str, type], ...] = (
    ("run_id", str), ("batch_id", str), ("started_at", str), ("target", str), ("board", str), ("model", str), ("recipe", str),
    ("bundle_name", str), ("bundle", str), ("artifact", str), ("artifact_sha256", str), ("format", str), ("scheme", str),
    ("runtime", str), ("runtime_version", str), ("provider", str), ("threads", int), ("batch", int), ("plan", str),
    ("governor", str), ("processes", int), ("n", int), ("p50_ms", float), ("p50_low_ms", float), ("p50_high_ms", float),
    ("p90_ms", float), ("p90_low_ms", float), ("p90_high_ms", float), ("p99_ms", float), ("p99_low_ms", float),
    ("p99_high_ms", float), ("interval_of", str), ("p90_early_stopping_ms", float), ("p99_early_stopping_ms", float),
    ("mean_ms", float), ("std_ms", float), ("min_ms", float), ("max_ms", float), ("images_per_s", float),
    ("first_inference_ms", float), ("init_ms", float), ("init_cold_ms", float), ("peak_mb", float), ("memory_delta_mb", float),
    ("file_mb", float), ("top1", float), ("top1_error", float), ("images", int), ("evaluation", str), ("energy_mj", float),
    ("energy_gross_mj", float), ("energy_scope", str), ("power_mw", float), ("idle_power_mw", float), ("speedup", float),
    ("reference", str), ("agreement", float), ("valid", bool), ("rules", int), ("reasons", str), ("failure", str),
)  # fmt: skip
"""Columns of one row a measurement: times in ms, memory and files in MB (10⁶ bytes), energy in mJ, shares of 1. Empty: absent.
``low`` and ``high`` hold the figure with 95 % confidence."""

SAMPLES: tuple[tuple[str, type], ...] = (
    ("run_id", str), ("target", str), ("bundle", str), ("artifact", str), ("runtime", str), ("provider", str), ("threads", int),
    ("process", int), ("number", int), ("latency_ns", int),
)  # fmt: skip
"""Columns of one row a timed inference; ``number`` counts within its process, in steps of the stride that was kept."""


def figure_rows(summaries: Iterable[Summary]) -> Iterator[Row]:
    """One row a measurement, in the columns of :data:`FIGURES`."""
    for s in summaries:
        made: Row = {name: getattr(s, name, None) for name, _ in FIGURES}
        for name, interval in (("p50", s.p50_interval_ms), ("p90", s.p90_interval_ms), ("p99", s.p99_interval_ms)):
            made[f"{name}_low_ms"], made[f"{name}_high_ms"] = interval or (None, None)
        made.update(valid=s.verdict.valid, rules=s.verdict.rules, reasons="; ".join(s.verdict.reasons))
        yield made


def sample_rows(runs: Iterable[Run]) -> Iterator[Row]:
    """One row a timed inference, in the columns of :data:`SAMPLES`."""
    for run in runs:
        for m in run.measurements:
            v = m.variant
            for series in m.series:
                for i, ns in enumerate(series.samples_ns):
                    yield {
                        "run_id": run.job.run_id,
                        "target": run.job.target,
                        "bundle": v.bundle,
                        "artifact": v.artifact,
                        "runtime": v.runtime,
                        "provider": v.provider,
                        "threads": v.threads,
                        "process": series.process,
                        "number": i * series.stride,
                        "latency_ns": ns,
                    }


def write_csv(path: Path, columns: Sequence[tuple[str, type]], rows: Iterable[Row]) -> int:
    """RFC 4180, UTF-8, a header line; what is absent is empty, what would be a formula is text. How many rows."""
    count = 0
    with writing_whole(path) as part, part.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, [name for name, _ in columns])
        writer.writeheader()
        for row in rows:
            writer.writerow({name: as_cell(value) for name, value in row.items()})
            count += 1
    return count


ROW_GROUP = 100_000


def write_parquet(path: Path, columns: Sequence[tuple[str, type]], rows: Iterable[Row]) -> int:
    """Typed columns, what is absent is null. How many rows. MissingExtra without pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as e:
        raise MissingExtra("pyarrow", "build") from e
    types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in columns])
    count = 0
    with writing_whole(path) as part, pyarrow.parquet.ParquetWriter(part, schema) as writer:
        for some in _groups(rows, ROW_GROUP):
            writer.write_table(pyarrow.Table.from_pylist(some, schema=schema))
            count += len(some)
    return count


def _groups(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    some: list[Row] = []
    for row in rows:
        some.append(row)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some


def bencher_document(summaries: Iterable[Summary]) -> tuple[dict[str, dict[str, dict[str, float]]], int]:
    """Bencher Metric Format (bencher.dev/docs/reference/bencher-metric-format): benchmark → measure → value and bounds; and how
    many older figures of a benchmark gave way to a newer one, since the format has one a name.

    ``latency`` in ns with its interval, ``throughput`` in images a second, ``file-size`` in bytes; ``peak-memory`` in bytes,
    ``accuracy`` and ``energy`` (µJ) beside them. Only figures that may enter a ranking are in it.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    older = 0
    for s in sorted(summaries, key=lambda s: (s.started_at, s.run_id)):
        if not s.rankable or s.p50_ms is None:
            continue
        name = f"{s.target}/{s.bundle_name}/{s.artifact}/{s.runtime}/{s.provider}/{s.threads}"
        older += name in found
        latency = {"value": s.p50_ms * 1e6}
        if s.p50_interval_ms is not None:
            latency.update(lower_value=s.p50_interval_ms[0] * 1e6, upper_value=s.p50_interval_ms[1] * 1e6)
        measures = {"latency": latency}
        for measure, value, unit in (
            ("throughput", s.images_per_s, 1.0),
            ("file-size", s.file_mb, 1e6),
            ("peak-memory", s.peak_mb, 1e6),
            ("accuracy", s.top1, 1.0),
            ("energy", s.energy_mj, 1e3),
        ):
            if value is not None:
                measures[measure] = {"value": value * unit}
        found[name] = measures
    return found, older


def write_json(path: Path, document: Any) -> None:
    with writing_whole(path) as part, part.open("w", encoding="utf-8") as stream:
        json.dump(document, stream, ensure_ascii=False)
