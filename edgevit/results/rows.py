"""A run as rows of the store, and rows as the run they came from. Every number of a run is kept once: in a column or in its
document."""

from __future__ import annotations

import dataclasses
import sys
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from device_agents import wire
from edgevit.errors import StoreError
from edgevit.results import schema

if TYPE_CHECKING:
    from edgevit.results.kept import Predictions
    from edgevit.results.summary import Summary

AT_ONCE = 200
"""Runs whose samples are read by one statement: far fewer statements than runs, and never all samples in memory twice."""

Numbers = dict[tuple[int, int], tuple[tuple[int, ...], tuple[int, ...]]]
Scores = dict[int, tuple[tuple[int, ...], tuple[int, ...]]]


def pack_int64(values: Sequence[int]) -> bytes:
    """Integers → little-endian int64 bytes."""
    packed = array("q", values)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_int64(data: bytes) -> tuple[int, ...]:
    """Little-endian int64 bytes → integers; ValueError where the length is no multiple of 8."""
    values = array("q")
    values.frombytes(data)
    if sys.byteorder == "big":
        values.byteswap()
    return tuple(values)


def insert_once(connection: Connection, table: sa.Table, row: dict[str, Any]) -> bool:
    """Insert ``row``; False, changing nothing, where its key is there, also by another writer at this moment."""
    statement = _insert(connection, table).on_conflict_do_nothing()
    return connection.execute(statement, row, execution_options={"preserve_rowcount": True}).rowcount == 1


def _insert(connection: Connection, table: sa.Table) -> Any:
    """The database's own INSERT, which knows ON CONFLICT; both spell it alike."""
    from sqlalchemy.dialects import postgresql, sqlite

    return (postgresql if connection.dialect.name == "postgresql" else sqlite).insert(table)


def insert_run(connection: Connection, run: wire.Run) -> bool:
    """Insert ``run`` whole, its batch there already; False, changing nothing, where its ``run_id`` is there."""
    job = run.job
    added = insert_once(
        connection,
        schema.runs,
        {
            "run_id": job.run_id,
            "batch_id": job.batch_id,
            "target": job.target,
            "board": run.facts.board_model or run.facts.cpu_model or run.facts.machine,
            "status": run.status,
            "started_at": run.started_at,
            "ended_at": run.ended_at,
            "document": wire.dumps(_without_numbers(run)).decode("utf-8"),
        },
    )
    if not added:
        return False
    measured = [_measurement_row(job.run_id, position, m) for position, m in enumerate(run.measurements)]
    if measured:
        connection.execute(schema.measurements.insert(), measured)
    timed = [
        {
            "run_id": job.run_id,
            "position": position,
            "number": number,
            "sample_count": len(one.samples_ns),
            "samples": pack_int64(one.samples_ns),
            "warmup": pack_int64(one.warmup_ns),
        }
        for position, m in enumerate(run.measurements)
        for number, one in enumerate(m.series)
    ]
    if timed:
        connection.execute(schema.series.insert(), timed)
    return True


def _measurement_row(run_id: str, position: int, m: wire.Measurement) -> dict[str, Any]:
    scored = m.accuracy
    return {
        "run_id": run_id,
        "position": position,
        "model": m.model,
        "recipe": m.recipe,
        "bundle": m.variant.bundle,
        "bundle_name": m.bundle_name,
        "artifact": m.variant.artifact,
        "artifact_sha256": m.artifact_sha256,
        "format": m.format,
        "scheme": m.scheme,
        "runtime": m.variant.runtime,
        "provider": m.variant.provider,
        "threads": m.variant.threads,
        "failure": m.failure.code if m.failure else None,
        "images": scored.images if scored else None,
        "correct": scored.correct if scored else None,
        "predictions": pack_int64(scored.predictions) if scored else None,
        "labels": pack_int64(scored.labels) if scored else None,
    }


def _without_numbers(run: wire.Run) -> wire.Run:
    def slim(m: wire.Measurement) -> wire.Measurement:
        series = tuple(dataclasses.replace(s, samples_ns=(), warmup_ns=()) for s in m.series)
        scored = dataclasses.replace(m.accuracy, predictions=(), labels=()) if m.accuracy else None
        return dataclasses.replace(m, series=series, accuracy=scored)

    return dataclasses.replace(run, measurements=tuple(slim(m) for m in run.measurements))


def restore_runs(connection: Connection, found: Sequence[Any]) -> Iterator[wire.Run]:
    """(run_id, document) → each run with all its numbers, in the same order. StoreError names a run that is damaged."""
    for start in range(0, len(found), AT_ONCE):
        some = found[start : start + AT_ONCE]
        ids = [row.run_id for row in some]
        numbers: dict[str, list[Any]] = {run_id: [] for run_id in ids}
        scores: dict[str, list[Any]] = {run_id: [] for run_id in ids}
        t, m = schema.series, schema.measurements
        for row in connection.execute(sa.select(t).where(t.c.run_id.in_(ids))):
            numbers[row.run_id].append(row)
        wanted = sa.select(m.c.run_id, m.c.position, m.c.predictions, m.c.labels)
        for row in connection.execute(wanted.where(m.c.run_id.in_(ids), m.c.predictions.is_not(None))):
            scores[row.run_id].append(row)
        for row in some:
            yield _restore(row.run_id, row.document, numbers[row.run_id], scores[row.run_id])


def keep_summaries(connection: Connection, runs: Sequence[wire.Run]) -> list[list[Summary]]:
    """Make the summaries of each run and keep them in place of what was kept; returns them."""
    from edgevit.results.kept import code_digest, pack_summaries
    from edgevit.results.stats import summarize

    made = [summarize(run) for run in runs]
    rows = [
        {"run_id": run.job.run_id, "code": code_digest(), "document": pack_summaries(one)}
        for run, one in zip(runs, made, strict=True)
    ]
    if rows:
        # Two who read at once may both make them: the same code makes the same.
        adding = _insert(connection, schema.summaries)
        newer = {name: adding.excluded[name] for name in ("code", "document")}
        connection.execute(adding.on_conflict_do_update(index_elements=["run_id"], set_=newer), rows)
    return made


def kept_summaries(connection: Connection, batch_id: str | None) -> dict[str, list[Summary] | None]:
    """Run → its summaries with their predictions, oldest run first; None where none are kept that this code would make."""
    from edgevit.results.kept import code_digest, unpack_summaries

    r, k = schema.runs, schema.summaries
    query = sa.select(r.c.run_id, k.c.document).outerjoin(k, sa.and_(k.c.run_id == r.c.run_id, k.c.code == code_digest()))
    query = query.order_by(r.c.started_at, r.c.run_id)
    rows = connection.execute(query if batch_id is None else query.where(r.c.batch_id == batch_id)).all()
    scored = _predictions(connection, batch_id)
    found: dict[str, list[Summary] | None] = {}
    for row in rows:
        try:
            found[row.run_id] = None if row.document is None else unpack_summaries(row.document, scored.get(row.run_id, {}))
        except ValueError:
            found[row.run_id] = None  # made anew from the run itself, which is what counts
    return found


def _predictions(connection: Connection, batch_id: str | None) -> dict[str, dict[int, Predictions]]:
    """Run → position → predictions and labels; equal ones, as of a fleet that scored one file, are held once."""
    m, r = schema.measurements, schema.runs
    query = sa.select(m.c.run_id, m.c.position, m.c.predictions, m.c.labels).where(m.c.predictions.is_not(None))
    if batch_id is not None:
        query = query.join(r, r.c.run_id == m.c.run_id).where(r.c.batch_id == batch_id)
    held: dict[bytes, tuple[int, ...]] = {}

    def unpack(data: bytes) -> tuple[int, ...]:
        if data not in held:
            held[data] = unpack_int64(data)
        return held[data]

    found: dict[str, dict[int, Predictions]] = {}
    for row in connection.execute(query):
        found.setdefault(row.run_id, {})[row.position] = (unpack(bytes(row.predictions)), unpack(bytes(row.labels)))
    return found


def _restore(run_id: str, document: str, numbers: Sequence[Any], scores: Sequence[Any]) -> wire.Run:
    try:
        run = wire.loads(wire.Run, document.encode("utf-8"), "run", wire.MAX_RUN_BYTES)
        series = {(row.position, row.number): (unpack_int64(row.samples), unpack_int64(row.warmup)) for row in numbers}
        scored = {row.position: (unpack_int64(row.predictions), unpack_int64(row.labels)) for row in scores}
        return _with_numbers(run, series, scored)
    except (wire.WireError, ValueError, KeyError) as e:
        raise StoreError(f"run {run_id} is damaged in the store: {e}", hint="edgevit collect") from e


def _with_numbers(run: wire.Run, numbers: Numbers, scores: Scores) -> wire.Run:
    whole = []
    for position, m in enumerate(run.measurements):
        series = []
        for number, one in enumerate(m.series):
            samples, warmup = numbers[position, number]
            series.append(dataclasses.replace(one, samples_ns=samples, warmup_ns=warmup))
        scored = m.accuracy
        if scored is not None:
            predictions, labels = scores[position]
            scored = dataclasses.replace(scored, predictions=predictions, labels=labels)
        whole.append(dataclasses.replace(m, series=tuple(series), accuracy=scored))
    return dataclasses.replace(run, measurements=tuple(whole))
